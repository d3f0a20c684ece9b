"""MIND, the Monge Inception Distance: a sliced Wasserstein distance of two sets of features.

    MIND = 3 d mean_u mean_j (sort(X u)_j - sort(Y u)_j)^2        u: random unit directions

Berthet et al., 2026, arXiv:2605.06797.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.eval.frechet import Rows, feature_pair

__all__ = ["sliced_distance"]

CHUNK = 64  # directions at once


def sliced_distance(a: Rows, b: Rows, *, projections: int = 1000, seed: int = 2020) -> float:
    """MIND of features a (N, d) and b (M, d), over `projections` directions.

    The larger set is cut to the smaller one's size by a random permutation.  Draws are those of
    torch's CPU generator with that seed: the permutation, then the directions (projections, d) in
    float32, as torch-fidelity draws them; the rest is in float64.
    FlowkitError: no samples, no directions, other dimensions, values not finite.
    """
    x, y = feature_pair(a, b, least=1)
    if projections < 1:
        raise FlowkitError(f"projections={projections}; give one direction or more")
    generator = torch.Generator().manual_seed(seed)
    n, d = min(len(x), len(y)), x.shape[1]
    x, y = (_cut(rows, n, generator) for rows in (x, y))
    directions = torch.randn(projections, d, generator=generator)
    directions = torch.nn.functional.normalize(directions.to(x), dim=1)
    squares = sum(
        float((_sorted(x, part) - _sorted(y, part)).square().sum())
        for part in directions.split(CHUNK)
    )
    return 3 * d * squares / (n * projections)


def _cut(rows: Tensor, n: int, generator: torch.Generator) -> Tensor:
    if len(rows) == n:
        return rows
    return rows[torch.randperm(len(rows), generator=generator)[:n].to(rows.device)]


def _sorted(rows: Tensor, directions: Tensor) -> Tensor:
    """Projections (directions, N), each row in order."""
    return (directions @ rows.T).sort(1).values
