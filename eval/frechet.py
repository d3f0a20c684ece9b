"""The Fréchet distance of two sets of features, from float64 moments that stream and merge.

    FD = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

The last trace is the sum of the square roots of the eigenvalues of A^T S2 A for any A A^T = S1, and
the nuclear norm of A^T B when B B^T = S2 too. Covariances have the N - 1 denominator; nothing is
added to their diagonals, and small negative results are not clipped (Heusel et al., 2017,
arXiv:1706.08500, eq. 6, without its matrix square root).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowkit.errors import FlowkitError

__all__ = [
    "Frechet",
    "FrechetMoments",
    "FrechetReference",
    "Rows",
    "feature_pair",
    "feature_rows",
    "frechet_distance",
    "frechet_parts",
]

Rows = Tensor | np.ndarray


class FrechetMoments:
    """Count, mean and covariance of features that arrive in batches.

    Sums are in float64 about the first batch's mean, so a large offset costs no digits.
    """

    def __init__(self) -> None:
        self.n = 0
        self.shift = self.sum = self.outer = torch.empty(0, dtype=torch.float64)

    @classmethod
    def from_statistics(cls, mean: Rows, cov: Rows, n: int) -> FrechetMoments:
        """The moments of n samples of which only mean (d,) and covariance (d, d) are left.

        cov: with the N - 1 denominator.  FlowkitError: shapes that do not fit, fewer than two
        samples, values not finite, a covariance that is not symmetric.
        """
        mean, cov = (torch.as_tensor(part).double() for part in (mean, cov))
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            shapes = f"{tuple(mean.shape)} and {tuple(cov.shape)}"
            raise FlowkitError(f"mean and covariance must be (d,) and (d, d), got {shapes}")
        if n < 2 or not mean.isfinite().all() or not cov.isfinite().all():
            raise FlowkitError(f"statistics of {n} samples must be finite, and of two or more")
        if not torch.allclose(cov, cov.T, rtol=1e-5, atol=1e-8 * float(cov.abs().max())):
            raise FlowkitError("the covariance is not symmetric; were mean and covariance swapped?")
        moments = cls()
        moments.n, moments.shift, moments.sum = n, mean.clone(), torch.zeros_like(mean)
        moments.outer = (cov + cov.T) * ((n - 1) / 2)
        return moments

    def update(self, features: Rows) -> None:
        """Add features (B, d) of any real dtype; raises FlowkitError when one is not finite."""
        features = feature_rows(features)
        if not len(features):
            return
        if not self.n:
            d = features.shape[1]
            self.shift = features.mean(0)
            self.sum = features.new_zeros(d)
            self.outer = features.new_zeros(d, d)
        if features.shape[1] != len(self.shift):
            raise FlowkitError(
                f"features have {features.shape[1]} dimensions, earlier ones {len(self.shift)}; "
                "use one extractor"
            )
        centred = features - self.shift
        self.n += len(features)
        self.sum += centred.sum(0)
        self.outer.addmm_(centred.T, centred)

    def merge(self, other: FrechetMoments) -> None:
        """Add the features that another process or file has seen."""
        if not other.n:
            return
        if not self.n:
            self.n, self.shift = other.n, other.shift.clone()
            self.sum, self.outer = other.sum.clone(), other.outer.clone()
            return
        total, outer = self._moved(other)
        self.outer += outer
        self.sum += total
        self.n += other.n

    def without(self, other: FrechetMoments) -> FrechetMoments:
        """What is left when the features of `other`, which were merged before, are taken out."""
        if other.n > self.n:
            raise FlowkitError(f"cannot take {other.n} samples out of the moments of {self.n}")
        left = FrechetMoments()
        left.n, left.shift = self.n - other.n, self.shift.clone()
        left.sum, left.outer = self.sum.clone(), self.outer.clone()
        if other.n:
            total, outer = self._moved(other)
            left.sum -= total
            left.outer -= outer
        return left

    def _moved(self, other: FrechetMoments) -> tuple[Tensor, Tensor]:
        """The other's two sums, about our shift."""
        if len(other.shift) != len(self.shift):
            raise FlowkitError(
                f"cannot merge moments of {len(self.shift)} and {len(other.shift)} dimensions; "
                "use one extractor"
            )
        theirs, move = other.sum.to(self.sum), other.shift.to(self.shift) - self.shift
        cross = torch.outer(theirs, move)
        outer = other.outer.to(self.outer) + cross + cross.T + other.n * torch.outer(move, move)
        return theirs + other.n * move, outer

    @property
    def mean(self) -> Tensor:
        """(d,) float64."""
        self._require(1)
        return self.shift + self.sum / self.n

    @property
    def cov(self) -> Tensor:
        """(d, d) float64, with the N - 1 denominator."""
        self._require(2)
        return (self.outer - torch.outer(self.sum, self.sum) / self.n) / (self.n - 1)

    def _require(self, count: int) -> None:
        if self.n < count:
            raise FlowkitError(
                f"the moments of {self.n} samples were asked for; give {count} or more"
            )


@dataclass(frozen=True)
class Frechet:
    """A Fréchet distance and its parts: value = mean_term + trace_1 + trace_2 - 2 * cross."""

    value: float
    mean_term: float
    trace_1: float
    trace_2: float
    cross: float
    n_1: int
    n_2: int
    d: int
    rank_deficient: bool


