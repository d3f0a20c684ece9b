"""DDIM and the solvers that run back on their own steps: BDIA, which remembers one state more.

BDIA (Zhang et al., 2023, arXiv:2307.10829) corrects the step before by the velocity of this one.
Its next state is affine in the one before, so of three states in a row two give the third, in
either direction.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.paths import Path
from flowkit.samplers.evaluations import Draw, Evaluations, per_sample

__all__ = ["bdia", "bdia_ddim", "bdia_edm", "ddim"]

Pair = tuple[Tensor, Tensor]


def ddim(
    x: Tensor,
    times: Sequence[float],
    *,
    eta: float = 0.0,
    path: Path | None = None,
    draw: Draw | None = None,
) -> Evaluations:
    """Order 1, 1 NFE per step (Song et al., 2021, arXiv:2010.02502, eq. 12 and 16).

    x_s = s data + (1 - s) (sqrt(1 - u^2) noise + u fresh noise),
    u = eta sqrt(1 - (ratio_s / ratio_t)^2) with ratio = (1 - t) / t.  eta = 0 is Euler's step on
    the flow, eta = 1 DDPM's ancestral step.  The rule is the same on every path: `path` changes
    nothing, it is taken so that "ddim" and "bdia_ddim" can be exchanged.
    Raises FlowkitError for eta outside [0, 1], and for decreasing times with eta > 0.
    """
    if not 0 <= eta <= 1:
        raise FlowkitError(f"eta must lie in [0, 1], got {eta}; 0 is deterministic, 1 is DDPM")
    if eta and times[-1] < times[0]:
        raise FlowkitError(f"ddim cannot invert with eta={eta}: it draws noise; set eta=0")
    draw = draw or per_sample()
    for k, (t, s) in enumerate(pairwise(times)):
        x, v = yield x, t
        x_s = x + (s - t) * v
        if eta and s < 1:
            u = eta * math.sqrt(1 - ((1 - s) * t / (s * (1 - t))) ** 2)
            noise = x - t * v
            x_s = x_s + (1 - s) * ((math.sqrt(1 - u * u) - 1) * noise + u * draw(x, k))
        x = x_s
    return x


def bdia(
    x: Tensor, times: Sequence[float], *, gamma: float = 1.0, state: Pair | None = None
) -> Evaluations:
    """Exactly invertible, 1 NFE per step: BDIA on the flow.

    x_next = gamma x_before + (1 - gamma) x + (h + gamma h_before) v; the first step is Euler's.
    gamma = 1, the default, is the leapfrog rule: order 2 on even grids, and the only gamma whose
    inversion does not amplify errors.  gamma < 1 is of order 1 with (1 - gamma) / (1 + gamma)
    times Euler's error, calmer in fewer than 10 steps; an inversion divides by it in every step.
    state: the pair (x at its last time but one, x at its last time) that the run in the other
    direction returned; the first of them takes the place of the first evaluation, and sample and
    invert undo each other to rounding.  Without it the first step is off as Euler's is.
    Raises FlowkitError for gamma outside [0, 1], inversion at gamma = 0 and a state of another
    shape; warns when an inversion would amplify errors too far.
    """
    return (yield from _bdia(x, times, gamma, state, [1.0] * len(times)))


def bdia_ddim(
    x: Tensor,
    times: Sequence[float],
    *,
    path: Path,
    gamma: float = 0.5,
    state: Pair | None = None,
) -> Evaluations:
    """Exactly invertible, 1 NFE per step: BDIA-DDIM on the states y of `path`.

    y_next = gamma (y_before - F(before)) + F(next), where F(s) = alpha_s data + sigma_s noise is
    DDIM's step; path=Straight() gives `bdia`.  gamma = 0.5, the default, is its authors' for few
    steps, and beats 1 on the uneven grids of DDIM (measured to 40 steps); they advise 1 for 40
    steps, and 0.92 to 1 for inversion.
    state, errors and warnings: as for `bdia`; and VE(), infinite at t = 0, needs a later start.
    """
    return (yield from _bdia(x, times, gamma, state, [_scale(path, t) for t in times]))


def bdia_edm(
    x: Tensor, times: Sequence[float], *, gamma: float = 0.5, state: Pair | None = None
) -> Evaluations:
    """Experimental.  Exactly invertible, order 2, 2 NFE per step: BDIA on EDM's states z = x / t
    and sigma = (1 - t) / t; meant for grids.edm, on which N steps take 2 N - 1 NFE.

    z_next = P(sigma_next) + gamma (z_before - P(sigma_before)), where P is the parabola through z
    with the slope dz/dsigma = noise and the bend of the Heun step towards the data, which it
    contains; so gamma = 0 is `edm_heun`.  A straight line back would make it of order 1.
    gamma = 0.5, the default, has up to 1.6 times the error of `edm_heun` from 18 steps on and can
    still be inverted in float32; 0.2 has a third of its error; with fewer steps 1 diverges.
    state, errors and warnings: as for `bdia`; and times that start at 0, where z is infinite.
    """
    if min(times) == 0:
        raise FlowkitError("bdia_edm is infinite at t=0: start later, e.g. times=grids.edm(18)")
    scale = [1 / t for t in times]
    gamma, before, x = _begin(x, times, gamma, state, scale)
    for i in range(0 if before is None else 1, len(times) - 1):
        t, s, t_before = times[i], times[i + 1], times[max(i - 1, 0)]
        x, v = yield x, t
        bend: Tensor | float = 0.0
        end = max(t_before, s)  # the grid time towards the data, whichever way the run goes
        if t < end < 1:
            guess = x + (end - t) * v
            # A float off the grid: an inversion asks for it late, it would pass for a boundary.
            _, v_end = yield guess, math.nextafter(end, t)
            bend = end / (t - end) * ((guess - end * v_end) - (x - t * v))
        after = _parabola(x, v, bend, t, s)
        if before is not None:
            g = gamma * (scale[i - 1] / scale[i + 1])
            after = after + g * (before - _parabola(x, v, bend, t, t_before))
        before, x = x, after
    return x, (before, x)


def _parabola(x: Tensor, v: Tensor, bend: Tensor | float, t: float, s: float) -> Tensor:
    """s P(sigma_s): Euler's step, and half the bend times the square of the step in sigma."""
    return x + (s - t) * v + 0.5 * (s - t) ** 2 / (s * t) * bend


