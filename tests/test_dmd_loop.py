"""Distribution matching in the loop: restarts, turns, what it costs and logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_distillation import NO_GAN, method
from torch import Tensor

from flowkit import checkpoint
from flowkit.coupling import Independent
from flowkit.data import load_data
from flowkit.errors import FlowkitError
from flowkit.samplers.timesteps import density
from flowkit.trainers.dmd_settings import MatchingOptions
from flowkit.trainers.launch import make_accelerator
from flowkit.trainers.loop import Loop, Preempted
from flowkit.trainers.settings import RunOptions, TrainOptions


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


def _stop_after(loop: Loop, step: int) -> None:
    """SIGTERM's effect after that step."""
    update = loop.update

    def then_stop(rows: Any) -> Any:
        logs = update(rows)
        loop.terminating = loop.step + 1 == step
        return logs

    loop.update = then_stop


class TestLoop:
    def test_stopped_in_any_phase_it_ends_in_the_same_bits(self, tmp_path: Path) -> None:
        whole = _loop(tmp_path / "whole")
        whole.run()
        # 7: the student has just learnt; 8 and 9: the critic alone; 10: the student's again
        for stop in (5, 7, 8, 9, 10):
            part = _loop(tmp_path / "parts")
            _stop_after(part, stop)
            with pytest.raises(Preempted):
                part.run()
            assert checkpoint.latest(tmp_path / "parts").name == f"checkpoint-{stop}"
        rest = _loop(tmp_path / "parts")
        rest.run()
        assert all(map(torch.equal, _weights(whole), _weights(rest)))
        costs = [json.loads((tmp_path / n / "cost.json").read_text()) for n in ("whole", "parts")]
        assert costs[0] == costs[1]

    def test_what_it_costs(self, tmp_path: Path) -> None:
        """14 steps of 32, five of them the student's too, one step each, with a discriminator."""
        loop = _loop(tmp_path, micro=16)
        loop.run()
        found = json.loads((tmp_path / "cost.json").read_text())
        student, critic = 32 * 5, 32 * 14
        assert found["forward"] == {
            "student": student + critic,  # its pictures for either turn
            "critic": 2 * student + 3 * critic,  # score and logits; score, and both logits
            "teacher": student,
        }
        assert found["backward"] == {
            "student": student,
            "critic": student + 3 * critic,
            "teacher": 0,
        }
        weights = sum(p.numel() for p in loop.parameters)
        # weights, gradient, average and Adam's two moments and one count a tensor
        assert found["memory"]["student"] == 4 * (5 * weights + len(loop.parameters))
        assert found["memory"]["teacher"] == 4 * weights and found["peak_memory"] is None

    def test_what_is_logged(self, tmp_path: Path) -> None:
        loop, seen = _loop(tmp_path, log_every=1), []
        loop.accelerator.log = lambda values, step: seen.append((step, values))
        loop.run()
        assert [step for step, _ in seen] == list(range(1, 15))
        last = {name.removeprefix("dmd/"): value for name, value in seen[-1][1].items()}
        assert {"loss", "gradient", "distance", "ratio", "ratio_min", "ratio_max"} <= last.keys()
        assert {
            "critic_score",
            "critic_head",
            "critic_fake_logit",
            "critic_real_logit",
        } <= last.keys()
        assert (last["student_updates"], last["critic_updates"], last["skipped"]) == (5, 14, 0)
        assert last["ratio_min"] <= last["ratio"] <= last["ratio_max"]

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

    def test_a_checkpoint_of_a_method_without_phases_is_named(self, tmp_path: Path) -> None:
        _loop(tmp_path, checkpoint_every=7).run()
        loop = _loop(tmp_path)
        loop.method.phase = density("curriculum", num_stages=2)
        with pytest.raises(FlowkitError, match="saved by a method without phases"):
            loop.run()
