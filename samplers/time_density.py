"""What a density of t is, and the plainest one.

t: 0 (noise) -> 1 (data).  A draw is the quantile of a uniform number, so that two densities given
the same generator are compared on common random numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TimeDensity", "Uniform"]


class TimeDensity(ABC):
    """A distribution of times in [0, 1]."""

    def sample(
        self,
        n: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """n independent times: (n,), float32, on `device` (default: the generator's)."""
        if device is None and generator is not None:
            device = generator.device
        return self.quantile(torch.rand(n, generator=generator, device=device, dtype=torch.float32))

    def pdf(self, t: float | Tensor) -> Tensor:
        """Density at t, in t's shape; 0 outside [0, 1].  Floats are taken as float64."""
        t = _tensor(t)
        inside = (t >= 0) & (t <= 1)
        return torch.where(inside, self._pdf(t.clamp(0, 1)), torch.zeros_like(t))

    def cdf(self, t: float | Tensor) -> Tensor:
        """Probability of a time <= t, in t's shape.  Floats are taken as float64."""
        return self._cdf(_tensor(t).clamp(0, 1))

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """The time that a share u in [0, 1] of the draws stays below, in u's shape and dtype."""

    @abstractmethod
    def _pdf(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _cdf(self, t: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Uniform(TimeDensity):
    """All times alike (Liu et al., 2022, arXiv:2209.03003)."""

    def quantile(self, u: Tensor) -> Tensor:
        return u

    def _pdf(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _cdf(self, t: Tensor) -> Tensor:
        return t


def _tensor(t: float | Tensor) -> Tensor:
    return t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