def _bdia(
    x: Tensor, times: Sequence[float], gamma: float, state: Pair | None, scale: Sequence[float]
) -> Evaluations:
    """BDIA on scale * x: F(s) is scale_s times Euler's step, so gamma is all that changes."""
    gamma, before, x = _begin(x, times, gamma, state, scale)
    for i in range(0 if before is None else 1, len(times) - 1):
        x, v = yield x, times[i]
        h = times[i + 1] - times[i]
        if before is None:
            after = x + h * v
        else:
            g = gamma * (scale[i - 1] / scale[i + 1])
            h_before = times[i] - times[i - 1]
            after = g * before + (1 - g) * x + (h + g * h_before) * v
        before, x = x, after
    return x, (before, x)


def _begin(
    x: Tensor, times: Sequence[float], gamma: float, state: Pair | None, scale: Sequence[float]
) -> tuple[float, Tensor | None, Tensor]:
    """(gamma, x before, x now).  BDIA solved for the state before is BDIA with 1 / gamma."""
    if not 0 <= gamma <= 1:
        raise FlowkitError(f"gamma must lie in [0, 1], got {gamma}; 1 inverts most exactly")
    if state is not None:
        shapes = [tuple(getattr(part, "shape", ())) for part in state]
        if shapes != [tuple(x.shape)] * 2:
            raise FlowkitError(
                f"state must be the pair that sample or invert returned, two of {tuple(x.shape)} "
                f"like x, got shapes {shapes}; pass result.state of the run to be undone"
            )
    if times[-1] < times[0]:
        if gamma == 0:
            raise FlowkitError("gamma=0 has no exact inverse; use gamma=1, or solver 'midpoint'")
        # In x, each step's 1 / gamma comes with a quotient of scales; their product telescopes.
        shrinking = math.log10(scale[-1] * scale[-2] / (scale[0] * scale[1]))
        _warn_of_growth(len(times) - 1, gamma, shrinking, state)
        gamma = 1 / gamma
    return (gamma, None, x) if state is None else (gamma, x, state[0].to(x))


def _warn_of_growth(num_steps: int, gamma: float, shrinking: float, state: Pair | None) -> None:
    """Warn when the root 1 / gamma of an inversion makes more than 1e-3 of rounding errors.

    Without a state it is the first step's own error that grows: by 1e3 at most.
    """
    bound = 3.0 if state is None else math.log10(1e-3 / torch.finfo(state[0].dtype).eps)
    growth = -num_steps * math.log10(gamma) - shrinking
    if growth > bound:
        least = math.ceil(100 * 10 ** (-(bound + shrinking) / num_steps)) / 100
        warnings.warn(
            f"inverting {num_steps} steps at gamma={gamma} multiplies errors by 1e{growth:.0f}; "
            f"use gamma >= {min(least, 1.0)} in sample and invert, or fewer steps",
            stacklevel=2,
        )


def _scale(path: Path, t: float) -> float:
    """y / x_t = alpha + sigma of `path`, where it has t's ratio; at t = 0 that of ratio 1e30."""
    if not isinstance(path, Path):
        raise FlowkitError(f"path must be one of flowkit.paths, e.g. VPLinear(), got {path!r}")
    ratio = (1 - t) / t if t else 1e30
    scale = float(path.scale(ratio)) * (1 + ratio)
    if scale > 1e15:
        raise FlowkitError(
            f"{type(path).__name__} is infinite at t=0: start later, e.g. times=grids.edm(18)"
        )
    return scale
