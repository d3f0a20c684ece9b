"""SlimFlow from end to end: its two stages, their restarts, its processes and what it refuses."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from small_slimflow import FEW, SHAPE, SMALL, random_lpips, small_config
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from tqdm.auto import tqdm

from flowkit.adapters import from_diffusers
from flowkit.checkpoint import export_model
from flowkit.diffusion_adapters import EDMVelocity
from flowkit.nets.mlp import MLP
from flowkit.nets.ncsnpp import NCSNpp
from flowkit.noise import keyed_noise
from flowkit.pairs import PairStore
from flowkit.samplers import sample
from flowkit.samplers.grids import uniform
from flowkit.trainers.costs import passes
from flowkit.trainers.settings import NetOptions, ReflowConfig
from flowkit.trainers.slimflow_settings import SlimFlowConfig
from flowkit.trainers.slimming import train_slimflow

SCRIPT = Path(__file__).resolve().parent.parent / "trainers" / "slimflow.py"
LEFTOVER = ".tmp-checkpoint-7"


def _contents(folder: Path) -> dict[str, str]:
    """Hash of every weight and pair file of a run."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.suffix == ".safetensors" and "stages" not in path.parts
    }


Counts = Counter[tuple[str, str]]


@contextmanager
def _counting() -> Iterator[Counts]:
    """Samples that go through each network: of the wide one, the teacher, and of the narrow one."""
    seen: Counts = Counter()

    def count(module: nn.Module, args: Any) -> None:
        if isinstance(module, MLP):
            network = "teacher" if module.config.width == 32 else "student"
            seen[network, "trained" if torch.is_grad_enabled() else "forward"] += len(args[0])

    handle = register_module_forward_pre_hook(count)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Counts]:
    """A small run that nothing disturbed, and the passes of all but its comparison."""
    folder = tmp_path_factory.mktemp("slimflow") / "run"
    with _counting() as whole:
        train_slimflow(small_config(folder))
    with _counting() as comparison:
        train_slimflow(small_config(folder))
    return folder, whole - comparison


@pytest.fixture(scope="module")
def finished(counted: tuple[Path, Counts]) -> Path:
    return counted[0]


