"""The one interface: a velocity is a function v(x_t, t).

    x_t = (1 - t) * noise + t * data        v = data - noise        t: 0 (noise) -> 1 (data)

A prediction of v at (x_t, t) is also one of the data, the noise and the score, because on the
straight path all of them are affine in each other:

    data = x_t + (1 - t) v      noise = x_t - t v      score = (t v - x_t) / (1 - t)
"""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from flowkit.errors import FlowkitError

__all__ = [
    "FlowMap",
    "Velocity",
    "VelocityModel",
    "batch_times",
    "bind",
    "expand_to",
    "guided",
    "interpolate",
    "sigma_interval",
    "to_data",
    "to_noise",
    "to_score",
    "velocity_from_data",
    "velocity_from_noise",
    "velocity_from_score",
]


@runtime_checkable
class Velocity(Protocol):
    """v(x_t, t): x_t (B, *), t a float, () or (B,) in [0, 1]; returns (B, *) in x_t's dtype."""

    def __call__(self, x_t: Tensor, t: float | Tensor, /) -> Tensor: ...


@runtime_checkable
class FlowMap(Protocol):
    """Mean velocity from time t to time s: x_s = x_t + (s - t) u(x_t, t, s)."""

    def __call__(self, x_t: Tensor, t: float | Tensor, s: float | Tensor, /) -> Tensor: ...


