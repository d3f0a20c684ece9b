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

__all__ = ["Frechet", "FrechetMoments", "frechet_distance", "frechet_parts"]


class FrechetMoments:
    """Count, mean and covariance of features that arrive in batches.

    Sums are in float64 about the first batch's mean, so a large offset costs no digits.
    """

    def __init__(self) -> None:
        self.n = 0
        self.shift = self.sum = self.outer = torch.empty(0, dtype=torch.float64)

    def update(self, features: Tensor | np.ndarray) -> None:
        """Add features (B, d) of any real dtype; raises FlowkitError when one is not finite."""
        features = _rows(features)
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
        if len(other.shift) != len(self.shift):
            raise FlowkitError(
                f"cannot merge moments of {len(self.shift)} and {len(other.shift)} dimensions; "
                "use one extractor"
            )
        theirs, outer = other.sum.to(self.sum), other.outer.to(self.outer)
        move = other.shift.to(self.shift) - self.shift  # other's sums, about our shift
        cross = torch.outer(theirs, move)
        self.outer += outer + cross + cross.T + other.n * torch.outer(move, move)
        self.sum += theirs + other.n * move
        self.n += other.n

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


def frechet_distance(a: Features, b: Features) -> float:
    """The Fréchet distance of two sets: features (N, d), tensors or arrays, or moments."""
    return frechet_parts(a, b).value


def frechet_parts(a: Features, b: Features) -> Frechet:
    """The Fréchet distance with its parts.

    a, b: features (N, d) or FrechetMoments.  When both are features and both N < d, no d x d
    matrix is formed.  FlowkitError: other dimensions, fewer than two samples, values not finite.
    """
    if not isinstance(a, FrechetMoments) and not isinstance(b, FrechetMoments):
        a, b = _rows(a), _rows(b)
        if max(len(a), len(b)) < a.shape[1]:
            return _from_features(a.cpu(), b.cpu())
    first, second = _moments(a), _moments(b)
    m1, m2, s1, s2 = first.mean.cpu(), second.mean.cpu(), first.cov.cpu(), second.cov.cpu()
    _same_dimension(len(m1), len(m2))
    return _parts(m1 - m2, s1.trace(), s2.trace(), _cross(s1, s2), first.n, second.n)


def _cross(s1: Tensor, s2: Tensor) -> Tensor:
    """tr (S1 S2)^(1/2) of two covariances."""
    factor, failed = torch.linalg.cholesky_ex(s1)
    if failed:
        values, vectors = torch.linalg.eigh(s1)
        factor = vectors * values.clamp(min=0).sqrt()
    product = factor.T @ s2 @ factor
    return torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()


def _from_features(a: Tensor, b: Tensor) -> Frechet:
    _same_dimension(a.shape[1], b.shape[1])
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


def _rows(features: Tensor | np.ndarray) -> Tensor:
    """Checked features in float64, on the CPU if their device has none."""
    features = torch.as_tensor(features)
    if features.ndim != 2:
        raise FlowkitError(f"features must be (N, d), got shape {tuple(features.shape)}")
    if not features.isfinite().all():
        raise FlowkitError("features are not finite; check the pictures that they were made from")
    return features.cpu().double() if features.device.type == "mps" else features.double()


def _same_dimension(d1: int, d2: int) -> None:
    if d1 != d2:
        raise FlowkitError(f"features have {d1} and {d2} dimensions; use one extractor for both")