def test_it_writes_the_comparison(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["seed"] == 0 and summary["nfe"] == [1]
    for name in ("teacher", "student", "distilled"):
        assert len(summary[name]["fd"]) == 1 and summary[name]["fd"][0] > 0
    assert {"teacher", "pairs", "student", "distilled", "evaluate"} == summary["seconds"].keys()
    assert (finished / "samples.png").stat().st_size > 1000
    assert len(list((finished / "records").iterdir())) == 3
    text = (finished / "summary.md").read_text()
    assert "1-RF (teacher)" in text and "2-RF (student)" in text and "distilled" in text
    assert "SlimFlow" in (finished / "distilled" / "README.md").read_text()


def test_its_passes_are_those_that_its_options_tell(counted: tuple[Path, Counts]) -> None:
    folder, seen = counted
    told = passes(small_config(folder), num_pictures=0)
    total: Counts = Counter()
    for stage in told.values():
        assert stage is not None
        for network, kinds in stage.items():
            total.update({(network, kind): samples for kind, samples in kinds.items()})
    assert total == seen
    assert told["distilled"] == {"student": {"trained": 2 * 15 * 64, "forward": 15 * 64}}
    assert told["pairs-1"] == {"teacher": {"forward": 8 * 400}}


@pytest.mark.parametrize(
    "overrides, stage, told",
    [
        (["pairs.solver=dopri5"], "pairs-1", None),
        (["pairs.guidance_scale=2"], "pairs-1", {"teacher": {"forward": 2 * 8 * 400}}),
        (["pairs.solver=euler"], "pairs-1", {"teacher": {"forward": 4 * 400}}),
        (
            ["pairs.real_share=.1", "pairs.real_steps=3"],
            "real-pairs-1",
            {"teacher": {"forward": 6}},
        ),
        (["distillation.two_step=none"], "distilled", {"student": {"trained": 15 * 64}}),
        (
            ["distillation.two_step=teacher"],
            "distilled",
            {"student": {"trained": 2 * 15 * 64, "forward": 2 * 15 * 64}},
        ),
    ],
)
def test_passes(tmp_path: Path, overrides: list[str], stage: str, told: object) -> None:
    assert passes(small_config(tmp_path, *overrides), num_pictures=1)[stage] == told


def test_passes_of_reflow() -> None:
    config = ReflowConfig(rounds=2, teacher="somewhere")
    told = passes(config, num_pictures=0)
    assert list(told) == [
        *("pairs-1", "student-1", "pairs-2", "student", "pairs-distillation", "distilled"),
        "control",
    ]
    assert told["student-1"] == {"teacher": {"trained": 3250 * 256}}
    assert told["pairs-distillation"] == {"teacher": {"forward": 24 * 10_000}}
    small = replace(config, student_net=NetOptions("mlp", {"width": 16}), control=False)
    assert passes(small, num_pictures=0)["pairs-2"] == {"student": {"forward": 24 * 10_000}}


def test_memory_is_that_of_the_roles(finished: Path) -> None:
    """Adam in float32: weights, average, gradients and two moments; the flow that guides."""
    took = json.loads((finished / "stages" / "distilled" / "memory.json").read_text())
    weights = sum(p.nbytes for p in from_diffusers(finished / "distilled").parameters())
    student = took["roles"]["student"]
    assert student["weights"] == student["average"] == student["gradients"] == weights
    assert 2 * weights <= student["optimizer"] < 2.05 * weights  # and a step for each tensor
    frozen = took["roles"]["frozen"]["weights"]  # with the frequencies of its time embedding
    assert weights <= frozen < 1.01 * weights
    assert took["sum"] == 3 * weights + student["optimizer"] + frozen
    assert (took["peak"] is None) == (not torch.cuda.is_available())


def test_the_student_is_smaller_and_its_pairs_are_its_own_ode(finished: Path) -> None:
    teacher, student = (from_diffusers(finished / name) for name in ("teacher", "student"))
    count = [sum(p.numel() for p in model.parameters()) for model in (teacher, student)]
    assert count[1] < count[0] / 2
    for name, flow in (("pairs-1", teacher), ("pairs-distillation", student)):
        rows = PairStore(finished / name).fetch(range(50, 100))
        with torch.no_grad():
            made = sample(flow, rows["noise"], uniform(4), solver="heun").x
        torch.testing.assert_close(made, rows["data"], rtol=0, atol=1e-5)


def test_checkpoints_keep_how_far_the_annealing_is(finished: Path) -> None:
    for step in (10, 20):
        path = finished / "stages" / "student" / f"checkpoint-{step}" / "state.json"
        phase = json.loads(path.read_text())["phase"]
        assert phase == {"step": step, "schedule": "linear", "steps": 12, "beta": 0.0}


def test_every_stage_goes_on_from_what_a_kill_leaves(finished: Path, tmp_path: Path) -> None:
    """All files appear whole, so a killed stage is a finished one that lacks its last files."""
    shutil.copytree(finished, run := tmp_path / "run")
    left = {"teacher": 10, "student": 5, "distilled": 5}  # the student's while annealing
    for stage, last in left.items():
        shutil.rmtree(run / stage)
        for path in (run / "stages" / stage).glob("checkpoint-*"):
            if int(path.name.removeprefix("checkpoint-")) > last:
                shutil.rmtree(path)
        shutil.copytree(run / "stages" / stage / "checkpoint-5", run / "stages" / stage / LEFTOVER)
    for pairs in ("pairs-1", "pairs-distillation"):
        (run / pairs / "shard-000001.json").unlink()  # its tensors are there, not yet valid
        (run / pairs / "shard-000003.json").unlink()
        (run / pairs / "shard-000003.safetensors").unlink()
    (run / "summary.json").unlink()
    train_slimflow(small_config(run))
    assert _contents(run) == _contents(finished)
    assert (run / "summary.json").is_file()
    assert not list(run.glob(f"stages/*/{LEFTOVER}"))


def _child(config: SlimFlowConfig) -> None:
    tqdm.set_lock(threading.RLock())  # tqdm's own is shared by forks: killed holding it, all wait
    train_slimflow(config)


def _killed(config: SlimFlowConfig, path: Path) -> None:
    """Run until `path` exists, then kill -9."""
    process = multiprocessing.get_context("fork").Process(target=_child, args=(config,))
    process.start()
    deadline = time.monotonic() + 120
    while not path.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.is_alive(), "it ended before it could be killed"
    process.kill()
    process.join()


@pytest.mark.slow
def test_killed_in_every_phase_it_ends_in_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    moments = [
        "stages/teacher/checkpoint-5",
        "pairs-1/shard-000001.safetensors",
        "stages/student/.tmp-checkpoint-5",  # while annealing
        "stages/student/checkpoint-15",  # after it
        "pairs-distillation/shard-000002.json",
        "stages/distilled/checkpoint-10",
    ]
    for moment in moments:
        _killed(small_config(tmp_path), tmp_path / moment)
        assert not (tmp_path / "summary.json").exists()
    train_slimflow(small_config(tmp_path))
    assert _contents(tmp_path) == _contents(finished)


@pytest.mark.slow
def test_two_processes_end_where_one_with_twice_the_batch_does(
    finished: Path, tmp_path: Path
) -> None:
    """Both halves of a batch are other processes' micro-batches: one process accumulates them."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(SCRIPT), *SMALL, f"output_dir={tmp_path}"]
        + [f"teacher={finished / 'teacher'}"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = _contents(tmp_path), _contents(finished)
    assert all(ours[name] == theirs[name] for name in ours if name.startswith("pairs-1"))
    for name in ("student", "distilled"):
        one, two = (
            load_file(folder / name / "diffusion_pytorch_model.safetensors")
            for folder in (finished, tmp_path)
        )
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-5)


def test_an_edm_teacher_classes_flips_lpips_and_the_published_formula(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = NCSNpp(
        sample_size=8,
        in_channels=1,
        model_channels=8,
        channel_mult=[1],
        num_blocks=1,
        num_classes=10,
        attention_resolutions=[],
    )
    export_model(EDMVelocity(net), tmp_path / "edm", shape=SHAPE, num_classes=10)
    train_slimflow(
        small_config(
            tmp_path / "run",
            *FEW,
            *(f"teacher={tmp_path / 'edm'}", "data.conditional=true", "data.flip=true"),
            *("pairs.grid=edm", "annealing.schedule=exponential"),
            *("distillation.two_step=teacher", random_lpips(tmp_path, 64), "checkpoint_every=1"),
            *("distillation.batch_size=8", "distillation.micro_batch_size=4"),
        )
    )
    first, second = (
        load_file(folder / "model.safetensors")
        for folder in sorted((tmp_path / "run" / "stages" / "distilled").glob("checkpoint-*"))
    )
    assert any(not torch.equal(first[name], second[name]) for name in first)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert all(math.isfinite(summary[name]["fd"][0]) for name in ("teacher", "distilled"))
    labels = PairStore(tmp_path / "run" / "pairs-distillation").fetch(range(100))["class_labels"]
    assert labels.unique().tolist() == list(range(10))
    noise = keyed_noise(0, range(4), SHAPE)
    distilled = from_diffusers(tmp_path / "run" / "distilled")
    with torch.no_grad():
        v = distilled(noise, 0.0, class_labels=torch.arange(4))
    assert v.shape == noise.shape and v.isfinite().all()


@pytest.fixture
def another_precision() -> Iterator[None]:
    """accelerate keeps the first choice of a process, so forget it before and after."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_latents_with_classes_in_bf16(tmp_path: Path, another_precision: None) -> None:
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=2,
        block_out_channels=(4,),
        norm_num_groups=2,
        sample_size=8,
    )
    vae.save_pretrained(tmp_path / "vae")
    rng = np.random.default_rng(0)
    for i in range(4):
        path = tmp_path / "data" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    words = [f"data.vae={tmp_path / 'vae'}", "data.conditional=true", "mixed_precision=bf16"]
    words += [f"data.name=folder:{tmp_path / 'data'}", "evaluate.split=train"]
    train_slimflow(small_config(tmp_path / "run", *FEW, *words))
    record = json.loads((tmp_path / "run" / "distilled" / "flowkit.json").read_text())
    assert record["shape"] == [2, 8, 8] and record["num_classes"] == 2
    assert record["latents"] is not None
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert math.isfinite(summary["distilled"]["fd"][0])
    rows = PairStore(tmp_path / "run" / "pairs-distillation").fetch(range(100))
    assert rows["data"].shape == (100, 2, 8, 8) and "class_labels" in rows


def test_without_annealing_and_second_term_it_is_reflow(finished: Path, tmp_path: Path) -> None:
    """The baseline that a comparison wants, from the same pairs."""
    plain = ["annealing.schedule=fixed", "annealing.beta=0", "distillation.two_step=none"]
    plain += ["student_training.steps=2", "distillation.steps=2", "evaluate.num_samples=10"]
    train_slimflow(small_config(tmp_path, f"teacher={finished / 'teacher'}", *plain))
    ours, theirs = _contents(tmp_path), _contents(finished)
    shared = [name for name in ours if name.startswith("pairs-1")]
    assert shared and all(ours[name] == theirs[name] for name in shared)
    weights = "student/diffusion_pytorch_model.safetensors"
    assert ours[weights] != theirs[weights]
