"""Diffusion networks as velocities: v = data - noise, both estimated by the network on its path.

x_t of the straight path is y = (alpha_s / t) x_t of the network's path at the time s with
sigma_s / alpha_s = (1 - t) / t (flowkit/paths.py), so in the trained range the velocity is exact.

Outside it, t < t_min or t > t_max, the network would be asked what it never learned.  There x_t is
rescaled to the nearest trained point, and the estimate that keeps v finite is held:

    t < t_min    v = (data - x_t) / (1 - t)       at t = 0 one Euler step ends on `data`
    t > t_max    v = (x_t - noise) / t            at t = 1 one step back ends on `noise`

A sampler may therefore start at t = 0 with plain noise; to repeat a diffusion sampler's own start
y = sigma_max noise, begin at t = t_min with x = (1 - t_min) noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowkit.errors import FlowkitError
from flowkit.flow_adapters import call_net
from flowkit.paths import VE, Path, VPLinear, VPTable, data_and_noise
from flowkit.velocity import VelocityModel, batch_times, expand_to

__all__ = [
    "Border",
    "EDMVelocity",
    "PreconditionedVelocity",
    "VPLinearVelocity",
    "VPVelocity",
]

# rfpp's bound on t and 1 - t (Lee et al., 2024, arXiv:2405.20320): beyond it lies rounding noise.
_MARGIN = 1e-5


class Border:
    """Where the straight path meets the path of a network that predicts `prediction`.

    prediction: "epsilon", "sample" or "v_prediction".  t_min, t_max: flowkit's times at the ends of
    what the network was trained on.  All times and results here have one shape, any shape.
    """

    def __init__(self, path: Path, prediction: str) -> None:
        if prediction not in ("epsilon", "sample", "v_prediction"):
            raise FlowkitError(
                "prediction must be 'epsilon', 'sample' or 'v_prediction' "
                f"(prediction_type of the scheduler), got {prediction!r}"
            )
        self.path, self.prediction = path, prediction
        noise_end, data_end = (1 / (1 + float(path.ratio(s))) for s in path.ends)
        self.t_min, self.t_max = max(noise_end, _MARGIN), min(data_end, 1 - _MARGIN)

    def enter(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, ratio): for x_t the network sees y = scale x_t, at noise-to-signal `ratio`."""
        held = t.clamp(self.t_min, self.t_max)
        ratio = (1 - held) / held
        # Both factors are 1 in the trained range.
        low, high = t.clamp(max=self.t_min), t.clamp(min=self.t_max)
        to_held = (1 - self.t_min) / (1 - low) * (self.t_max / high)
        return to_held * self.path.scale(ratio) / held, ratio

    def leave(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b): v = a data - b noise, with the network's estimates; both 1 in the range."""
        low, high = t.clamp(max=self.t_min), t.clamp(min=self.t_max)
        data_weight = 1 / (1 - low) - self.t_min / (1 - self.t_min)
        noise_weight = 1 / high - (1 - self.t_max) / self.t_max
        return data_weight, noise_weight


