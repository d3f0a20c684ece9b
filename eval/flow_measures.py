"""What a flow's paths are like: straightness, curvature, length, turning, and what few steps lose.

    S = int_0^1 E |(x_1 - x_0) - v(x_t, t)|^2 dt        0 iff every path is straight at one speed

With L the length of a path and c = x_1 - x_0 its chord, S is a sum of two: how much the paths bend,
and how much their speed changes,

    S = E [L^2 - |c|^2] + E [int |v|^2 dt - L^2]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.eval.picture_quality import wide
from flowkit.samplers.evaluations import Solver
from flowkit.samplers.grids import uniform
from flowkit.samplers.solve import DEFAULT_SOLVER, sample
from flowkit.velocity import Velocity

__all__ = [
    "FewStepGap",
    "PathShape",
    "Straightness",
    "acceleration",
    "few_step_gap",
    "path_shape",
    "straightness",
]

Distance = Callable[[Tensor, Tensor], Tensor]
"""Pictures (B, C, H, W) in [-1, 1], twice, to (B,): flowkit.perceptual.LPIPS() or yours."""


@dataclass(frozen=True)
class Straightness:
    """total: S, summed over dimensions.  per_dim: S / D.  relative: S / E |x_1 - x_0|^2, nan when
    nothing moves."""

    total: float
    per_dim: float
    relative: float


@dataclass(frozen=True)
class PathShape:
    """The shape of a flow's paths; means over them.

    straightness: S, which Lee et al., 2023, arXiv:2301.12003, call curvature.
    curvature: S of the same paths walked at constant speed, E [L^2 - |c|^2]: what no change of
    speed, and so no choice of times, can mend.  0 iff straight.
    length_ratio: L / |c|, 1 if straight.
    turning: sum of the angles between successive slopes, in radians, that is the total curvature
    int |kappa| ds (Milnor, 1950); 0 if straight.
    speed_ratio: the greatest |v| over the mean |v| of a path, 1 at constant speed.
    A path that does not move has no ratio and makes it nan; one that returns makes L / |c| inf.
    """

    straightness: Straightness
    curvature: Straightness
    length_ratio: float
    turning: float
    speed_ratio: float


@torch.no_grad()
def straightness(
    velocity: Velocity,
    noise: Tensor,
    num_steps: int = 100,
    *,
    times: list[float] | None = None,
) -> Straightness:
    """Straightness of the paths that start at `noise` (B, *), over Euler steps (Liu et al., 2022,
    arXiv:2209.03003, eq. 3).

    times: increasing, instead of num_steps equal ones; slopes count by their step's length.
    FlowkitError: times that do not increase, a velocity that is not finite.

    On Euler's path sum_i dt_i |v_i - c|^2 = sum_i dt_i |v_i|^2 - |x_1 - x_0|^2 / T, where
    c = (x_1 - x_0) / T, so one pass over the path is enough.  Both sums are in float64: the
    difference is small on straight paths.
    """
    times = uniform(num_steps) if times is None else times
    squares, chord = torch.zeros(()), torch.zeros(())
    for dt, slope in _slopes(velocity, noise, times):
        squares, chord = squares + dt * slope.square().sum(1), chord + dt * slope
    moved = chord.square().sum(1).mean() / (times[-1] - times[0])
    return _relative(squares.mean() - moved, moved, chord)


@torch.no_grad()
def path_shape(
    velocity: Velocity,
    noise: Tensor,
    num_steps: int = 100,
    *,
    times: list[float] | None = None,
) -> PathShape:
    """Shape of the paths that start at `noise` (B, *), over Euler steps; arguments and errors are
    those of `straightness`.

    Take many steps: these are the measures of Euler's polygon, right to order 1.
    """
    times = uniform(num_steps) if times is None else times
    length, squares, turning, fastest, chord, before = (torch.zeros(()) for _ in range(6))
    for dt, slope in _slopes(velocity, noise, times):
        speed = slope.norm(dim=1)
        squares, length = squares + dt * speed.square(), length + dt * speed
        fastest = torch.maximum(fastest.to(speed), speed)
        if before.ndim:
            turning = turning + _angle(before, slope)
        chord, before = chord + dt * slope, slope
    span, distance = times[-1] - times[0], chord.norm(dim=1)
    moved = distance.square().mean() / span
    return PathShape(
        _relative(squares.mean() - moved, moved, chord),
        _relative(length.square().mean() / span - moved, moved, chord),
        float((length / distance).mean()),
        float(turning.mean()),
        float((fastest * span / length).mean()),
    )


def _relative(total: Tensor, moved: Tensor, chord: Tensor) -> Straightness:
    if not total.isfinite():
        raise FlowkitError("the velocity is not finite on these paths; check the model's weights")
    return Straightness(float(total), float(total) / chord.shape[1], float(total / moved))


def _slopes(
    velocity: Velocity, noise: Tensor, times: Sequence[float]
) -> Iterator[tuple[float, Tensor]]:
    """(length of the step, slope (B, D) in float64) of each step of Euler's path."""
    if len(times) < 2 or any(t >= s for t, s in pairwise(times)):
        raise FlowkitError(f"times must increase from noise (0) to data (1), got {times}")
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    for t, s in pairwise(times):
        v = velocity(x, t)
        x = x + (s - t) * v
        yield s - t, wide(v).flatten(1)


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """The angle of each row of a with that of b, exact also for small ones (Kahan, 2006); 0 beside
    a slope of 0, which has no direction."""
    p, q = b.norm(dim=1, keepdim=True) * a, a.norm(dim=1, keepdim=True) * b
    return 2 * torch.atan2((p - q).norm(dim=1), (p + q).norm(dim=1))


