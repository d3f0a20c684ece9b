"""What every network here is conditioned on: a time and, where it has classes, a label.

sinusoidal(t)_i = cos(t w_i), sin(t w_i)        w_i = 10000^(-i / half)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from flowkit.errors import FlowkitError

__all__ = [
    "FourierFeatures",
    "LabelEmbedding",
    "NetOutput",
    "add_augmentation",
    "add_labels",
    "as_times",
    "frequencies",
    "sinusoidal",
]


@dataclass
class NetOutput(BaseOutput):
    """What a network returns: sample (B, C, H, W)."""

    sample: Tensor


def as_times(timestep: float | Tensor, sample: Tensor) -> Tensor:
    """One time for the whole batch, (1,), or one per sample, (B,): at least float32."""
    dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
    times = torch.as_tensor(timestep, dtype=dtype, device=sample.device).reshape(-1)
    if len(times) not in (1, len(sample)):
        raise FlowkitError(
            f"timestep must be one number or one per sample, got {len(times)} for a batch of "
            f"{len(sample)}; pass a tensor of shape () or ({len(sample)},)"
        )
    return times


def frequencies(half: int, *, endpoint: bool = False, scale: float = 1.0) -> Tensor:
    """The angular frequencies scale * 10000^(-i / n), i < half: (half,) float32.

    n is half, or half - 1 where the last one is to be exactly 1/10000 (`endpoint`).
    """
    i = torch.arange(half, dtype=torch.float64)
    return (scale * torch.exp(-math.log(10000.0) * i / (half - endpoint))).float()


def sinusoidal(times: Tensor, omega: Tensor) -> Tensor:
    """Cosines, then sines, of times * omega: (n, 2 half).  times: (n,).  omega: (half,)."""
    angle = times[:, None] * omega.to(times.dtype)
    return torch.cat((angle.cos(), angle.sin()), dim=1)


class FourierFeatures(nn.Module):
    """Sines, then cosines, of 2 pi f t with fixed random f ~ N(0, scale^2).

    Tancik et al., 2020, arXiv:2006.10739, as the time embedding of Song et al., 2021,
    arXiv:2011.13456.  The frequencies are saved with the weights.
    """

    freqs: Tensor

    def __init__(self, dim: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(dim // 2) * scale)

    def forward(self, times: Tensor) -> Tensor:
        """times: (n,).  Returns (n, dim)."""
        angle = times[:, None] * (2 * math.pi * self.freqs.to(times.dtype))
        return torch.cat((angle.sin(), angle.cos()), dim=1)


class LabelEmbedding(nn.Module):
    """A vector per class and, with dropout > 0, one more for "no class" (index num_classes).

    In train mode each label becomes the null class with probability `dropout`, which is what
    classifier-free guidance needs (Ho & Salimans, 2022, arXiv:2207.12598).
    """

    def __init__(self, num_classes: int, dim: int, dropout: float) -> None:
        super().__init__()
        if num_classes < 1 or not 0 <= dropout < 1:
            raise FlowkitError(
                f"num_classes must be >= 1 and label_dropout in [0, 1), got {num_classes} and "
                f"{dropout}; num_classes null makes a network without classes"
            )
        self.num_classes, self.dropout = num_classes, dropout
        self.table = nn.Embedding(num_classes + (dropout > 0), dim)

    def forward(self, labels: Tensor | None) -> Tensor:
        """labels: (B,) integers, or None for the null class.  Returns (B or 1, dim)."""
        if labels is None:
            if not self.dropout:
                raise FlowkitError(
                    f"this network has {self.num_classes} classes and no null class (it was built "
                    "with label_dropout 0); pass class_labels"
                )
            labels = torch.tensor([self.num_classes], device=self.table.weight.device)
        if self.training and self.dropout:
            drop = torch.rand(labels.shape, device=labels.device) < self.dropout
            labels = labels.masked_fill(drop, self.num_classes)
        return self.table(labels)


def add_labels(emb: Tensor, labels: LabelEmbedding | None, class_labels: Tensor | None) -> Tensor:
    """emb (n, dim) plus the vector of each class: (n or B, dim)."""
    if labels is not None:
        return emb + labels(class_labels)
    if class_labels is not None:
        raise FlowkitError(
            "got class_labels for a network without classes; build it with num_classes or leave "
            "them out"
        )
    return emb


def add_augmentation(emb: Tensor, layer: nn.Linear | None, labels: Tensor | None) -> Tensor:
    """emb (n, dim) plus a linear map of augmentation labels (B, augment_dim); None adds nothing."""
    if labels is None:
        return emb
    if layer is None:
        raise FlowkitError(
            "got augment_labels for a network without them; build it with augment_dim or leave "
            "them out"
        )
    return emb + layer(labels.to(emb.dtype))
