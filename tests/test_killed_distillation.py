"""Real processes: killed anywhere a distillation goes on to the same bits; two equal one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

TRAINERS = Path(__file__).resolve().parent.parent / "trainers"
SMALL = [
    *("net.options.width=16", "net.options.num_blocks=1", "teacher_training.steps=8"),
    *("teacher_training.batch_size=64", "teacher_training.micro_batch_size=32"),
    "student_training.steps=12",
    *("student_training.batch_size=64", "student_training.micro_batch_size=32"),
    *("student_training.warmup_steps=2", "matching.student_every=2", "matching.divergence=kl"),
    *("matching.student_times=[0,0.5]", "sample_every=4", "log_every=1", "checkpoint_every=3"),
    *("evaluate.nfe=[1]", "evaluate.num_samples=100", "evaluate.straightness_samples=20"),
]
PATH = ["path.steps=6", "path.record_every=2", "path.switch_every=2", "path.learning_rate=0.001"]
# The command with a death of its own: before a turn of a stage at a step, inside the write of a
# node, or of a checkpoint.
DYING = """
import os, signal, sys
from flowkit import checkpoint
from flowkit.trainers import disback, recorded_path
from flowkit.trainers.loop import Loop

place, take, learnt = sys.argv.pop(1), Loop._take, recorded_path.write_json
publish = checkpoint.publish_folder

def die(*words):
    if ":".join(map(str, words)) == place:
        os.kill(os.getpid(), signal.SIGKILL)

def dying_take(self, turn, rows):
    die(self.name, self.step, turn.role)
    return take(self, turn, rows)

def dying_write(path, value):
    die("node", len(value["nodes"]))
    return learnt(path, value)

def dying_publish(staging, target):
    die("checkpoint", target.parent.name, target.name)
    return publish(staging, target)

Loop._take, recorded_path.write_json = dying_take, dying_write
checkpoint.publish_folder = dying_publish
disback.main()
"""
# In the order of a run.  Steps 4 and 8: the student's turn, then the critic's; 5: the critic alone.
DEATHS = [
    *("teacher:5:student", "node:1", "degraded:5:student", "checkpoint:student:checkpoint-3"),
    *("student:4:student", "student:4:critic", "student:5:critic", "student:8:critic"),
]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def _run(command: list[str], *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command, *SMALL, *words],
        env=_environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def _student(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "diffusion_pytorch_model.safetensors")


def test_killed_in_every_phase_it_ends_in_the_same_bits(tmp_path: Path) -> None:
    script = [str(TRAINERS / "disback.py")]
    done = _run(script, *PATH, f"output_dir={tmp_path / 'whole'}")
    assert done.returncode == 0, done.stderr[-2000:]
    parts = f"output_dir={tmp_path / 'parts'}"
    for place in DEATHS:
        died = _run(["-c", DYING, place], *PATH, parts)
        assert died.returncode == -signal.SIGKILL, (place, died.stderr[-2000:])
    done = _run(script, *PATH, parts)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, tensor in _student(tmp_path / "whole").items():
        assert torch.equal(_student(tmp_path / "parts")[name], tensor), name
    for file in ("path/path.json", "stages/student/cost.json", "stages/degraded/cost.json"):
        assert (tmp_path / "whole" / file).read_text() == (tmp_path / "parts" / file).read_text()


@pytest.mark.parametrize("name", ["dmd", "disback"])
def test_two_processes_end_where_one_that_accumulates_does(name: str, tmp_path: Path) -> None:
    words, found = (PATH if name == "disback" else []), []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = _run([*launch, str(TRAINERS / f"{name}.py")], *words, f"output_dir={folder}")
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(_student(folder))
    for key, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][key], rtol=0, atol=1e-5)
    costs = [(tmp_path / n / "stages/student/cost.json").read_text() for n in "12"]
    assert costs[0] == costs[1]
