"""Reflow from end to end: the whole chain, its restarts, its processes and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flowkit.adapters import from_diffusers
from flowkit.config import parse
from flowkit.errors import FlowkitError
from flowkit.nets.mlp import MLP
from flowkit.noise import keyed_noise
from flowkit.pairs import PairStore
from flowkit.samplers import invert, sample
from flowkit.samplers.grids import uniform
from flowkit.trainers.settings import ReflowConfig
from flowkit.trainers.straighten import straighten
from flowkit.velocity import VelocityModel

SCRIPT = Path(__file__).resolve().parent.parent / "trainers" / "reflow.py"
SMALL = [
    *("net.options.width=64", "net.options.num_blocks=2", "sample_every=0", "log_every=20"),
    *("teacher_training.steps=600", "teacher_training.batch_size=64"),
    *("teacher_training.learning_rate=3e-3", "teacher_training.ema_decay=0.98"),
    *("student_training.steps=400", "student_training.batch_size=64"),
    *("distillation.steps=60", "distillation.batch_size=64", "evaluate.nfe=[1,2]"),
    *("pairs.num_pairs=1000", "pairs.shard_size=250", "pairs.chunk_size=125"),
    *("evaluate.num_samples=300", "evaluate.straightness_samples=100"),
]


def _config(folder: Path, *overrides: str) -> ReflowConfig:
    return parse(ReflowConfig, [*SMALL, f"output_dir={folder}", *overrides], doc="")


def _contents(folder: Path) -> dict[str, str]:
    """Hash of every weight and pair file of a run."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.suffix == ".safetensors" and "stages" not in path.parts
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("reflow") / "run"
    straighten(_config(folder))
    return folder


def test_it_writes_the_comparison(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["seed"] == 0 and summary["nfe"] == [1, 2]
    for name in ("teacher", "student", "distilled", "control"):
        assert len(summary[name]["fd"]) == 2
        assert all(value > 0 for value in summary[name]["fd"])
    assert summary["student"]["straightness"] < 0.7 * summary["teacher"]["straightness"]
    assert summary["student"]["fd"][0] < summary["teacher"]["fd"][0]
    stages = {"teacher", "pairs", "student", "distilled", "evaluate"}
    assert stages <= summary["seconds"].keys()
    assert (finished / "samples.png").stat().st_size > 1000
    assert "NFE" in (finished / "summary.md").read_text()


def test_the_student_loads_and_samples(finished: Path) -> None:
    net = MLP.from_pretrained(finished / "student")
    velocity = from_diffusers(finished / "student")
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, velocity.net.state_dict()[name])
    noise = keyed_noise(0, range(4), (1, 8, 8))
    with torch.no_grad():
        pictures = sample(velocity, noise, uniform(2)).x
    assert pictures.shape == (4, 1, 8, 8) and pictures.isfinite().all()
    assert "reflow" in (finished / "student" / "README.md").read_text()


def test_the_pairs_are_the_teachers_ode(finished: Path) -> None:
    store = PairStore(finished / "pairs-1")
    rows = store.fetch(range(125, 250))
    teacher = from_diffusers(finished / "teacher")
    with torch.no_grad():
        made = sample(teacher, rows["noise"], uniform(12), solver="heun").x
    torch.testing.assert_close(made, rows["data"], rtol=0, atol=1e-5)


def test_running_it_again_only_reads(finished: Path) -> None:
    before = _contents(finished)
    straighten(_config(finished))
    assert _contents(finished) == before


def test_a_folder_of_another_configuration_is_refused(finished: Path) -> None:
    before = _contents(finished)
    with pytest.raises(FlowkitError, match=r"other options: 'pairs.num_pairs' is 999, not 1000"):
        straighten(_config(finished, "pairs.num_pairs=999"))
    assert _contents(finished) == before


