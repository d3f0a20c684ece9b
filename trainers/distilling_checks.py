"""What is refused before distribution matching costs any time."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from flowkit.errors import FlowkitError
from flowkit.registry import look_up
from flowkit.trainers.discriminator import check_layers, middle_layers
from flowkit.trainers.divergences import DIVERGENCES
from flowkit.trainers.dmd_settings import DMDConfig
from flowkit.trainers.noise_levels import Middle, noise_levels
from flowkit.trainers.pairing import null_class
from flowkit.trainers.settings import TrainOptions
from flowkit.trainers.stages import Run
from flowkit.velocity import VelocityModel

__all__ = [
    "build_times",
    "check",
    "check_fit",
    "check_ratio",
    "check_teacher",
    "feature_layers",
]


def check(config: DMDConfig) -> None:
    """Refuse what training would refuse, or do badly, before anything costs time."""
    matching, gan = config.matching, config.gan
    if config.mixed_precision == "fp16":
        raise FlowkitError(
            "distribution matching diverges in fp16 (Yin et al., 2024, arXiv:2405.14867, their "
            "code); set mixed_precision=bf16 or no"
        )
    if not matching.weight and not gan.weight:
        raise FlowkitError("the student has no loss; set matching.weight or gan.weight above 0")
    wants_head = bool(gan.weight) or matching.divergence is not None
    if wants_head and not gan.critic_weight:
        raise FlowkitError(
            "gan.weight and matching.divergence need a discriminator; set gan.critic_weight above 0"
        )
    if matching.divergence is not None:
        look_up("divergence", matching.divergence, DIVERGENCES)
    times = [*matching.student_times, 1.0]
    if len(times) < 2 or any(not t < s for t, s in pairwise(times)):
        raise FlowkitError(
            f"matching.student_times must increase and stay below 1, got {matching.student_times}"
        )
    for options in (matching.times, config.critic.times, gan.times):
        build_times(options)
    Middle(build_times(matching.times), matching.low, matching.high)
    default = TrainOptions()
    for name in ("loss", "times"):
        if getattr(config.student_training, name) != getattr(default, name):
            raise FlowkitError(
                f"student_training.{name} is for other methods; distribution matching has "
                "matching.times and a loss of its own"
            )


def check_ratio(config: DMDConfig, processes: int) -> None:
    """Refuse a discriminator or bins that could not tell f-distill its ratio."""
    matching, batch = config.matching, config.student_training
    if matching.divergence is None:
        return
    asked = Middle(build_times(matching.times), matching.low, matching.high)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    (low, high), (first, last) = (
        times.quantile(ends).tolist() for times in (asked, build_times(config.gan.times))
    )
    if low < first or last < high:
        raise FlowkitError(
            f"gan.times lie in [{first:.3g}, {last:.3g}], but matching.divergence asks the "
            f"discriminator in [{low:.3g}, {high:.3g}]; widen gan.times"
        )
    size = batch.micro_batch_size or batch.batch_size // processes
    if size < 2 * matching.num_bins:
        raise FlowkitError(
            f"matching.num_bins {matching.num_bins} of a pass of {size} pictures leave each fewer "
            f"than 2, and no ratio to tell; at most {size // 2}, or 0"
        )


@torch.no_grad()
def check_fit(run: Run, model: VelocityModel, name: str) -> None:
    """Refuse a teacher or student that has no velocity for this run's pictures."""
    device = run.accelerator.device
    noise, cond = torch.zeros(1, *run.shape, device=device), {}
    if run.num_classes is not None:
        cond["class_labels"] = torch.tensor([run.num_classes - 1], device=device)
    wanted = f"pictures {run.shape} with classes {run.num_classes}"
    try:
        found = tuple(model(noise, 0.5, **cond).shape)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FlowkitError(f"{name} cannot take {wanted} ({reason}); choose another") from None
    if found != tuple(noise.shape):
        raise FlowkitError(f"{name} answers {wanted} with velocities {found[1:]}; choose another")


def check_teacher(teacher: VelocityModel, config: DMDConfig) -> None:
    """Refuse a teacher that has not the layers or the null class that the options ask of it."""
    if config.gan.critic_weight:
        check_layers(teacher.net, feature_layers(teacher, config))
    if config.matching.guidance_scale != 1:
        null_class(teacher)


def feature_layers(teacher: VelocityModel, config: DMDConfig) -> list[str]:
    """The layers that the discriminator reads; none without one."""
    if not config.gan.critic_weight:
        return []
    return list(config.gan.layers) or middle_layers(teacher.net)


def build_times(options: dict[str, Any]) -> Any:
    """The density of an option `{name: ..., **options}`."""
    try:
        return noise_levels(**options)
    except TypeError as error:
        raise FlowkitError(f"times: {error}") from None
