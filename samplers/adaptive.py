"""Adaptive solvers: they choose their steps by the error they estimate.

Which times they evaluate depends on the state, so a dry run on another state tells nothing.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.samplers.evaluations import Evaluations, Solver

__all__ = ["ADAPTIVE", "dopri5"]

T = TypeVar("T")
_Stages = Generator[tuple[Tensor, float], tuple[Tensor, Tensor], T]

# Dormand & Prince, 1980, "A family of embedded Runge-Kutta formulae", RK5(4)7M: where the stages
# lie, what they take of the slopes before them, and the rule of order 5 less the one of order 4.
# The last stage is the result itself, and its slope the first of the next step.
_AT = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)

_SHORTEST = 64 * math.ulp(1.0)  # the stages of a shorter step drown in the rounding of t


def dopri5(
    x: Tensor,
    times: Sequence[float],
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_evaluations: int = 10_000,
) -> Evaluations:
    """Dormand-Prince 5(4), order 5 with steps of its own, 6 NFE per tried step and 2 to begin.

    A step is taken if the root mean square of error / (atol + rtol max(|x_t|, |x_s|)) is at most 1
    in every sample: the steps, and within the tolerance the result, depend on the batch.  It lands
    on every time of `times`, of which two are enough.  One host sync per tried step.
    Raises FlowkitError for tolerances that are not positive, rather than exceed `max_evaluations`,
    and where the velocity is not finite or no step is short enough for it.
    Dormand & Prince, 1980; first step and PI control: Hairer, Norsett & Wanner, 1993, "Solving
    Ordinary Differential Equations I", II.4.
    """
    if not (rtol > 0 and atol > 0):
        raise FlowkitError(f"rtol and atol must be positive, got {rtol} and {atol}")
    x, v = yield x, times[0]
    h, spent, before = (yield from _first_step(x, v, times, rtol, atol)), 2, 1.0
    for t, end in pairwise(times):
        while t != end:
            _check_budget(spent := spent + 6, max_evaluations, t)
            landing = abs(end - t) <= 1.01 * h
            s = end if landing else t + math.copysign(h, end - t)
            x_s, v_s, error = yield from _tried(x, v, t, s)
            ratio = _norm(error / (atol + rtol * torch.maximum(x.abs(), x_s.abs())))
            if ratio <= 1:  # false for NaN too
                grown = abs(s - t) * _growth(ratio, before)
                h = max(grown, h) if landing else grown  # the grid has cut it short, not the error
                x, v, t, before = x_s, v_s, s, ratio
            else:
                h = abs(s - t) * _growth(ratio, 1.0)
                _check_length(h, t, ratio)
    return x


ADAPTIVE: frozenset[Solver] = frozenset({dopri5})
"""The solvers whose evaluations depend on the state: no dry run, no scheduler."""


def _tried(x: Tensor, v: Tensor, t: float, s: float) -> _Stages[tuple[Tensor, Tensor, Tensor]]:
    """A step from t to s: the state there, its velocity, and the estimated error of the state."""
    x_s, slopes = x, [v]
    for at, row in zip(_AT, _STAGES, strict=True):
        x_s = x + (s - t) * _combined(row, slopes)
        _, v = yield x_s, s if at == 1 else t + at * (s - t)
        slopes.append(v)
    return x_s, v, (s - t) * _combined(_ERROR, slopes)


def _first_step(
    x: Tensor, v: Tensor, times: Sequence[float], rtol: float, atol: float
) -> _Stages[float]:
    """A length whose Euler step would miss by a hundredth of the tolerance, to the order of 5."""
    t, span, scale = times[0], times[-1] - times[0], atol + rtol * x.abs()
    size, speed = _norm(x / scale), _norm(v / scale)
    if not math.isfinite(size + speed):
        raise FlowkitError(f"the state and its velocity must be finite, at t={t:.4g} they are not")
    h = min(0.01 * size / speed if min(size, speed) > 1e-5 else 1e-6, abs(span))
    s = t + math.copysign(h, span)
    _, v_s = yield x + (s - t) * v, s
    bend = _norm((v_s - v) / scale) / h
    if not math.isfinite(bend):
        return h
    return min(100 * h, (0.01 / max(speed, bend, 0.01)) ** 0.2, abs(span))


def _growth(ratio: float, before: float) -> float:
    """How much longer the next step may be, from the ratios of error to tolerance of two steps."""
    if not math.isfinite(ratio):
        return 0.2
    return min(max(0.9 * max(ratio, 1e-10) ** -0.17 * max(before, 1e-4) ** 0.04, 0.2), 10.0)


def _norm(error: Tensor) -> float:
    """The root mean square of the worst sample."""
    return error.reshape(len(error), -1).square().mean(1).sqrt().max().item()


def _combined(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    first, *rest = (w * v for w, v in zip(weights, slopes, strict=True) if w)
    return sum(rest, first)


def _check_budget(spent: int, max_evaluations: int, t: float) -> None:
    if spent > max_evaluations:
        raise FlowkitError(
            f"dopri5 got to t={t:.4g} with max_evaluations={max_evaluations}; "
            "allow more of them, or a larger rtol and atol"
        )


def _check_length(h: float, t: float, ratio: float) -> None:
    if h < _SHORTEST:
        what = "too steep" if math.isfinite(ratio) else "not finite"
        raise FlowkitError(
            f"dopri5 has shrunk its step to nothing at t={t:.6g}: the velocity is {what} there; "
            "mend it, or take a solver of fixed steps such as 'heun'"
        )
