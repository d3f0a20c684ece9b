"""Where a forward pass of a cached network stands in its run: (step, stage, branch), and its time.

Forward passes are never counted through a run.  In this order, a key comes from

    cache.at(step, stage, branch)         said outright
    cache.follow(velocity, solver, times) the solver's own evaluation times
    the pipeline's scheduler              its place among its timesteps
    the model's time argument             a new value is a new step, and sample() says where a run
                                          begins and ends

and the branch, unless said, from diffusers' cache context and the order of calls within the step.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flowkit.errors import FlowkitError
from flowkit.samplers.cache_context import CacheContext
from flowkit.samplers.current_run import Run, current_run
from flowkit.samplers.evaluations import Solver
from flowkit.samplers.replay import evaluation_keys
from flowkit.samplers.scheduler import FlowScheduler
from flowkit.samplers.solve import evaluation_times, is_adaptive

__all__ = ["Clock", "Moment", "Place", "planned_steps"]

_TIME_NAMES = ("timestep", "timesteps", "t", "time", "times", "sigma", "sigmas", "noise_labels")


@dataclass(frozen=True)
class Place:
    """A forward pass: the run's step, the evaluation in it, which of several conditionings.

    t: its time, in whatever scale the run has.  last: whether the step is known to be the last.
    """

    step: int
    stage: int
    branch: Hashable
    t: float
    last: bool = False


@dataclass(frozen=True)
class Moment:
    """A place as it is said, or found out; the time may be left to the model's argument."""

    step: int
    stage: int
    t: float | None
    last: bool = False
    branch: Hashable = None


def planned_steps(
    solver: str | Solver, times: Sequence[float], options: dict[str, Any]
) -> list[tuple[float, tuple[int, int]]]:
    """(t, (step, stage)) of each evaluation of a run; steps count in the order of the run."""
    keys = evaluation_keys(solver, times, **options)
    if times[-1] > times[0]:
        return keys
    last = len(times) - 2
    return [(t, (last - interval, stage)) for t, (interval, stage) in keys]


