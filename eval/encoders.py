"""CLIP and LPIPS networks as feature extractors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowkit.errors import FlowkitError
from flowkit.eval.weights_files import (
    OPTION_HINT,
    WeightsFile,
    find_weights,
    offline,
    state_sha256,
)
from flowkit.perceptual import LPIPS
from flowkit.registry import look_up

__all__ = ["CLIP_MODELS", "LPIPS_FILES", "ClipPictures", "LpipsFeatures", "load_clip", "load_lpips"]

CLIP_MODELS = {
    "vitl14-336": "openai/clip-vit-large-patch14-336",
    "vitl14": "openai/clip-vit-large-patch14",
    "vitb16": "openai/clip-vit-base-patch16",
    "vitb32": "openai/clip-vit-base-patch32",
}
_URL = "https://download.pytorch.org/models/"
LPIPS_FILES = {
    "vgg": WeightsFile("vgg16-397923af.pth", "397923af", f"{_URL}vgg16-397923af.pth"),
    "alex": WeightsFile("alexnet-owt-7be5be79.pth", "7be5be79", f"{_URL}alexnet-owt-7be5be79.pth"),
    "squeeze": WeightsFile(
        "squeezenet1_1-b8a52dc0.pth", "b8a52dc0", f"{_URL}squeezenet1_1-b8a52dc0.pth"
    ),
}


class ClipPictures(nn.Module):
    """CLIP's embedding of pictures, of unit length (Radford et al., 2021, arXiv:2103.00020).

    clip: transformers' CLIPModel.  size: the side that it takes.  dim: of the embedding.
    """

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.vision, self.projection = clip.vision_model, clip.visual_projection
        self.size: int = clip.config.vision_config.image_size
        self.dim: int = clip.config.projection_dim

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, size, size), of CLIP's mean and deviation -> (B, dim)."""
        pooled = self.vision(pixel_values=x).pooler_output
        return F.normalize(self.projection(pooled), dim=-1)


def load_clip(name: str, weights: str | os.PathLike[str] | None = None) -> tuple[Any, Any, str]:
    """transformers' CLIPModel, its tokenizer and the sha256 of its tensors.

    name: a key of CLIP_MODELS.  weights: a folder of transformers; default: the Hugging Face
    cache, or the hub.  FlowkitError: no transformers, no such folder, or neither cache nor hub.
    """
    hub = look_up("CLIP model", name, CLIP_MODELS)
    given = weights is not None and os.fspath(weights) != "auto"
    source = os.fspath(Path(weights).expanduser()) if given and weights is not None else hub
    if given and not Path(source).is_dir():
        raise FlowkitError(
            f"no CLIP folder at {source}; expected one that `hf download {hub}` makes"
        )
    try:
        from transformers import AutoTokenizer, CLIPModel
    except ImportError as error:
        raise FlowkitError(f"CLIP needs transformers ({error}); pip install transformers") from None
    try:
        clip = CLIPModel.from_pretrained(source, local_files_only=given or offline())
        words = AutoTokenizer.from_pretrained(source, local_files_only=given or offline())
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FlowkitError(
            f"cannot read CLIP from {source} ({reason}); run `hf download {hub}` where there is a "
            f"network, or {OPTION_HINT}, a folder that holds it"
        ) from None
    return clip.eval().requires_grad_(False), words, state_sha256(clip)


class LpipsFeatures(nn.Module):
    """A picture's LPIPS features, weighted so that the squared distance of two pictures' features
    is their LPIPS (Zhang et al., 2018, arXiv:1801.03924)."""

    def __init__(self, lpips: LPIPS) -> None:
        super().__init__()
        self.lpips = lpips

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, d), d growing with H and W."""
        rows = []
        for i, layer in enumerate(self.lpips._features(x)):
            places = layer[0, 0].numel()
            weight = (self.lpips.get_buffer(f"w{i}") / places).sqrt()
            unit = F.normalize(layer.float(), dim=1, eps=1e-10)
            rows.append((unit * weight[:, None, None]).flatten(1))
        return torch.cat(rows, 1)


def load_lpips(
    net: str, weights: str | os.PathLike[str] | None = None
) -> tuple[LpipsFeatures, str]:
    """LPIPS' features by the network's name, vgg, alex or squeeze, and the sha256 of its file.

    FlowkitError: no such network, no file, or one that holds something else.
    """
    path, digest = find_weights(look_up("LPIPS network", net, LPIPS_FILES), weights)
    return LpipsFeatures(LPIPS(net, weights=path, size=None)), digest