class VelocityModel(nn.Module):
    """A network seen as a velocity: model(x_t, t, **cond) -> v, in x_t's dtype.

    The network keeps its own dtype, time scale and sign; a subclass (flowkit/adapters.py)
    translates in `forward`.  `description()` is what an exported model needs to be rebuilt.
    """

    adapter: str  # the name under which flowkit.adapters finds the class again
    t_min: float = 0.0  # the noisiest time the network knows: start at (1 - t_min) * noise there

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network's parameters."""
        return next(
            (p.dtype for p in self.net.parameters() if p.is_floating_point()), torch.float32
        )

    def forward(self, x_t: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        raise NotImplementedError("use an adapter of flowkit.adapters")

    def description(self) -> dict[str, Any]:
        """JSON-able {"adapter": name, **constructor options}."""
        return {"adapter": self.adapter}


def expand_to(t: float | Tensor, x: Tensor) -> Tensor:
    """t in x's dtype, broadcasting against x: () or (B,) becomes (1 or B, 1, ..., 1)."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    return t.reshape(-1, *([1] * (x.ndim - 1)))


def batch_times(t: float | Tensor, x: Tensor) -> Tensor:
    """t as one time per sample: (B,), at least float32, on x's device."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.as_tensor(t, dtype=dtype, device=x.device).expand(len(x))


def interpolate(noise: Tensor, data: Tensor, t: float | Tensor) -> Tensor:
    """x_t on the straight path.  noise, data: (B, *).  t: float, () or (B,)."""
    t = expand_to(t, data)
    return (1 - t) * noise + t * data


def to_data(x_t: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
    """The data that (x_t, v) point to; the posterior mean E[data | x_t] when v is exact."""
    return x_t + (1 - expand_to(t, x_t)) * v


def to_noise(x_t: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
    """The noise that (x_t, v) come from."""
    return x_t - expand_to(t, x_t) * v


def to_score(x_t: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
    """Gradient of log p_t at x_t: -noise / (1 - t).  Undefined at t = 1."""
    t = expand_to(t, x_t)
    return (t * v - x_t) / (1 - t)


# rfpp's bound (Lee et al., 2024, arXiv:2405.20320): nearer to an end the quotient is noise.
_MARGIN = 1e-5


def velocity_from_data(x_t: Tensor, data: Tensor, t: float | Tensor) -> Tensor:
    """v = (data - x_t) / (1 - t), with 1 - t kept >= 1e-5."""
    return (data - x_t) / (1 - expand_to(t, x_t)).clamp(min=_MARGIN)


def velocity_from_noise(x_t: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
    """v = (x_t - noise) / t, with t kept >= 1e-5."""
    return (x_t - noise) / expand_to(t, x_t).clamp(min=_MARGIN)


def velocity_from_score(x_t: Tensor, score: Tensor, t: float | Tensor) -> Tensor:
    """v = (x_t + (1 - t) score) / t, with t kept >= 1e-5."""
    t = expand_to(t, x_t)
    return (x_t + (1 - t) * score) / t.clamp(min=_MARGIN)


class bind:  # noqa: N801 - reads as a function
    """Fix the conditioning of a model: bind(model, class_labels=y) is a Velocity."""

    def __init__(self, velocity: Any, **cond: Any) -> None:
        self.velocity, self.cond = velocity, cond

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        return self.velocity(x_t, t, **self.cond)


class guided:  # noqa: N801 - reads as a function
    """Classifier-free guidance, v = v_u + scale (v_c - v_u), inside a t-interval (Ho & Salimans,
    2022, arXiv:2207.12598).

    conditional, unconditional: Velocity.  The same model at lower quality, under the same
    conditioning, in the place of `unconditional` makes it AutoGuidance (Karras et al., 2024,
    arXiv:2406.02507): guided(bind(model, y=y), bind(weak, y=y), 1.4).
    interval: open at both ends, in flowkit's t; for limits in EDM's sigma see `sigma_interval`.
    scale 1 and times outside never call `unconditional` (Kynkaanniemi et al., 2024,
    arXiv:2404.07724).  A stage of a solver is inside or outside by its own time.
    rescale: in [0, 1], pulls the per-sample standard deviation of v towards that of v_c (Lin et
    al., 2023, arXiv:2305.08891); in velocity space, where it is not the same as in that of noise.

    t: a float, () or (B,).  Only a tensor t on a device, with an interval, makes the host wait.
    Predictions of data, noise and score are guided alike, being affine in v.
    """

    def __init__(
        self,
        conditional: Velocity,
        unconditional: Velocity,
        scale: float,
        *,
        interval: tuple[float, float] = (-1.0, 2.0),
        rescale: float = 0.0,
    ) -> None:
        if not 0 <= rescale <= 1:
            raise FlowkitError(f"rescale must lie in [0, 1], got {rescale}; 0 switches it off")
        if not interval[0] < interval[1]:
            raise FlowkitError(f"interval must be (low, high) with low < high, got {interval}")
        self.conditional, self.unconditional = conditional, unconditional
        self.scale, self.interval, self.rescale = scale, interval, rescale

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        v_c = self.conditional(x_t, t)
        if self.scale == 1:
            return v_c
        low, high = self.interval
        if low < 0 and high > 1:
            return self._guide(v_c, self.unconditional(x_t, t))
        if not isinstance(t, Tensor):
            return self._guide(v_c, self.unconditional(x_t, t)) if low < t < high else v_c
        inside = (low < t) & (t < high)
        if not inside.any():
            return v_c
        v = self._guide(v_c, self.unconditional(x_t, t))
        return torch.where(inside.to(v.device).reshape(-1, *[1] * (v.ndim - 1)), v, v_c)

    def _guide(self, v_c: Tensor, v_u: Tensor) -> Tensor:
        v = v_u + self.scale * (v_c - v_u)
        if not self.rescale or v[0].numel() == 1:  # one number has no deviation
            return v
        dims = tuple(range(1, v.ndim))
        std, std_c = v.std(dims, keepdim=True), v_c.std(dims, keepdim=True)
        # What rounding alone leaves of a constant v is no deviation to divide by.
        rounding = torch.finfo(v.dtype).eps * v.abs().amax(dims, keepdim=True)
        ratio = torch.where(std > rounding, std_c / std, torch.ones_like(std))
        return v * (self.rescale * ratio + 1 - self.rescale)


def sigma_interval(low: float, high: float) -> tuple[float, float]:
    """The `interval` of guided for EDM's sigma between low and high: t = 1 / (1 + sigma).

    sigma_interval(0.28, 5.42) is (0.156, 0.781).  high: math.inf takes in pure noise, t = 0.
    """
    if not 0 <= low < high:
        raise FlowkitError(f"sigma_interval needs 0 <= low < high, got {low} and {high}")
    return (-1.0 if high == math.inf else 1 / (1 + high)), 1 / (1 + low)
