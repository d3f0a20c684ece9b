"""Gaussian paths y_s = alpha(s) data + sigma(s) noise, and the change from one to another.

Where two paths have the same noise-to-signal ratio sigma/alpha they hold the same picture at
another scale, y = (alpha(s) / t) x_t, so a denoiser of any path is exactly a velocity of the
straight one: no training, no approximation.  flowkit's own convention is in flowkit/velocity.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.velocity import batch_times, expand_to

__all__ = [
    "VE",
    "Path",
    "Straight",
    "VPLinear",
    "VPTable",
    "data_and_noise",
    "denoiser_velocity",
    "from_path",
    "to_path",
]


class Path(ABC):
    """A path by its own time s.

    `ends`: (s at the noise end, s at the data end) of what a network of this path was trained on.
    Every method maps a float or a tensor elementwise to a tensor; a float is computed in float64.
    """

    ends: tuple[float, float]

    @abstractmethod
    def ratio(self, s: float | Tensor) -> Tensor:
        """Noise-to-signal ratio sigma/alpha at time s; it falls from noise to data."""

    @abstractmethod
    def time(self, ratio: float | Tensor) -> Tensor:
        """The time s with this ratio: the inverse of `ratio`."""

    @abstractmethod
    def scale(self, ratio: float | Tensor) -> Tensor:
        """alpha where the path has this ratio."""

    def alpha(self, s: float | Tensor) -> Tensor:
        """Coefficient of the data at time s."""
        return self.scale(self.ratio(s))

    def sigma(self, s: float | Tensor) -> Tensor:
        """Coefficient of the noise at time s."""
        ratio = self.ratio(s)
        return ratio * self.scale(ratio)


class Straight(Path):
    """flowkit's own path: s = t, alpha = t, sigma = 1 - t, ratio = (1 - t) / t."""

    ends = (0.0, 1.0)

    def ratio(self, s: float | Tensor) -> Tensor:
        s = _tensor(s)
        return (1 - s) / s

    def time(self, ratio: float | Tensor) -> Tensor:
        return 1 / (1 + _tensor(ratio))

    def scale(self, ratio: float | Tensor) -> Tensor:
        return self.time(ratio)

    def alpha(self, s: float | Tensor) -> Tensor:
        return _tensor(s)

    def sigma(self, s: float | Tensor) -> Tensor:
        return 1 - _tensor(s)


class VE(Path):
    """Variance exploding, y = data + sigma noise, s = sigma.

    Karras et al., 2022, arXiv:2206.00364.
    The default range is that of EDM's published networks: t from 1/81 to 0.998.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not 0 < sigma_min < sigma_max:
            raise FlowkitError(
                f"sigma_min and sigma_max must be 0 < min < max, got {sigma_min}, {sigma_max}"
            )
        self.ends = (sigma_max, sigma_min)

    def ratio(self, s: float | Tensor) -> Tensor:
        return _tensor(s)

    def time(self, ratio: float | Tensor) -> Tensor:
        return _tensor(ratio)

    def scale(self, ratio: float | Tensor) -> Tensor:
        return torch.ones_like(_tensor(ratio))


class _VariancePreserving(Path):
    """alpha^2 + sigma^2 = 1."""

    def scale(self, ratio: float | Tensor) -> Tensor:
        return (1 + _tensor(ratio).square()).rsqrt()


class VPLinear(_VariancePreserving):
    """The continuous VP SDE with beta(s) linear on [0, 1].

    Song et al., 2021, arXiv:2011.13456, eq. 32.
    ratio^2 = exp(beta_min s + (beta_max - beta_min) s^2 / 2) - 1; at s = 1 the defaults give t =
    0.006529.  `s_min` is the least s the network was trained at.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, s_min: float = 1e-5) -> None:
        if not 0 < beta_min < beta_max or not 0 < s_min < 1:
            raise FlowkitError(
                "expected 0 < beta_min < beta_max and 0 < s_min < 1, "
                f"got beta_min={beta_min}, beta_max={beta_max}, s_min={s_min}"
            )
        self.beta_min, self.beta_range = beta_min, beta_max - beta_min
        self.ends = (1.0, s_min)

    def ratio(self, s: float | Tensor) -> Tensor:
        s = _tensor(s)
        return torch.expm1(s * (self.beta_min + 0.5 * self.beta_range * s)).sqrt()

    def time(self, ratio: float | Tensor) -> Tensor:
        # The root of the quadratic in the form that does not cancel at small s.
        integral = torch.log1p(_tensor(ratio).square())
        root = (self.beta_min**2 + 2 * self.beta_range * integral).sqrt()
        return 2 * integral / (root + self.beta_min)


