"""Where a score is asked or learnt: densities of t that belong to score distillation.

They are the densities of flowkit.samplers.timesteps, EDM's sampling levels, and the middle of any.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.registry import check_options
from flowkit.samplers.time_density import TimeDensity
from flowkit.samplers.timesteps import density

__all__ = ["Karras", "Middle", "noise_levels"]


@dataclass(frozen=True)
class Karras(TimeDensity):
    """sigma = (sigma_max^(1/rho) + u (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho at t = 1 / (1 +
    sigma), u uniform: the levels of EDM's sampler (Karras et al., 2022, arXiv:2206.00364, eq. 5),
    of which DMD2 draws one of 1000."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not (0 < self.sigma_min < self.sigma_max < math.inf and self.rho > 0):
            raise FlowkitError(
                f"expected 0 < sigma_min < sigma_max and rho > 0, got {self.sigma_min}, "
                f"{self.sigma_max} and {self.rho}"
            )

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)

    def quantile(self, u: Tensor) -> Tensor:
        noisy, clean = self._ends
        return 1 / (1 + (noisy + u * (clean - noisy)).pow(self.rho))

    def _pdf(self, t: Tensor) -> Tensor:
        noisy, clean = self._ends
        sigma = (1 - t) / t
        slope = sigma.pow(1 / self.rho - 1) / (self.rho * (noisy - clean)) / t.square()
        inside = (sigma >= self.sigma_min) & (sigma <= self.sigma_max)
        return torch.where(inside, slope, torch.zeros_like(t))

    def _cdf(self, t: Tensor) -> Tensor:
        noisy, clean = self._ends
        return ((((1 - t) / t).pow(1 / self.rho) - noisy) / (clean - noisy)).clamp(0, 1)


@dataclass(frozen=True)
class Middle(TimeDensity):
    """The draws of `base` between its quantiles `low` and `high`: DMD2's 20 to 980 of 1000."""

    base: TimeDensity
    low: float = 0.02
    high: float = 0.98

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise FlowkitError(
                f"low and high must be 0 <= low < high <= 1, got {self.low} and {self.high}"
            )

    def quantile(self, u: Tensor) -> Tensor:
        return self.base.quantile(self.low + (self.high - self.low) * u)

    def _pdf(self, t: Tensor) -> Tensor:
        share = self.base.cdf(t)
        inside = (share >= self.low) & (share <= self.high)
        return torch.where(inside, self.base.pdf(t), torch.zeros_like(t)) / (self.high - self.low)

    def _cdf(self, t: Tensor) -> Tensor:
        return ((self.base.cdf(t) - self.low) / (self.high - self.low)).clamp(0, 1)


def noise_levels(name: str, **options: Any) -> TimeDensity:
    """A density by its name in a configuration: "karras", or one of flowkit.samplers.timesteps.

    Raises FlowkitError for an unknown name or option.
    """
    if name != "karras":
        return density(name, **options)
    check_options("density of t 'karras'", Karras, options)
    return Karras(**options)
