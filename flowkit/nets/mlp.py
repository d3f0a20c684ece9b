"""A residual MLP for small pictures, fast on one CPU core.

    h <- h + W2 silu(W1 (LN(h) (1 + scale(t, y)) + shift(t, y)))

Time is flowkit's t in [0, 1]; the output is the velocity, exactly zero at initialisation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from flowkit.errors import FlowkitError
from flowkit.nets.embeddings import (
    LabelEmbedding,
    NetOutput,
    add_labels,
    as_times,
    frequencies,
    sinusoidal,
)

__all__ = ["MLP"]


class MLPBlock(nn.Module):
    """LayerNorm, FiLM (Perez et al., 2018, arXiv:1709.07871), two linear layers, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 2 * width)
        self.contract = nn.Linear(2 * width, width)

    def forward(self, h: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        """h: (B, width).  gain, shift: (B or 1, width)."""
        normed = torch.addcmul(shift, F.layer_norm(h, h.shape[-1:]), gain)
        return h + self.contract(F.silu(self.expand(normed)))


class MLP(ModelMixin, ConfigMixin):
    """v(x, t, y) for pictures of `shape`; 338,240 parameters for 64 numbers at the defaults.

    shape: (C, H, W).  width: of the residual stream; the blocks are 2 * width inside and the time
    embedding has width / 2 numbers of 1000 t.  num_classes: null for none.
    label_dropout: chance of the null class in training, in [0, 1); > 0 adds that class.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MLPBlock"]

    config: Any
    omega: Tensor

    @register_to_config
    def __init__(
        self,
        shape: Sequence[int],
        width: int = 128,
        num_blocks: int = 3,
        num_classes: int | None = None,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(shape) != 3 or min(shape) < 1 or width < 4 or width % 4:
            raise FlowkitError(
                f"MLP needs shape (C, H, W) and a width that 4 divides, got {tuple(shape)} and "
                f"{width}"
            )
        size = math.prod(shape)
        self.gradient_checkpointing = False
        self.register_buffer("omega", frequencies(width // 4, scale=1000.0), persistent=False)
        self.time_mlp = nn.Sequential(
            nn.Linear(width // 2, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.labels = (
            LabelEmbedding(num_classes, width, label_dropout) if num_classes is not None else None
        )
        self.film = nn.Linear(width, 2 * width * num_blocks)
        self.proj_in = nn.Linear(size, width)
        self.blocks = nn.ModuleList(MLPBlock(width) for _ in range(num_blocks))
        self.proj_out = nn.Linear(width, size)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(
        self,
        sample: Tensor,
        timestep: float | Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> NetOutput | tuple[Tensor]:
        """sample: (B, C, H, W).  timestep: () or (B,), flowkit's t.  class_labels: (B,) ints."""
        if sample.shape[1:] != tuple(self.config.shape):
            raise FlowkitError(
                f"this MLP was built for pictures of shape {tuple(self.config.shape)}, got "
                f"{tuple(sample.shape[1:])}"
            )
        times = sinusoidal(as_times(timestep, sample), self.omega).to(sample.dtype)
        emb = add_labels(self.time_mlp(times), self.labels, class_labels)
        gains, shifts = self.film(F.silu(emb)).chunk(2, dim=1)
        width = self.config.width
        h = self.proj_in(sample.flatten(1))
        films = zip((1 + gains).split(width, 1), shifts.split(width, 1), strict=True)
        for block, (gain, shift) in zip(self.blocks, films, strict=True):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h = self._gradient_checkpointing_func(block, h, gain, shift)
            else:
                h = block(h, gain, shift)
        out = self.proj_out(h).view(sample.shape)
        return NetOutput(out) if return_dict else (out,)
