"""How two sets overlap: measures of balls that reach to each sample's k-th nearest neighbour.

Precision and recall, realism: Kynkaanniemi et al., 2019, arXiv:1904.06991. Density and coverage:
Naeem et al., 2020, arXiv:2002.09797. AuthPct: Alaa et al., 2022, arXiv:2102.08921.
Sizes are part of these numbers: compare only results with the same counts, k and features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.eval.frechet import Rows
from flowkit.eval.neighbours import Radii, all_bounds, kth_squares, nearest
from flowkit.eval.point_clouds import (
    FLOOR,
    Cloud,
    clouds,
    compact_pair,
    error_bound,
    squares,
    tile_dtype,
)

__all__ = [
    "DensityCoverage",
    "PrecisionRecall",
    "authentic_percentage",
    "density_coverage",
    "precision_recall",
    "realism",
]

PAIRS = 1 << 14  # undecided pairs that are kept before they are decided


class PrecisionRecall(NamedTuple):
    """Shares, in [0, 1]."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """density: 0 or more, about 1 for equal distributions.  coverage: a share, in [0, 1]."""

    density: float
    coverage: float


def precision_recall(
    real: Rows, generated: Rows, k: int = 3, strict: bool = False
) -> PrecisionRecall:
    """Precision, the share of generated samples inside any real ball, and recall, the share of
    real ones inside any generated ball.

    real (N, d), generated (M, d): features.  A ball's radius is the distance to the k-th nearest
    neighbour in its own set.  strict: a sample on the border is outside (prdc's rule) instead of
    inside (the authors', torch-fidelity's); with repeated samples they differ much.
    FlowkitError: k < 1 or not more than k samples in a set, other dimensions, values not finite.
    """
    x, y = compact_pair(real, generated)
    x_radii, y_radii = kth_squares(x, k), kth_squares(y, k)
    x_cloud, y_cloud = clouds(x, y)
    dtype = _dtype((x_cloud, x_radii), (y_cloud, y_radii))
    precision = _Union(x_cloud, x_radii, y_cloud, strict, dtype)
    recall = _Union(y_cloud, y_radii, x_cloud, strict, dtype)
    for columns in y_cloud.slices():
        for rows in x_cloud.slices():
            for i, j in _open_pairs(rows, columns, recall.inside, precision.inside):
                products = x_cloud.block(i, dtype) @ y_cloud.block(j, dtype).T
                precision.see(i, j, products)
                recall.see(j, i, products.T)
    return PrecisionRecall(precision.share(), recall.share())


def density_coverage(
    real: Rows, generated: Rows, k: int = 5, *, strict: bool = True
) -> DensityCoverage:
    """Density, the number of real balls that a generated sample lies in over k, on average, and
    coverage, the share of real balls with a generated sample inside.

    Arguments and errors as in precision_recall; strict is the authors' rule here.
    """
    x, y = compact_pair(real, generated)
    x_radii = kth_squares(x, k)
    x_cloud, y_cloud = clouds(x, y)
    dtype = _dtype((x_cloud, x_radii))
    union = _Union(x_cloud, x_radii, y_cloud, strict, dtype)
    hit = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    count = 0
    for columns in y_cloud.slices():
        block = y_cloud.block(columns, dtype)
        for rows in x_cloud.slices():
            sure, i, j = union.decide(rows, columns, x_cloud.block(rows, dtype) @ block.T)
            count += int(sure.sum())
            hit[rows] |= sure.any(1)
            within = union.exactly(i, j)
            count += int(within.sum())
            hit[i[within]] = True
    return DensityCoverage(count / (k * len(y)), float(hit.double().mean()))


def realism(real: Rows, generated: Rows, k: int = 3) -> Tensor:
    """The realism score of every generated sample: (M,) float64, above 1 inside a real ball.

    The largest radius / distance over the real balls whose radius is below the median
    (Kynkaanniemi et al., 2019, eq. 3); infinite on a ball's centre.
    FlowkitError: as precision_recall; no radius is below the median.
    """
    x, y = compact_pair(real, generated)
    radii = kth_squares(x, k).all()
    kept = (radii.sqrt() < radii.sqrt().quantile(0.5)).nonzero()[:, 0]
    if not len(kept):
        raise FlowkitError(
            f"no real ball is smaller than the median of {len(x)} for k={k}; the real samples "
            "repeat or lie on a grid, where realism is not defined"
        )
    x, radii = x[kept], radii[kept]
    x_cloud, y_cloud = clouds(x, y)
    scores = radii.new_empty(len(y))
    every = torch.arange(len(y), device=y.device)
    scaled = radii * x_cloud.scale**2
    for part, (low, high) in all_bounds(y_cloud, x_cloud, every, max(1, (1 << 20) // len(x))):
        least = (scaled / high).amax(1, keepdim=True)  # of the largest ratio
        row, column = (scaled >= least * low).nonzero(as_tuple=True)
        apart = squares(y, x, part[row], column)
        ratios = torch.where(apart == 0, torch.inf, radii[column] / apart)
        found = torch.zeros_like(least[:, 0]).scatter_reduce_(0, row, ratios, "amax")
        scores[part] = found.sqrt()
    return scores


def authentic_percentage(train: Rows, generated: Rows) -> float:
    """AuthPct: the percentage of generated samples that are no copies, in [0, 100].

    A sample is authentic when its nearest training sample lies farther from it than from that
    training sample's own nearest other. FlowkitError: as precision_recall with k = 1.
    """
    x, y = compact_pair(train, generated)
    own = kth_squares(x, 1)
    x_cloud, y_cloud = clouds(x, y)
    apart, index = nearest(y_cloud, x_cloud)
    return 100 * float((apart > own.at(index)).double().mean())


Index = slice | Tensor


def _open_pairs(
    rows: slice, columns: slice, rows_done: Tensor, columns_done: Tensor
) -> Iterator[tuple[Index, Index]]:
    """Parts of a piece in which a row or a column is not done; the whole where most pairs are."""
    done = columns_done[columns]
    if float(done.double().mean() * rows_done[rows].double().mean()) < 0.2:
        yield rows, columns
        return
    yield rows, (~done).nonzero()[:, 0] + columns.start
    left = (~rows_done[rows]).nonzero()[:, 0] + rows.start  # without those just found
    yield left, done.nonzero()[:, 0] + columns.start


class _Union:
    """Which points lie in any of the balls; products that leave it open are checked exactly."""

    def __init__(
        self, centres: Cloud, radii: Radii, points: Cloud, strict: bool, dtype: torch.dtype
    ) -> None:
        self.centres, self.radii, self.points, self.strict = centres, radii, points, strict
        self.inside = torch.zeros(len(points), dtype=torch.bool, device=centres.norms.device)
        self.open: list[tuple[Tensor, Tensor]] = []
        bound, unit = error_bound(points.rows.shape[1], dtype), torch.finfo(dtype).eps
        low, high = radii.low * centres.scale**2, radii.high * centres.scale**2
        # -2 x.y + |x|^2 - r^2 < -|y|^2 inside; the sum on the left is rounded too.
        self.bias = centres.norms - (low + high) / 2
        self.error = bound * centres.norms + 4 * unit * (centres.norms + high) + FLOOR
        self.error += (high - low) / 2
        if strict:
            self.bias[radii.high == 0] = torch.inf  # such a ball is empty
        self.rounded = self.bias.to(dtype)
        self.point_error = bound * points.norms

    def see(self, balls: Index, points: Index, products: Tensor) -> None:
        """Take in the products x.y of some centres with some points."""
        if not products.numel():
            return
        error = self.error[balls]
        margin = torch.add(self.rounded[balls][:, None], products, alpha=-2)
        closest = margin.amin(0).double() + self.points.norms[points]
        width = error.max() + self.point_error[points]
        inside = self.inside[points] | (closest < -width)
        self.inside[points] = inside
        doubtful = ((closest <= width) & ~inside).nonzero()[:, 0]
        if not len(doubtful):
            return
        columns = _numbers(points, self.inside)[doubtful]
        middle = margin[:, doubtful].double() + self.points.norms[columns]
        widths = error[:, None] + self.point_error[columns]
        sure = (middle < -widths).any(0)
        self.inside[columns[sure]] = True
        i, j = ((middle <= widths) & ~sure).nonzero(as_tuple=True)
        self.open.append((_numbers(balls, self.inside)[i], columns[j]))
        if sum(len(i) for i, _ in self.open) > PAIRS:
            self._settle()

    def _settle(self) -> None:
        """Decide the open pairs, leaving out points that others of them have decided."""
        i, j = (torch.cat(part) for part in zip(*self.open, strict=True))
        self.open.clear()
        while len(i):
            within = self.exactly(i[:PAIRS], j[:PAIRS])
            self.inside[j[:PAIRS][within]] = True
            left = ~self.inside[j[PAIRS:]]
            i, j = i[PAIRS:][left], j[PAIRS:][left]

    def decide(
        self, balls: slice, points: slice, products: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Which pairs are surely inside, (balls, points) bool, and the undecided ones' indices."""
        norms, error = self.points.norms[points], self.point_error[points]
        low, high = (
            (self.bias[balls, None] + sign * self.error[balls, None]).to(products)
            for sign in (-1, 1)
        )
        sure = torch.add(high, products, alpha=-2) < -(norms + error).to(products)
        maybe = torch.add(low, products, alpha=-2) <= -(norms - error).to(products)
        i, j = (maybe & ~sure).nonzero(as_tuple=True)
        return sure, i + balls.start, j + points.start

    def exactly(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether point j lies in ball i, for index pairs."""
        apart = squares(self.centres.rows, self.points.rows, i, j)
        radii = self.radii.at(i)
        return apart < radii if self.strict else apart <= radii

    def share(self) -> float:
        """Of the points that are inside."""
        if self.open:
            self._settle()
        return float(self.inside.double().mean())


def _dtype(*balls: tuple[Cloud, Radii]) -> torch.dtype:
    """float32 for products, unless more than one ball in a hundred is as small as its errors."""
    rows = balls[0][0].rows
    bound = error_bound(rows.shape[1], torch.float32)
    lost = (radii.high * cloud.scale**2 < 4 * bound * cloud.norms for cloud, radii in balls)
    drowned = any(float(part.double().mean()) > 0.01 for part in lost)
    return torch.float64 if drowned else tile_dtype(rows.shape[1], rows.device)


def _numbers(index: Index, like: Tensor) -> Tensor:
    """The row numbers that an index stands for."""
    if isinstance(index, slice):
        return torch.arange(index.start, index.stop, device=like.device)
    return index
