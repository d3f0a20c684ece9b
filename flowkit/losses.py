"""Premetrics: how far a predicted velocity is from a batch's, one number per sample.

    error = v - (data - noise)        predicted data = x_t + (1 - t) v

Any premetric has the same minimiser as the squared one only where (x_t, t) has one target: for
pairs of an ODE, not for independent noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from flowkit.coupling import Batch
from flowkit.errors import FlowkitError
from flowkit.perceptual import LPIPS, FeatureDistance
from flowkit.registry import check_options, look_up
from flowkit.velocity import to_data

__all__ = [
    "LPIPS",
    "FeatureDistance",
    "HuberForm",
    "Perceptual",
    "PerceptualHuber",
    "Premetric",
    "PseudoHuber",
    "Squared",
    "huber_c",
    "premetric",
    "pseudo_huber",
    "squared",
]

HuberForm = Literal["rfpp", "ict", "elementwise"]

_HUBER_C: dict[str, Callable[[int], float]] = {
    "rfpp": lambda d: 0.00054 * d,
    "ict": lambda d: 0.00054 * math.sqrt(d),
    "elementwise": lambda d: 1e-3,
}


class Premetric(Protocol):
    """Loss per sample (B,), at least float32, of a velocity v (B, *) at x_t (B, *), t (B,)."""

    def __call__(self, v: Tensor, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor: ...


def squared(error: Tensor) -> Tensor:
    """Mean square of each sample: (B, *) -> (B,), at least float32."""
    return _rows(error).square().mean(1)


def huber_c(preset: HuberForm, d: int) -> float:
    """The c that a preset takes for d numbers per sample: .00054 d, .00054 sqrt(d) or .001."""
    return look_up("pseudo-Huber preset", preset, _HUBER_C)(d)


def pseudo_huber(error: Tensor, *, c: float | None = None, reduction: HuberForm = "rfpp") -> Tensor:
    """Pseudo-Huber loss of each sample: (B, *) with d numbers each -> (B,), at least float32.

    reduction, and the default of c > 0:
      "rfpp"         (sqrt(|error|^2 + c^2) - c) / d,  c = .00054 d (Lee et al., 2024,
                     arXiv:2405.20320)
      "ict"          sqrt(|error|^2 + c^2) - c,  c = .00054 sqrt(d) (Song and Dhariwal, 2023,
                     arXiv:2310.14189)
      "elementwise"  the mean over elements of sqrt(error^2 + c^2) - c,  c = .001
                     (G-U-N/Rectified-Diffusion)
    """
    rows = _rows(error)
    d = rows.shape[1]
    default = huber_c(reduction, d)
    c = default if c is None else c
    _check_c(c)
    if reduction == "elementwise":
        return _huber(rows.square(), c).mean(1)
    huber = _huber(rows.square().sum(1), c)
    return huber / d if reduction == "rfpp" else huber


def _huber(square: Tensor, c: float) -> Tensor:
    """sqrt(square + c^2) - c without the difference, which would cancel for small errors."""
    return square / ((square + c * c).sqrt() + c)


class Squared(nn.Module):
    """Mean square of the velocity's error."""

    def forward(self, v: Tensor, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        return squared(_error(v, batch))


class PseudoHuber(nn.Module):
    """Pseudo-Huber loss of the velocity's error; preset and c as in `pseudo_huber`."""

    def __init__(self, preset: HuberForm = "rfpp", c: float | None = None) -> None:
        super().__init__()
        huber_c(preset, 1)
        _check_c(c)
        self.preset, self.c = preset, c

    def forward(self, v: Tensor, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        return pseudo_huber(_error(v, batch), c=self.c, reduction=self.preset)


class Perceptual(nn.Module):
    """Distance of the predicted data from the data, divided by 1 - t if `divide`.

    distance: (a, b) pictures (B, C, H, W) -> (B,), such as LPIPS() or FeatureDistance(net).
    """

    def __init__(self, distance: nn.Module, *, divide: bool = False) -> None:
        super().__init__()
        self.distance, self.divide = distance, divide

    def forward(self, v: Tensor, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        loss = self.distance(batch.data, to_data(_wide(x_t), _wide(v), t))
        return loss / (1 - t).clamp(min=_MARGIN) if self.divide else loss


class PerceptualHuber(nn.Module):
    """t H(error) + distance(data, predicted data), H being rfpp's pseudo-Huber loss.

    LPIPS-Huber, config E of Lee et al., 2024, arXiv:2405.20320; with `divide` the distance is
    divided by 1 - t: LPIPS-Huber-1/t, their config F.  (Their t runs from data to noise.)
    distance: as for `Perceptual`.  c: as in `pseudo_huber`.
    """

    def __init__(
        self, distance: nn.Module, *, divide: bool = False, c: float | None = None
    ) -> None:
        super().__init__()
        self.perceptual, self.huber = Perceptual(distance, divide=divide), PseudoHuber("rfpp", c)

    def forward(self, v: Tensor, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        return t * self.huber(v, x_t, t, batch) + self.perceptual(v, x_t, t, batch)


_MARGIN = 1e-5  # rfpp never trains nearer to an end


def premetric(name: str, **options: Any) -> nn.Module:
    """A premetric by its name in a configuration.

    "squared"; "huber": preset, c; "lpips": net, weights, pooling, size, divide; "lpips_huber" and
    "lpips_huber_1/t": net, weights, pooling, size, c.
    net: a name of LPIPS' networks, or a feature network (a module), which is then used with
    FeatureDistance.  size: by default 224 for LPIPS, as the pictures are for a module.
    Raises FlowkitError for an unknown name or option, and for missing LPIPS weights.
    """
    build = look_up("premetric", name, _PREMETRICS)
    check_options(f"premetric {name!r}", build, options)
    return build(**options)


def _lpips(
    net: str | nn.Module = "vgg",
    weights: str | None = None,
    pooling: str = "max",
    size: int | None = None,
    divide: bool = False,
) -> nn.Module:
    return Perceptual(_distance(net, weights, pooling, size), divide=divide)


def _lpips_huber(
    net: str | nn.Module = "vgg",
    weights: str | None = None,
    pooling: str = "max",
    size: int | None = None,
    c: float | None = None,
) -> nn.Module:
    return PerceptualHuber(_distance(net, weights, pooling, size), c=c)


def _lpips_huber_divided(
    net: str | nn.Module = "vgg",
    weights: str | None = None,
    pooling: str = "max",
    size: int | None = None,
    c: float | None = None,
) -> nn.Module:
    return PerceptualHuber(_distance(net, weights, pooling, size), divide=True, c=c)


def _distance(
    net: str | nn.Module, weights: str | None, pooling: str, size: int | None
) -> nn.Module:
    if not isinstance(net, nn.Module):
        return LPIPS(net, weights=weights, pooling=pooling, size=size or 224)
    if weights is not None or pooling != "max":
        raise FlowkitError("weights and pooling are of LPIPS; a network of your own has its own")
    return FeatureDistance(net, size=size)


_PREMETRICS: dict[str, Callable[..., nn.Module]] = {
    "squared": Squared,
    "huber": PseudoHuber,
    "lpips": _lpips,
    "lpips_huber": _lpips_huber,
    "lpips_huber_1/t": _lpips_huber_divided,
}


def _error(v: Tensor, batch: Batch) -> Tensor:
    """The velocity's error, at least in float32."""
    return _wide(v) - (_wide(batch.data) - _wide(batch.noise))


def _rows(error: Tensor) -> Tensor:
    return _wide(error).reshape(len(error), -1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_c(c: float | None) -> None:
    if c is not None and not c > 0:
        raise FlowkitError(f"c must be positive, got {c}; leave it out for the preset's")
