"""What NCSNpp and ADM have in common: the walk through encoder, turning point and decoder.

    h, skips <- encoder(x)        h <- middle(h)        h <- block([h, skip]) ...        F = head(h)

Raw networks F(x, c, y): c is whatever noise label the surrounding parametrisation defines (999 t,
log sigma, log(sigma) / 4, ...), which is an adapter's business.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.attention import AttentionMixin
from torch import Tensor, nn
from torch.nn import functional as F

from flowkit.errors import FlowkitError
from flowkit.nets.embeddings import NetOutput, as_times
from flowkit.nets.unet_blocks import BlockPlan, BlockStyle, Resample, ResBlock, group_norm, plan

__all__ = ["Head", "PyramidConv", "UNet"]


class Head(nn.Module):
    """norm, silu, 3 x 3 convolution to the output's channels."""

    def __init__(self, in_channels: int, out_channels: int, eps: float) -> None:
        super().__init__()
        self.norm = group_norm(in_channels, eps)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        """h: (B, C, H, W).  Returns (B, out_channels, H, W)."""
        return self.conv(F.silu(self.norm(h)))


class PyramidConv(nn.Module):
    """A 3 x 3 convolution at half the resolution: the input's way beside the encoder."""

    def __init__(self, in_channels: int, out_channels: int, taps: tuple[int, ...]) -> None:
        super().__init__()
        # Both filters act on one zero-padded picture, so that their order does not matter.
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=len(taps) // 2)
        self.resample = Resample(taps, up=False, padding=0)

    def forward(self, h: Tensor) -> Tensor:
        """h: (B, C, H, W).  Returns (B, out_channels, H/2, W/2)."""
        return self.resample(self.conv(h))


class UNet(ModelMixin, AttentionMixin, ConfigMixin):
    """The shared body; NCSNpp and ADM say how it is sized, embedded and initialised."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResBlock"]
    _repeated_blocks = ["ResBlock"]
    _skip_layerwise_casting_patterns = ["norm"]

    config: Any
    down_blocks: Any  # ModuleLists of ResBlock
    mid_blocks: Any
    up_blocks: Any
    pyramid: nn.ModuleList  # by level, from 1; empty without a residual encoder
    heads: Any  # ModuleList of Head by level, from 0
    upsample: Resample | None  # between the heads of neighbouring levels

    def _build_blocks(self, stem: int, style: BlockStyle, *, attend_all: bool) -> None:
        """conv_in and the blocks.  attend_all: attention in every decoder block of an
        attended level instead of its last one only."""
        config = self.config
        widths = [config.model_channels * mult for mult in config.channel_mult]
        attended = {
            level
            for level in range(len(widths))
            if config.sample_size >> level in config.attention_resolutions
        }
        encoder, decoder = plan(stem, widths, config.num_blocks)
        self.gradient_checkpointing = False
        self.conv_in = nn.Conv2d(config.in_channels, stem, 3, padding=1)
        self.down_blocks = nn.ModuleList(
            ResBlock(row, style, attention=not row.resample and row.level in attended)
            for row in encoder
        )
        turn = BlockPlan(len(widths) - 1, widths[-1], widths[-1])
        self.mid_blocks = nn.ModuleList(ResBlock(turn, style, attention=a) for a in (True, False))
        last = {i for i, row in enumerate(decoder[1:]) if row.resample} | {len(decoder) - 1}
        self.up_blocks = nn.ModuleList(
            ResBlock(
                row,
                style,
                attention=not row.resample and row.level in attended and (attend_all or i in last),
            )
            for i, row in enumerate(decoder)
        )

    def res_blocks(self) -> Iterator[ResBlock]:
        """Every residual block, from input to output."""
        for part in (self.down_blocks, self.mid_blocks, self.up_blocks):
            yield from part

    def _embed(
        self, times: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        """The vector that every block receives: (n, emb_channels); times: (n,)."""
        raise NotImplementedError

    def _check_size(self, sample: Tensor) -> None:
        factor = 2 ** (len(self.config.channel_mult) - 1)
        if any(size % factor for size in sample.shape[-2:]):
            raise FlowkitError(
                f"this network halves pictures {factor.bit_length() - 1} times, got "
                f"{tuple(sample.shape[-2:])}; height and width must be multiples of {factor}"
            )

    def _run(self, block: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, h, emb)
        return block(h, emb)

    def _head(self, level: int, h: Tensor, coarser: Tensor | None) -> Tensor:
        out = self.heads[level](h)
        if coarser is None or self.upsample is None:
            return out
        return self.upsample(coarser) + out

    def forward(
        self,
        sample: Tensor,
        timestep: float | Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        *,
        augment_labels: Tensor | None = None,
    ) -> NetOutput | tuple[Tensor]:
        """sample: (B, C, H, W).  timestep: () or (B,), the noise label c.

        class_labels: (B,) integers.  augment_labels: (B, augment_dim), the augmentation that was
        applied to the pictures (Karras et al., 2022, arXiv:2206.00364, appendix F); None for none.
        Returns a sample (B, out_channels, H, W).
        """
        self._check_size(sample)
        emb = self._embed(as_times(timestep, sample), class_labels, augment_labels)
        h, pyramid = self.conv_in(sample), sample
        skips = [h]
        for block in self.down_blocks:
            h = self._run(block, h, emb)
            if block.resampling and len(self.pyramid):
                h = pyramid = (h + self.pyramid[block.level - 1](pyramid)) * math.sqrt(0.5)
            skips.append(h)
        for block in self.mid_blocks:
            h = self._run(block, h, emb)
        out: Tensor | None = None
        for block in self.up_blocks:
            if not block.resampling:
                h = torch.cat((h, skips.pop()), dim=1)
            elif block.level + 1 < len(self.heads):
                out = self._head(block.level + 1, h, out)
            h = self._run(block, h, emb)
        out = self._head(0, h, out)
        return NetOutput(out) if return_dict else (out,)