Features = Tensor | np.ndarray | FrechetMoments


class FrechetReference:
    """A set that others are measured against: its covariance is factored once.

    source: features (N, d) or FrechetMoments.
    """

    def __init__(self, source: Features) -> None:
        moments = _moments(source)
        self.mean, self.cov, self.n = moments.mean.cpu(), moments.cov.cpu(), moments.n
        self._factor: Tensor | None = None

    def parts(self, source: Features) -> Frechet:
        """The Fréchet distance of features (N, d) or FrechetMoments to this set."""
        other = _moments(source)
        mean, cov = other.mean.cpu(), other.cov.cpu()
        same_dimension(len(mean), len(self.mean))
        if other.n <= min(len(mean), self.n):  # the factor of lower rank is the exact one
            cross = _cross(_factor(cov, other.n), self.cov)
        else:
            if self._factor is None:
                self._factor = _factor(self.cov, self.n)
            cross = _cross(self._factor, cov)
        return _parts(mean - self.mean, cov.trace(), self.cov.trace(), cross, other.n, self.n)


def frechet_distance(a: Features, b: Features) -> float:
    """The Fréchet distance of two sets: features (N, d), tensors or arrays, or moments."""
    return frechet_parts(a, b).value


def frechet_parts(a: Features, b: Features) -> Frechet:
    """The Fréchet distance with its parts.

    a, b: features (N, d) or FrechetMoments.  When both are features and both N < d, no d x d
    matrix is formed.  FlowkitError: other dimensions, fewer than two samples, values not finite.
    """
    if not isinstance(a, FrechetMoments) and not isinstance(b, FrechetMoments):
        a, b = feature_rows(a), feature_rows(b)
        if max(len(a), len(b)) < a.shape[1]:
            return _from_features(a.cpu(), b.cpu())
    return FrechetReference(b).parts(a)


def _factor(cov: Tensor, n: int) -> Tensor:
    """A (d, r) with A A^T = the covariance of n samples."""
    d = len(cov)
    if n > d:
        factor, failed = torch.linalg.cholesky_ex(cov)
        if not failed:
            return factor
    values, vectors = torch.linalg.eigh(cov)
    # Null directions hold rounding errors, of which the cross term would sum the square roots.
    kept = values > d * torch.finfo(torch.float64).eps * values[-1].clamp(min=0)
    return vectors[:, kept] * values[kept].sqrt()


def _cross(factor: Tensor, cov: Tensor) -> Tensor:
    """tr (S1 S2)^(1/2) of S1 = factor factor^T and S2 = cov."""
    product = factor.T @ cov @ factor
    return torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()


def _from_features(a: Tensor, b: Tensor) -> Frechet:
    same_dimension(a.shape[1], b.shape[1])
    if min(len(a), len(b)) < 2:
        raise FlowkitError(f"got {len(a)} and {len(b)} samples; a covariance needs two or more")
    m1, m2 = a.mean(0), b.mean(0)
    x, y = (a - m1) / (len(a) - 1) ** 0.5, (b - m2) / (len(b) - 1) ** 0.5
    cross = torch.linalg.svdvals(x @ y.T).sum()
    return _parts(m1 - m2, x.square().sum(), y.square().sum(), cross, len(a), len(b))


def _parts(gap: Tensor, t1: Tensor, t2: Tensor, cross: Tensor, n1: int, n2: int) -> Frechet:
    mean_term, d = float(gap.square().sum()), len(gap)
    value = mean_term + float(t1 + t2 - 2 * cross)
    deficient = min(n1, n2) <= d
    return Frechet(value, mean_term, float(t1), float(t2), float(cross), n1, n2, d, deficient)


def _moments(source: Features) -> FrechetMoments:
    if isinstance(source, FrechetMoments):
        return source
    moments = FrechetMoments()
    moments.update(source)
    return moments


def feature_rows(features: Rows) -> Tensor:
    """Features (N, d) of any real dtype, checked, in float64 (on the CPU if their device has none).

    FlowkitError: another shape, values that are not finite.
    """
    features = torch.as_tensor(features)
    if features.ndim != 2:
        raise FlowkitError(f"features must be (N, d), got shape {tuple(features.shape)}")
    if not features.isfinite().all():
        raise FlowkitError("features are not finite; check the pictures that they were made from")
    return features.cpu().double() if features.device.type == "mps" else features.double()


def feature_pair(a: Rows, b: Rows, *, least: int = 2) -> tuple[Tensor, Tensor]:
    """Two sets of features, checked, in float64 on the first one's device.

    least: samples that each must have.  FlowkitError: see feature_rows; other dimensions, too few.
    """
    first, second = feature_rows(a), feature_rows(b)
    same_dimension(first.shape[1], second.shape[1])
    if min(len(first), len(second)) < least:
        counts = f"{len(first)} and {len(second)} samples"
        raise FlowkitError(f"got {counts}; this measure needs {least} or more of each")
    return first, second.to(first.device)


def same_dimension(d1: int, d2: int) -> None:
    """FlowkitError unless d1 == d2."""
    if d1 != d2:
        raise FlowkitError(f"features have {d1} and {d2} dimensions; use one extractor for both")
