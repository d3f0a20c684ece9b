"""ADM: the class-conditional U-Net of Dhariwal & Nichol, 2021, arXiv:2105.05233.

With the choices of Karras et al., 2022, arXiv:2206.00364, table 7: attention with 64 channels a
head at 32, 16 and 8 pixels, the embedding scales and shifts the second norm of each block, and
augmentation labels enter beside the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from flowkit.nets.embeddings import (
    LabelEmbedding,
    add_augmentation,
    add_labels,
    frequencies,
    sinusoidal,
)
from flowkit.nets.unet import Head, UNet
from flowkit.nets.unet_blocks import BlockStyle

__all__ = ["ADM"]


class ADM(UNet):
    """F(x, c, y); the defaults are the ImageNet 64 x 64 network without its classes.

    sample_size: H = W of the training pictures; it places attention_resolutions.
    channel_mult: channels of each level in units of model_channels; every level but the first is
    half the resolution of the one before.  out_channels: null for in_channels.
    augment_dim: length of augmentation labels, 0 for none.
    num_classes, label_dropout: as in the other networks.
    """

    omega: Tensor

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        out_channels: int | None = None,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_blocks: int = 3,
        attention_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.0,
        num_classes: int | None = None,
        label_dropout: float = 0.0,
        augment_dim: int = 0,
    ) -> None:
        super().__init__()
        width, emb = model_channels, 4 * model_channels
        style = BlockStyle(
            emb_channels=emb,
            eps=1e-5,
            residual_scale=1.0,
            adaptive=True,
            resample_filter=(1, 1),
            resample_conv=False,
            head_channels=64,
            dropout=dropout,
        )
        stem = width * channel_mult[0]
        self._build_blocks(stem, style, attend_all=True)
        self.register_buffer("omega", frequencies(width // 2), persistent=False)
        self.time_mlp = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.labels = (
            LabelEmbedding(num_classes, emb, label_dropout) if num_classes is not None else None
        )
        self.augment = nn.Linear(augment_dim, width, bias=False) if augment_dim else None
        self.pyramid = nn.ModuleList()
        self.heads = nn.ModuleList([Head(stem, out_channels or in_channels, style.eps)])
        self.upsample = None
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """PyTorch's default, but each branch, the output and the augmentation start at zero."""
        quiet: list[Any] = [head.conv for head in self.heads]
        for block in self.res_blocks():
            quiet.append(block.conv_2)
            if block.attn is not None:
                quiet.append(block.attn.to_out[0])
        for module in quiet:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        if self.augment is not None:
            nn.init.zeros_(self.augment.weight)

    def _embed(
        self, times: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        emb = sinusoidal(times, self.omega).to(self.conv_in.weight.dtype)
        emb = self.time_mlp(add_augmentation(emb, self.augment, augment_labels))
        return F.silu(add_labels(emb, self.labels, class_labels))
