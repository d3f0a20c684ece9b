"""The run behind trainers/dmd.py: teacher, distribution matching, comparison."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.files import atomic_folder, read_json, write_json
from flowkit.nets.embeddings import LabelEmbedding
from flowkit.registry import look_up
from flowkit.samplers import FlowScheduler
from flowkit.trainers.compare import Comparison
from flowkit.trainers.discriminator import Critic, check_layers, middle_layers
from flowkit.trainers.distribution_matching import DistributionMatching
from flowkit.trainers.divergences import DIVERGENCES
from flowkit.trainers.dmd_settings import DisBackConfig, DMDConfig
from flowkit.trainers.noise_levels import Middle, noise_levels
from flowkit.trainers.pairing import conditioned, null_class
from flowkit.trainers.settings import TrainOptions
from flowkit.trainers.stages import Run
from flowkit.velocity import VelocityModel

__all__ = [
    "build_method",
    "build_times",
    "check",
    "distil",
    "finish_run",
    "keep_labels",
    "open_run",
]


def distil(config: DMDConfig) -> None:
    """Train a teacher or take one, distil it to few steps, and compare the two."""
    run, comparison, teacher, start = open_run(config)
    method = partial(build_method, run=run, config=config, teacher=teacher)
    finish_run(run, comparison, config, teacher, start, method)


def open_run(config: DMDConfig) -> tuple[Run, Comparison, VelocityModel, VelocityModel]:
    """The run, its comparison, the teacher, and what the student starts from, all checked."""
    check(config)
    run = Run(config, [config.teacher_training, config.student_training])
    comparison = Comparison(run)
    if config.matching.guidance_scale != 1 and run.num_classes is None:
        raise FlowkitError("matching.guidance_scale needs class labels; set data.conditional=true")
    if config.teacher == "train":
        check_teacher(run.build(config.net), config)
    teacher = open_teacher(run, config)
    check_teacher(teacher, config)
    return (
        run,
        comparison,
        teacher,
        teacher if config.student == "teacher" else run.load(config.student),
    )


def finish_run(
    run: Run,
    comparison: Comparison,
    config: DMDConfig,
    teacher: VelocityModel,
    start: VelocityModel,
    method: Callable[..., DistributionMatching],
) -> None:
    """Train the student by the method, and compare."""
    student = run.train("student", start, run.independent(), config.student_training, method=method)
    record_sampler(run, config, "student")
    divergence = config.matching.divergence
    name = "DMD2" if divergence is None else f"f-distill ({divergence})"
    if isinstance(config, DisBackConfig):
        name = f"DisBack with {name}"
    comparison.finish({"teacher": teacher, "student": student}, method=name)


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


def open_teacher(run: Run, config: DMDConfig) -> VelocityModel:
    """The teacher: loaded, or trained first."""
    if config.teacher != "train":
        return run.load(config.teacher)
    return run.train("teacher", run.build(config.net), run.independent(), config.teacher_training)


def build_method(
    model: VelocityModel,
    *_: Any,
    run: Run,
    config: DMDConfig,
    teacher: VelocityModel,
    fake: VelocityModel | None = None,
    real: VelocityModel | None = None,
) -> DistributionMatching:
    """The method around a trainable copy of the student's first weights.

    fake, real: where the fake score starts, and the real score, when not at the teacher.
    """
    device = run.accelerator.device
    fake = keep_labels(copy.deepcopy(fake or teacher).requires_grad_(True))
    cond = {}
    if run.num_classes is not None:
        cond["class_labels"] = torch.zeros(1, dtype=torch.long, device=device)
    torch.manual_seed(config.seed)  # of the heads' weights, alike on every process
    critic = Critic(
        fake,
        teacher,
        layers=feature_layers(teacher, config),
        features=config.gan.features,
        shape=run.shape,
        cond=cond,
    )
    matching = config.matching
    return DistributionMatching(
        keep_labels(model),
        frozen(real or teacher, matching.guidance_scale, run.accelerator.autocast, device),
        critic,
        critic_training(config),
        times=Middle(build_times(matching.times), matching.low, matching.high),
        critic_times=build_times(config.critic.times),
        gan_times=build_times(config.gan.times),
        matching=matching,
        critic_options=config.critic,
        gan=config.gan,
        decode=run.decode,
    )


def critic_training(config: DMDConfig) -> TrainOptions:
    """The student's training options with the critic's own in their place."""
    critic = config.critic
    return replace(
        config.student_training,
        learning_rate=critic.learning_rate,
        betas=critic.betas,
        weight_decay=critic.weight_decay,
        max_grad_norm=critic.max_grad_norm,
    )


def frozen(
    teacher: VelocityModel,
    scale: float,
    autocast: Callable[[], AbstractContextManager[Any]],
    device: torch.device,
) -> Callable[..., Tensor]:
    """The teacher as teacher(x_t, t, **cond), guided by `scale`, in the run's precision."""

    def velocity(x_t: Tensor, t: float | Tensor, **cond: Tensor) -> Tensor:
        with autocast():
            if scale == 1:
                return teacher(x_t, t, **cond).to(x_t.dtype)
            guide = conditioned(teacher, cond["class_labels"], scale, device)
            return guide(x_t, t).to(x_t.dtype)

    return velocity


def keep_labels(model: VelocityModel) -> VelocityModel:
    """The model, which drops no label: student and fake score must speak of the same class."""
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout = 0.0
    return model


def record_sampler(run: Run, config: DMDConfig, name: str) -> None:
    """Say in an exported student's folder how it is sampled: `sampler` in its flowkit.json, and a
    diffusers scheduler with those times in scheduler/."""
    times = [*config.matching.student_times, 1.0]
    solver = "euler" if len(times) == 2 else "consistency"
    folder = run.folder / name
    if run.accelerator.is_main_process:
        with atomic_folder(folder / "scheduler") as temporary:
            FlowScheduler(solver=solver, times=times).save_pretrained(temporary)
        record = read_json(folder / "flowkit.json")
        write_json(
            folder / "flowkit.json", {**record, "sampler": {"solver": solver, "times": times}}
        )
    run.accelerator.wait_for_everyone()
