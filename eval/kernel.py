"""Kernel distances of two sets of features: KID and CMMD, as squared maximum mean discrepancies.

    MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)

KID leaves the pairs of a sample with itself out, so its mean over draws is the true value and small
negative results are right (Binkowski et al., 2018, arXiv:1801.01401); CMMD keeps them in
(Jayasumana et al., 2024, arXiv:2401.09603).  Kernel matrices are summed in tiles, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.eval.frechet import Rows, feature_pair

__all__ = ["KernelDistance", "cmmd", "kernel_distance", "kernel_parts"]

TILE = 1024  # rows of a piece of a kernel matrix: 8 MB of float64


@dataclass(frozen=True)
class KernelDistance:
    """A KID, raw (papers often print 1000 times it).

    std: over the blocks or subsets, not a standard error; 0 for one.  form: "blocks" or "subsets".
    size: samples of a set in a block or subset, at most.  seed: None where nothing is drawn.
    """

    value: float
    std: float
    form: str
    count: int
    size: int
    n_1: int
    n_2: int
    seed: int | None


def kernel_distance(
    a: Rows,
    b: Rows,
    *,
    block_size: int = 5000,
    subsets: int | None = None,
    subset_size: int = 1000,
    seed: int = 2020,
) -> float:
    """The kernel distance (KID) of features a (N, d) and b (M, d), k(x, y) = (x.y / d + 1)^3.

    By default the mean over non-overlapping blocks of at most block_size rows of each set, in
    their order: nothing is drawn.  subsets: the mean over that many draws of subset_size rows
    without replacement instead, as papers print it (100 of 1000); numpy's RandomState(seed) draws
    from a, then from b, each time, which is torch-fidelity's order.
    FlowkitError: fewer than two samples, or fewer than subset_size; other dimensions; not finite.
    """
    parts = kernel_parts(
        a, b, block_size=block_size, subsets=subsets, subset_size=subset_size, seed=seed
    )
    return parts.value


def kernel_parts(
    a: Rows,
    b: Rows,
    *,
    block_size: int = 5000,
    subsets: int | None = None,
    subset_size: int = 1000,
    seed: int = 2020,
) -> KernelDistance:
    """The kernel distance with its spread; arguments as in `kernel_distance`."""
    x, y = feature_pair(a, b)
    if subsets is None:
        if block_size < 2:
            raise FlowkitError(f"block_size={block_size}; a block needs two samples or more")
        pairs, size = _blocks(x, y, block_size), min(block_size, max(len(x), len(y)))
    else:
        if subsets < 1 or not 2 <= subset_size <= min(len(x), len(y)):
            raise FlowkitError(
                f"cannot draw {subsets} subsets of {subset_size} from {len(x)} and {len(y)} "
                "samples; lower subset_size, or leave subsets out to use blocks"
            )
        pairs, size = _draws(x, y, subsets, subset_size, seed), subset_size
    values = np.array([_unbiased(*pair) for pair in pairs])
    form, used = ("blocks", None) if subsets is None else ("subsets", seed)
    spread = float(values.std())
    mean = float(values.mean())
    return KernelDistance(mean, spread, form, len(values), size, len(x), len(y), used)


def cmmd(a: Rows, b: Rows, *, sigma: float = 10.0, normalize: bool = True) -> float:
    """CMMD of image embeddings a (N, d) and b (M, d): 1000 times the MMD^2 under a Gaussian kernel.

    k(x, y) = exp(-|x - y|^2 / (2 sigma^2)).  normalize: scale every row to length 1 first, as the
    measure has it for CLIP's.  FlowkitError: as kernel_distance; a row of zeros to normalize.
    """
    x, y = feature_pair(a, b, least=1)
    if not sigma > 0:
        raise FlowkitError(f"sigma must be positive, got {sigma}")
    if normalize:
        x, y = unit_rows(x), unit_rows(y)
    centre = x.mean(0)  # distances stay, their rounding shrinks
    x, y = x - centre, y - centre

    def kernel(products: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        squares = rows.square().sum(1)[:, None] + columns.square().sum(1)
        return (products.mul_(-2).add_(squares).clamp_(min=0).mul_(-1 / (2 * sigma**2))).expm1_()

    # k - 1 instead of k: the three ones cancel, and near 1 it has the digits that k lacks.
    same = _same_sum(x, kernel) / len(x) ** 2 + _same_sum(y, kernel) / len(y) ** 2
    return 1000 * (same - 2 * _cross_sum(x, y, kernel) / (len(x) * len(y)))


def unit_rows(features: Tensor) -> Tensor:
    """Rows scaled to length 1; FlowkitError for a row of zeros."""
    lengths = features.norm(dim=1, keepdim=True)
    if not lengths.all():
        raise FlowkitError(
            f"row {int((lengths == 0).nonzero()[0, 0])} of the features is zero and has no "
            "direction; check the pictures that they were made from"
        )
    return features / lengths


Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # inner products, which it may overwrite


def _cubic(products: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    root = products.div_(rows.shape[1]).add_(1)
    return root * root * root


def _unbiased(x: Tensor, y: Tensor) -> float:
    """The unbiased MMD^2 of x (m, d) and y (n, d) (Binkowski et al., 2018, eq. 4)."""
    m, n = len(x), len(y)
    value = (_same_sum(x, _cubic) - _diagonal(x)) / (m * (m - 1))
    value += (_same_sum(y, _cubic) - _diagonal(y)) / (n * (n - 1))
    return value - 2 * _cross_sum(x, y, _cubic) / (m * n)


def _diagonal(x: Tensor) -> float:
    return float((x.square().sum(1) / x.shape[1] + 1).pow(3).sum())


def _same_sum(x: Tensor, kernel: Kernel) -> float:
    """Sum of k over all pairs of one set, both orders, a sample with itself included."""
    total, tiles = 0.0, x.split(TILE)
    for i, rows in enumerate(tiles):
        for j, columns in enumerate(tiles[: i + 1]):
            part = float(kernel(rows @ columns.T, rows, columns).sum())
            total += part if i == j else 2 * part
    return total


def _cross_sum(x: Tensor, y: Tensor, kernel: Kernel) -> float:
    tiles = ((rows, columns) for rows in x.split(TILE) for columns in y.split(TILE))
    return sum(float(kernel(rows @ columns.T, rows, columns).sum()) for rows, columns in tiles)


def _blocks(x: Tensor, y: Tensor, block_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Both sets in the same number of parts, as even as can be."""
    count = math.ceil(max(len(x), len(y)) / block_size)
    if min(len(x), len(y)) < 2 * count:
        raise FlowkitError(
            f"{len(x)} and {len(y)} samples leave fewer than two in one of {count} blocks; "
            "raise block_size"
        )
    for i in range(count):
        first, second = (
            slice(i * len(rows) // count, (i + 1) * len(rows) // count) for rows in (x, y)
        )
        yield x[first], y[second]


def _draws(
    x: Tensor, y: Tensor, subsets: int, size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    random = np.random.RandomState(seed)
    for _ in range(subsets):
        first, second = (random.choice(len(rows), size, replace=False) for rows in (x, y))
        yield x[torch.from_numpy(first)], y[torch.from_numpy(second)]
