"""The diffusion transformer of DiT and SiT, with adaptive layer norm that starts at zero.

    (shift, scale, gate)_1, (shift, scale, gate)_2 = Linear(silu(c))        c = time(t) + class(y)
    h <- h + gate_1 Attn(LN(h) (1 + scale_1) + shift_1)
    h <- h + gate_2  MLP(LN(h) (1 + scale_2) + shift_2)

Peebles & Xie, 2022, arXiv:2212.09748; Ma et al., 2024, arXiv:2401.08740, whose time convention
is flowkit's: t in [0, 1], not scaled, and the output is the velocity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from torch import Tensor, nn
from torch.nn import functional as F

from flowkit.errors import FlowkitError
from flowkit.nets.attention import SelfAttention
from flowkit.nets.embeddings import (
    LabelEmbedding,
    NetOutput,
    add_labels,
    as_times,
    frequencies,
    sinusoidal,
)

__all__ = ["DIT_SIZES", "DiT", "patchify", "sincos_2d", "unpatchify"]

# Peebles & Xie, 2022, arXiv:2212.09748, table 1.
DIT_SIZES: dict[str, dict[str, int]] = {
    "S": {"hidden_size": 384, "num_layers": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "num_layers": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "num_layers": 28, "num_heads": 16},
}


def sincos_2d(dim: int, height: int, width: int) -> Tensor:
    """Fixed position code of a grid, row by row: (height * width, dim) float32.

    The first half of the channels codes the column, the second half the row; each half is sines,
    then cosines, of position * 10000^(-k / (dim / 4)).
    """
    if dim % 4:
        raise FlowkitError(f"the width of a DiT must be a multiple of 4, got {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = (axis.reshape(-1, 1) * omega for axis in (cols, rows))
    return torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1).float()


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) to tokens (B, H W / patch^2, patch^2 C), row by row, channels last."""
    b, c, h, w = images.shape
    grid = images.view(b, c, h // patch, patch, w // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The inverse of patchify: tokens (B, N, patch^2 C) to (B, C, height, width) pixels."""
    b, h, w = len(tokens), height // patch, width // patch
    grid = tokens.view(b, h, w, patch, patch, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, height, width)


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, then (1 + scale) and shift.  h: (B, N, D); others (B or 1, D)."""
    normed = F.layer_norm(h, h.shape[-1:], eps=1e-6)
    return torch.addcmul(shift[:, None], normed, 1 + scale[:, None])


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the conditioning; identity at first."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.attn = SelfAttention(dim, heads)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim)
        )
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """h: (B, N, D).  c: (B or 1, D).  Returns (B, N, D)."""
        rows = self.modulation(F.silu(c)).chunk(6, dim=1)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = rows
        h = torch.addcmul(h, gate_1[:, None], self.attn(modulate(h, shift_1, scale_1)))
        return torch.addcmul(h, gate_2[:, None], self.mlp(modulate(h, shift_2, scale_2)))


class DiT(ModelMixin, AttentionMixin, ConfigMixin):
    """v(x, t, y) for pictures or latents; DiT(**DIT_SIZES["XL"]) is the XL/2 of the papers.

    sample_size: H = W, or (H, W), of the input; other sizes that patch_size divides also run, with
    the position code of their own grid.  out_channels: null for in_channels; 2 * in_channels has
    the variance head of the published checkpoints.  num_classes: null for none.
    label_dropout: chance of the null class in training; > 0 adds that class.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiTBlock"]
    _repeated_blocks = ["DiTBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed"]

    config: Any
    blocks: Any  # ModuleList of DiTBlock
    omega: Tensor
    pos_embed: Tensor

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        hidden_size: int = 1152,
        num_layers: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        height, width = (sample_size,) * 2 if isinstance(sample_size, int) else sample_size
        self.gradient_checkpointing = False
        dim, patch = hidden_size, patch_size
        grid = self._grid(height, width)
        self.patch_embed = nn.Conv2d(in_channels, dim, patch, stride=patch)
        self.register_buffer("pos_embed", sincos_2d(dim, *grid), persistent=False)
        self.register_buffer("omega", frequencies(128), persistent=False)
        self.time_mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.labels = (
            LabelEmbedding(num_classes, dim, label_dropout) if num_classes is not None else None
        )
        self.blocks = nn.ModuleList(DiTBlock(dim, num_heads, mlp_ratio) for _ in range(num_layers))
        self.modulation = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, patch * patch * (out_channels or in_channels))
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Peebles & Xie's initialisation: every block is the identity, the output is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            for proj in (block.attn.to_q, block.attn.to_k, block.attn.to_v):
                # The bound of one (D, 3D) matrix, which is what the papers' code initialises.
                nn.init.xavier_uniform_(proj.weight, gain=math.sqrt(0.5))
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))
        if self.patch_embed.bias is not None:
            nn.init.zeros_(self.patch_embed.bias)
        small: list[Any] = [self.time_mlp[0], self.time_mlp[2]]
        small += [self.labels.table] if self.labels is not None else []
        for layer in small:
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (*(block.modulation for block in self.blocks), self.modulation, self.proj_out):
            nn.init.zeros_(layer.weight)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise FlowkitError(
                f"this DiT cuts {patch} x {patch} patches, got a {height} x {width} picture; "
                "resize it to multiples of the patch"
            )
        return height // patch, width // patch

    def _positions(self, height: int, width: int, device: torch.device) -> Tensor:
        size = self.config.sample_size
        own = (size, size) if isinstance(size, int) else tuple(size)
        grid = self._grid(height, width)
        if (height, width) == own:
            return self.pos_embed
        return sincos_2d(self.config.hidden_size, *grid).to(device)

    def forward(
        self,
        sample: Tensor,
        timestep: float | Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> NetOutput | tuple[Tensor]:
        """sample: (B, C, H, W).  timestep: () or (B,), flowkit's t.  class_labels: (B,) integers.

        Returns a sample (B, out_channels, H, W).  Without class_labels a network with a null
        class takes that; one without a null class raises.
        """
        height, width = sample.shape[-2:]
        positions = self._positions(height, width, sample.device)
        h = self.patch_embed(sample).flatten(2).transpose(1, 2) + positions.to(sample.dtype)
        times = sinusoidal(as_times(timestep, sample), self.omega).to(sample.dtype)
        c = add_labels(self.time_mlp(times), self.labels, class_labels)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h = self._gradient_checkpointing_func(block, h, c)
            else:
                h = block(h, c)
        shift, scale = self.modulation(F.silu(c)).chunk(2, dim=1)
        tokens = self.proj_out(modulate(h, shift, scale))
        out = unpatchify(tokens, self.config.patch_size, height, width)
        return NetOutput(out) if return_dict else (out,)
