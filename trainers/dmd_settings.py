"""The options of trainers/dmd.py, as dataclasses; nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from flowkit.config import option
from flowkit.trainers.settings import NetOptions, PictureOptions, TrainOptions

__all__ = [
    "BacktrackingOptions",
    "CriticOptions",
    "DMDConfig",
    "DisBackConfig",
    "GANOptions",
    "MatchingOptions",
]


@dataclass
class MatchingOptions:
    """The student's loss: distribution matching, plain or weighted as f-distill."""

    weight: float = option(1.0, "weight of the distribution-matching loss; 0: GAN alone", low=0)
    times: dict[str, Any] = option(
        {"name": "uniform"},
        "density of the t where teacher and fake score are compared; also karras",
    )
    low: float = option(0.02, "its draws start at this quantile (noise end)", low=0, high=1)
    high: float = option(0.98, "and end at this one (data end)", low=0, high=1)
    guidance_scale: float = option(1.0, "classifier-free guidance of the teacher; 1: none")
    student_times: list[float] = option(
        [0.0], "times of the student's steps, increasing; [0]: one step", low=0, high=1
    )
    backward_simulation: bool = option(
        True, "later steps start from the student's own pictures; false: from real ones"
    )
    student_every: int = option(
        5, "the critic learns at every step, the student at every one of these", low=1
    )
    divergence: str | None = option(
        None, "f-distill: rkl, kl, js, sf, sh, jf or neyman; null: plain (reverse KL)"
    )
    num_bins: int = option(
        10, "bins of t, of equal mass, that ratios are normalised in; 0: none", low=0
    )


@dataclass
class CriticOptions:
    """The fake-score network's own training; what is not here is as the student's."""

    learning_rate: float = option(5e-4, "peak learning rate", low=0)
    betas: tuple[float, float] = option((0.9, 0.999), "Adam's betas", low=0, high=1)
    weight_decay: float = option(0.0, "weight decay", low=0)
    max_grad_norm: float | None = option(None, "clip the gradient's norm to this", low=0)
    times: dict[str, Any] = option({"name": "uniform"}, "density of the t that it learns at")
    weight: float = option(1.0, "weight of the fake-score loss", low=0)
    weighting: Literal["velocity", "edm"] = option(
        "velocity", "1 in velocities, or EDM's 1/sigma^2 + 1/sigma_data^2 in pictures"
    )
    sigma_data: float = option(0.5, "of EDM's weighting", low=0)


@dataclass
class GANOptions:
    """The discriminator beside the fake score; both weights 0 leave it out."""

    weight: float = option(3e-3, "weight in the student's loss", low=0)
    critic_weight: float = option(1e-2, "weight in the critic's loss", low=0)
    features: Literal["fake", "teacher"] = option("fake", "whose features it reads")
    layers: list[str] = option([], "layers whose outputs it reads; []: the middle of the network")
    times: dict[str, Any] = option(
        {"name": "uniform"},
        "diffusion GAN: density of the t that pictures are noised to; {name: constant, t: 1}: none",
    )


def _student_training() -> TrainOptions:
    return TrainOptions(steps=5000, learning_rate=2e-4, betas=(0.0, 0.999), ema_decay=0.99)


@dataclass
class DMDConfig(PictureOptions):
    """Options of trainers/dmd.py."""

    output_dir: str = option("runs/dmd", "everything is written here; the same folder resumes")
    teacher: str = option("train", "train: train one first; else a folder or hub id of a model")
    net: NetOptions = field(default_factory=NetOptions)
    teacher_training: TrainOptions = field(default_factory=TrainOptions)
    student: str = option(
        "teacher", "the weights it starts from: teacher, or a folder such as a 2-rectified flow's"
    )
    student_training: TrainOptions = field(default_factory=_student_training)
    matching: MatchingOptions = field(default_factory=MatchingOptions)
    critic: CriticOptions = field(default_factory=CriticOptions)
    gan: GANOptions = field(default_factory=GANOptions)


@dataclass
class BacktrackingOptions:
    """The recorded path from the teacher to the student's first pictures, and the way back."""

    steps: int = option(
        1000, "steps of the recording; 0: no path, plain distribution matching", low=0
    )
    record_every: int = option(100, "steps of the recording between two nodes", low=1)
    learning_rate: float = option(1e-4, "learning rate of the recording", low=0)
    switch_every: int = option(
        20, "student's updates at each node on the way back; the teacher gets the rest", low=1
    )


@dataclass
class DisBackConfig(DMDConfig):
    """Options of trainers/disback.py: those of distribution matching, and the path."""

    output_dir: str = option("runs/disback", "everything is written here; the same folder resumes")
    path: BacktrackingOptions = field(default_factory=BacktrackingOptions)
