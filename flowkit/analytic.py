"""Flows whose velocity is known in closed form: to measure a solver, a cache or a guidance rule on.

For data drawn from N(mean, std^2), coordinate by coordinate, with g(t) = t^2 std^2 + (1 - t)^2:

    v(x, t) = mean + (t std^2 - (1 - t)) / g(t) * (x - t mean)
    x_s = s mean + sqrt(g(s) / g(t)) * (x_t - t mean)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.velocity import expand_to

__all__ = ["Gaussian", "Mixture", "normal_quantiles"]


class Gaussian:
    """The velocity of data N(mean, std^2), and its solution; any shape, each number by itself."""

    def __init__(self, mean: float = 0.7, std: float = 0.4) -> None:
        _check_stds([std])
        self.mean, self.std = mean, std

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        t = expand_to(t, x_t)
        slope = (t * self.std**2 - (1 - t)) / self._variance(t)
        return self.mean + slope * (x_t - t * self.mean)

    def flow(self, x_t: Tensor, t: float, s: float) -> Tensor:
        """The solution at time s that passes through x_t (B, *) at time t."""
        growth = (self._variance(s) / self._variance(t)) ** 0.5
        return s * self.mean + growth * (x_t - t * self.mean)

    def _variance(self, t: Any) -> Any:
        return t * t * self.std**2 + (1 - t) ** 2


class Mixture:
    """The velocity of data from a mixture of Gaussians; any shape, each number by itself.

    weights, means, stds: one number for each component; the weights are normalised.  Its paths
    have no closed form: take many steps of "rk4" (4,000 give 1e-12 on smooth mixtures).
    """

    def __init__(
        self, weights: Sequence[float], means: Sequence[float], stds: Sequence[float]
    ) -> None:
        _check_stds(stds)
        if not len(weights) == len(means) == len(stds) or min(weights) <= 0:
            raise FlowkitError(
                "a mixture needs as many weights > 0 as means and stds, got "
                f"{list(weights)}, {list(means)} and {list(stds)}"
            )
        rows = (torch.tensor(row, dtype=torch.float64) for row in (weights, means, stds))
        self.weights, self.means, self.stds = rows

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        t = expand_to(t, x_t)[..., None]
        w, mean, std = (row.to(x_t) for row in (self.weights, self.means, self.stds))
        variance = t * t * std**2 + (1 - t) ** 2
        offset = x_t[..., None] - t * mean
        share = (w.log() - 0.5 * variance.log() - offset**2 / (2 * variance)).softmax(-1)
        return (share * (mean + (t * std**2 - (1 - t)) / variance * offset)).sum(-1)


def normal_quantiles(count: int = 64, shape: Sequence[int] = (1, 4, 4, 4)) -> Tensor:
    """The quantiles (i + 1/2) / count of the standard normal, float64: a start without chance."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.special.ndtri(u).reshape(*shape)


def _check_stds(stds: Sequence[float]) -> None:
    if not stds or min(stds) <= 0:
        raise FlowkitError(f"standard deviations must be positive, got {list(stds)}")