class _DiffusionVelocity(VelocityModel):
    """A network on the other side of a border: see Border."""

    def __init__(self, net: nn.Module, path: Path, prediction: str) -> None:
        super().__init__(net)
        self.border = Border(path, prediction)
        self.path, self.prediction = path, prediction
        self.t_min, self.t_max = self.border.t_min, self.border.t_max

    def forward(self, x_t: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        x = x_t if x_t.dtype == torch.float64 else x_t.float()
        times = batch_times(t, x)
        scale, ratio = self.border.enter(times)
        data, noise = self._estimates(x * expand_to(scale, x), ratio, cond)
        data_weight, noise_weight = (expand_to(w, x) for w in self.border.leave(times))
        return (data_weight * data - noise_weight * noise).to(x_t.dtype)

    def _estimates(self, y: Tensor, ratio: Tensor, cond: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(data, noise) at y (B, *), a point of the network's path with ratio (B,)."""
        scale = self.path.scale(ratio)
        alpha, sigma = expand_to(scale, y), expand_to(ratio * scale, y)
        output = self._predict(y, ratio, cond)
        return data_and_noise(self.prediction, y, output, alpha, sigma)

    def _predict(self, y: Tensor, ratio: Tensor, cond: dict[str, Any]) -> Tensor:
        """The network's output at y."""
        raise NotImplementedError


class EDMVelocity(_DiffusionVelocity):
    """A network D(y, sigma, **cond) at y = data + sigma noise.

    prediction: what it returns: "sample", the denoised y (EDM's networks with their
    preconditioning inside), or "epsilon".  sigma_min, sigma_max: the trained range; published
    rfpp networks were trained with 1e-5 and 99999 (Lee et al., 2024, arXiv:2405.20320).
    """

    adapter = "edm"

    def __init__(
        self,
        net: nn.Module,
        *,
        prediction: str = "sample",
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> None:
        super().__init__(net, VE(sigma_min, sigma_max), prediction)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def _predict(self, y: Tensor, ratio: Tensor, cond: dict[str, Any]) -> Tensor:
        return call_net(self, y, ratio, **cond)

    def description(self) -> dict[str, Any]:
        return super().description() | {
            "prediction": self.prediction,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
        }


# sigma, sigma_data -> c_skip, c_out, c_in, c_noise and (1 - c_skip) / sigma, all (B,).
# The last is the noise's share of y, written so that nothing cancels at small sigma.
_Coefficients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _edm(sigma: Tensor, sigma_data: float) -> _Coefficients:
    power = sigma.square() + sigma_data**2
    c_in = power.rsqrt()
    c_skip, c_out = sigma_data**2 / power, sigma * sigma_data * c_in
    return c_skip, c_out, c_in, sigma.log() / 4, sigma / power


def _vp(sigma: Tensor, sigma_data: float) -> _Coefficients:
    one, c_in = torch.ones_like(sigma), (1 + sigma.square()).rsqrt()
    return one, -sigma, c_in, 999 * VPLinear().time(sigma), torch.zeros_like(sigma)


def _ve(sigma: Tensor, sigma_data: float) -> _Coefficients:
    one = torch.ones_like(sigma)
    return one, sigma, one, (sigma / 2).log(), torch.zeros_like(sigma)


_PRECONDITIONINGS: dict[str, Callable[[Tensor, float], _Coefficients]] = {
    "edm": _edm,
    "vp": _vp,
    "ve": _ve,
}


class PreconditionedVelocity(_DiffusionVelocity):
    """A raw network F(c_in y, c_noise, **cond): D(y, sigma) = c_skip y + c_out F.

    kind: "edm" (also what EDM's published DDPM++, NCSN++ and ADM weights use), or the "vp" and
    "ve" of score_sde's weights (Karras et al., 2022, arXiv:2206.00364, Table 1).  sigma_data is
    used by "edm" alone.
    """

    adapter = "preconditioned"

    def __init__(
        self,
        net: nn.Module,
        *,
        kind: str = "edm",
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> None:
        super().__init__(net, VE(sigma_min, sigma_max), "sample")
        if kind not in _PRECONDITIONINGS:
            raise FlowkitError(f"kind must be one of {list(_PRECONDITIONINGS)}, got {kind!r}")
        self.kind, self.sigma_data = kind, sigma_data
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def denoise(self, y: Tensor, sigma: float | Tensor, **cond: Any) -> Tensor:
        """D(y, sigma), the posterior mean of the data.  y: (B, *).  sigma: float, () or (B,)."""
        wide = y if y.dtype == torch.float64 else y.float()
        return self._estimates(wide, batch_times(sigma, wide), cond)[0].to(y.dtype)

    def _estimates(self, y: Tensor, ratio: Tensor, cond: dict[str, Any]) -> tuple[Tensor, Tensor]:
        coefficients = _PRECONDITIONINGS[self.kind](ratio, self.sigma_data)
        c_noise = coefficients[3]
        c_skip, c_out, c_in, _, rest = (expand_to(c, y) for c in coefficients)
        output = call_net(self, c_in * y, c_noise, **cond)
        return c_skip * y + c_out * output, rest * y - c_out / expand_to(ratio, y) * output

    def description(self) -> dict[str, Any]:
        return super().description() | {
            "kind": self.kind,
            "sigma_data": self.sigma_data,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
        }


class VPVelocity(_DiffusionVelocity):
    """A network of a discrete VP path (DDPM, Stable Diffusion, DiT): net(y, index, **cond).

    alphas_cumprod: the scheduler's table; the index is interpolated in log-SNR, or rounded when
    integer_times is set because the network cannot take a fraction.  A learned variance is
    dropped.  null_class: the label that stands for "no label"; with it, a call without
    `class_labels` is the unconditional one.
    """

    adapter = "vp"

    def __init__(
        self,
        net: nn.Module,
        *,
        alphas_cumprod: Sequence[float],
        prediction: str = "epsilon",
        integer_times: bool = False,
        null_class: int | None = None,
    ) -> None:
        super().__init__(net, VPTable(alphas_cumprod), prediction)
        self.alphas_cumprod = [float(a) for a in alphas_cumprod]
        self.integer_times, self.null_class = integer_times, null_class

    def _predict(self, y: Tensor, ratio: Tensor, cond: dict[str, Any]) -> Tensor:
        s = self.path.time(ratio)
        if self.null_class is not None and cond.get("class_labels") is None:
            labels = torch.full((len(y),), self.null_class, dtype=torch.long, device=y.device)
            cond = cond | {"class_labels": labels}
        return call_net(self, y, s.round().long() if self.integer_times else s, **cond)

    def description(self) -> dict[str, Any]:
        return super().description() | {
            "alphas_cumprod": self.alphas_cumprod,
            "prediction": self.prediction,
            "integer_times": self.integer_times,
            "null_class": self.null_class,
        }


class VPLinearVelocity(_DiffusionVelocity):
    """A network of the continuous linear-beta VP SDE: net(y, time_scale s, **cond).

    time_scale 999 is score_sde's (Song et al., 2021, arXiv:2011.13456).
    """

    adapter = "vp_linear"

    def __init__(
        self,
        net: nn.Module,
        *,
        prediction: str = "epsilon",
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        s_min: float = 1e-5,
        time_scale: float = 999.0,
    ) -> None:
        super().__init__(net, VPLinear(beta_min, beta_max, s_min), prediction)
        self.beta_min, self.beta_max, self.s_min = beta_min, beta_max, s_min
        self.time_scale = time_scale

    def _predict(self, y: Tensor, ratio: Tensor, cond: dict[str, Any]) -> Tensor:
        return call_net(self, y, self.time_scale * self.path.time(ratio), **cond)

    def description(self) -> dict[str, Any]:
        return super().description() | {
            "prediction": self.prediction,
            "beta_min": self.beta_min,
            "beta_max": self.beta_max,
            "s_min": self.s_min,
            "time_scale": self.time_scale,
        }
