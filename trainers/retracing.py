"""The run behind trainers/disback.py: teacher, recorded path, the way back, comparison."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

from flowkit.errors import FlowkitError
from flowkit.trainers.backtracking import Recording, WayBack
from flowkit.trainers.distilling import (
    build_method,
    finish_run,
    frozen,
    keep_labels,
    open_run,
)
from flowkit.trainers.distilling_checks import build_times
from flowkit.trainers.distribution_matching import DistributionMatching
from flowkit.trainers.dmd_settings import DisBackConfig
from flowkit.trainers.recorded_path import RecordedPath
from flowkit.trainers.stages import Run
from flowkit.velocity import VelocityModel

__all__ = ["backtrack", "build_backtracking", "check_path", "record"]


def check_path(config: DisBackConfig) -> None:
    """Refuse a schedule in which a switch would never come, or the teacher never be reached."""
    nodes, every = config.path.steps // config.path.record_every, config.path.switch_every
    if config.path.steps and not nodes:
        raise FlowkitError(
            f"path.steps {config.path.steps} is less than path.record_every "
            f"{config.path.record_every}: no node would be recorded"
        )
    updates = -(-config.student_training.steps // config.matching.student_every)
    if updates <= every * (nodes - 1):
        raise FlowkitError(
            f"the student has {updates} updates, and {nodes} nodes of path.switch_every {every} "
            f"take {every * (nodes - 1)} before its teacher is reached; train longer, switch "
            "sooner, or record fewer nodes"
        )


def backtrack(config: DisBackConfig) -> None:
    """Distil along the path on which the teacher degrades into the student's first pictures."""
    check_path(config)
    run, comparison, teacher, start = open_run(config)
    path = record(run, config, teacher, start)
    method = partial(build_backtracking, run=run, config=config, teacher=teacher, path=path)
    finish_run(run, comparison, config, teacher, start, method)


def record(
    run: Run, config: DisBackConfig, teacher: VelocityModel, start: VelocityModel
) -> RecordedPath:
    """The path in run.folder/path, recorded unless it is there; empty for path.steps 0."""
    options, accelerator = config.path, run.accelerator
    identity = {"teacher": run.identity(teacher), "student": run.identity(start)}
    path = RecordedPath(run.folder / "path", teacher.net, identity)
    training = replace(
        config.student_training,
        steps=options.steps,
        learning_rate=options.learning_rate,
        warmup_steps=0,
        ema_decay=0.0,  # nodes are the weights themselves
    )

    def method(model: VelocityModel, *_: Any) -> Recording:
        return Recording(
            keep_labels(model),
            frozen(start, 1.0, accelerator.autocast, accelerator.device),
            path if accelerator.is_main_process else None,
            every=options.record_every,
            start=config.matching.student_times[0],
            times=build_times(config.critic.times),
            options=config.critic,
            frozen={"first student": start},
        )

    if options.steps:
        run.train("degraded", teacher, run.independent(), training, method=method)
    path = RecordedPath(path.folder, teacher.net, identity)  # as the main process left it
    if len(path) != options.steps // options.record_every:
        raise FlowkitError(
            f"{path.folder} holds {len(path)} nodes, not {options.steps // options.record_every}; "
            "remove it and degraded/ to record anew"
        )
    return path


def build_backtracking(
    model: VelocityModel,
    *_: Any,
    run: Run,
    config: DisBackConfig,
    teacher: VelocityModel,
    path: RecordedPath,
) -> DistributionMatching:
    """Distribution matching whose real score goes back along the path, and whose fake score starts
    at its end; without a path it is that of `build_method`, to the bit."""
    fake = teacher
    if len(path):
        fake = copy.deepcopy(teacher)
        path.load(len(path) - 1, fake.net)
    target = copy.deepcopy(teacher)
    method = build_method(model, run=run, config=config, teacher=teacher, fake=fake, real=target)
    method.phase = WayBack(target, path, config.path.switch_every)
    return method
