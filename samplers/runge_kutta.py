"""Runge-Kutta solvers: a step looks at nothing but the state it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from flowkit.samplers.evaluations import Evaluations

__all__ = ["euler", "heun", "midpoint", "rk4"]


def euler(x: Tensor, times: Sequence[float]) -> Evaluations:
    """Order 1, 1 NFE per step: x_s = x_t + (s - t) v_t."""
    for t, s in pairwise(times):
        x, v = yield x, t
        x = x + (s - t) * v
    return x


def midpoint(x: Tensor, times: Sequence[float]) -> Evaluations:
    """Order 2, 2 NFE per step: the slope at the middle of the step.

    RF-Solver of order 2 is this very rule (Wang et al., 2024, arXiv:2411.04746): its Taylor step
    x + h v + h^2/2 v' with v' = (v_half - v) / (h/2) is x + h v_half.
    """
    for t, s in pairwise(times):
        x, v = yield x, t
        _, v = yield x + 0.5 * (s - t) * v, 0.5 * (t + s)
        x = x + (s - t) * v
    return x


def heun(x: Tensor, times: Sequence[float]) -> Evaluations:
    """Order 2, 2 NFE per step: the average of the slopes at both ends of the step."""
    for t, s in pairwise(times):
        x, v_t = yield x, t
        _, v_s = yield x + (s - t) * v_t, s
        x = x + 0.5 * (s - t) * (v_t + v_s)
    return x


def rk4(x: Tensor, times: Sequence[float]) -> Evaluations:
    """Order 4, 4 NFE per step: the classical rule of Runge and Kutta."""
    for t, s in pairwise(times):
        h = s - t
        x, v_1 = yield x, t
        _, v_2 = yield x + 0.5 * h * v_1, 0.5 * (t + s)
        _, v_3 = yield x + 0.5 * h * v_2, 0.5 * (t + s)
        _, v_4 = yield x + h * v_3, s
        x = x + h / 6 * (v_1 + 2 * v_2 + 2 * v_3 + v_4)
    return x
