"""Inversion: data to noise and back by one solver, what returns, and how normal the noise is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.eval.flow_measures import Distance, in_float64
from flowkit.eval.picture_quality import WINDOW, psnr, ssim, wide
from flowkit.samplers.evaluations import Solver
from flowkit.samplers.solve import invert, sample
from flowkit.velocity import Velocity

__all__ = ["InversionError", "Normality", "inversion_error", "normality"]


@dataclass(frozen=True)
class Normality:
    """How like draws from N(0, 1) numbers are: mean 0, std 1, kurtosis 3, correlation 0.

    correlation: of neighbours along the places of a picture, or along a vector; nan where there
    are none.
    """

    mean: float
    std: float
    kurtosis: float
    correlation: float


@dataclass(frozen=True)
class InversionError:
    """What data -> noise -> data loses.

    rmse: of the state.  psnr, ssim, perceptual: means over the pictures; psnr is inf as soon as one
    returns exactly; ssim is None below 11 pixels a side, perceptual without a distance.
    latent_rmse: of the noise against the solution's, None unless asked for.
    noise: see `Normality`.  nfe_inversion, nfe_sampling: of the two legs.
    """

    rmse: float
    psnr: float
    ssim: float | None
    perceptual: float | None
    latent_rmse: float | None
    noise: Normality
    nfe_inversion: int
    nfe_sampling: int


@torch.no_grad()
def inversion_error(
    velocity: Velocity,
    data: Tensor,
    times: Sequence[float],
    solver: str | Solver,
    *,
    keep_state: bool = True,
    reference_steps: int | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    perceptual: Distance | None = None,
    **options: Any,
) -> InversionError:
    """Invert `data` along `times` and sample back along them, with the same solver.

    data: (B, *), pictures (B, C, H, W) in [-1, 1] unless `decode` makes pictures of them.
    keep_state: hand what the inversion leaves (the second state of an exact solver) to the way
    back; without it only the noise is kept, as one does to store or edit it.
    reference_steps: also compare the noise with an rk4 inversion, each step cut into so many.
    options: the solver's.  FlowkitError: what `invert` refuses, noise that is not finite.
    """
    inverse = invert(velocity, data, times, solver, **options)
    if not inverse.x.isfinite().all():
        raise FlowkitError("the inversion is not finite; check the model's weights and the times")
    back = (
        options | {"state": inverse.state} if keep_state and inverse.state is not None else options
    )
    run = sample(velocity, inverse.x, times, solver, **back)
    latent = None
    if reference_steps is not None:
        exact = invert(*in_float64(velocity, data), _cut(times, reference_steps), "rk4").x
        latent = _rms(wide(inverse.x) - exact)
    original, returned = (_shown(x, decode) for x in (data.to(run.x.dtype), run.x))
    pictures = original.ndim == 4 and min(original.shape[-2:]) >= WINDOW
    return InversionError(
        _rms(run.x - data),
        float(psnr(original, returned).mean()),
        float(ssim(original, returned).mean()) if pictures else None,
        float(perceptual(returned, original).mean()) if perceptual else None,
        latent,
        normality(inverse.x),
        inverse.nfe,
        run.nfe,
    )


def normality(noise: Tensor) -> Normality:
    """Moments of all numbers of `noise` (B, *) together, in float64.

    Of N standard normal numbers they spread by 1, 0.7, 5 and 1 / sqrt(number of axes), over
    sqrt(N).  FlowkitError: fewer than two numbers.
    """
    if noise.numel() < 2:
        raise FlowkitError(f"moments need two numbers or more, got {noise.numel()}")
    x = wide(noise)
    centred = x - x.mean()
    variance = centred.square().mean()
    places = range(1 if x.ndim == 2 else 2, x.ndim)  # behind (B, C), or (B,)
    pairs = [
        (centred.narrow(d, 0, x.shape[d] - 1) * centred.narrow(d, 1, x.shape[d] - 1)).flatten()
        for d in places
        if x.shape[d] > 1
    ]
    products = torch.cat(pairs).mean() if pairs else torch.tensor(torch.nan)
    return Normality(
        float(x.mean()),
        float(variance.sqrt()),
        float(centred.pow(4).mean() / variance**2),
        float(products / variance),
    )


def _cut(times: Sequence[float], parts: int) -> list[float]:
    """The grid with each step cut into equal ones."""
    inner = [[t + (s - t) * i / parts for i in range(parts)] for t, s in pairwise(times)]
    return [*chain(*inner), times[-1]]


def _shown(x: Tensor, decode: Callable[[Tensor], Tensor] | None) -> Tensor:
    return (x if decode is None else decode(x)).clamp(-1, 1)


def _rms(error: Tensor) -> float:
    return float(wide(error).square().mean().sqrt())
