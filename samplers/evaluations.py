"""How a solver and whoever drives it talk: the solver asks for velocities, one at a time.

    def midpoint(x: Tensor, times: Sequence[float]) -> Evaluations:
        for t, s in pairwise(times):
            x, v = yield x, t                                  # step boundary: take x back
            _, v = yield x + 0.5 * (s - t) * v, 0.5 * (t + s)  # inner stage: keep our own x
            x = x + (s - t) * v
        return x

The driver answers a request (x, t) with (x, v(x, t)); at a step boundary it may have changed x.
A solver leaves something for its inverse by returning (x, state) instead of x.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from torch import Tensor

__all__ = ["Evaluations", "Solver"]

Evaluations = Generator[tuple[Tensor, float], tuple[Tensor, Tensor], Tensor | tuple[Tensor, Any]]

Solver = Callable[..., Evaluations]
"""solver(x, times, **options): times are Python floats that increase, or decrease to invert."""
