"""Forecasts of a feature from its last values: the mathematics of the feature caches.

A forecast is a sum of the values kept, with weights that depend on their places alone:

    newton      F(t) = sum_i F[t_0, ..., t_i] (t - t_0) ... (t - t_(i-1))    t_0 the newest time
    official    F(j) = sum_i B_i (j - j_0)^i / i!,  B_(i+1) = (B_i - B_i of before) / (j_0 - j_1)

Newton's divided differences over the true times are the polynomial through the values, so they are
exact for features of degree <= order on any grid.  The papers' rule (Liu et al., 2025,
arXiv:2503.06923) counts steps j; it takes differences for derivatives, so it is exact for degree 1
only, where its full steps are evenly spaced.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowkit.errors import FlowkitError

__all__ = ["History", "Rule", "Schedule", "combine", "newton_weights", "official_weights"]

MODES = ("newton", "official")
MOST = 4  # orders


@functools.lru_cache(maxsize=256)
def newton_weights(nodes: tuple[float, ...], at: float) -> tuple[float, ...]:
    """Weights w with sum_j w_j p(nodes_j) = p(at) for all polynomials p of degree < len(nodes).

    nodes: one or more different places, in any order.  The weights add up to 1.
    """
    return tuple(
        math.prod((at - b) / (a - b) for k, b in enumerate(nodes) if k != j)
        for j, a in enumerate(nodes)
    )


@functools.lru_cache(maxsize=256)
def official_weights(nodes: tuple[float, ...], at: float, warmup: int = 1) -> tuple[float, ...]:
    """Weights of the papers' rule for values kept at the steps `nodes`, the newest first.

    warmup: the papers' first_enhance; full steps before the last of these take no differences.
    The weights add up to 1.
    """
    count = len(nodes)
    before: list[list[float]] = []
    for j in reversed(range(count)):  # from the oldest; a ladder B_0, B_1, ... as weights
        ladder = [[float(k == j) for k in range(count)]]
        if nodes[j] > warmup - 2:
            for old in before:
                gap = nodes[j] - nodes[j + 1]
                ladder.append([(b - a) / gap for b, a in zip(ladder[-1], old, strict=True)])
        before = ladder
    ahead = at - nodes[0]
    factors = [ahead**i / math.factorial(i) for i in range(len(before))]
    return tuple(
        math.fsum(f * b[k] for f, b in zip(factors, before, strict=True)) for k in range(count)
    )


def combine(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """sum_j weights_j values_j, in float32 or wider, then in the values' dtype; a new tensor.

    The weights must add up to 1.
    """
    if len(values) == 1:
        return values[0].clone()
    if len(values) == 2 and (values[0].dtype == torch.float32 or values[0].is_cuda):
        return torch.lerp(values[1], values[0], weights[0])  # one kernel, float32 inside
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    out = values[0].to(dtype) * weights[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        out = out.add_(value.to(dtype), alpha=weight)
    return out.to(values[0].dtype)


@dataclass(frozen=True)
class Rule:
    """How features are forecast.  order: 0 (reuse) to 4.  mode: "newton" or "official".

    warmup: of the schedule, which the official rule looks at.
    """

    order: int = 1
    mode: str = "newton"
    warmup: int = 1

    def __post_init__(self) -> None:
        if self.order not in range(MOST + 1):
            raise FlowkitError(f"order must be 0 (reuse) to {MOST}, got {self.order!r}")
        if self.mode not in MODES:
            raise FlowkitError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")

    def place(self, step: int, t: float) -> float:
        """Where an evaluation stands, in what the rule is a polynomial of."""
        return t if self.mode == "newton" else float(step)

    def weights(self, nodes: tuple[float, ...], at: float) -> tuple[float, ...]:
        """The weights of values kept at `nodes`, newest first, for a forecast of the one `at`."""
        if self.mode == "newton":
            return newton_weights(nodes, at)
        return official_weights(nodes, at, self.warmup)


class History:
    """The last order + 1 values of one feature, newest first, and where they were computed.

    They are copies in their own dtype; `device` is where, None for where they are.
    relative: a note of what they are, differences to something else; they are not mixed.
    """

    def __init__(self, rule: Rule, device: torch.device | str | None = None) -> None:
        self.rule, self.device, self.relative = rule, device, False
        self.nodes: tuple[float, ...] = ()
        self.values: tuple[Tensor, ...] = ()

    def add(self, place: float, value: Tensor, below: Tensor | None = None) -> None:
        """Keep a copy of a value, or of what it is above `below`, in the memory of one let go.

        One of another kind than those kept starts anew, one at the newest place replaces it.
        """
        relative = below is not None
        if self.values and (self.values[0].shape, self.relative) != (value.shape, relative):
            self.nodes, self.values = (), ()
        self.relative = relative
        again = place in self.nodes[:1]
        kept = slice(int(again), self.rule.order + int(again))
        free = [*self.values[: kept.start], *self.values[kept.stop :]]
        own = free[0] if free else torch.empty_like(value, device=self.device, requires_grad=False)
        if below is None or own.device != value.device:
            own.copy_(value.detach() if below is None else value.detach() - below)
        else:
            torch.sub(value.detach(), below, out=own)
        self.nodes = (place, *self.nodes[kept])
        self.values = (own, *self.values[kept])

    def forecast(self, place: float, device: torch.device | None = None) -> Tensor:
        """The feature at `place`, a new tensor on `device`."""
        values = self.values
        if self.device is not None:
            values = tuple(value.to(device) for value in values)
        return combine(self.rule.weights(self.nodes, place), values)

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(value.nbytes for value in self.values)


@dataclass(frozen=True)
class Schedule:
    """Which steps are computed in full: the first `warmup`, then every `interval`-th.

    interval: None for none after the warm-up.  steps: exactly these instead.  last: the last step
    as well, where their number is known.
    """

    interval: int | None = 4
    warmup: int = 2
    steps: Collection[int] | None = None
    last: bool = False

    def __post_init__(self) -> None:
        for name, value in (("interval", self.interval), ("warmup", self.warmup)):
            if value is not None and (value < 1 or value != int(value)):
                raise FlowkitError(f"{name} must be a whole number from 1 on, got {value!r}")
        if self.steps is not None and (0 not in self.steps or min(self.steps) < 0):
            raise FlowkitError(
                f"steps must hold 0, where there is nothing to forecast from, got "
                f"{sorted(self.steps)}"
            )

    def is_full(self, step: int) -> bool:
        """Whether a step is computed, the last one apart."""
        if self.steps is not None:
            return step in self.steps
        if self.interval is None or step < self.warmup:
            return step < self.warmup
        return (step - self.warmup + 1) % self.interval == 0

    def full_steps(self, num_steps: int) -> list[int]:
        """The steps, of `num_steps`, that are computed."""
        last = num_steps - 1 if self.last else -1
        return [j for j in range(num_steps) if self.is_full(j) or j == last]
