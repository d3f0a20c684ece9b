"""What few-step methods cost: passes of each network, in samples, computed from a run's options."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from flowkit.samplers import grids
from flowkit.samplers.solve import evaluation_times
from flowkit.trainers.dmd_settings import DisBackConfig, DMDConfig
from flowkit.trainers.settings import PairOptions, ReflowConfig, TrainOptions
from flowkit.trainers.slimflow_settings import SlimFlowConfig


@dataclass
class Passes:
    """Samples that each network saw, forward and backward.

    teacher: the frozen one.  student: what is exported, and the small flow it is distilled from.
    critic: the fake score, and the copy of the teacher that a path is recorded with.
    """

    teacher: int = 0
    student: int = 0
    student_back: int = 0
    critic: int = 0
    critic_back: int = 0

    def __add__(self, other: Passes) -> Passes:
        names = [f.name for f in fields(self)]
        return Passes(**{name: getattr(self, name) + getattr(other, name) for name in names})


def count(config: Any) -> Passes:
    """The passes of a run; its teacher's training and the measurements are not among them."""
    if isinstance(config, DMDConfig):
        return _matching(config) + _recording(config)
    if isinstance(config, SlimFlowConfig):
        return _slimflow(config)
    return _reflow(config)


def first_flow(config: ReflowConfig) -> Passes:
    """Those of the 2-rectified flow alone."""
    return Passes(teacher=_pairs(config.pairs)) + _trained(config.student_training)


def small_flow(config: SlimFlowConfig) -> Passes:
    """Those of the small 2-rectified flow alone."""
    return Passes(teacher=_pairs(config.pairs)) + _trained(config.student_training)


def _pairs(options: PairOptions) -> int:
    nfe = len(evaluation_times(options.solver, grids.uniform(options.num_steps)))
    return options.num_pairs * nfe


def _trained(options: TrainOptions) -> Passes:
    seen = options.steps * options.batch_size
    return Passes(student=seen, student_back=seen)


def _reflow(config: ReflowConfig) -> Passes:
    if not config.distillation.steps:
        return first_flow(config)
    own = Passes(student=_pairs(config.pairs))
    return first_flow(config) + own + _trained(config.distillation)


def _slimflow(config: SlimFlowConfig) -> Passes:
    passes = small_flow(config) + Passes(student=_pairs(config.own_pairs))
    passes += _trained(config.distillation)
    if config.distillation.two_step != "none":
        passes += _trained(config.distillation)  # the student at fresh noise
        asked = 1 if config.distillation.two_step == "student" else 2  # of the frozen small flow
        seen = config.distillation.steps * config.distillation.batch_size
        passes += Passes(student=asked * seen)
    return passes


def _matching(config: DMDConfig) -> Passes:
    options, batch = config.student_training, config.student_training.batch_size
    student = -(-options.steps // config.matching.student_every) * batch
    critic = options.steps * batch
    judged = 2 * critic if config.gan.critic_weight else 0  # its pictures and real ones
    passes = Passes(student=critic, critic=critic + judged, critic_back=critic + judged)
    passes += Passes(student=student, student_back=student)
    if config.matching.weight:
        passes += Passes(teacher=student, critic=student)
    if config.gan.weight:
        passes += Passes(critic=student, critic_back=student)  # to the picture, not the weights
    return passes


def _recording(config: DMDConfig) -> Passes:
    if not isinstance(config, DisBackConfig):
        return Passes()
    seen = config.path.steps * config.student_training.batch_size
    return Passes(student=seen, critic=seen, critic_back=seen)
