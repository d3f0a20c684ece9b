"""A run of a solver whose evaluations are recorded, or given what another run recorded.

    with share_values(model) as values:
        source = recording(source, values, solver, times[::-1], steps=4)
        noise = invert(source, data, times, solver).x
        edited = sample(replaying(target, values, solver, times), noise, times, solver).x

Evaluations correspond by (interval, stage): interval i of the grid is between times[i] and
times[i + 1], whichever way a run goes through it, and stage counts the evaluations made in it.  So
the midpoints of RF-Solver meet at one time, while the first evaluation of an interval, which an
inversion makes at its end next to the data, meets the one that sampling makes next to the noise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.samplers.evaluations import Solver
from flowkit.samplers.solve import evaluation_times
from flowkit.samplers.value_sharing import Key, SharedValues
from flowkit.velocity import Velocity

__all__ = ["PlannedRun", "evaluation_keys", "recording", "replaying"]


def recording(
    velocity: Velocity,
    values: SharedValues,
    solver: str | Solver,
    times: Sequence[float],
    *,
    steps: int | None = None,
    **options: Any,
) -> Velocity:
    """`velocity` for one run along `times`, whose attention values are kept.

    velocity: must run the model once an evaluation, so it cannot be a guided one.
    times: in the order of the run, decreasing for an inversion.  steps: keep those of this many
    intervals next to the noise; None for all.  options: the solver's.
    What `values` kept before is forgotten.
    """
    values.clear()
    return PlannedRun(velocity, _planned(solver, times, steps, options), values.record)


def replaying(
    velocity: Velocity,
    values: SharedValues,
    solver: str | Solver,
    times: Sequence[float],
    *,
    steps: int | None = None,
    **options: Any,
) -> Velocity:
    """`velocity` for one run along `times`, on the attention values that are kept for it.

    velocity: a guided one gets them in both branches; wrap one branch alone to keep it there.
    Where the two runs evaluate an interval unequally often (FireFlow's first step has one
    evaluation more), the last ones correspond.  Arguments as of `recording`.
    """
    plan = _planned(solver, times, steps, options)
    here = Counter(key[0] for _, key in plan if key is not None)
    there = Counter(interval for interval, _ in values.kept)

    def partner(key: Key | None) -> Key | None:
        if key is None or key[0] not in there:
            return None
        interval, stage = key
        return interval, max(stage + there[interval] - here[interval], 0)

    return PlannedRun(velocity, [(t, partner(key)) for t, key in plan], values.replay)


def evaluation_keys(
    solver: str | Solver, times: Sequence[float], **options: Any
) -> list[tuple[float, Key]]:
    """Time and (interval, stage) of each evaluation of a run, in order.

    times: in the order of the run; the intervals of an inversion come last to first.
    Of several evaluations at one grid time the last begins a step, the others end the one before.
    """
    times = [float(t) for t in times]
    last, backwards = len(times) - 2, times[-1] < times[0]
    index = {t: i for i, t in enumerate(times)}
    visited = evaluation_times(solver, times, **options)
    left, stages, keys = Counter(visited), Counter[int](), []
    for t in visited:
        left[t] -= 1
        if t in index:
            step = index[t] - (left[t] > 0)
        else:
            step = sum((s > t) if backwards else (s < t) for s in times) - 1
        step = min(max(step, 0), last)
        interval = last - step if backwards else step
        keys.append((t, (interval, stages[interval])))
        stages[interval] += 1
    return keys


Plan = list[tuple[float, Key | None]]


def _planned(
    solver: str | Solver, times: Sequence[float], steps: int | None, options: dict[str, Any]
) -> Plan:
    """The evaluations of a run, with the keys of those in the first `steps` intervals."""
    most = len(times) - 1
    if steps is not None and not 0 <= steps <= most:
        raise FlowkitError(f"values can be shared in 0 to {most} of {most} steps, got {steps}")
    keys = evaluation_keys(solver, times, **options)
    return [(t, key if steps is None or key[0] < steps else None) for t, key in keys]


class PlannedRun:
    """A velocity for one run whose evaluations are known: each happens inside act(its key).

    plan: their times in order, with their keys; None for one that happens outside of any act.
    FlowkitError, at an evaluation: it is not at the time of the plan's next.
    """

    def __init__(
        self, velocity: Velocity, plan: Plan, act: Callable[[Key], AbstractContextManager[None]]
    ) -> None:
        self.velocity, self.plan, self.act = velocity, plan, act
        self.done = 0

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        planned, key = self.plan[self.done] if self.done < len(self.plan) else (None, None)
        if planned != float(t):
            raise FlowkitError(
                f"evaluation {self.done} is at t = {float(t):.6g}, expected was "
                f"{'none' if planned is None else f't = {planned:.6g}'}; make one of these for "
                "each run, with the run's solver, options and times in its order"
            )
        self.done += 1
        with self.act(key) if key is not None else nullcontext():
            return self.velocity(x_t, t)
