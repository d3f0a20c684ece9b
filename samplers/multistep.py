"""Multistep solvers: a step also looks at the velocities of the steps before it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from flowkit.samplers.evaluations import Evaluations

__all__ = ["ab2"]


def ab2(x: Tensor, times: Sequence[float]) -> Evaluations:
    """Adams-Bashforth, order 2 on any grid, 1 NFE per step; the first step is Euler's.

    x_s = x_t + h [(1 + r/2) v_t - (r/2) v_before],  r = h / h_before.
    """
    v_before, h_before = None, 0.0
    for t, s in pairwise(times):
        x, v = yield x, t
        h = s - t
        if v_before is None:
            x = x + h * v
        else:
            r = h / h_before
            x = x + h * ((1 + 0.5 * r) * v - 0.5 * r * v_before)
        v_before, h_before = v, h
    return x
