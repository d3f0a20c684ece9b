"""Densities of t for training, each with sample, pdf, cdf and quantile.

t: 0 (noise) -> 1 (data).  A draw is the quantile of a uniform number, so that two densities given
the same generator are compared on common random numbers.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.registry import check_options, look_up
from flowkit.samplers.curriculum import Curriculum
from flowkit.samplers.time_density import TimeDensity, Uniform

__all__ = [
    "Constant",
    "CosMap",
    "Curriculum",
    "EDM",
    "LogitNormal",
    "Mode",
    "Shifted",
    "TimeDensity",
    "UShaped",
    "Uniform",
    "density",
]


class _NormalLogit(TimeDensity):
    """logit(t) ~ N(center, std^2)."""

    std: float

    @property
    @abstractmethod
    def center(self) -> float: ...

    def __post_init__(self) -> None:
        _check_positive("std", self.std)

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.center + self.std * torch.special.ndtri(u))

    def _pdf(self, t: Tensor) -> Tensor:
        z = (torch.logit(t) - self.center) / self.std
        density = torch.exp(-0.5 * z * z) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))
        return torch.where((t > 0) & (t < 1), density, torch.zeros_like(t))

    def _cdf(self, t: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit(t) - self.center) / self.std)


@dataclass(frozen=True)
class LogitNormal(_NormalLogit):
    """logit(t) ~ N(mean, std^2) (Esser et al., 2024, arXiv:2403.03206); mean > 0 leans to data."""

    mean: float = 0.0
    std: float = 1.0

    @property
    def center(self) -> float:
        return self.mean


@dataclass(frozen=True)
class EDM(_NormalLogit):
    """log sigma ~ N(mean, std^2) at t = 1 / (1 + sigma) (Karras et al., 2022, arXiv:2206.00364)."""

    mean: float = -1.2
    std: float = 1.2

    @property
    def center(self) -> float:
        return -self.mean  # logit(t) = -log sigma


_UNIFORM_BELOW = 1e-6  # UShaped(a) differs from uniform by a^2 / 12 at most
_LOGARITHMS_FROM = 40.0  # sinh(a / 2) leaves float32 at a = 178
_MARGIN = 1e-5  # rfpp's distance of draws from both ends
_BISECTIONS = 55  # to the last bit of a float64 in [0, 1]


@dataclass(frozen=True)
class UShaped(TimeDensity):
    """p(t) = a cosh(a (t - 1/2)) / (2 sinh(a/2)): both ends more often (Lee et al., 2024,
    arXiv:2405.20320).

    a >= 0; 0 is uniform, 4 the paper's.  p is (e^{at} + e^{a(1-t)}) normalised, so its inverse is
    t = 1/2 + asinh((2u - 1) sinh(a/2)) / a.  Draws lie in [1e-5, 1 - 1e-5], as in rfpp's code.
    """

    a: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.a < math.inf:
            raise FlowkitError(f"a must be finite and >= 0, got {self.a}; 0 is uniform")

    def quantile(self, u: Tensor) -> Tensor:
        a, m = self.a, 2 * u - 1
        if a < _UNIFORM_BELOW:
            t = u
        elif a < _LOGARITHMS_FROM:
            t = 0.5 + torch.asinh(m * math.sinh(a / 2)) / a
        else:  # the same with sinh(a/2) = e^{a/2} / 2 taken out of the logarithm
            log_y = (m.abs() + torch.hypot(m, torch.full_like(m, 2 * math.exp(-a / 2)))).log()
            t = 0.5 + m.sign() * (0.5 + (log_y.clamp(min=-a) - math.log(2)) / a).clamp(min=0)
        return _MARGIN + (1 - 2 * _MARGIN) * t

    def _pdf(self, t: Tensor) -> Tensor:
        a = self.a
        if a < _UNIFORM_BELOW:
            return torch.ones_like(t)
        return a * (torch.exp(-a * t) + torch.exp(-a * (1 - t))) / (-2 * math.expm1(-a))

    def _cdf(self, t: Tensor) -> Tensor:
        a = self.a
        if a < _UNIFORM_BELOW:
            return t
        return 0.5 + 0.5 * (torch.expm1(-a * t) - torch.expm1(-a * (1 - t))) / math.expm1(-a)


@dataclass(frozen=True)
class Shifted(TimeDensity):
    """t / (t + shift (1 - t)) with t of `base`; shift > 1 leans to noise (Esser et al., 2024,
    arXiv:2403.03206, eq. 23)."""

    base: TimeDensity = field(default_factory=Uniform)
    shift: float = 3.0

    def __post_init__(self) -> None:
        _check_positive("shift", self.shift)

    def quantile(self, u: Tensor) -> Tensor:
        t = self.base.quantile(u)
        return t / (t + self.shift * (1 - t))

    def _unshifted(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 - t + self.shift * t)

    def _pdf(self, t: Tensor) -> Tensor:
        return self.base.pdf(self._unshifted(t)) * self.shift / (1 - t + self.shift * t).square()

    def _cdf(self, t: Tensor) -> Tensor:
        return self.base.cdf(self._unshifted(t))


@dataclass(frozen=True)
class Constant(TimeDensity):
    """One time only: t = 0 distils a flow to one step.  pdf is infinite there, 0 elsewhere."""

    t: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.t <= 1:
            raise FlowkitError(f"t must lie in [0, 1], got {self.t}")

    def quantile(self, u: Tensor) -> Tensor:
        return torch.full_like(u, self.t)

    def _pdf(self, t: Tensor) -> Tensor:
        return torch.where(t == self.t, math.inf, torch.zeros_like(t))

    def _cdf(self, t: Tensor) -> Tensor:
        return (t >= self.t).to(t.dtype)


@dataclass(frozen=True)
class Mode(TimeDensity):
    """The time of share u is u + scale (cos^2(pi u / 2) - 1 + u): the middle more often for scale
    > 0, both ends for < 0, uniform at 0 (Esser et al., 2024, arXiv:2403.03206, eq. 20).

    scale: in [-1, 2 / (pi - 2) = 1.75], where time grows with the share; elsewhere it has no
    density.  The cdf, the inverse of a transcendental function, is found by bisection.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise FlowkitError(
                f"scale must lie in [-1, 2 / (pi - 2) = 1.7519], got {self.scale}; "
                "beyond it times of a mode density fall again"
            )

    def quantile(self, u: Tensor) -> Tensor:
        # cos^2 - 1 is -sin^2, which leaves both ends exact
        return u + self.scale * (u - torch.sin(0.5 * math.pi * u).square())

    def _pdf(self, t: Tensor) -> Tensor:
        u = self._cdf(t)
        return 1 / (1 + self.scale * (1 - 0.5 * math.pi * torch.sin(math.pi * u)))

    def _cdf(self, t: Tensor) -> Tensor:
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            below = self.quantile(middle) < t
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return high


