"""Evolution of schedules: what a generation is, whatever a schedule is scored by and varied by.

Nothing here needs torch; an objective does what it needs.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from flowkit.errors import FlowkitError
from flowkit.files import atomic_file, read_json
from flowkit.samplers.schedule_file import QUANTITIES, RELAXATIONS, Schedule, Step

__all__ = [
    "Evolution",
    "Objective",
    "Predictor",
    "Scored",
    "Vary",
    "encoded",
    "evolve",
    "forest",
    "scored",
]

Objective = Callable[[Schedule], float]
"""The score of a schedule, the lower the better; always the same for the same schedule."""

_TRIES = 10  # at a schedule that was not there before, as in AutoDiffusion


@dataclass(frozen=True)
class Scored:
    """A schedule and its score."""

    score: float
    schedule: Schedule


Vary = Callable[[Sequence[Schedule], random.Random], Schedule]
"""vary(parents, rng): a child of one or more of the parents, which come best first."""

Predictor = Callable[[Sequence[Scored], Sequence[Schedule]], Sequence[float]]
"""predictor(known, candidates): a number for each candidate, low where a good score is likely."""


@dataclass
class Evolution:
    """All that an evolution has scored.

    archive: in order of evaluation.  best: the lowest score after each generation, the start first.
    """

    archive: list[Scored] = field(default_factory=list)
    best: list[float] = field(default_factory=list)

    def top(self, count: int) -> list[Scored]:
        """The best so many, best first; of equals the older."""
        return sorted(self.archive, key=lambda one: one.score)[:count]


def evolve(
    objective: Objective,
    start: Sequence[Schedule],
    vary: Vary,
    *,
    generations: int = 60,
    children: int = 32,
    keep: int = 15,
    seed: int = 0,
    predictor: Predictor | None = None,
    state: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Evolution:
    """(keep + children) evolution: the best `keep` of all so far are the parents of new children.

    start: what it begins with and is never worse than; nothing is scored twice.
    predictor: of 4 times as many candidates those that it ranks first are scored.
    state: a file, written after each generation; an evolution that finds its own there goes on,
    and ends where an uninterrupted one does, for generation g draws from (seed, g) alone.
    Raises FlowkitError for the state of another evolution.
    """
    if not start or min(children, keep) < 1 or generations < 0:
        raise FlowkitError(
            "an evolution needs schedules to start from, children and keep >= 1, generations >= 0, "
            f"got {len(start)}, {children}, {keep} and {generations}"
        )
    setting: dict[str, Any] = {"seed": seed, "children": children, "keep": keep}
    setting["predictor"] = predictor is not None
    setting["start"] = [schedule.to_dict() for schedule in start]
    found = _restored(state, setting) or Evolution()
    seen = {_key(one.schedule) for one in found.archive}
    with tqdm(total=generations, disable=not progress, unit="generation") as bar:
        bar.update(min(len(found.best) - 1, generations) if found.best else 0)
        while len(found.best) <= generations:
            rng = random.Random(f"{seed}/{len(found.best)}")
            if not found.archive:
                new = [schedule for schedule in start if not _seen(schedule, seen)]
            else:
                parents = [one.schedule for one in found.top(keep)]
                count = children * (4 if predictor else 1)
                new = _offspring(parents, vary, count, seen, rng)
                if predictor:
                    order = np.argsort(predictor(found.archive, new), kind="stable")
                    new = [new[i] for i in order[:children]]
            found.archive += [scored(objective, schedule) for schedule in new]
            bar.update(1 if found.best else 0)
            found.best.append(found.top(1)[0].score)
            bar.set_postfix(best=f"{found.best[-1]:.4g}", scored=len(found.archive))
            if state is not None:
                _save(state, setting, found)
    return found


def forest(known: Sequence[Scored], candidates: Sequence[Schedule]) -> list[float]:
    """A random forest on the ranks of what is known, which no outlier moves.

    It learns from schedules of the candidates' solvers and numbers of steps.
    """
    from sklearn.ensemble import RandomForestRegressor

    kinds = {(one.solver, len(one.times)) for one in candidates}
    alike = [one for one in known if (one.schedule.solver, len(one.schedule.times)) in kinds]
    ranks = np.argsort(np.argsort([one.score for one in alike], kind="stable"))
    trees = RandomForestRegressor(50, min_samples_leaf=2, max_features=0.5, random_state=0)
    codes = [*(encoded(one.schedule) for one in alike), *map(encoded, candidates)]
    table = np.array([*zip_longest(*codes, fillvalue=0.0)]).T  # shorter schedules end in zeros
    trees.fit(table[: len(alike)], ranks)
    return trees.predict(table[len(alike) :]).tolist()


def encoded(schedule: Schedule) -> list[float]:
    """The numbers that a predictor sees: the times, and for each step its switches."""
    numbers = [float(schedule.analytic), *schedule.times]
    for step in schedule.steps or [Step()] * (len(schedule.times) - 1):
        numbers += [float(step.quantity == name) for name in QUANTITIES]
        numbers += [step.order, step.stencil, float(step.corrector == "pseudo")]
        for value in (step.relaxation, step.corrector_relaxation):
            named = isinstance(value, str)
            numbers += [float(value == name) for name in RELAXATIONS]
            numbers.append(0.0 if named else float(value))
    return numbers


def _offspring(
    parents: Sequence[Schedule],
    vary: Vary,
    count: int,
    seen: set[Any],
    rng: random.Random,
) -> list[Schedule]:
    """New schedules, as many as wanted or as can be found."""
    new: list[Schedule] = []
    for _ in range(_TRIES * count):
        child = vary(parents, rng)
        if not _seen(child, seen):
            new.append(child)
            if len(new) == count:
                break
    return new


def _seen(schedule: Schedule, seen: set[Any]) -> bool:
    """Whether it was there before; from now on it was."""
    key = _key(schedule)
    known = key in seen
    seen.add(key)
    return known


def _key(schedule: Schedule) -> Any:
    return (
        schedule.times,
        schedule.steps,
        schedule.solver,
        repr(schedule.options),
        schedule.analytic,
    )


def scored(objective: Objective, schedule: Schedule) -> Scored:
    """The schedule with its score; one that is no number becomes the worst there is."""
    score = float(objective(schedule))
    return Scored(math.inf if math.isnan(score) else score, schedule)


def _restored(state: str | os.PathLike[str] | None, setting: dict[str, Any]) -> Evolution | None:
    if state is None or not Path(state).exists():
        return None
    try:
        values = read_json(state)
        theirs, best = values["setting"], values["best"]
        archive = [Scored(score, Schedule.from_dict(one)) for score, one in values["archive"]]
    except (ValueError, TypeError, KeyError, FlowkitError):
        raise FlowkitError(
            f"{os.fspath(state)} is not the state of an evolution; remove it"
        ) from None
    for name, value in setting.items():
        if theirs.get(name) != value:
            raise FlowkitError(
                f"{os.fspath(state)} is of another evolution: its {name} differs; remove the file, "
                "or name another one"
            )
    return Evolution(archive, best)


def _save(state: str | os.PathLike[str], setting: dict[str, Any], found: Evolution) -> None:
    archive = [(one.score, one.schedule.to_dict()) for one in found.archive]
    values = {"setting": setting, "best": found.best, "archive": archive}
    with atomic_file(state) as temporary:
        temporary.write_text(json.dumps(values), encoding="utf-8")