class Clock:
    """Tells a model's forward passes apart.

    num_steps: of a run, where it is known.  scheduler: gives the pipeline's, or None.
    on_new_run is called when a run begins after another: its step comes before the one seen last.
    on_end is called when a pipeline has ended.
    """

    def __init__(
        self,
        model: nn.Module,
        num_steps: int | None,
        scheduler: Callable[[], Any] | None,
        on_new_run: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        self.num_steps, self.scheduler, self.on_new_run = num_steps, scheduler, on_new_run
        self._model = type(model).__name__
        self._time = _time_parameter(model)
        self._told: Moment | None = None
        self._run: _SchedulerRun | None = None  # of a pipeline
        self._loop: Run | None = None  # of sample() and invert()
        self._loop_steps: int | None = None
        self._context = CacheContext(model, on_end) if hasattr(model, "cache_context") else None
        self.reset()

    def reset(self) -> None:
        """Forget the run."""
        self._seen: tuple[int, int] | None = None  # (step, stage)
        self._calls: Counter[Hashable] = Counter()
        self._step = 0  # this and the next two as read off the time argument
        self._rising: bool | None = None
        self._t: float | None = None
        self._run, self._loop, self._loop_steps = None, None, None

    def close(self) -> None:
        """Take the listener for cache contexts off the model."""
        if self._context is not None:
            self._context.remove()

    @contextmanager
    def at(self, moment: Moment) -> Iterator[None]:
        """Every forward pass inside stands there."""
        before, self._told = self._told, moment
        try:
            yield
        finally:
            self._told = before

    def locate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Place:
        """Where the forward pass with these arguments stands."""
        if self._told is None and (run := current_run()) is not self._loop:
            begun = self._seen is not None
            self.reset()
            self._loop, self._loop_steps = run, _distinct_times(run)
            if begun:
                self.on_new_run()
        moment = self._told or self._scheduled() or self._read(args, kwargs)
        if self._seen is not None and moment.step < self._seen[0]:
            self._calls.clear()
            self.on_new_run()
        if self._seen != (moment.step, moment.stage):
            self._seen = moment.step, moment.stage
            self._calls.clear()
        branch = moment.branch
        if branch is None:
            name = self._context.name if self._context is not None else None
            branch = (name, self._calls[name])
            self._calls[name] += 1
        t = moment.t
        if t is None:
            t = self._argument(args, kwargs)
        if t is None or not math.isfinite(t):
            t = float(moment.step)
        return Place(moment.step, moment.stage, branch, t, moment.last)

    def _scheduled(self) -> Moment | None:
        """By the place a pipeline's scheduler has reached."""
        scheduler = self.scheduler() if self.scheduler is not None else None
        timesteps = getattr(scheduler, "timesteps", None)
        if not isinstance(timesteps, Tensor) or not len(timesteps):
            return None
        if not hasattr(scheduler, "step_index"):
            return None
        if self._run is None or self._run.timesteps is not timesteps:
            if self._run is not None:
                self.reset()
                self.on_new_run()
            self._run = _SchedulerRun(scheduler)
        return self._run.moment(scheduler)

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Moment:
        """By the model's time argument: another value is another step."""
        t = self._argument(args, kwargs)
        if t is None:
            raise FlowkitError(
                f"the cache cannot tell at which step {self._model} runs: it was given no time "
                f"argument ({self._time[1] or ' or '.join(_TIME_NAMES[:3])}); call it inside "
                "`with cache.at(step):`"
            )
        if self._t is not None and t != self._t:
            rising = t > self._t
            if self._rising in (None, rising):
                self._step, self._rising = self._step + 1, rising
            else:
                self._step, self._rising = 0, None
        self._t = t
        return Moment(self._step, 0, t, last=self._step + 1 == self._known_steps())

    def _argument(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
        index, name = self._time
        return _number(kwargs.get(name, args[index] if index < len(args) else None))

    def _known_steps(self) -> int | None:
        """Of the run: by the plain loop, the option, or a scheduler without step_index."""
        if self._loop_steps is not None:
            return self._loop_steps
        if self.num_steps is not None or self.scheduler is None:
            return self.num_steps
        timesteps = getattr(self.scheduler(), "timesteps", None)
        if not isinstance(timesteps, Tensor) or not len(timesteps):
            return None
        if self._run is None or self._run.timesteps is not timesteps:
            self._run = _SchedulerRun(self.scheduler())
        return self._run.steps[-1][0] + 1


class _SchedulerRun:
    """A scheduler's timesteps and what step and stage each of them is."""

    def __init__(self, scheduler: Any) -> None:
        self.timesteps: Tensor = scheduler.timesteps
        self.times: list[float] = self.timesteps.tolist()  # the one time that the host waits
        self.begin: int | None = None
        self.steps = _solver_steps(scheduler) or _value_steps(self.times)

    def moment(self, scheduler: Any) -> Moment:
        index = scheduler.step_index
        if index is None:
            index = getattr(scheduler, "begin_index", None) or 0
        if self.begin is None:
            self.begin = index
        index = min(index, len(self.times) - 1)
        step, stage = self.steps[index]
        first, _ = self.steps[self.begin]
        return Moment(step - first, stage, self.times[index], last=step == self.steps[-1][0])


def _distinct_times(run: Run | None) -> int | None:
    """How many times a run of the plain loop evaluates at, where that is known beforehand."""
    if run is None or is_adaptive(run.solver):
        return None
    return len(set(evaluation_times(run.solver, run.times, **run.options)))


def _value_steps(times: Sequence[float]) -> list[tuple[int, int]]:
    """Every new value begins a step; a repeated one is a further call within it."""
    steps, step = [], -1
    for i, t in enumerate(times):
        step += not i or t != times[i - 1]
        steps.append((step, 0))
    return steps


def _solver_steps(scheduler: Any) -> list[tuple[int, int]] | None:
    """The steps and stages of our own scheduler's solver."""
    if not isinstance(scheduler, FlowScheduler):
        return None
    plan = planned_steps(scheduler._solver, scheduler.times, scheduler._options)
    return [key for _, key in plan] if len(plan) == len(scheduler.timesteps) else None


def _time_parameter(model: nn.Module) -> tuple[int, str]:
    """Position and name of a forward's time argument; the second one if no name is known."""
    names = [
        name
        for name, p in inspect.signature(model.forward).parameters.items()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    for name in _TIME_NAMES:
        if name in names:
            return names.index(name), name
    return (1, names[1]) if len(names) > 1 else (1, "")


def _number(value: Any) -> float | None:
    """A time as a Python float: of a tensor its first element."""
    if isinstance(value, Tensor):
        usable = value.numel() and value.ndim <= 1 and not value.is_complex()
        return float(value.reshape(-1)[0]) if usable else None
    return float(value) if isinstance(value, int | float) else None
