"""Distribution matching in the loop: restarts, processes, whole runs, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_distillation import NO_GAN, draw, method, mlp
from torch import Tensor

from flowkit import checkpoint
from flowkit.adapters import from_diffusers
from flowkit.checkpoint import export_model
from flowkit.config import parse
from flowkit.coupling import Independent
from flowkit.data import load_data
from flowkit.errors import FlowkitError
from flowkit.samplers import FlowScheduler, sample
from flowkit.trainers.distilling import distil
from flowkit.trainers.dmd_settings import CriticOptions, DMDConfig, MatchingOptions
from flowkit.trainers.launch import make_accelerator
from flowkit.trainers.loop import Loop, Preempted
from flowkit.trainers.settings import RunOptions, TrainOptions
from flowkit.velocity import VelocityModel

SCRIPT = Path(__file__).resolve().parent.parent / "trainers" / "dmd.py"


def _loop(folder: Path, *, micro: int | None = None, **options: Any) -> Loop:
    run = RunOptions(**{"sample_every": 0, "checkpoint_every": 100, **options})
    training = TrainOptions(steps=14, batch_size=32, micro_batch_size=micro, warmup_steps=4)
    built = method(
        matching=MatchingOptions(student_every=3, divergence="kl", num_bins=2), training=training
    )
    data = Independent(load_data("digits"), labels=False)
    accelerator = make_accelerator(run)
    return Loop(built, data, training, run, folder=folder, accelerator=accelerator, name="dmd")


def _weights(loop: Loop) -> list[Tensor]:
    parameters = [p for learner in loop.learners.values() for p in learner.parameters]
    return [p.detach().clone() for p in (*parameters, *loop.ema.shadow_params)]


class TestLoop:
    # 7: the student has just learnt; 8 and 9: the critic alone; 5 and 12: other phases of both
    @pytest.mark.parametrize("stop", [5, 7, 8, 9])
    def test_stopped_in_any_phase_it_ends_in_the_same_bits(self, tmp_path: Path, stop: int) -> None:
        whole = _loop(tmp_path / "whole")
        whole.run()
        half = _loop(tmp_path / "halves")
        update = half.update

        def then_stop(rows: Any) -> Any:
            logs = update(rows)
            half.terminating = half.step + 1 == stop
            return logs

        half.update = then_stop
        with pytest.raises(Preempted):
            half.run()
        assert checkpoint.latest(tmp_path / "halves").name == f"checkpoint-{stop}"
        rest = _loop(tmp_path / "halves")
        rest.run()
        assert all(map(torch.equal, _weights(whole), _weights(rest)))

    def test_each_role_takes_its_own_number_of_steps(self, tmp_path: Path) -> None:
        loop = _loop(tmp_path, micro=8)  # four micro-batches: accumulation starves nobody
        loop.run()
        steps = {
            name: {int(s["step"]) for s in learner.optimizer.state.values()}
            for name, learner in loop.learners.items()
        }
        assert steps == {"student": {5}, "critic": {14}}
        assert loop.ema.optimization_step == 5

    def test_a_role_that_stands_still_does_not_move(self, tmp_path: Path) -> None:
        loop = _loop(tmp_path)
        before = [p.clone() for p in loop.parameters]
        critic = [p.clone() for p in loop.learners["critic"].parameters]
        for loop.step in (1, 2):  # the critic's steps; the rate of the first is 0
            rows = map(loop.coupling.fetch, [loop.order.indices(loop.step, 0)])
            assert "loss" not in loop.update(rows)
        assert all(map(torch.equal, before, loop.parameters))
        assert not any(map(torch.equal, critic, loop.learners["critic"].parameters))
        assert all(p.grad is None for p in loop.parameters)

    def test_a_checkpoint_of_another_method_is_named(self, tmp_path: Path) -> None:
        _loop(tmp_path, checkpoint_every=7).run()
        run = RunOptions(sample_every=0)
        training = TrainOptions(steps=20, batch_size=32)
        built = method(gan=NO_GAN, training=training)
        data = Independent(load_data("digits"), labels=False)
        loop = Loop(
            built, data, training, run,
            folder=tmp_path, accelerator=make_accelerator(run), name="dmd",
        )  # fmt: skip
        with pytest.raises(FlowkitError, match="checkpoint-14 does not fit this network"):
            loop.run()


SMALL = [
    *("student_training.steps=8", "student_training.batch_size=64", "matching.student_every=3"),
    *("student_training.micro_batch_size=32", "student_training.warmup_steps=2"),
    *("sample_every=0", "log_every=1", "checkpoint_every=2", "evaluate.nfe=[1]"),
    *("evaluate.num_samples=100", "evaluate.straightness_samples=20"),
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
    record = json.loads((tmp_path / "student" / "flowkit.json").read_text())
    assert record["sampler"] == {"solver": "consistency", "times": [0, 0.5, 1]}
    student = from_diffusers(tmp_path / "student")
    assert isinstance(student, VelocityModel)
    before = from_diffusers(teacher).state_dict()
    assert any(not torch.equal(before[k], v) for k, v in student.state_dict().items())
    made = sample(student, draw(2, 1, 8, 8), record["sampler"]["times"], "consistency").x
    assert made.shape == (2, 1, 8, 8)
    scheduler = FlowScheduler.from_pretrained(tmp_path / "student" / "scheduler")
    scheduler.set_timesteps(2)
    assert scheduler.config.solver == "consistency" and len(scheduler.timesteps) == 2
    for step in (4, 8):
        shown = tmp_path / "stages" / "student" / f"pictures-{step:07d}.png"
        assert shown.stat().st_size > 1000
    weights = _student(tmp_path)
    distil(config)  # again: only reads
    assert all(torch.equal(weights[k], v) for k, v in _student(tmp_path).items())


def test_class_conditional_with_a_guided_teacher(tmp_path: Path) -> None:
    model = mlp(num_classes=10, label_dropout=0.1)
    export_model(model, tmp_path / "teacher", shape=(1, 8, 8), num_classes=10)
    distil(
        _config(
            tmp_path / "run",
            *(f"teacher={tmp_path / 'teacher'}", "data.conditional=true"),
            *("matching.guidance_scale=2.0", "gan.features=teacher"),
        )
    )
    labels = torch.tensor([3, 3])
    student = from_diffusers(tmp_path / "run" / "student")
    assert student(draw(2, 1, 8, 8), 0.0, class_labels=labels).shape == (2, 1, 8, 8)


def _start(folder: Path, *overrides: str, processes: int = 1) -> subprocess.Popen:
    torchrun = [*("-m", "torch.distributed.run", "--standalone"), f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [sys.executable, *(torchrun if processes > 1 else []), str(SCRIPT), *SMALL]
        + [f"output_dir={folder}", *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_end_where_one_that_accumulates_does(teacher: Path, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        words = [f"teacher={teacher}", "matching.divergence=kl"]
        process = _start(folder, *words, processes=processes)
        assert process.wait(timeout=300) == 0, process.stderr.read()[-2000:]
        found.append(_student(folder))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=0, atol=1e-5)


BAD = [
    (["mixed_precision=fp16"], "diverges in fp16"),
    (["matching.divergence=jss"], "unknown divergence 'jss', did you mean 'js'"),
    (["matching.divergence=kl", "gan.weight=0", "gan.critic_weight=0"], "need a discriminator"),
    (["gan.critic_weight=0"], "need a discriminator"),
    (["matching.weight=0", "gan.weight=0"], "has no loss"),
    (["gan.layers=[mid_block]"], "MLP has no layer 'mid_block'"),
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
