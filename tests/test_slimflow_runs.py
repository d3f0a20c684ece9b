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
from flowkit.trainers.cost import solver_passes
from flowkit.trainers.settings import PairOptions
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


def test_its_cost_is_what_went_through_its_networks(counted: tuple[Path, Counts]) -> None:
    folder, seen = counted
    cost = json.loads((folder / "summary.json").read_text())["cost"]
    roles = {"teacher": "teacher", "pairs-1": "teacher"}
    total: Counts = Counter()
    for stage, told in cost.items():
        network = roles.get(stage, "student")
        trained = sum(told.get("backward", {}).values())
        total[network, "trained"] += trained
        total[network, "forward"] += sum(told["forward"].values()) - trained
    assert total == seen
    distilled = cost["distilled"]
    assert distilled["forward"] == {"student": 2 * 15 * 64, "flow": 15 * 64}
    assert distilled["backward"] == {"student": 2 * 15 * 64, "flow": 0}
    assert cost["pairs-1"] == {"forward": {"flow": 8 * 400}}
    weights = sum(p.nbytes for p in from_diffusers(folder / "distilled").parameters())
    assert distilled["memory"]["flow"] == weights
    # Adam in float32: weights, average, gradients and two moments, and a step for each tensor
    assert 5 * weights <= distilled["memory"]["student"] < 5.05 * weights
    assert (distilled["peak_memory"] is None) == (not torch.cuda.is_available())


@pytest.mark.parametrize(
    "options, invert, told",
    [
        ({"solver": "dopri5"}, False, None),
        ({"guidance_scale": 2.0}, False, 2 * 8 * 400),
        ({"guidance_scale": 2.0, "real_steps": 3}, True, 6 * 400),
        ({"solver": "euler"}, False, 4 * 400),
    ],
)
def test_passes_of_pairs(options: dict[str, Any], invert: bool, told: int | None) -> None:
    pairs = PairOptions(num_steps=4, **options)
    assert solver_passes(pairs, 400, invert=invert) == told


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
