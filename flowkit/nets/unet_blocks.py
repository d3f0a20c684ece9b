"""Parts of the two convolutional networks: resampling, the residual block, and its layout.

Song et al., 2021, arXiv:2011.13456 (appendix H), Dhariwal & Nichol, 2021, arXiv:2105.05233, and
Karras et al., 2022, arXiv:2206.00364 (appendix F) use the same block with other constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowkit.errors import FlowkitError
from flowkit.nets.attention import SelfAttention

__all__ = ["BlockPlan", "BlockStyle", "Resample", "ResBlock", "group_norm", "plan"]


@dataclass(frozen=True)
class BlockStyle:
    """What all blocks of one network share.

    residual_scale multiplies every sum of a branch and its shortcut.  With `adaptive` the
    embedding scales and shifts the second norm, otherwise it is added before it.
    resample_filter: of each up- and downsampling, along one axis.  resample_conv puts a 1 x 1
    convolution on the shortcut of a resampling block.  head_channels: null for a single head.
    """

    emb_channels: int
    eps: float
    residual_scale: float
    adaptive: bool
    resample_filter: tuple[int, ...]
    resample_conv: bool
    head_channels: int | None
    dropout: float


@dataclass(frozen=True)
class BlockPlan:
    """Where one block stands: level 0 is full resolution; resample is "up", "down" or None."""

    level: int
    in_channels: int
    out_channels: int
    resample: str | None = None


def plan(
    stem: int, widths: Sequence[int], num_blocks: int
) -> tuple[list[BlockPlan], list[BlockPlan]]:
    """Encoder and decoder of a U-Net whose levels have `widths` channels.

    stem: channels of the first convolution.  The encoder has num_blocks a level, the decoder one
    more; a level begins with a resampling block, except where the network begins and turns.  The
    stem and every encoder block leave a skip connection, which the decoder's blocks take back.
    """
    encoder: list[BlockPlan] = []
    skips, channels = [stem], stem
    for level, width in enumerate(widths):
        if level:
            encoder.append(BlockPlan(level, channels, channels, "down"))
            skips.append(channels)
        for _ in range(num_blocks):
            encoder.append(BlockPlan(level, channels, width))
            skips.append(width)
            channels = width
    decoder: list[BlockPlan] = []
    for level, width in reversed(list(enumerate(widths))):
        if level < len(widths) - 1:
            decoder.append(BlockPlan(level, channels, channels, "up"))
        for _ in range(num_blocks + 1):
            decoder.append(BlockPlan(level, channels + skips.pop(), width))
            channels = width
    return encoder, decoder


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """At most 32 groups of at least 4 channels."""
    groups = min(32, channels // 4)
    if not groups or channels % groups:
        raise FlowkitError(
            f"{channels} channels cannot be split into {groups or 1} groups of at least 4; choose "
            "channel counts that are multiples of 4 below 128 and of 32 above"
        )
    return nn.GroupNorm(groups, channels, eps=eps)


class Resample(nn.Module):
    """Twice or half the resolution by a separable filter, e.g. (1, 1) or (1, 3, 3, 1).

    (1, 1) is nearest neighbour upwards and the 2 x 2 mean downwards.  Borders are padded with
    zeros, `padding` pixels where the default is not wanted.
    """

    kernel: Tensor

    def __init__(self, taps: Sequence[int], *, up: bool, padding: int | None = None) -> None:
        super().__init__()
        if len(taps) % 2 or not sum(taps):
            raise FlowkitError(
                f"resample_filter needs an even number of taps, got {list(taps)}; "
                "use [1, 1] or [1, 3, 3, 1]"
            )
        self.up, self.box = up, tuple(taps) == (1, 1)
        self.padding = len(taps) // 2 - 1 if padding is None else padding
        line = torch.tensor(list(taps), dtype=torch.float32)
        line = line / line.sum() * (2 if up else 1)
        self.register_buffer("kernel", torch.outer(line, line)[None, None], persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        """h: (B, C, H, W).  Returns (B, C, 2H, 2W), or (B, C, H/2, W/2) at the default padding."""
        if self.box:
            return F.interpolate(h, scale_factor=2.0) if self.up else F.avg_pool2d(h, 2)
        kernel = self.kernel.to(h.dtype).expand(h.shape[1], 1, -1, -1)
        convolve = F.conv_transpose2d if self.up else F.conv2d
        return convolve(h, kernel, stride=2, padding=self.padding, groups=h.shape[1])


class ResBlock(nn.Module):
    """norm, silu, (resample,) conv, + embedding, norm, silu, conv, + shortcut; then attention."""

    def __init__(self, where: BlockPlan, style: BlockStyle, *, attention: bool) -> None:
        super().__init__()
        c_in, c_out = where.in_channels, where.out_channels
        self.level, self.resampling, self.style = where.level, where.resample, style
        self.norm_1 = group_norm(c_in, style.eps)
        self.conv_1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(style.emb_channels, c_out * (2 if style.adaptive else 1))
        self.norm_2 = group_norm(c_out, style.eps)
        self.dropout = nn.Dropout(style.dropout)
        self.conv_2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.resample = (
            Resample(style.resample_filter, up=where.resample == "up") if where.resample else None
        )
        shortcut = c_in != c_out or (where.resample is not None and style.resample_conv)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if shortcut else None
        self.norm_attn: nn.GroupNorm | None = None
        self.attn: SelfAttention | None = None
        if attention:
            heads = c_out // style.head_channels if style.head_channels else 1
            self.norm_attn = group_norm(c_out, style.eps)
            self.attn = SelfAttention(c_out, max(heads, 1))

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """h: (B, C, H, W).  emb: (B or 1, emb_channels).  Returns (B, C', H', W')."""
        branch = F.silu(self.norm_1(h))
        if self.resample is not None:
            branch, h = self.resample(branch), self.resample(h)
        branch, rows = self.conv_1(branch), self.emb(emb)[:, :, None, None]
        if self.style.adaptive:
            scale, shift = rows.chunk(2, dim=1)
            branch = F.silu(torch.addcmul(shift, self.norm_2(branch), 1 + scale))
        else:
            branch = F.silu(self.norm_2(branch + rows))
        branch = self.conv_2(self.dropout(branch))
        h = self.shortcut(h) if self.shortcut is not None else h
        h = (h + branch) * self.style.residual_scale
        if self.attn is None or self.norm_attn is None:
            return h
        tokens = self.attn(self.norm_attn(h).flatten(2).transpose(1, 2))
        return (h + tokens.transpose(1, 2).reshape(h.shape)) * self.style.residual_scale
