"""A feature cache on a network: some steps are computed, in the others its blocks are forecast.

    with taylorseer(model, interval=4) as cache:
        images = pipe(...)                      # or sample(velocity, noise, times)
    print(cache.summary())

The outermost module's forward says where the run is (cache_keys.py); the forwards of the hooked
parts (cache_blocks.py) then compute and keep, or forecast.  A part that is skipped and whose output
nothing should read gives NaN, never zeros, so that an output which does depend on it shows at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from flowkit.errors import FlowkitError
from flowkit.samplers.cache_blocks import (
    ForwardHook,
    Part,
    bare_model,
    find_blocks,
    find_modules,
    is_hooked,
    leaves,
    rebuild,
)
from flowkit.samplers.cache_gate import FirstBlock
from flowkit.samplers.cache_keys import Clock, Moment, Place, planned_steps
from flowkit.samplers.cache_parts import Each, Stack
from flowkit.samplers.cache_state import Branch, Features, Pass, Stats
from flowkit.samplers.evaluations import Solver
from flowkit.samplers.forecast import Rule, Schedule
from flowkit.samplers.replay import PlannedRun
from flowkit.velocity import Velocity

__all__ = ["FeatureCache"]

LEVELS = ("block", "each", "module")


class FeatureCache:
    """The handle of a cache: what `taylorseer` and the others give.

    Its features are dropped when a run begins, by its times or the pipeline's, and when the shapes
    of the model's inputs change.  Gradients do not flow through forecasts.
    """

    def __init__(
        self,
        model: Any,
        rule: Rule,
        schedule: Schedule,
        *,
        level: str | None = None,
        blocks: Sequence[str] | None = None,
        modules: Sequence[str] | None = None,
        residual: bool = True,
        gate: FirstBlock | None = None,
        num_steps: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if level not in (None, *LEVELS):
            raise FlowkitError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
        self.rule, self.schedule, self.gate = rule, schedule, gate
        self.level, self.features = level, Features(rule, residual, device)
        self.model = bare_model(model)
        if is_hooked(self.model):
            raise FlowkitError(
                f"this {type(self.model).__name__} has a cache already; disable() that first"
            )
        found = find_blocks(self.model, blocks)
        parts = found
        skipped: list[Part] = []
        if level == "module" or modules is not None:
            self.level = "module"
            parts, skipped = find_modules(found, modules)
        if gate is not None and (len(parts) < 2 or self.level in ("module", "each")):
            raise FlowkitError('a gate needs level="block" and at least two blocks')
        self.parts = [name for name, _ in parts]
        scheduler = None if isinstance(model, nn.Module) else getattr(model, "scheduler", None)
        self.clock = Clock(
            self.model,
            num_steps,
            (lambda: model.scheduler) if scheduler is not None else None,
            self._begin,
            self._end,
        )
        self.stats = Stats()
        self._branches: dict[Hashable, Branch] = {}
        self._now: Pass | None = None
        self._ended = False
        whole = self.level in (None, "block")
        self._parts: Stack | Each = (
            Stack(self.features, gate)
            if whole
            else Each(self.features, blocks=self.level == "each")
        )
        self._hooks = [ForwardHook(self.model, self._run)]
        for i, (_, part) in enumerate(parts):
            self._hooks.append(ForwardHook(part, functools.partial(self._visit, i)))
        self._norms: dict[str, ForwardHook] = {}
        for name, part in skipped:
            self._hooks.append(ForwardHook(part, functools.partial(self._skip, name)))
            if isinstance(part, nn.LayerNorm | nn.RMSNorm):
                self._norms[name] = self._hooks[-1]

    # For users.

    def disable(self) -> None:
        """Take the cache off the model and drop its features; the statistics stay."""
        for hook in reversed(self._hooks):
            hook.remove()
        self.clock.close()
        self._hooks = []
        self._branches.clear()
        self.features.clear()

    def reset(self) -> None:
        """Begin a run.  Needed only after one that was broken off within its first step."""
        self.clock.reset()
        self._begin()

    def at(
        self, step: int, stage: int = 0, branch: Hashable = None, *, t: float | None = None
    ) -> AbstractContextManager[None]:
        """Say where the forward passes inside stand; a step before the last one begins a run.

        stage: evaluations of the step before this one.  branch: a name for each conditioning; None
        for the order of calls.  t: None for the model's time argument, or the step where it has
        none.
        """
        if step < 0 or step != int(step):
            raise FlowkitError(f"a step is a whole number from 0 on, got {step!r}")
        last = step + 1 == self.clock.num_steps
        return self.clock.at(Moment(int(step), stage, t, last, branch))

    def follow(
        self, velocity: Velocity, solver: str | Solver, times: Sequence[float], **options: Any
    ) -> Velocity:
        """`velocity` for one run of a solver, which then knows steps, stages and the last step.

        times: in the order of the run, decreasing for an inversion.  options: the solver's.
        Without this, each new time that the model sees is a step.
        """
        plan = planned_steps(solver, [float(t) for t in times], options)
        moments = {key: Moment(*key, t, last=key[0] == len(times) - 2) for t, key in plan}
        self.reset()
        return PlannedRun(velocity, list(plan), lambda key: self.clock.at(moments[key]))

    def summary(self) -> str:
        """One line on what is hooked and what the last run computed."""
        s, passes = self.stats, self.stats.computed + self.stats.forecast
        kind = "blocks as one" if isinstance(self._parts, Stack) else "outputs"
        return (
            f"{type(self.model).__name__}: {len(self.parts)} {kind}, order {self.rule.order} "
            f"{self.rule.mode}; {s.computed} of {passes} passes computed, full steps "
            f"{s.full_steps}; {s.nbytes / 2**20:.1f} MiB kept"
        )

    # The model's forward.

    def _run(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._now is not None:  # a model that calls itself
            return inner(*args, **kwargs)
        now = self._now = self._start(args, kwargs)
        try:
            out = self._attempt(now, inner, args, kwargs)
            while not (now.full or now.branch.covered or self._is_covered(now, out)):
                now = self._now = self._again(now)
                out = self._attempt(now, inner, args, kwargs)
        finally:
            self._now = None
        self._finish(now)
        return out

    def _attempt(
        self, now: Pass, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The model's output, NaN where it cannot do without what its norms give."""
        if now.full or now.branch.covered or not self._norms:
            return inner(*args, **kwargs)
        try:
            return inner(*args, **kwargs)
        except (RuntimeError, IndexError, TypeError):
            return torch.tensor(math.nan)

    def _start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        """What is known of a pass before it runs."""
        if self._ended:
            self._ended, self.stats = False, Stats()
        place = self.clock.locate(args, kwargs)
        signature = tuple((leaf.shape, leaf.dtype) for leaf in leaves((args, kwargs)))
        branch = self._branches.get((place.stage, place.branch))
        if branch is not None and branch.signature != signature:
            self.reset()
            place, branch = self.clock.locate(args, kwargs), None
        if branch is None:
            branch = self._branches[place.stage, place.branch] = Branch(signature)
        full: bool | None = self._must_compute(place, branch)
        if not full and self.gate is not None:
            full = None
        return Pass(place, self.rule.place(place.step, place.t), branch, full)

    def _must_compute(self, place: Place, branch: Branch) -> bool:
        schedule = self.schedule
        fresh = branch.computed < (schedule.warmup if schedule.steps is None else 1)
        return fresh or schedule.is_full(place.step) or (schedule.last and place.last)

    def _is_covered(self, now: Pass, out: Any) -> bool:
        """Whether the output of a first forecast depends on forecasts alone, and not on NaN."""
        now.branch.covered = not any(bool(leaf.isnan().any()) for leaf in leaves(_plain(out)))
        return now.branch.covered

    def _again(self, now: Pass) -> Pass:
        """The same pass, with more of the network kept for its output to read.

        Norms that feed more than forecast parts are computed; of a stack every block is forecast.
        """
        if self._norms:
            for hook in self._norms.values():
                hook.active = False
            self._norms = {}
            return Pass(now.place, now.at, now.branch, False)
        if self.level is not None or self.gate is not None or isinstance(self._parts, Each):
            raise FlowkitError(
                f"the output of {type(self.model).__name__} reads blocks whose output is not "
                'forecast; use taylorseer(level="each"), or name all blocks with blocks=[...]'
            )
        self._parts = Each(self.features, blocks=True)
        branch = Branch(now.branch.signature)
        self._branches = {(now.place.stage, now.place.branch): branch}
        return Pass(now.place, now.at, branch, True)

    def _finish(self, now: Pass) -> None:
        branch, full = now.branch, bool(now.full)
        if not now.calls:
            raise FlowkitError(
                f"none of the {len(self.parts)} parts hooked in {type(self.model).__name__} ran"
            )
        self._parts.finish(now)
        if full:
            branch.computed += 1
            self.stats.nbytes = max(
                self.stats.nbytes, sum(b.nbytes for b in self._branches.values())
            )
        self.stats.count(now.place.step, full)

    def _begin(self) -> None:
        self._branches.clear()
        self.stats = Stats()

    def _end(self) -> None:
        """A pipeline has ended: its features are of no more use."""
        self.clock.reset()
        self._branches.clear()
        self._ended = True

    # The parts' forwards.

    def _visit(
        self, index: int, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._now is None:
            raise FlowkitError(
                f"{self.parts[index]} ran outside of a forward pass of "
                f"{type(self.model).__name__}, so the cache knows no step; call the whole model, "
                "or disable() the cache before"
            )
        return self._parts.run(self._now, index, inner, args, kwargs)

    def _skip(
        self, name: str, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A part that only feeds others which are forecast."""
        now = self._now
        if now is None or now.full:
            out = inner(*args, **kwargs)
            if now is not None and name not in now.branch.outputs:
                now.branch.outputs[name] = rebuild(out, self.features.nan)
                if name in self._norms and isinstance(out, Tensor) and out.ndim == 3:
                    # One token does, and its modulation costs nothing.
                    now.branch.outputs[name] = self.features.nan(out[:, :1])
            return out
        return now.branch.outputs[name]


def _plain(out: Any) -> Any:
    """A model's output as tensors and tuples."""
    known = isinstance(out, Tensor | tuple | list | dict)
    return out if known else tuple(getattr(out, "__dict__", {}).values())
