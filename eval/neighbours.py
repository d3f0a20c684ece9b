"""The k-th nearest neighbours of features, decided as exact differences decide them, without an
N x N matrix: products of blocks leave a few candidates for each sample (see point_clouds)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.eval.point_clouds import (
    BLOCK,
    FLOOR,
    Cloud,
    clouds,
    error_bound,
    squares,
    tile_dtype,
)

__all__ = ["Radii", "all_bounds", "kth_squares", "nearest"]

SPARE = 5  # neighbours kept beyond the k-th, for those whose order products do not tell


@dataclass(frozen=True)
class Radii:
    """Squared distances to k-th nearest neighbours: bounds of all, and their values when needed.

    low, high: (N,) float64, around the values.  known: the values, nan where not yet computed.
    index, bounds: candidates (N, C), as _kth_exact takes them.
    """

    cloud: Cloud
    k: int
    low: Tensor
    high: Tensor
    known: Tensor
    index: Tensor
    bounds: tuple[Tensor, Tensor]

    def at(self, i: Tensor) -> Tensor:
        """The values of these rows, as exact differences give them."""
        new = i[self.known[i].isnan()].unique()
        if len(new):
            low, high = (part[new] for part in self.bounds)
            candidates = self.index[new]
            self._set(new, _kth_exact(self.cloud, self.cloud, new, candidates, (low, high), self.k))
        return self.known[i]

    def all(self) -> Tensor:
        """Every value: (N,)."""
        return self.at(torch.arange(len(self.known), device=self.known.device))

    def _set(self, rows: Tensor, found: tuple[Tensor, Tensor]) -> None:
        self.known[rows] = self.low[rows] = self.high[rows] = found[0]


def kth_squares(rows: Tensor, k: int) -> Radii:
    """Squared distance of every row (N, d) to its k-th nearest other.

    FlowkitError: k < 1 or not more than k rows.
    """
    if not 1 <= k < len(rows):
        raise FlowkitError(f"k={k} neighbours of {len(rows)} samples; give more than k of each set")
    (cloud,) = clouds(rows)
    dtype = tile_dtype(rows.shape[1], rows.device)
    bound, keep = error_bound(rows.shape[1], dtype), min(k + SPARE, len(rows) - 1)
    least, index = _nearest_by_products(cloud, keep, dtype)
    least += cloud.norms[:, None] * (1 - bound) - FLOOR
    most = least + 2 * (bound * (cloud.norms[:, None] + cloud.norms[index]) + FLOOR)
    low, high = (part.kthvalue(k, 1).values / cloud.scale**2 for part in (least, most))
    radii = Radii(cloud, k, low, high, torch.full_like(low, math.nan), index, (least, most))
    # Those left out are no nearer than the last one kept; 0 is the least there is.
    last = least.amax(1) / cloud.scale**2
    open_rows = ((last < high) | (low <= 0)).nonzero()[:, 0]
    exact = radii.at(open_rows)
    doubtful = open_rows[(exact > last[open_rows]) & (exact > 0)]
    if len(doubtful) and keep < len(rows) - 1:
        radii._set(doubtful, nearest(cloud, cloud, k, queries=doubtful))
    return radii


def nearest(
    cloud: Cloud, points: Cloud, k: int = 1, *, queries: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Squared distance to the k-th nearest point and, for k = 1, its index (the lowest of equals).

    queries: rows of `cloud`, all by default; a cloud's own rows are not their own neighbours.
    """
    if queries is None:
        queries = torch.arange(len(cloud), device=cloud.rows.device)
    every = torch.arange(len(points), device=cloud.rows.device)
    size = max(1, BLOCK * BLOCK // len(points))
    found = [
        _kth_exact(cloud, points, part, every.expand(len(part), -1), bounds, k)
        for part, bounds in all_bounds(cloud, points, queries, size)
    ]
    values, indices = zip(*found, strict=True)
    return torch.cat(values), torch.cat(indices)


def all_bounds(
    cloud: Cloud, points: Cloud, queries: Tensor, size: int
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """`size` queries at a time, with bounds (size, len(points)) below and above the scaled squared
    distances, from float64 products; infinite for a row of the cloud and itself."""
    bound = error_bound(cloud.rows.shape[1], torch.float64)
    for part in queries.split(size):
        block = cloud.block(part, torch.float64)
        products = [block @ points.block(piece, torch.float64).T for piece in points.slices()]
        norms = cloud.norms[part][:, None] + points.norms
        middle, width = norms - 2 * torch.cat(products, 1), bound * norms + FLOOR
        if points is cloud:
            middle[torch.arange(len(part), device=part.device), part] = math.inf
        yield part, (middle - width, middle + width)


def _nearest_by_products(cloud: Cloud, keep: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The `keep` smallest of (1 - e) |y|^2 - 2 x.y over the others y, and their indices: (N, keep).

    Each pair of blocks is multiplied once and serves the rows of both.
    """
    best = cloud.norms.new_full((len(cloud), keep), math.inf)
    index = torch.zeros_like(best, dtype=torch.int64)
    offsets = (cloud.norms * (1 - error_bound(cloud.rows.shape[1], dtype))).to(dtype)

    def merge(queries: slice, others: slice, found: tuple[Tensor, Tensor]) -> None:
        values = torch.cat([best[queries], found[0].double()], 1)
        where = torch.cat([index[queries], found[1] + others.start], 1)
        best[queries], kept = values.topk(keep, largest=False)
        index[queries] = where.gather(1, kept)

    parts = cloud.slices()
    for a, rows in enumerate(parts):
        block = cloud.block(rows, dtype)
        for columns in parts[: a + 1]:
            products = block @ cloud.block(columns, dtype).T
            if rows == columns:
                products.fill_diagonal_(-math.inf)
            else:
                below = torch.add(offsets[rows, None], products, alpha=-2)
                merge(columns, rows, _smallest_of_columns(below, keep))
            merge(rows, columns, _smallest(products.mul_(-2).add_(offsets[columns]), keep))
    return best, index


def _smallest(values: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` smallest of each row and their columns.

    They lie in the `keep` classes of columns, modulo a sixteenth, with the smallest minima.
    """
    rows, width = values.shape
    if width % 16 or width // 16 <= keep:
        return values.topk(min(keep, width), largest=False)
    classes = values.view(rows, 16, width // 16)
    chosen = classes.amin(1).topk(keep, largest=False).indices
    picked = classes.gather(2, chosen[:, None].expand(rows, 16, keep)).flatten(1)
    found, place = picked.topk(keep, largest=False)
    columns = place.div(keep, rounding_mode="floor") * (width // 16)
    return found, columns + chosen.gather(1, place % keep)


def _smallest_of_columns(values: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The same for each column and its rows; only the minima are transposed."""
    height, columns = values.shape
    if height % 16 or height // 16 <= keep:
        return _smallest(values.T.contiguous(), keep)
    classes = values.view(16, height // 16, columns)
    chosen = classes.amin(0).T.contiguous().topk(keep, largest=False).indices
    picked = classes.gather(1, chosen.T.expand(16, keep, columns)).flatten(0, 1).T.contiguous()
    found, place = picked.topk(keep, largest=False)
    rows = place.div(keep, rounding_mode="floor") * (height // 16)
    return found, rows + chosen.gather(1, place % keep)


def _kth_exact(
    cloud: Cloud,
    points: Cloud,
    queries: Tensor,
    index: Tensor,
    bounds: tuple[Tensor, Tensor],
    k: int,
) -> tuple[Tensor, Tensor]:
    """The k-th smallest squared distance of each query to its candidates, and one that has it.

    index (Q, C): candidates.  bounds (Q, C): below and above their scaled squared distances; only
    those whose order these leave open are computed.
    """
    low, high = bounds
    kth_low, kth_high = (part.kthvalue(k, 1).values[:, None] for part in bounds)
    nearer, farther = high < kth_low, low > kth_high
    values = low.new_full(low.shape, math.inf).masked_fill_(nearer, -1.0)
    row, column = (~(nearer | farther)).nonzero(as_tuple=True)
    values[row, column] = squares(cloud.rows, points.rows, queries[row], index[row, column])
    if k == 1:
        least = values.amin(1)
        ties = torch.where(values == least[:, None], index, len(points))
        return least, ties.amin(1)
    kth = values.kthvalue(k, 1)
    return kth.values, index.gather(1, kth.indices[:, None])[:, 0]
