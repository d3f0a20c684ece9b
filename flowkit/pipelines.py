"""How the latents, timesteps and network outputs of a diffusers pipeline are x_t, t and v.

                  latents y                     timestep                        output
flow models       x_t                           1000 (1 - t)                    noise - data
VP models         alpha data + sigma noise      index of alphas_cumprod         noise, data or v

Every method takes t as a float64 tensor of any shape, in [0, 1], and gives that shape back; in
coefficients, y = scale x_t and v = a y + b output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowkit.diffusion_adapters import Border
from flowkit.paths import Path, Straight, VPTable, data_and_noise

__all__ = ["FlowLatents", "VPLatents"]


class FlowLatents:
    """Pipelines of flow models (FlowMatch schedulers, or `use_flow_sigmas`)."""

    path: Path = Straight()

    def __init__(self, num_train_timesteps: int = 1000) -> None:
        self.num_train_timesteps = num_train_timesteps

    def timestep(self, t: Tensor) -> Tensor:
        """What the pipeline calls time t."""
        return self.num_train_timesteps * (1 - t)

    def time(self, timestep: Tensor) -> Tensor:
        """The t of a timestep: undoes `timestep`."""
        return 1 - timestep / self.num_train_timesteps

    def sigma(self, t: Tensor) -> Tensor:
        """diffusers' sigma at t: the share of the noise."""
        return 1 - t

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        """Undoes `sigma`."""
        return 1 - sigma

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(scale, a, b) at t."""
        return torch.ones_like(t), torch.zeros_like(t), -torch.ones_like(t)

    def mixture(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of y = alpha data + sigma noise at t."""
        return t, 1 - t


class VPLatents:
    """Pipelines of variance-preserving models (DDPM, DDIM, ... schedulers).

    alphas_cumprod: the scheduler's table.  prediction: "epsilon", "sample" or "v_prediction".
    """

    def __init__(self, alphas_cumprod: Sequence[float], prediction: str) -> None:
        self.path: Path = VPTable(alphas_cumprod)
        self.border = Border(self.path, prediction)

    def timestep(self, t: Tensor) -> Tensor:
        """The index of the table, interpolated, that the network sees at time t."""
        return self.path.time(self.border.enter(t)[1])

    def time(self, timestep: Tensor) -> Tensor:
        """The t of an index of the table."""
        return 1 / (1 + self.path.ratio(timestep))

    def sigma(self, t: Tensor) -> Tensor:
        """diffusers' sigma at t: the noise-to-signal ratio."""
        return (1 - t) / t

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        """Undoes `sigma`."""
        return 1 / (1 + sigma)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(scale, a, b) at t."""
        scale, ratio = self.border.enter(t)
        alpha, sigma = self.path.scale(ratio), ratio * self.path.scale(ratio)
        data_weight, noise_weight = self.border.leave(t)

        def velocity(y: Tensor, output: Tensor) -> Tensor:
            data, noise = data_and_noise(self.border.prediction, y, output, alpha, sigma)
            return data_weight * data - noise_weight * noise

        zero, one = torch.zeros_like(t), torch.ones_like(t)
        return scale, velocity(one, zero), velocity(zero, one)

    def mixture(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of y = alpha data + sigma noise at t."""
        alpha = self.path.scale((1 - t) / t)
        return alpha, alpha * (1 - t) / t
