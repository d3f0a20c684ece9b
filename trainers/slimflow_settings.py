"""The options of trainers/slimflow.py; this module knows nothing of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from flowkit.config import option
from flowkit.trainers.settings import NetOptions, PairOptions, PictureOptions, TrainOptions

__all__ = ["AnnealingOptions", "GuidedOptions", "SlimFlowConfig"]


@dataclass
class AnnealingOptions:
    """How the student's coupling goes from fresh noise (beta = 1) to the pairs' own (beta = 0)."""

    schedule: Literal["linear", "exponential", "cosine", "fixed"] = option(
        "linear", "beta(k): 1 - k/K, exp(-k/K), (1 + cos(pi k/K))/2, or `beta` throughout"
    )
    steps: int = option(2_400, "K, steps until linear and cosine reach 0", low=1)
    beta: float = option(
        0.0, "beta of schedule=fixed; 0: plain reflow, 1: a 1-rectified flow", low=0, high=1
    )


@dataclass
class GuidedOptions(TrainOptions):
    """Distillation to one step, guided by the flow that is distilled."""

    two_step: Literal["student", "teacher", "none"] = option(
        "student",
        "whose first step the second term's two steps take: student (published code and "
        "results), teacher (published formula), or no second term",
    )
    two_step_weight: float = option(1.0, "weight of the second term", low=0)
    two_step_between: tuple[float, float] = option(
        (0.2, 0.8), "where the two steps meet: t uniform in this range", low=0, high=1
    )


def _student_net() -> NetOptions:
    return NetOptions("mlp", {"width": 60})


def _annealed_training() -> TrainOptions:
    return TrainOptions(steps=6500, learning_rate=1e-3)


def _guided_training() -> GuidedOptions:
    return GuidedOptions(
        steps=3250, learning_rate=5e-4, warmup_steps=100, times={"name": "constant", "t": 0.0}
    )


@dataclass
class SlimFlowConfig(PictureOptions):
    """Options of trainers/slimflow.py."""

    output_dir: str = option("runs/slimflow", "everything is written here; the same folder resumes")
    teacher: str = option("train", "train: train one first; else a folder or hub id of a model")
    net: NetOptions = field(default_factory=NetOptions)
    teacher_training: TrainOptions = field(default_factory=TrainOptions)
    pairs: PairOptions = field(default_factory=PairOptions)
    student_net: NetOptions = field(default_factory=_student_net)
    annealing: AnnealingOptions = field(default_factory=AnnealingOptions)
    student_training: TrainOptions = field(default_factory=_annealed_training)
    own_pairs: PairOptions = field(default_factory=PairOptions)
    distillation: GuidedOptions = field(default_factory=_guided_training)

    @property
    def rounds(self) -> int:
        """Reflows that there are: the student is a 2-rectified flow."""
        return 1
