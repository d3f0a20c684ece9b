"""The numbers of a schedule made better where it stands: its times and its relaxations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from cmaes import CMA
from numpy.typing import NDArray
from tqdm.auto import tqdm

from flowkit.errors import FlowkitError
from flowkit.samplers.evolution import Objective, Scored, scored
from flowkit.samplers.schedule_file import Schedule

__all__ = ["minimise", "polish"]

Array = NDArray[np.float64]


def polish(
    objective: Objective,
    found: Scored,
    *,
    evaluations: int = 1000,
    spread: float = 0.2,
    seed: int = 0,
    progress: bool = False,
) -> Scored:
    """The best schedule with the same switches that a search over its numbers comes upon.

    They are the times between the ends, as logarithms of the steps' lengths, and every relaxation
    that is a number.  spread: the first deviation of each.  evaluations: about how many.
    The schedule itself is the worst that comes back.
    """
    best, free = found, _numbers(found.schedule)
    lengths = np.diff(found.schedule.times)
    logits = np.log(lengths[:-1] / lengths[-1])
    start = np.array([*logits, *(value for _, _, value in free)])
    with tqdm(total=evaluations, disable=not progress, unit="schedule", desc="polish") as bar:

        def score(z: Array) -> float:
            nonlocal best
            child = _with(found.schedule, z[: len(logits)], free, z[len(logits) :])
            result = scored(objective, child) if child else Scored(math.inf, found.schedule)
            if result.score < best.score:
                best = result
            bar.update()
            bar.set_postfix(best=f"{best.score:.4g}")
            return result.score

        if len(start):
            minimise(score, start, spread, evaluations, seed)
    return best


def minimise(
    score: Callable[[Array], float], mean: Array, spread: float, evaluations: int, seed: int = 0
) -> Array:
    """CMA-ES (Hansen, 2016, arXiv:1604.00772) around a mean, whose last place is returned.

    It needs no derivative and minds no roughness, which a network has in t.
    """
    strategy = CMA(mean=mean, sigma=spread, seed=seed)
    for _ in range(evaluations // strategy.population_size):
        draws = [strategy.ask() for _ in range(strategy.population_size)]
        strategy.tell([(draw, score(draw)) for draw in draws])
    return strategy.mean


def _numbers(schedule: Schedule) -> list[tuple[int, str, float]]:
    """(step, field, value) of each relaxation that is a number and has something to relax."""
    last = len(schedule.steps) - 1
    values = [
        (i, name, getattr(step, name))
        for i, step in enumerate(schedule.steps)
        for name, counts in (
            ("relaxation", i > 0 and step.order > 1),
            ("corrector_relaxation", i < last and step.corrector == "pseudo"),
        )
        if counts
    ]
    return [(i, name, value) for i, name, value in values if not isinstance(value, str)]


def _with(
    schedule: Schedule,
    logits: Sequence[float] | Array,
    free: Sequence[tuple[int, str, float]],
    values: Sequence[float] | Array,
) -> Schedule | None:
    """The schedule with steps exp(logits) times as long as the last, and with other numbers."""
    first, last = schedule.times[0], schedule.times[-1]
    lengths = np.exp([*logits, 0.0])
    ends = first + (last - first) * np.cumsum(lengths / lengths.sum())
    steps = list(schedule.steps)
    for (i, name, _), value in zip(free, values, strict=True):
        changed: dict[str, Any] = {name: float(value)}
        steps[i] = replace(steps[i], **changed)
    try:
        times = (first, *ends[:-1].tolist(), last)
        return replace(schedule, times=times, steps=tuple(steps), info={})
    except FlowkitError:  # a step too short for float64
        return None
