"""Densities of t for training, each with sample, pdf, cdf and quantile in closed form.

t: 0 (noise) -> 1 (data).  A draw is the quantile of a uniform number, so that two densities given
the same generator are compared on common random numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.registry import check_options, look_up

__all__ = [
    "Constant",
    "Curriculum",
    "EDM",
    "LogitNormal",
    "Shifted",
    "TimeDensity",
    "UShaped",
    "Uniform",
    "density",
]


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


class Curriculum(TimeDensity):
    """Easy times first (Kim et al., 2024, arXiv:2403.10348): stage n of N draws from the noisiest
    n/N of `base`, and stage N from all of it.

    base: its mass is cut into num_stages equal parts from t = 0 on.  A stage ends when the loss
    has not beaten its best in more than `patience` updates in a row; the first loss of a stage
    sets the mark.  Give update() a loss whose weight does not depend on t.
    """

    def __init__(
        self, base: TimeDensity | None = None, *, num_stages: int = 20, patience: int = 200
    ) -> None:
        if num_stages < 1 or patience < 0:
            raise FlowkitError(
                f"num_stages must be >= 1 and patience >= 0, got {num_stages} and {patience}"
            )
        self.base, self.num_stages, self.patience = base or Uniform(), num_stages, patience
        self.stage, self.best, self.stalled = 1, math.inf, 0

    @property
    def share(self) -> float:
        """How much of the base's mass the stage draws from."""
        return self.stage / self.num_stages

    def update(self, loss: float | Tensor) -> bool:
        """Tell the loss of a step; returns whether the next stage begins."""
        if self.stage == self.num_stages:
            return False
        loss = float(loss)
        if loss < self.best:
            self.best, self.stalled = loss, 0
        else:
            self.stalled += 1
        advance = self.stalled > self.patience
        if advance:
            self.stage, self.best, self.stalled = self.stage + 1, math.inf, 0
        return advance

    def state_dict(self) -> dict[str, Any]:
        """JSON-able position in the curriculum."""
        best = None if self.best == math.inf else self.best
        return {"stage": self.stage, "best": best, "stalled": self.stalled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the position of state_dict()."""
        if not 1 <= state["stage"] <= self.num_stages:
            raise FlowkitError(
                f"the state is of stage {state['stage']}, this curriculum has {self.num_stages}; "
                "use the num_stages it was saved with"
            )
        self.stage, self.stalled = state["stage"], state["stalled"]
        self.best = math.inf if state["best"] is None else state["best"]

    def quantile(self, u: Tensor) -> Tensor:
        return self.base.quantile(u * self.share)

    def _pdf(self, t: Tensor) -> Tensor:
        inside = self.base.cdf(t) <= self.share
        return torch.where(inside, self.base.pdf(t) / self.share, torch.zeros_like(t))

    def _cdf(self, t: Tensor) -> Tensor:
        return (self.base.cdf(t) / self.share).clamp(max=1)


_DENSITIES: dict[str, type[TimeDensity]] = {
    "uniform": Uniform,
    "logit_normal": LogitNormal,
    "u_shaped": UShaped,
    "edm": EDM,
    "shifted": Shifted,
    "constant": Constant,
}


def density(name: str, **options: Any) -> TimeDensity:
    """A density by its name in a configuration; `base` of "shifted" is {"name": ..., **options}.

    Raises FlowkitError for an unknown name or option.
    """
    cls = look_up("density of t", name, _DENSITIES)
    check_options(f"density of t {name!r}", cls, options)
    if isinstance(base := options.get("base"), Mapping):
        options["base"] = density(**base)
    return cls(**options)


def _tensor(t: float | Tensor) -> Tensor:
    return t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise FlowkitError(f"{name} must be positive, got {value}")