def test_a_named_teacher_two_rounds_and_real_pictures(finished: Path, tmp_path: Path) -> None:
    config = _config(
        tmp_path,
        f"teacher={finished / 'teacher'}",
        *("rounds=2", "pairs.real_share=0.2", "pairs.real_steps=6", "data.flip=true"),
        *("student_training.steps=100", "distillation.steps=0", "control=false"),
    )
    straighten(config)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"student-1", "student", "pairs-1", "pairs-2", "real-pairs-1"} <= names
    assert "distilled" not in names and "control" not in names


def test_class_conditional_with_guidance_and_a_smaller_student(tmp_path: Path) -> None:
    config = _config(
        tmp_path,
        *("data.conditional=true", "net.options.label_dropout=0.1", "pairs.guidance_scale=1.5"),
        *("teacher_training.steps=40", "student_training.steps=20", "distillation.steps=10"),
        *(
            "student_net.name=mlp",
            "student_net.options.width=16",
            "student_net.options.num_blocks=1",
        ),
        *("student_net.options.label_dropout=0.1", "pairs.num_pairs=500"),
    )
    straighten(config)
    student = from_diffusers(tmp_path / "student")
    assert sum(p.numel() for p in student.parameters()) < 0.5 * sum(
        p.numel() for p in from_diffusers(tmp_path / "teacher").parameters()
    )
    scales = [
        PairStore(tmp_path / name).index.source["guidance_scale"]
        for name in ("pairs-1", "pairs-distillation")
    ]
    assert scales == [1.5, 1.0]
    labels = PairStore(tmp_path / "pairs-1").fetch(range(500))["class_labels"]
    assert labels.unique().tolist() == list(range(10))


BAD = [
    (["data.name=digitz"], "did you mean"),
    (["net.name=mpl"], "unknown net 'mpl'"),
    (["net.options.widht=3"], "did you mean 'width'"),
    (["student_training.times.name=u_shape"], "u_shaped"),
    (["student_training.loss.name=huberr"], "huber"),
    (["evaluate.features=digit"], "digits"),
    (["teacher=no/such/folder"], "no/such/folder"),
    (["teacher_training.batch_size=10", "teacher_training.micro_batch_size=3"], "multiple of"),
    (["data.name=folder:no/such/pictures"], "no/such/pictures"),
    (["student_net.name=nothing"], "unknown net"),
    (["net.options.width=abc"], "net.options"),
    (["student_training.times={}"], "times"),
    (["teacher_training.batch_size=-4"], r"'teacher_training.batch_size' must be at least 1"),
    (["pairs.real_share=1.5"], r"must be in \[0, 1\], got 1.5"),
    (["evaluate.nfe=[0]"], "at least 1"),
    (["rounds=0"], "'rounds' must be at least 1"),
    (["student_training.dropout=0.1"], "no dropout layer"),
    (["student_training.batch_size=64", "student_training.micro_batch_size=48"], "multiple of"),
    (["pairs.real_share=1"], "below 1"),
    (["pairs.solver=hein"], "did you mean 'heun'"),
    (["pairs.chunk_size=2000"], "pairs.shard_size 250"),
    (["data.conditional=true", "pairs.guidance_scale=2"], "label_dropout"),
    (["pairs.guidance_scale=2"], "class labels"),
    (["data.name=digits", "net.name=unet2d", "gradient_checkpointing=maybe"], "true"),
]


