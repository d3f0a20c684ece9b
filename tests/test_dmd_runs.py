"""Distribution matching from end to end: whole runs, what they export, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from small_distillation import draw, mlp
from torch import Tensor

from flowkit.adapters import from_diffusers
from flowkit.checkpoint import export_model
from flowkit.config import parse
from flowkit.errors import FlowkitError
from flowkit.eval import fid
from flowkit.eval.sampling_plan import sampling_plans
from flowkit.eval.settings import FidConfig
from flowkit.nets.mlp import MLP
from flowkit.samplers import FlowScheduler, sample
from flowkit.trainers.distilling import distil
from flowkit.trainers.dmd_settings import CriticOptions, DMDConfig
from flowkit.velocity import VelocityModel

SMALL = [
    *("student_training.steps=8", "student_training.batch_size=64", "matching.student_every=3"),
    *("student_training.micro_batch_size=32", "student_training.warmup_steps=2"),
    *("sample_every=0", "log_every=1", "checkpoint_every=4", "evaluate.nfe=[1]"),
    *("evaluate.num_samples=40", "evaluate.straightness_samples=4"),
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved flow for digits with random weights."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    export_model(mlp(), folder, shape=(1, 8, 8))
    return folder


def _config(folder: Path, *overrides: str) -> DMDConfig:
    return parse(DMDConfig, [*SMALL, f"output_dir={folder}", *overrides], doc="")


def _student(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "student" / "diffusion_pytorch_model.safetensors")


def test_a_run_from_end_to_end(teacher: Path, tmp_path: Path) -> None:
    times = "matching.student_times=[0,0.5]"
    words = ["matching.divergence=js", "sample_every=4"]
    config = _config(tmp_path, f"teacher={teacher}", times, *words)
    distil(config)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"teacher", "student"} <= summary.keys()
    own = summary["student"]["own"]
    assert (own["solver"], own["times"]) == ("consistency", [0, 0.5, 1]) and own["fd"] > 0
    page = (tmp_path / "summary.md").read_text()
    assert "| student (f-distill (js)) |" in page and "by its 2 steps (consistency)" in page
    assert "| teacher |" in page and "RF" not in page and "Reflow" not in page
    assert {"teacher", "student", "critic"} == summary["cost"]["student"]["forward"].keys()
    names = {path.name.rsplit("-", 1)[0] for path in (tmp_path / "records").iterdir()}
    assert names == {f"{m}-euler-nfe-0001" for m in ("teacher", "student")} | {
        "student-consistency-nfe-0002"
    }
    card = (tmp_path / "student" / "README.md").read_text()
    assert '[0.0, 0.5, 1.0], solver="consistency")' in card
    record = json.loads((tmp_path / "student" / "flowkit.json").read_text())
    assert record["sampler"] == {"solver": "consistency", "times": [0, 0.5, 1]}
    student = from_diffusers(tmp_path / "student")
    assert isinstance(student, VelocityModel)
    before = from_diffusers(teacher).state_dict()
    assert any(not torch.equal(before[k], v) for k, v in student.state_dict().items())
    made = sample(student, draw(2, 1, 8, 8), record["sampler"]["times"], "consistency").x
    assert made.shape == (2, 1, 8, 8)
    for step in (4, 8):
        shown = tmp_path / "stages" / "student" / f"pictures-{step:07d}.png"
        assert shown.stat().st_size > 1000
    weights = _student(tmp_path)
    distil(config)  # again: only reads
    assert all(torch.equal(weights[k], v) for k, v in _student(tmp_path).items())


def _tiny_vae(folder: Path) -> Path:
    torch.manual_seed(0)
    AutoencoderKL(
        in_channels=1, out_channels=1, norm_num_groups=4, latent_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize("kind", ["classes", "latents", "bf16"])
def test_other_runs_export_what_the_harness_measures(kind: str, tmp_path: Path) -> None:
    """A class-conditional run with a guided teacher, one on latents, one in bf16."""
    shape, options, words = [1, 8, 8], {}, [f"teacher={tmp_path / 'teacher'}"]
    words += ["student_training.steps=4", "matching.student_times=[0,0.5]"]
    if kind == "classes":
        options = {"num_classes": 10, "label_dropout": 0.1}
        words += ["data.conditional=true", "matching.guidance_scale=2.0", "gan.features=teacher"]
    if kind == "latents":
        shape = [3, 4, 4]
        words += [f"data.vae={_tiny_vae(tmp_path / 'vae')}", "sample_every=4"]
    if kind == "bf16":
        words += ["mixed_precision=bf16", "matching.divergence=sf", "matching.num_bins=2"]
    classes = options.get("num_classes")
    export_model(
        mlp(shape=shape, **options), tmp_path / "teacher", shape=shape, num_classes=classes
    )
    AcceleratorState._reset_state(reset_partial_state=True)  # another precision in one process
    distil(_config(tmp_path / "run", *words))
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path / "run" / "student"
    net = MLP.from_pretrained(folder)
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in net.parameters())
    scheduler = FlowScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(2)
    assert scheduler.config.solver == "consistency" and len(scheduler.timesteps) == 2
    (record,) = fid.run(
        FidConfig(
            reference="digits-test", model=str(folder), features="digits", num_samples=40,
            solver="own", nfe=None, progress=False, straightness_samples=0, jackknife=0,
            output_dir=str(tmp_path / "fid"), reference_dir=str(tmp_path / "references"),
        )
    )  # fmt: skip
    assert (record.solver, record.steps, record.nfe) == ("consistency", 2, 2)
    assert record.metrics["fid"] > 0


def test_the_harness_says_what_a_model_was_trained_for(teacher: Path) -> None:
    options = FidConfig(reference="digits-test", model=str(teacher), solver="own", nfe=None)
    with pytest.raises(FlowkitError, match="names no sampler of its own; say a solver"):
        sampling_plans(options)


BAD = [
    (["mixed_precision=fp16"], "diverges in fp16"),
    (["matching.divergence=jss"], "unknown divergence 'jss', did you mean 'js'"),
    (["matching.divergence=kl", "gan.weight=0", "gan.critic_weight=0"], "need a discriminator"),
    (["gan.critic_weight=0"], "need a discriminator"),
    (["matching.weight=0", "gan.weight=0"], "has no loss"),
    (["gan.layers=[mid_block]"], "MLP has no layer 'mid_block'"),
    (["matching.divergence=kl", "gan.times={name: constant, t: 1.0}"], "widen gan.times"),
    (["matching.divergence=kl", "student_training.micro_batch_size=16"], "pass of 16 pictures"),
    (["gan.features=student"], "gan.features"),
    (["matching.student_times=[0.5,0.2]"], "must increase"),
    (["matching.student_times=[0,1]"], "below 1"),
    (["matching.times.name=karas"], "karas"),
    (["matching.low=0.9", "matching.high=0.1"], "low < high"),
    (["matching.guidance_scale=2"], "class labels"),
    (["data.conditional=true", "matching.guidance_scale=2"], "label_dropout"),
    (["student_training.times.name=u_shaped"], "matching.times"),
    (["student_training.loss={name: huber, preset: rfpp}"], "a loss of its own"),
    (["teacher=no/such/folder"], "no/such/folder"),
]


@pytest.mark.parametrize("overrides, message", BAD)
def test_bad_input_is_one_line(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(FlowkitError, match=message) as error:
        distil(_config(tmp_path / "run", *overrides))
    assert "\n" not in str(error.value)


def test_a_student_for_other_pictures_is_refused(teacher: Path, tmp_path: Path) -> None:
    other = mlp(shape=[1, 4, 4])
    export_model(other, tmp_path / "other", shape=(1, 4, 4))
    with pytest.raises(FlowkitError, match=r"trained for pictures \(1, 4, 4\)"):
        distil(_config(tmp_path / "run", f"teacher={teacher}", f"student={tmp_path / 'other'}"))


def test_a_teacher_that_takes_other_pictures_than_it_says_is_refused(tmp_path: Path) -> None:
    export_model(mlp(shape=[1, 4, 4]), tmp_path / "teacher", shape=(1, 8, 8))
    with pytest.raises(FlowkitError, match=r"teacher=.* cannot take pictures \(1, 8, 8\)"):
        distil(_config(tmp_path / "run", f"teacher={tmp_path / 'teacher'}"))


def test_the_critics_options_stand_in_for_the_students() -> None:
    from flowkit.trainers.distilling import critic_training

    config = DMDConfig(critic=CriticOptions(learning_rate=1e-6, weight_decay=0.1))
    training = critic_training(config)
    assert (training.learning_rate, training.weight_decay) == (1e-6, 0.1)
    assert training == replace(
        config.student_training,
        **{k: getattr(config.critic, k) for k in ("betas", "learning_rate")},
        weight_decay=0.1,
        max_grad_norm=None,
    )