@dataclass(frozen=True)
class CosMap(TimeDensity):
    """p(t) = 2 / (pi (1 - 2t + 2t^2)): the noise levels of the cosine schedule (Nichol & Dhariwal,
    2021, arXiv:2102.09672) at its uniform times (Esser et al., 2024, arXiv:2403.03206, eq. 21)."""

    def quantile(self, u: Tensor) -> Tensor:
        signal, noise = (torch.sin(0.5 * math.pi * share) for share in (u, 1 - u))
        return signal / (signal + noise)

    def _pdf(self, t: Tensor) -> Tensor:
        return 2 / (math.pi * (t.square() + (1 - t).square()))

    def _cdf(self, t: Tensor) -> Tensor:
        return torch.atan2(t, 1 - t) * (2 / math.pi)


_DENSITIES: dict[str, type[TimeDensity]] = {
    "uniform": Uniform,
    "logit_normal": LogitNormal,
    "u_shaped": UShaped,
    "edm": EDM,
    "shifted": Shifted,
    "constant": Constant,
    "mode": Mode,
    "cosmap": CosMap,
    "curriculum": Curriculum,
}


def density(name: str, **options: Any) -> TimeDensity:
    """A density by its name in a configuration; `base` (of "shifted", "curriculum") is
    {"name": ..., **options}.

    Raises FlowkitError for an unknown name or option.
    """
    cls = look_up("density of t", name, _DENSITIES)
    check_options(f"density of t {name!r}", cls, options)
    if isinstance(base := options.get("base"), Mapping):
        options["base"] = density(**base)
    return cls(**options)


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise FlowkitError(f"{name} must be positive, got {value}")