class VPTable(_VariancePreserving):
    """The discrete VP path of a table alphas_cumprod (Ho et al., 2020, arXiv:2006.11239, eq. 4).

    s is an index of the table, 0 (data) to len - 1 (noise); between two indices log(sigma/alpha)
    is linear, and s stays inside the table.  A last entry of 0 (zero terminal SNR) counts as
    2^-24, as in diffusers.
    """

    def __init__(self, alphas_cumprod: Sequence[float]) -> None:
        table = torch.tensor(alphas_cumprod, dtype=torch.float64)
        table = torch.where(table == 0, 2.0**-24, table)
        valid = table.ndim == 1 and len(table) >= 2
        if not valid or not bool(((table > 0) & (table < 1)).all() and (table.diff() < 0).all()):
            raise FlowkitError(
                "alphas_cumprod must be at least 2 numbers in [0, 1) that fall from index to "
                f"index, got {len(table)} of them"
                + (f" from {float(table[0]):.4g} to {float(table[-1]):.4g}" if valid else "")
            )
        self.ends = (len(table) - 1.0, 0.0)
        self._log_ratio = 0.5 * torch.log((1 - table) / table)
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def ratio(self, s: float | Tensor) -> Tensor:
        s = _tensor(s)
        table = self._table(s)
        low = s.floor().long().clamp(0, len(table) - 2)
        return torch.lerp(table[low], table[low + 1], s - low).exp()

    def time(self, ratio: float | Tensor) -> Tensor:
        log_ratio = _tensor(ratio).log()
        table = self._table(log_ratio)
        high = torch.searchsorted(table, log_ratio.detach()).clamp(1, len(table) - 1)
        low = table[high - 1]
        s = high - 1 + (log_ratio - low) / (table[high] - low)
        return s.clamp(0, len(table) - 1)

    def _table(self, like: Tensor) -> Tensor:
        """The table on the device and in the dtype of `like`, copied there once."""
        key = (like.device, like.dtype)
        if key not in self._copies:
            self._copies[key] = self._log_ratio.to(like)
        return self._copies[key]


def to_path(path: Path, x_t: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
    """(y, s): the point x_t of the straight path, seen on `path`.

    x_t: (B, *).  t: float, () or (B,), in (0, 1].  Returns y: (B, *) and s: (B,).
    """
    times = batch_times(t, x_t)
    ratio = (1 - times) / times
    return x_t * expand_to(path.scale(ratio) / times, x_t), path.time(ratio)


def from_path(path: Path, y: Tensor, s: float | Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, t): the point y of `path` at time s, seen on the straight path; undoes `to_path`."""
    ratio = path.ratio(batch_times(s, y))
    t = 1 / (1 + ratio)
    return y * expand_to(t / path.scale(ratio), y), t


def data_and_noise(
    prediction: str, y: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """The (data, noise) that a network's output at y = alpha data + sigma noise stands for.

    prediction: "epsilon" (the noise), "sample" (the data) or "v_prediction" (alpha noise - sigma
    data, Salimans & Ho, 2022, arXiv:2202.00512), the names of diffusers' schedulers.
    y, output: (B, *).  alpha, sigma: broadcastable to them.
    """
    if prediction == "epsilon":
        return (y - sigma * output) / alpha, output
    if prediction == "sample":
        return output, (y - alpha * output) / sigma
    if prediction == "v_prediction":
        power = alpha.square() + sigma.square()
        return (alpha * y - sigma * output) / power, (sigma * y + alpha * output) / power
    raise FlowkitError(
        f"unknown prediction {prediction!r}; expected 'epsilon', 'sample' or 'v_prediction'"
    )


def denoiser_velocity(denoiser: Callable[..., Tensor], path: Path) -> Callable[..., Tensor]:
    """The velocity of a denoiser of `path`, exact where the path has t's ratio.

    denoiser: D(y, s, **cond) -> E[data | y], y: (B, *), s: (B,).  Returns a Velocity for t in
    (0, 1) that passes **cond on.  Networks are better served by flowkit.adapters, which also know
    the dtype, the trained range and what the network predicts.
    """

    def velocity(x_t: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        y, s = to_path(path, x_t, t)
        return (denoiser(y, s, **cond) - x_t) / (1 - expand_to(t, x_t))

    return velocity


def _tensor(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=None if torch.is_tensor(value) else torch.float64)