@pytest.mark.parametrize("overrides, message", BAD)
def test_bad_input_is_one_line(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(FlowkitError, match=message) as error:
        straighten(_config(tmp_path / "run", *overrides))
    assert "\n" not in str(error.value)


def test_a_refused_run_leaves_its_folder_free(tmp_path: Path) -> None:
    with pytest.raises(FlowkitError):
        straighten(_config(tmp_path, "evaluate.features=digit"))
    stages = ["teacher_training.steps=2", "student_training.steps=2", "distillation.steps=0"]
    few = ["control=false", "pairs.num_pairs=100", "evaluate.num_samples=20"]
    straighten(_config(tmp_path, *stages, *few))
    assert (tmp_path / "summary.json").is_file()


def test_a_teacher_for_other_pictures_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(FlowkitError, match=r"trained for pictures \(1, 8, 8\)"):
        other = ["data.size=16", "evaluate.features=pixels"]
        straighten(_config(tmp_path, f"teacher={finished / 'teacher'}", *other))


def _start(folder: Path, *overrides: str, processes: int = 1) -> subprocess.Popen:
    torchrun = [*("-m", "torch.distributed.run", "--standalone"), f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [sys.executable, *(torchrun if processes > 1 else []), str(SCRIPT), *SMALL]
        + [f"output_dir={folder}", "checkpoint_every=40", *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _kill_when(happened: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not happened() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, f"it ended before it could be killed: {process.communicate()[1]}"
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_and_resumed_it_ends_in_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    moments: list[tuple[str, str]] = [
        ("stages/teacher", ".tmp-checkpoint-120"),
        ("stages/teacher", "checkpoint-440"),
        ("pairs-1", "shard-000001.safetensors"),
        ("stages/student", "checkpoint-40"),
        ("stages/student", ".tmp-checkpoint-280"),
    ]
    for folder, name in moments:
        _kill_when((tmp_path / folder / name).exists, _start(tmp_path))
        assert not (tmp_path / "summary.json").exists()
    last = _start(tmp_path)
    assert last.wait(timeout=300) == 0, last.stderr.read()[-2000:]
    assert _contents(tmp_path) == _contents(finished)


def test_two_processes_write_the_same_pairs(finished: Path, tmp_path: Path) -> None:
    process = _start(
        tmp_path,
        f"teacher={finished / 'teacher'}",
        *("student_training.steps=0", "distillation.steps=0", "control=false"),
        processes=2,
    )
    assert process.wait(timeout=300) == 0, process.stderr.read()[-2000:]
    ours, theirs = _contents(tmp_path), _contents(finished)
    names = [name for name in ours if name.startswith("pairs-1")]
    assert len(names) == 4
    assert all(ours[name] == theirs[name] for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_digits_reach_their_numbers(tmp_path: Path, seed: int) -> None:
    straighten(parse(ReflowConfig, [f"output_dir={tmp_path}", f"seed={seed}"], doc=""))
    summary: dict[str, Any] = json.loads((tmp_path / "summary.json").read_text())
    teacher, student = summary["teacher"], summary["student"]
    assert student["fd"][0] <= 0.20 * teacher["fd"][0]
    assert student["fd"][1] <= 0.50 * teacher["fd"][1]
    assert student["fd"][4] <= 1.40 * teacher["fd"][4]
    assert teacher["straightness"] >= 10 * student["straightness"]
    assert summary["distilled"]["fd"][0] <= 0.95 * student["fd"][0]
    _rf_solver_beats_euler(from_diffusers(tmp_path / "teacher"))


@torch.no_grad()
def _rf_solver_beats_euler(flow: VelocityModel) -> None:
    """At 16 evaluations, sampling and inverting: relative errors over 500 samples."""
    noise = keyed_noise(99, range(500), (1, 8, 8))
    exact = sample(flow, noise, uniform(200), solver="heun").x
    errors, trips = {}, {}
    for solver, steps in (("euler", 16), ("rf_solver", 8)):
        made = sample(flow, noise, uniform(steps), solver=solver)
        assert made.nfe == 16
        errors[solver] = float((made.x - exact).norm() / exact.norm())
        back = invert(flow, exact, uniform(steps), solver=solver).x
        again = sample(flow, back, uniform(steps), solver=solver).x
        trips[solver] = float((again - exact).norm() / exact.norm())
    print(f"errors {errors}, round trips {trips}")
    assert errors["rf_solver"] <= 0.5 * errors["euler"]
    assert trips["rf_solver"] <= 0.25 * trips["euler"]


def test_weights_are_safetensors_only(finished: Path) -> None:
    for name in ("teacher", "student", "distilled", "control"):
        assert load_file(finished / name / "diffusion_pytorch_model.safetensors")
        assert not list((finished / name).glob("*.bin"))
