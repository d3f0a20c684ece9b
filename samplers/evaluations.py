"""How a solver and whoever drives it talk: the solver asks for velocities, one at a time.

    def midpoint(x: Tensor, times: Sequence[float]) -> Evaluations:
        for t, s in pairwise(times):
            x, v = yield x, t                                  # step boundary: take x back
            _, v = yield x + 0.5 * (s - t) * v, 0.5 * (t + s)  # inner stage: keep our own x
            x = x + (s - t) * v
        return x

The driver answers a request (x, t) with (x, v(x, t)); at a step boundary it may have changed x.
A solver leaves something for its inverse by returning (x, state) instead of x.
A stochastic solver takes its noise from an option `draw`, which says where the noise comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.noise import derive_seed, keyed_noise

__all__ = ["Draw", "Evaluations", "Solver", "per_sample"]

Evaluations = Generator[tuple[Tensor, float], tuple[Tensor, Tensor], Tensor | tuple[Tensor, Any]]

Solver = Callable[..., Evaluations]
"""solver(x, times, **options): times are Python floats that increase, or decrease to invert."""

Draw = Callable[[Tensor, int], Tensor]
"""draw(x, k): standard normal noise in the shape, dtype and device of x, the k-th of the run."""


def per_sample(seed: int = 0, indices: Sequence[int] | None = None) -> Draw:
    """Noise of sample i and draw k that depends on (seed, i, k) alone, whatever the batch.

    indices: the number of each sample of the batch, 0 to B - 1 when left out.
    """

    def draw(x: Tensor, k: int) -> Tensor:
        rows = range(len(x)) if indices is None else indices
        if len(rows) != len(x):
            raise FlowkitError(f"per_sample has {len(rows)} indices, the batch {len(x)} samples")
        return keyed_noise(derive_seed(seed, "draw", k), rows, x.shape[1:]).to(x)

    return draw
