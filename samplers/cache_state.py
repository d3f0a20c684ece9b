"""What a feature cache keeps: of a run, of its branches, of a pass under way, of features."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.samplers.cache_blocks import leaves, rebuild
from flowkit.samplers.cache_keys import Place
from flowkit.samplers.forecast import History, Rule

__all__ = ["Branch", "Features", "Inputs", "Pass", "Stats", "inputs_of"]

Inputs = list[tuple[Tensor, int | None]]
"""Tensors, and how often they had been written to."""


@dataclass
class Stats:
    """What a run has computed.  computed, forecast: forward passes.

    full_steps, forecast_steps: steps in which some pass was computed, and the others.
    nbytes: of the features kept, at most.
    """

    computed: int = 0
    forecast: int = 0
    full_steps: list[int] = field(default_factory=list)
    forecast_steps: list[int] = field(default_factory=list)
    nbytes: int = 0

    def count(self, step: int, full: bool) -> None:
        """One more forward pass."""
        self.computed, self.forecast = self.computed + full, self.forecast + (not full)
        if full and step not in self.full_steps[-1:]:
            self.full_steps.append(step)
            if step in self.forecast_steps[-1:]:
                self.forecast_steps.pop()
        elif not full and step not in self.full_steps[-1:] + self.forecast_steps[-1:]:
            self.forecast_steps.append(step)


class Branch:
    """What is kept of the passes of one (stage, branch)."""

    def __init__(self, signature: Hashable) -> None:
        self.signature = signature
        self.histories: dict[Hashable, list[History]] = {}
        self.outputs: dict[Hashable, Any] = {}  # as computed, with NaN for every number
        self.calls: int | None = None  # of blocks in a pass
        self.computed = 0  # passes
        self.covered = False  # known to reach the output through forecasts alone

    @property
    def nbytes(self) -> int:
        """Bytes of all features."""
        return sum(h.nbytes for group in self.histories.values() for h in group)


@dataclass
class Pass:
    """A forward pass under way.  full: computed or forecast, None while a gate has not decided."""

    place: Place
    at: float  # in what the rule is a polynomial of
    branch: Branch
    full: bool | None
    visits: Counter[int] = field(default_factory=Counter)  # of each part
    calls: int = 0  # of all parts
    base: Inputs = field(default_factory=list)  # what the whole stack adds to
    last: Any = None  # output of the block that ran last


class Features:
    """Keeps the outputs of parts of a network in a pass's branch, and forecasts them.

    residual: keep what a part adds to an input of its own shape, where it has one.
    """

    def __init__(
        self, rule: Rule, residual: bool, device: torch.device | str | None = None
    ) -> None:
        self.rule, self.residual, self.device = rule, residual, device
        self._nans: dict[Hashable, Tensor] = {}

    def keep(self, now: Pass, slot: Hashable, out: Any, base: Inputs) -> None:
        """The tensors of the output `out`, or what they are above `base`."""
        branch = now.branch
        if slot not in branch.outputs:
            branch.outputs[slot] = rebuild(out, self.nan)
        found = leaves(out)
        histories = branch.histories.setdefault(slot, [])
        while len(histories) < len(found):
            histories.append(History(self.rule, self.device))
        for history, leaf in zip(histories, found, strict=True):
            history.add(now.at, leaf, self._below(leaf, base))

    def forecast(self, now: Pass, slot: Hashable, base: Inputs) -> Any:
        """An output like those kept, of tensors that are the caller's own."""
        histories = now.branch.histories.get(slot)
        if histories is None:
            raise FlowkitError(
                "a part of the model runs in a forecast pass that did not run in a computed one; "
                "give each kind of pass a branch with cache.at(step, branch=...)"
            )
        remaining = iter(histories)

        def forecast(like: Tensor) -> Tensor:
            history = next(remaining)
            value = history.forecast(now.at, like.device)
            below = self._below(like, base) if history.relative else None
            return value if below is None else value.add_(below)

        return rebuild(now.branch.outputs[slot], forecast)

    def snapshot(self, out: Any) -> Any:
        """An output that may be the last of a pass, safe from what the model does with it."""
        return rebuild(out, lambda leaf: leaf.detach().clone())

    def nan(self, like: Tensor) -> Tensor:
        """Not a number, in the shape of a tensor: one for all of that shape."""
        key = like.shape, like.dtype, like.device
        if key not in self._nans:
            self._nans[key] = torch.full_like(like, math.nan, requires_grad=False)
        return self._nans[key]

    def clear(self) -> None:
        """Drop what is kept here."""
        self._nans.clear()

    def _below(self, leaf: Tensor, base: Inputs) -> Tensor | None:
        """What a part adds to, to give `leaf`: the first of its inputs of that shape.

        None where there is none, or where the part has written into it.
        """
        if not self.residual:
            return None
        for x, edits in base:
            if x.shape == leaf.shape and x.dtype == leaf.dtype:
                same = edits == _edits(x) and x.data_ptr() != leaf.data_ptr()
                return x.detach() if same else None
        return None


def inputs_of(tree: Any) -> Inputs:
    """The tensors among a part's arguments."""
    return [(leaf, _edits(leaf)) for leaf in leaves(tree)]


def _edits(x: Tensor) -> int | None:
    """torch's count of in-place edits, which tensors of inference mode do not have."""
    return None if x.is_inference() else x._version
