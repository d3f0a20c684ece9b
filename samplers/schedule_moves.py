"""Where schedules come from: what a search starts with, and how a child differs from its parents.

vary_steps    times and the switches of every step, for the solver "unified" (USF's S^3)
vary_times    times alone, for any solver (AutoDiffusion)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flowkit.errors import FlowkitError
from flowkit.samplers.schedule_file import QUANTITIES, RELAXATIONS, UNIFIED, Schedule, Step

__all__ = ["RESOLUTION", "on_cells", "unified_schedules", "vary_steps", "vary_times"]

RESOLUTION = 1000  # cells of AutoDiffusion's grid
_APART = 1e-4  # of two times, in shares of the whole
# What a new step is drawn from: order as in USF's search, quantities with our favourite first.
_ORDER_SHARES = {1: 0.2, 2: 0.4, 3: 0.3, 4: 0.1}
_QUANTITY_SHARES = (0.6, 0.2, 0.2)  # in the order of QUANTITIES


def unified_schedules(times: Sequence[float], *, analytic: bool = False) -> list[Schedule]:
    """The fixed solvers that are points in the space of steps, on these times: Euler, ab2, deis
    "tab" 3 in velocity, abm of order 3 and 4, dpmpp_2m, dpmpp_3m, unipc of order 2, and
    Adams-Bashforth of the noise.  analytic: their first steps are."""
    kinds = {
        "euler": Step(),
        "ab2": Step(order=2, stencil=1),
        "tab 3": Step(order=3, stencil=2),
        "abm": Step(order=2, stencil=1, corrector="pseudo"),
        "abm order 4": Step(order=3, stencil=2, corrector="pseudo"),
        "dpmpp_2m": Step("data", 2, 1, "bh2"),
        "dpmpp_3m": Step("data", 3, 2),
        "unic 1": Step("data", 1, 0, 0.0, "pseudo", "bh2"),
        "unipc": Step("data", 2, 1, "bh2", "pseudo"),
        "noise 2": Step("noise", 2, 1),
    }
    count = len(times) - 1
    return [
        Schedule(tuple(times), (step,) * count, analytic=analytic, info={"name": name})
        for name, step in kinds.items()
    ]


def vary_steps(parents: Sequence[Schedule], rng: random.Random) -> Schedule:
    """A child of one parent, or at times of two, with some times moved and some steps changed.

    Parents that are not of the solver "unified" are passed over.  The ends of the times stay.
    """
    parents = [parent for parent in parents if parent.solver == UNIFIED]
    if not parents:
        raise FlowkitError(
            "vary_steps needs a parent of the solver 'unified'; see unified_schedules"
        )
    child = rng.choice(parents)
    times, steps = list(child.times), list(child.steps)
    if rng.random() < 0.3:
        other = rng.choice([one for one in parents if one.analytic == child.analytic])
        cut = rng.randrange(len(steps) + 1)  # at an end: the times of one, the steps of the other
        steps[cut:] = other.steps[cut:]
        if 0 < cut < len(steps) and times[cut] < other.times[cut + 1]:
            times[cut + 1 :] = other.times[cut + 1 :]
    for i in range(1, len(times) - 1):
        if rng.random() < 0.3:
            times[i] = _moved(times[i - 1], times[i], times[i + 1], rng)
    steps = [_changed(step, rng) if rng.random() < 0.3 else step for step in steps]
    return Schedule(tuple(times), tuple(steps), analytic=child.analytic)


def vary_times(parents: Sequence[Schedule], rng: random.Random) -> Schedule:
    """A child with other inner times, each on one of RESOLUTION + 1 grid points, none twice.

    AutoDiffusion (Li et al., 2023, arXiv:2309.10438): half of the children are mutations, in which
    each time is replaced with probability 0.1 by an unused one, and half crossovers, which take
    each time from one of two parents; here without duplicates and with the ends fixed.
    """
    child = rng.choice(parents)
    first, *inner, last = child.times
    used = [_cell(t, first, last) for t in inner]
    if rng.random() < 0.5:
        other = [_cell(t, first, last) for t in rng.choice(parents).times[1:-1]]
        used = [rng.choice(pair) for pair in zip(used, other, strict=True)]
    else:
        used = [rng.randrange(1, RESOLUTION) if rng.random() < 0.1 else cell for cell in used]
    cells = set(used)
    while len(cells) < len(inner):  # a crossover or a mutation met a time that is there
        cells.add(rng.randrange(1, RESOLUTION))
    return _on(cells, child)


def on_cells(schedule: Schedule, rng: random.Random | None = None) -> Schedule:
    """The schedule with its inner times rounded to AutoDiffusion's grid; drawn there if rng."""
    first, *inner, last = schedule.times
    if len(inner) >= RESOLUTION:
        raise FlowkitError(f"at most {RESOLUTION} steps fit on the grid, got {len(inner) + 1}")
    if rng is not None:
        return _on(set(rng.sample(range(1, RESOLUTION), len(inner))), schedule)
    cells: set[int] = set()
    for t in inner:
        free = (cell for cell in range(1, RESOLUTION) if cell not in cells)
        cells.add(min(free, key=lambda cell: abs(cell - _cell(t, first, last))))
    return _on(cells, schedule)


def _on(cells: set[int], schedule: Schedule) -> Schedule:
    first, *_, last = schedule.times
    inner = [first + (last - first) * cell / RESOLUTION for cell in sorted(cells)]
    return replace(schedule, times=(first, *inner, last), info={})


def _cell(t: float, first: float, last: float) -> int:
    return min(max(round(RESOLUTION * (t - first) / (last - first)), 1), RESOLUTION - 1)


def _moved(before: float, t: float, after: float, rng: random.Random) -> float:
    """A time nearby, still apart from its neighbours."""
    width = min(t - before, after - t)
    margin = min(_APART, 0.25 * (after - before))
    return min(max(t + rng.gauss(0, 0.3) * width, before + margin), after - margin)


def _changed(step: Step, rng: random.Random) -> Step:
    """Another step: drawn anew, or the same with other numbers for its relaxations."""
    if rng.random() < 0.5:
        return _drawn(rng)
    names = ("relaxation", "corrector_relaxation")
    values = {name: getattr(step, name) for name in names}
    nudged = {
        name: value + rng.gauss(0, 0.5)
        for name, value in values.items()
        if not isinstance(value, str) and rng.random() < 0.5
    }
    return replace(step, **nudged)


def _drawn(rng: random.Random) -> Step:
    quantity = rng.choices(QUANTITIES, _QUANTITY_SHARES)[0]
    order = rng.choices(list(_ORDER_SHARES), list(_ORDER_SHARES.values()))[0]
    named = [] if quantity == "velocity" else list(RELAXATIONS)
    relaxations: list[Any] = [rng.choice([0.0, rng.gauss(0, 1), *named]) for _ in range(2)]
    corrector = rng.choice(("none", "pseudo", "pseudo"))
    stencil = rng.randint(order - 1, 3)
    return Step(quantity, order, stencil, relaxations[0], corrector, relaxations[1])
