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
    """total: S, summed over dimensions.  per_dim: S / D.  relative: S / E |x_1 - x_0|^2."""

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

    On Euler's path sum_i dt_i |v_i - c|^2 = sum_i dt_i |v_i|^2 - |x_1 - x_0|^2 / T, where
    c = (x_1 - x_0) / T, so one pass over the path is enough.
    """
    times = uniform(num_steps) if times is None else times
    if len(times) < 2 or any(t >= s for t, s in zip(times, times[1:], strict=False)):
        raise FlowkitError(f"times must increase from noise (0) to data (1), got {times}")
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    squares = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    start, duration = x, times[-1] - times[0]
    for t, s in zip(times, times[1:], strict=False):
        v = velocity(x, t)
        squares += (s - t) * v.double().square().flatten(1).sum(1)
        x = x + (s - t) * v
    moved = (x - start).double().square().flatten(1).sum(1) / duration
    total = float((squares - moved).mean())
    return Straightness(total, total / noise[0].numel(), total / float(moved.mean()))
