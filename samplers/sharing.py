"""Which steps of a run should be computed in full, so that they best serve the others.

    steps = optimal_sharing(state_similarity(states), 6)

states: what is to be shared, of every step of one full run.  The dynamic program is that of DDT's
encoder sharing (Wang et al., 2025, arXiv:2504.05741, section 3.4), which encoder_sharing.py runs;
its steps place the full steps of any cache that reuses.  For caches that forecast, placement.py
measures what a choice of steps errs by, and `optimal_sharing` takes that instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flowkit.errors import FlowkitError
from flowkit.samplers.placement import ForecastErrors

__all__ = ["checked_steps", "optimal_sharing", "sharing_cost", "state_similarity"]


def optimal_sharing(similarity: Any, K: int) -> list[int]:  # noqa: N803 - the paper's letter
    """The K of N steps, the first always one, that best serve all N until the next of them.

    W(a, e) = sum over a < k < e of 1 - similarity[k][a]        steps a to e - 1 served by a
    C_m(e) = min over a of C_{m-1}(a) + W(a, e)                 the least cost is C_K(N)

    similarity: (N, N), a tensor, an array or lists: how well step k is served by what an earlier
    step a computed.  The diagonal and what lies above it are not read.  Of equally good answers
    the one with the earlier last steps.  Exact, in O(K N^2).
    Or, for a cache that forecasts, the `forecast_errors` of a run, whose W has signs and looks at
    several full steps: `ForecastErrors.place`.
    Raises FlowkitError for a similarity that is not square or not finite, and for K beyond 1 to N.
    """
    if isinstance(similarity, ForecastErrors):
        return similarity.place(_checked_count(K, len(similarity)))
    cost = _serving_costs(similarity)
    n = len(cost)
    K = _checked_count(K, n)  # noqa: N806
    best, chosen = np.full(n + 1, np.inf), []
    best[0] = 0.0
    for _ in range(K):
        total = best[:-1, None] + cost
        chosen.append(total.argmin(axis=0))
        best = total.min(axis=0)
    steps, end = [], n
    for last in reversed(chosen):
        end = int(last[end])
        steps.append(end)
    return steps[::-1]


def sharing_cost(similarity: Any, steps: Sequence[int]) -> float:
    """What serving all N steps by `steps` costs: the sum of W from each of them to the next.

    similarity: as of `optimal_sharing`; for `forecast_errors` it is the error at the end, relative
    to the last state.  steps: increasing from 0.
    """
    if isinstance(similarity, ForecastErrors):
        return similarity.cost(checked_steps(steps, len(similarity)))
    cost = _serving_costs(similarity)
    ends = [*checked_steps(steps, len(cost)), len(cost)]
    return float(sum(cost[a, e] for a, e in pairwise(ends)))


def state_similarity(states: Sequence[Tensor]) -> Tensor:
    """Mean cosine of the states of every two steps: (N, N) float64, on the CPU.

    states: N tensors (B, *, D), encoder states or any other features; the cosine is that of the
    last dimension, the mean that over all others.
    """
    shapes = sorted({tuple(state.shape) for state in states})
    if len(shapes) != 1 or len(shapes[0]) < 2:
        raise FlowkitError(
            f"states must be tensors of one shape (B, *, D), got {shapes or 'none'}; take the "
            "same batch and the same branches in each step"
        )
    # Sample by sample, so that no more than a part of the states is ever there twice.
    wide = torch.float32 if states[0].device.type == "mps" else torch.float64
    total = torch.zeros(len(states), len(states), dtype=torch.float64)
    for rows in zip(*states, strict=True):
        units = F.normalize(torch.stack(rows).to(wide), dim=-1).flatten(1)
        total += (units @ units.T).cpu()
    similarity = (total / states[0][..., 0].numel()).clamp(-1, 1)
    return similarity.fill_diagonal_(1.0)


def checked_steps(steps: Iterable[int], n: int) -> list[int]:
    """`steps` as a list; FlowkitError unless they increase from 0 and stay below n."""
    found = list(steps)
    whole = all(isinstance(step, int | np.integer) for step in found)
    if not (whole and found[:1] == [0] and all(a < b for a, b in pairwise([*found, n]))):
        raise FlowkitError(f"steps must increase from 0 and stay below {n}, got {found}")
    return [int(step) for step in found]


def _checked_count(count: Any, n: int) -> int:
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or not 1 <= count <= n:
        raise FlowkitError(f"K must be a number of steps from 1 to {n}, got {count!r}")
    return int(count)


def _serving_costs(similarity: Any) -> np.ndarray:
    """W (N, N + 1): [a, e] for serving the steps after a and before e; infinite where e <= a."""
    if isinstance(similarity, Tensor):
        similarity = similarity.detach().cpu().double()
    try:
        table = np.asarray(similarity, dtype=np.float64)
    except (TypeError, ValueError):
        raise FlowkitError(
            f"similarity must be a matrix of numbers, got a {type(similarity).__name__}"
        ) from None
    n = len(table) if table.ndim else 0
    if table.shape != (n, n) or not n:
        raise FlowkitError(f"similarity must have the shape (N, N), got {table.shape}")
    if not np.isfinite(np.tril(table, -1)).all():
        raise FlowkitError("similarity must be finite below its diagonal; look for NaN in states")
    cost = np.full((n, n + 1), np.inf)
    for a in range(n):
        cost[a, a + 1] = 0.0
        cost[a, a + 2 :] = np.cumsum(1 - table[a + 1 :, a])
    return cost