def acceleration(velocity: Velocity, x_t: Tensor, t: float) -> Tensor:
    """dv/dt along the path through x_t (B, *) at time t: v_t + (dv/dx) v, exact, of x_t's shape.

    It is 0 where the flow is straight at one speed, for any grid.  The network must allow
    forward-mode differentiation (torch.func.jvp); velocity must take t as a tensor ().
    """
    moment = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device)
    with torch.no_grad():
        v = velocity(x_t, moment)
    return torch.func.jvp(velocity, (x_t, moment), (v, torch.ones_like(moment)))[1].detach()


@dataclass(frozen=True)
class FewStepGap:
    """How far few steps end from the reference solution, from the same noise; one entry a count.

    steps, nfe: of each run.  rmse: root mean square over pictures and dimensions.
    perceptual: mean distance, None without one.  order: minus the slope of log rmse over log steps,
    by least squares; nan with fewer than two errors above rounding.
    """

    steps: tuple[int, ...]
    nfe: tuple[int, ...]
    rmse: tuple[float, ...]
    perceptual: tuple[float, ...] | None
    order: float


@torch.no_grad()
def few_step_gap(
    velocity: Velocity,
    noise: Tensor,
    steps: Sequence[int],
    *,
    solver: str | Solver = DEFAULT_SOLVER,
    grid: Callable[[int], Sequence[float]] = uniform,
    reference: Tensor | None = None,
    reference_steps: int = 200,
    perceptual: Distance | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> FewStepGap:
    """The gap between runs of few steps and the reference solution from `noise` (B, *).

    steps: the numbers of steps to try.  grid: their times, grid(n) being n + 1 floats.
    reference: (B, *), the solution; None solves with rk4 in `reference_steps` steps of `grid`.
    perceptual: distance of the pictures, which `decode` makes of latents; clamped to [-1, 1].
    options: the solver's.  FlowkitError: no steps, a result that is not finite.
    """
    if not steps:
        raise FlowkitError("few_step_gap needs numbers of steps, such as [1, 2, 4, 8], got none")
    if reference is None:
        reference = sample(*in_float64(velocity, noise), grid(reference_steps), "rk4").x
    exact = wide(reference)
    shown = _shown(reference.to(noise), decode) if perceptual else None
    nfe, rmse, distances = [], [], []
    for count in steps:
        result = sample(velocity, noise, grid(count), solver, **options)
        rmse.append(float((wide(result.x) - exact).square().mean().sqrt()))
        nfe.append(result.nfe)
        if perceptual and shown is not None:
            distances.append(float(perceptual(_shown(result.x, decode), shown).mean()))
    if not all(map(math.isfinite, rmse)):
        raise FlowkitError("the velocity is not finite on these paths; check the model's weights")
    state = torch.promote_types(noise.dtype, torch.float32)
    floor = 8 * torch.finfo(state).eps * float(exact.square().mean().sqrt())
    found = tuple(distances) if perceptual else None
    return FewStepGap(tuple(steps), tuple(nfe), tuple(rmse), found, _order(steps, rmse, floor))


def in_float64(velocity: Velocity, x: Tensor) -> tuple[Velocity, Tensor]:
    """The velocity and a state (B, *) of it for a run whose state is in float64; the velocity is
    still called in x's dtype, float32 at least, and on x's device."""
    called = x.to(torch.promote_types(x.dtype, torch.float32))
    return lambda state, t: velocity(state.to(called), t).to(state), wide(x)


def _shown(x: Tensor, decode: Callable[[Tensor], Tensor] | None) -> Tensor:
    return (x if decode is None else decode(x)).clamp(-1, 1)


def _order(steps: Sequence[int], errors: Sequence[float], floor: float) -> float:
    """Minus the slope of log error over log steps, of the errors above `floor`."""
    points = [(math.log(n), math.log(e)) for n, e in zip(steps, errors, strict=True) if e > floor]
    if len({n for n, _ in points}) < 2:
        return math.nan
    mean_n, mean_e = (sum(column) / len(points) for column in zip(*points, strict=True))
    across = sum((n - mean_n) * (e - mean_e) for n, e in points)
    return -across / sum((n - mean_n) ** 2 for n, _ in points)
