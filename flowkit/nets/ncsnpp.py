"""NCSN++ and DDPM++: the convolutional U-Nets of score-based diffusion.

Song et al., 2021, arXiv:2011.13456, appendix H, with the choices that Karras et al., 2022,
arXiv:2206.00364, table 7, compare.  DDPM++ is the default; NCSN++ is embedding "fourier", encoder
"residual" and resample_filter (1, 3, 3, 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from flowkit.errors import FlowkitError
from flowkit.nets.embeddings import (
    FourierFeatures,
    LabelEmbedding,
    add_augmentation,
    add_labels,
    frequencies,
    sinusoidal,
)
from flowkit.nets.unet import Head, PyramidConv, UNet
from flowkit.nets.unet_blocks import BlockStyle, Resample

__all__ = ["NCSNpp"]

_CHOICES = {
    "embedding": ("positional", "fourier"),
    "encoder": ("standard", "residual"),
    "decoder": ("standard", "skip"),
}


class NCSNpp(UNet):
    """F(x, c, y) with single-head attention and residuals scaled by sqrt(1/2).

    sample_size: H = W of the training pictures; it places attention_resolutions.
    channel_mult: channels of each level in units of model_channels; every level but the first is
    half the resolution of the one before.  out_channels: null for in_channels.
    embedding: "positional" (DDPM++) or "fourier".  encoder "residual" adds the downsampled input
    at each level, decoder "skip" sums an output per level.  augment_dim: length of augmentation
    labels, 9 in the published EDM checkpoints, 0 for none.
    num_classes, label_dropout: as in the other networks.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int | None = None,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (2, 2, 2),
        num_blocks: int = 4,
        attention_resolutions: Sequence[int] = (16,),
        embedding: str = "positional",
        encoder: str = "standard",
        decoder: str = "standard",
        resample_filter: Sequence[int] = (1, 1),
        dropout: float = 0.0,
        num_classes: int | None = None,
        label_dropout: float = 0.0,
        augment_dim: int = 0,
    ) -> None:
        super().__init__()
        given = {"embedding": embedding, "encoder": encoder, "decoder": decoder}
        for name, choices in _CHOICES.items():
            if given[name] not in choices:
                raise FlowkitError(f"{name} must be one of {choices}, got {given[name]!r}")
        style = BlockStyle(
            emb_channels=4 * model_channels,
            eps=1e-6,
            residual_scale=math.sqrt(0.5),
            adaptive=False,
            resample_filter=tuple(resample_filter),
            resample_conv=True,
            head_channels=None,
            dropout=dropout,
        )
        self._build_blocks(model_channels, style, attend_all=False)
        self._build_embedding()
        self._build_pyramids(style)
        self._initialise()

    def _build_pyramids(self, style: BlockStyle) -> None:
        config, taps = self.config, style.resample_filter
        outputs = config.out_channels or config.in_channels
        levels = [config.model_channels * mult for mult in config.channel_mult]
        inputs = [config.in_channels, *levels]
        self.pyramid = nn.ModuleList(
            PyramidConv(inputs[level], levels[level], taps)
            for level in range(len(levels) - 1)
            if config.encoder == "residual"
        )
        tops = levels if config.decoder == "skip" else levels[:1]
        self.heads = nn.ModuleList(Head(top, outputs, style.eps) for top in tops)
        self.upsample = Resample(taps, up=True) if config.decoder == "skip" else None

    def _build_embedding(self) -> None:
        config = self.config
        dim = config.model_channels * (2 if config.embedding == "fourier" else 1)
        if config.embedding == "fourier":
            self.fourier = FourierFeatures(dim)
        else:
            self.register_buffer("omega", frequencies(dim // 2, endpoint=True), persistent=False)
        classes, emb = config.num_classes, 4 * config.model_channels
        self.labels = (
            LabelEmbedding(classes, dim, config.label_dropout) if classes is not None else None
        )
        self.augment = (
            nn.Linear(config.augment_dim, dim, bias=False) if config.augment_dim else None
        )
        self.time_mlp = nn.Sequential(
            nn.Linear(dim, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU()
        )

    @torch.no_grad()
    def _initialise(self) -> None:
        """Xavier-uniform weights, zero biases, branches and outputs that start near zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        quiet: list[Any] = [head.conv for head in self.heads]
        for block in self.res_blocks():
            quiet.append(block.conv_2)
            if block.attn is not None:
                quiet.append(block.attn.to_out[0])
                for proj in (block.attn.to_q, block.attn.to_k, block.attn.to_v):
                    nn.init.xavier_uniform_(proj.weight, gain=math.sqrt(0.1))
        for module in quiet:
            nn.init.xavier_uniform_(module.weight, gain=1e-5)
        if self.labels is not None:  # as a Xavier-uniform matrix on one-hot labels * sqrt(classes)
            rows, dim = self.labels.num_classes, self.labels.table.embedding_dim
            bound = math.sqrt(6 * rows / (rows + dim))
            nn.init.uniform_(self.labels.table.weight, -bound, bound)

    def _embed(
        self, times: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        if self.config.embedding == "fourier":
            emb = self.fourier(times)
        else:
            emb = sinusoidal(times, self.omega)
            emb = emb.roll(emb.shape[1] // 2, dims=1)  # this family has the sines first
        emb = add_labels(emb.to(self.conv_in.weight.dtype), self.labels, class_labels)
        return self.time_mlp(add_augmentation(emb, self.augment, augment_labels))
