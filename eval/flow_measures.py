"""How straight a flow's paths are.

S = int_0^1 E |(x_1 - x_0) - v(x_t, t)|^2 dt        0 iff every path is straight at one speed
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.samplers.grids import uniform
from flowkit.velocity import Velocity

__all__ = ["Straightness", "straightness"]


@dataclass(frozen=True)
class Straightness:
    """total: S, summed over dimensions.  per_dim: S / D.  relative: S / E |x_1 - x_0|^2, nan when
    nothing moves."""

    total: float
    per_dim: float
    relative: float


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
    if len(times) < 2 or any(t >= s for t, s in zip(times, times[1:], strict=False)):
        raise FlowkitError(f"times must increase from noise (0) to data (1), got {times}")
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    wide = torch.device("cpu") if x.device.type == "mps" else x.device  # MPS has no float64
    squares = torch.zeros(len(x), dtype=torch.float64, device=wide)
    path = torch.zeros_like(x, dtype=torch.float64, device=wide)
    for t, s in zip(times, times[1:], strict=False):
        v = velocity(x, t)
        x = x + (s - t) * v
        slope = v.to(wide).double()
        squares += (s - t) * slope.square().flatten(1).sum(1)
        path += (s - t) * slope
    moved = path.square().flatten(1).sum(1).mean() / (times[-1] - times[0])
    total = squares.mean() - moved
    if not total.isfinite():
        raise FlowkitError("the velocity is not finite on these paths; check the model's weights")
    return Straightness(float(total), float(total) / noise[0].numel(), float(total / moved))
