"""The decoupled diffusion transformer: an encoder makes a state of it all, a decoder the velocity.

    c       = silu(time(t) + class(y))
    encoded = E blocks on Linear(patches), conditioned on c
    state   = silu(time(t) + encoded)                                   one vector per token
    v       = head of D blocks on Linear(patches), conditioned on state

    h <- h + gate_1   Attn(RMS(h) (1 + scale_1) + shift_1)      shifts, scales, gates: Linear(c)
    h <- h + gate_2 SwiGLU(RMS(h) (1 + scale_2) + shift_2)

Wang et al., 2025, arXiv:2504.05741, whose time and sign are flowkit's.  A state given back in the
place of a new one spares the encoder (flowkit/samplers/sharing.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.nn import functional as F

from flowkit.errors import FlowkitError
from flowkit.nets.embeddings import LabelEmbedding, add_labels, as_times, sinusoidal

__all__ = ["DDT", "DDT_SIZES", "DDTOutput", "rotate", "rotation"]

DDT_SIZES: dict[str, dict[str, int]] = {
    "B": {"hidden_size": 768, "num_encoder_layers": 8, "num_decoder_layers": 4, "num_heads": 12},
    "L": {"hidden_size": 1024, "num_encoder_layers": 20, "num_decoder_layers": 4, "num_heads": 16},
    "XL": {"hidden_size": 1152, "num_encoder_layers": 22, "num_decoder_layers": 6, "num_heads": 16},
}

Rotation = tuple[Tensor, Tensor]


@dataclass
class DDTOutput(BaseOutput):
    """sample (B, C, H, W); the decoder's state (B, N, D), and `encoded`, which it was made of.

    encoded: (B, N, D), what the encoder gave, before the time enters; None where it did not run.
    """

    sample: Tensor
    state: Tensor
    encoded: Tensor | None = None


def rotation(dim: int, height: int, width: int, like: Tensor) -> Rotation:
    """Cosines and sines of the angles of a grid's positions: (height * width, 1, dim / 2) each.

    Columns and rows lie evenly in [0, 16], whatever their number.  Angle 2 k is the column times
    10000^(-4 k / dim), angle 2 k + 1 the row times the same.  At least float32.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    wide: dict[str, Any] = {"device": like.device, "dtype": dtype}
    rows, columns = torch.meshgrid(
        torch.linspace(0, 16, height, **wide), torch.linspace(0, 16, width, **wide), indexing="ij"
    )
    omega = 10000.0 ** (-torch.arange(0, dim, 4, **wide) / dim)
    angles = torch.stack((columns, rows), dim=-1).reshape(-1, 1, 1, 2) * omega[:, None]
    return angles.cos().flatten(2), angles.sin().flatten(2)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn each pair of neighbouring channels by its angle (Su et al., 2021, arXiv:2104.09864).

    x: (B, N, heads, dim).  by: from `rotation`.
    """
    cos, sin = by
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


class RotaryProcessor:
    """Scaled dot-product attention of normed, rotated queries and keys."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(self, attn: RotaryAttention, hidden_states: Tensor, by: Rotation) -> Tensor:
        """hidden_states: (B, N, dim).  Returns (B, N, dim)."""
        if attn.fused_projections:
            rows = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            rows = (attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        query, key, value = (row.unflatten(-1, (attn.heads, -1)) for row in rows)
        out = dispatch_attention_fn(
            rotate(attn.norm_q(query), by).to(value.dtype),
            rotate(attn.norm_k(key), by).to(value.dtype),
            value,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[0](out.flatten(2).to(value.dtype))


class RotaryAttention(nn.Module, AttentionModuleMixin):
    """Self-attention with RMS norm and rotation of queries and keys; no bias but at the output."""

    _default_processor_cls: Any = RotaryProcessor
    _available_processors = [RotaryProcessor]
    _supports_qkv_fusion = True

    processor: Any  # what set_processor may replace
    to_qkv: nn.Linear  # made by fuse_projections

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads or dim // heads % 4:
            raise FlowkitError(
                "the width of a DDT must be a multiple of 4 times its number of heads, got "
                f"{dim} and {heads}"
            )
        self.heads, self.use_bias = heads, False
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.norm_q = nn.RMSNorm(dim // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(dim // heads, eps=1e-6)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])  # a list, as LoRA targets expect
        self.processor = RotaryProcessor()

    def forward(self, hidden_states: Tensor, by: Rotation) -> Tensor:
        """hidden_states: (B, N, dim).  Returns (B, N, dim)."""
        return self.processor(self, hidden_states, by)


class SwiGLU(nn.Module):
    """W_out (silu(W_gate h) * W_in h) (Shazeer, 2020, arXiv:2002.05202), without bias."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.proj_in = nn.Linear(dim, hidden, bias=False)
        self.proj_out = nn.Linear(hidden, dim, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.proj_out(F.silu(self.gate(h)) * self.proj_in(h))


class DDTBlock(nn.Module):
    """Attention and SwiGLU, each shifted, scaled and gated by one condition, or one per token."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm_1 = nn.RMSNorm(dim, eps=1e-6)
        self.attn = RotaryAttention(dim, heads)
        self.norm_2 = nn.RMSNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim, int(2 * int(dim * mlp_ratio) / 3))
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, h: Tensor, c: Tensor, by: Rotation) -> Tensor:
        """h: (B, N, D).  c: (B or 1, N or 1, D).  Returns (B, N, D)."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(c).chunk(6, dim=-1)
        h = h + gate_1 * self.attn(torch.addcmul(shift_1, self.norm_1(h), 1 + scale_1), by)
        return h + gate_2 * self.mlp(torch.addcmul(shift_2, self.norm_2(h), 1 + scale_2))


class DDT(ModelMixin, AttentionMixin, ConfigMixin):
    """v(x, t, y) for pictures or latents; DDT(**DDT_SIZES["XL"], num_classes=1000) is the XL/2.

    sample_size: H = W, or (H, W), of the input; other sizes that patch_size divides also run.
    num_classes: null for none.  label_dropout: chance of the null class in training; > 0 adds it.
    The output is zero at first; unlike DiT's, the blocks are not the identity then.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DDTBlock"]
    _repeated_blocks = ["DDTBlock"]
    _skip_layerwise_casting_patterns = ["norm"]

    config: Any
    encoder_blocks: Any  # ModuleLists of DDTBlock
    decoder_blocks: Any

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        num_encoder_layers: int = 22,
        num_decoder_layers: int = 6,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self._grid(*(sample_size,) * 2 if isinstance(sample_size, int) else sample_size)
        self.gradient_checkpointing = False
        dim, pixels = hidden_size, patch_size * patch_size * in_channels
        self.time_mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.labels = (
            LabelEmbedding(num_classes, dim, label_dropout) if num_classes is not None else None
        )

        def stack(layers: int) -> nn.ModuleList:
            return nn.ModuleList(DDTBlock(dim, num_heads, mlp_ratio) for _ in range(layers))

        self.encoder_embed = nn.Linear(pixels, dim)
        self.encoder_blocks = stack(num_encoder_layers)
        self.decoder_embed = nn.Linear(pixels, dim)
        self.decoder_blocks = stack(num_decoder_layers)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, pixels)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """The authors' initialisation, which leaves the blocks at torch's own."""
        for embed in (self.encoder_embed, self.decoder_embed):
            nn.init.xavier_uniform_(embed.weight)
            nn.init.zeros_(embed.bias)
        small: list[Any] = [self.time_mlp[0], self.time_mlp[2]]
        small += [self.labels.table] if self.labels is not None else []
        for layer in small:
            nn.init.normal_(layer.weight, std=0.02)
        for last in (self.modulation, self.proj_out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise FlowkitError(
                f"this DDT cuts {patch} x {patch} patches, got a {height} x {width} picture; "
                "resize it to multiples of the patch"
            )
        return height // patch, width // patch

    def _run(self, blocks: nn.ModuleList, h: Tensor, c: Tensor, by: Rotation) -> Tensor:
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h = self._gradient_checkpointing_func(block, h, c, by)
            else:
                h = block(h, c, by)
        return h

    def forward(
        self,
        sample: Tensor,
        timestep: float | Tensor,
        class_labels: Tensor | None = None,
        state: Tensor | None = None,
        encoded: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDTOutput | tuple[Tensor, Tensor, Tensor | None]:
        """sample: (B, C, H, W).  timestep: () or (B,), flowkit's t.  class_labels: (B,) integers.

        state: of an earlier call, (B, N, D); then encoder, timestep and class_labels have no part.
        encoded: of an earlier call, (B, N, D); the state is made of it and this timestep.
        Without class_labels a network with a null class takes that; one without it raises.
        """
        grid, patch = self._grid(*sample.shape[-2:]), self.config.patch_size
        tokens = F.pixel_unshuffle(sample, patch).flatten(2).transpose(1, 2)
        by = rotation(self.config.hidden_size // self.config.num_heads, *grid, like=sample)
        if state is None:
            # The period of the slowest wave is 10 rather than DiT's 10000.
            omega = 10.0 ** (-torch.arange(128, device=sample.device) / 128)
            times = sinusoidal(as_times(timestep, sample), omega)
            time = self.time_mlp(times.to(sample.dtype))
            if encoded is None:
                c = F.silu(add_labels(time, self.labels, class_labels))
                embedded = self.encoder_embed(tokens)
                encoded = self._run(self.encoder_blocks, embedded, c[:, None], by)
            state = F.silu(time[:, None] + encoded)
        h = self._run(self.decoder_blocks, self.decoder_embed(tokens), state, by)
        shift, scale = self.modulation(state).chunk(2, dim=-1)
        h = self.proj_out(torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], eps=1e-6), 1 + scale))
        out = F.pixel_shuffle(h.transpose(1, 2).unflatten(2, grid), patch)
        return DDTOutput(out, state, encoded) if return_dict else (out, state, encoded)
