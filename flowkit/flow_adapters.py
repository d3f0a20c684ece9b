"""Networks that already predict a flow's velocity: only sign, time and calling convention differ.

flowkit          v(x_t, t)                                              t: 0 noise -> 1 data
reversed         u(x_t, s) = noise - data,  s = 1 - t,  v = -u          s: 1 noise -> 0 data
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowkit.errors import FlowkitError
from flowkit.velocity import VelocityModel, batch_times

__all__ = [
    "DiffusersFlowVelocity",
    "FlowVelocity",
    "FluxVelocity",
    "ReversedFlowVelocity",
    "call_net",
]


class FlowVelocity(VelocityModel):
    """A network with flowkit's sign: v = net(x_t, time_scale t, **cond).

    time_scale 1: flowkit's nets, SiT, LightningDiT, DDT, FiT, facebookresearch/flow_matching.
    time_scale 999: gnobitab/RectifiedFlow and SlimFlow.  1000: diffusers' nets trained this way.
    """

    adapter = "flow"
    t_min, t_max = 0.0, 1.0  # the trained range; a diffusion network's is narrower

    def __init__(self, net: nn.Module, *, time_scale: float = 1.0) -> None:
        super().__init__(net)
        self.time_scale = time_scale

    def forward(self, x_t: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        times = batch_times(t, x_t)
        return call_net(self, x_t, self.time_scale * times, **cond).to(x_t.dtype)

    def description(self) -> dict[str, Any]:
        return super().description() | {"time_scale": self.time_scale}


class ReversedFlowVelocity(FlowVelocity):
    """A network with time and sign reversed: v = -net(x_t, time_scale (1 - t), **cond).

    time_scale 1: REPA, REG, ERW, RAE, MeanFlow and rfpp.
    """

    adapter = "reversed_flow"

    def forward(self, x_t: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        times = 1 - batch_times(t, x_t)
        return -call_net(self, x_t, self.time_scale * times, **cond).to(x_t.dtype)


class DiffusersFlowVelocity(FlowVelocity):
    """A diffusers flow transformer (SD3, Sana, ...): v = -net(x_t, timestep=1000 (1 - t), **cond).

    cond: what the pipeline passes to the transformer: encoder_hidden_states, pooled_projections,
    encoder_attention_mask, ...
    """

    adapter = "diffusers_flow"

    def __init__(self, net: nn.Module, *, time_scale: float = 1000.0) -> None:
        super().__init__(net, time_scale=time_scale)

    def forward(self, x_t: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        timestep = self.time_scale * (1 - batch_times(t, x_t))
        return -call_net(self, x_t, timestep=timestep, **cond).to(x_t.dtype)


class FluxVelocity(VelocityModel):
    """Flux: latents (B, C, H, W) packed into (B, HW/4, 4C) tokens, timestep 1 - t, v = -net(...).

    cond: encoder_hidden_states, pooled_projections; txt_ids (zeros when left out); guidance, a
    float or (B,), for networks with embedded guidance (`guidance`, the option, when left out).
    """

    adapter = "flux"
    t_min, t_max = 0.0, 1.0

    def __init__(self, net: nn.Module, *, guidance: float = 3.5) -> None:
        super().__init__(net)
        self.guidance = guidance

    def forward(self, x_t: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        tokens, img_ids = self._pack(x_t)
        times = batch_times(t, x_t)
        if cond.get("txt_ids") is None and "encoder_hidden_states" in cond:
            cond["txt_ids"] = img_ids.new_zeros(cond["encoder_hidden_states"].shape[1], 3)
        config: Any = self.net.config
        if config.guidance_embeds:
            guidance = cond.get("guidance")
            cond["guidance"] = batch_times(self.guidance if guidance is None else guidance, x_t)
        out = call_net(self, tokens, timestep=1 - times, img_ids=img_ids, **cond)
        return -_unpack(out, x_t).to(x_t.dtype)

    def description(self) -> dict[str, Any]:
        return super().description() | {"guidance": self.guidance}

    def _pack(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """2x2 patches as tokens in raster order, and their (0, row, column) ids."""
        config: Any = self.net.config
        channels = config.in_channels // 4
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % 2 or x.shape[3] % 2:
            raise FlowkitError(
                f"this Flux network takes latents (B, {channels}, H, W) with even H and W, "
                f"got {tuple(x.shape)}"
            )
        tokens = nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        row, column = torch.meshgrid(
            torch.arange(rows, device=x.device),
            torch.arange(columns, device=x.device),
            indexing="ij",
        )
        ids = torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3)
        return tokens, ids.to(torch.float32)


def call_net(model: VelocityModel, x: Tensor, *args: Tensor, **cond: Any) -> Tensor:
    """model.net(x, *args, **cond) in the network's dtype, back in float32 (float64 when x is).

    Times stay at least float32 (bf16 cannot tell 999 from 1000).  The output may be a tensor, a
    tuple or a diffusers output; a learned variance (twice x's channels) is dropped.
    """
    dtype = model.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    args = tuple(_cast(a, wide) for a in args)
    cond = {
        name: _cast(value, wide if name == "timestep" else dtype) for name, value in cond.items()
    }
    out = model.net(x.to(dtype), *args, **cond)
    if not isinstance(out, Tensor):
        out = out.sample if hasattr(out, "sample") else out[0]
    if out.ndim > 2 and out.shape[1] == 2 * x.shape[1]:
        out = out.chunk(2, dim=1)[0]
    return out.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _unpack(tokens: Tensor, like: Tensor) -> Tensor:
    rows, columns = like.shape[2] // 2, like.shape[3] // 2
    patches = tokens.transpose(1, 2).unflatten(2, (rows, columns))
    return nn.functional.pixel_shuffle(patches, 2)
