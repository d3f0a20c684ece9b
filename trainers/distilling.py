"""The run behind trainers/dmd.py: teacher, distribution matching, comparison."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.files import atomic_folder, read_json, write_json
from flowkit.nets.embeddings import LabelEmbedding
from flowkit.samplers import FlowScheduler
from flowkit.trainers.compare import Comparison
from flowkit.trainers.discriminator import Critic
from flowkit.trainers.distilling_checks import (
    build_times,
    check,
    check_fit,
    check_ratio,
    check_teacher,
    feature_layers,
)
from flowkit.trainers.distribution_matching import DistributionMatching
from flowkit.trainers.dmd_settings import DisBackConfig, DMDConfig
from flowkit.trainers.noise_levels import Middle
from flowkit.trainers.pairing import conditioned
from flowkit.trainers.settings import TrainOptions
from flowkit.trainers.stages import Run
from flowkit.velocity import VelocityModel

__all__ = [
    "build_method",
    "distil",
    "finish_run",
    "frozen",
    "keep_labels",
    "open_run",
    "sampler_of",
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
    check_ratio(config, run.accelerator.num_processes)
    comparison = Comparison(run)
    if config.matching.guidance_scale != 1 and run.num_classes is None:
        raise FlowkitError("matching.guidance_scale needs class labels; set data.conditional=true")
    if config.teacher == "train":
        check_teacher(run.build(config.net), config)
    student = None if config.student == "teacher" else run.load(config.student)
    if student is not None:
        check_fit(run, student, f"student={config.student}")
    teacher = open_teacher(run, config)
    check_fit(run, teacher, f"teacher={config.teacher}")
    check_teacher(teacher, config)
    return run, comparison, teacher, student or teacher


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
    models = {"teacher": teacher, "student": student}
    comparison.finish(models, method=name, samplers={"student": sampler_of(config)})


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
    asked = {"teacher": real or teacher}
    if real is not None and config.gan.features == "teacher":
        asked["features"] = teacher
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
        frozen=asked,
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


def sampler_of(config: DMDConfig) -> tuple[str, list[float]]:
    """The solver and the times that a student is trained for."""
    times = [*config.matching.student_times, 1.0]
    return ("euler" if len(times) == 2 else "consistency"), times


def record_sampler(run: Run, config: DMDConfig, name: str) -> None:
    """Say in an exported student's folder how it is sampled: `sampler` in its flowkit.json, and a
    diffusers scheduler with those times in scheduler/."""
    solver, times = sampler_of(config)
    folder = run.folder / name
    if run.accelerator.is_main_process:
        with atomic_folder(folder / "scheduler") as temporary:
            FlowScheduler(solver=solver, times=times).save_pretrained(temporary)
        record = read_json(folder / "flowkit.json")
        write_json(
            folder / "flowkit.json", {**record, "sampler": {"solver": solver, "times": times}}
        )
    run.accelerator.wait_for_everyone()
