"""What each named extractor is made of: its network, and how pictures are made ready for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowkit.errors import FlowkitError
from flowkit.eval.classifiers import CifarResNet, DigitsNet, ResNet20, ResNet56
from flowkit.eval.dinov2_net import SIZES, load_dinov2
from flowkit.eval.encoders import CLIP_MODELS, LPIPS_FILES, ClipPictures, load_clip, load_lpips
from flowkit.eval.inception_net import load_inception
from flowkit.eval.resize import resize
from flowkit.eval.weights_files import (
    OPTION_HINT,
    WeightsFile,
    file_sha256,
    find_weights,
    load_into,
)
from flowkit.registry import look_up

__all__ = [
    "BATCH",
    "DIGITS_WEIGHTS",
    "Recipe",
    "Weights",
    "clip_recipe",
    "full_name",
    "make_recipe",
]

DIGITS_WEIGHTS = Path(__file__).parent / "weights" / "digits.safetensors"
BATCH = 500
Weights = str | os.PathLike[str] | None


@dataclass(frozen=True)
class Recipe:
    """A network and how pictures are made ready for it.

    prepare: uint8 (B, 3, H, W) to what the net takes; None for nets that take floats in [-1, 1]
    as they are.  preprocessing: the name of that rule.  dim: of the features, if it is fixed.
    batch: how many pictures go through the net at once.  channels_last: the order in which the
    CPU is quicker at this net.
    """

    net: Callable[[Tensor], Tensor]
    sha256: str = ""
    prepare: Callable[[Tensor], Tensor] | None = None
    preprocessing: str = "none"
    dim: int | None = None
    batch: int = BATCH
    channels_last: bool = False


def full_name(name: str) -> str | None:
    """An extractor's name with its convention; None for module:name.  FlowkitError: neither."""
    family, _, convention = name.partition(":")
    if convention and family not in _DEFAULTS:
        return None
    known = {plain: plain for plain in _BUILDERS if ":" not in plain} | _DEFAULTS
    if convention:
        known = {full: full for full in _BUILDERS if full.startswith(f"{family}:")}
    return look_up("features", name, known)


def make_recipe(name: str, weights: Weights) -> Recipe:
    """The recipe of a full name, its network loaded; raises FlowkitError as load_extractor does."""
    return _BUILDERS[name](weights)


def _pixels(weights: Weights) -> Recipe:
    return Recipe(nn.Flatten())


def _digits(weights: Weights) -> Recipe:
    path = DIGITS_WEIGHTS if weights is None or weights == "auto" else Path(weights)
    if not path.is_file():
        raise FlowkitError(
            f"no feature weights at {path}; put digits.safetensors, which "
            f"eval/train_digits_features.py makes, there, or {OPTION_HINT}"
        )
    net = DigitsNet()
    load_into(net, path)
    return Recipe(net, file_sha256(path), dim=64)


def _cifar(build: type[ResNet20] | type[ResNet56], sha256: str, weights: Weights) -> Recipe:
    name = f"{build.__name__.lower()}-{sha256}.th"
    url = f"https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/{name}"
    path, digest = find_weights(WeightsFile(name, sha256, url), weights)
    net: CifarResNet = build()
    load_into(net, path)
    return Recipe(net, digest, dim=112)


# Scale and shift of levels, by convention, as the number's origin has them.
_INCEPTION = {
    "clean": (1 / 128, -1.0),
    "legacy_pytorch": (2 / 255, -1.0),
    "legacy_tensorflow": (1 / 128, -1.0),
}


def _inception(convention: str, weights: Weights) -> Recipe:
    net, digest = load_inception(weights)
    scale, shift = _INCEPTION[convention]
    prepare = partial(resize, size=299, convention=convention, scale=scale, shift=shift)
    return Recipe(net, digest, prepare, convention, 2048, batch=16, channels_last=True)


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _normalised(
    levels: Tensor, size: int, convention: str, statistics: tuple[tuple[float, ...], ...]
) -> Tensor:
    """Resized, in [0, 1], less the mean, over the deviation of what the network was trained on."""
    mean, deviation = (torch.tensor(s, device=levels.device)[:, None, None] for s in statistics)
    return resize(levels, size, convention, scale=1 / 255).sub_(mean).div_(deviation)


def _dinov2(size: str, convention: str, weights: Weights) -> Recipe:
    net, digest, dim = load_dinov2(size, weights)
    prepare = partial(_normalised, size=224, convention=convention, statistics=IMAGENET)
    return Recipe(net, digest, prepare, convention, dim, batch=32)


def clip_recipe(clip: Any, digest: str, convention: str) -> Recipe:
    """For the pictures' half of transformers' CLIPModel, whose sha256 is `digest`."""
    net = ClipPictures(clip)
    prepare = partial(_normalised, size=net.size, convention=convention, statistics=CLIP)
    return Recipe(net, digest, prepare, convention, net.dim, batch=32)


def _clip(name: str, convention: str, weights: Weights) -> Recipe:
    clip, _, digest = load_clip(name, weights)
    return clip_recipe(clip, digest, convention)


def _lpips(name: str, weights: Weights) -> Recipe:
    net, digest = load_lpips(name, weights)
    scale = partial(resize, size=64, convention="clean", scale=2 / 255, shift=-1.0)
    return Recipe(net, digest, scale, "clean", batch=32)


_BUILDERS: dict[str, Callable[[Weights], Recipe]] = {
    **{f"inception:{name}": partial(_inception, name) for name in _INCEPTION},
    "digits": _digits,
    "cifar-resnet20": partial(_cifar, ResNet20, "12fca82f"),
    "cifar-resnet56": partial(_cifar, ResNet56, "4bfd9763"),
    "pixels": _pixels,
    **{
        f"dinov2-{size}:{name}": partial(_dinov2, size, name)
        for size in SIZES
        for name in ("pillow", "clean")
    },
    **{
        f"clip-{model}:{name}": partial(_clip, model, name)
        for model in CLIP_MODELS
        for name in ("pillow", "clean")
    },
    **{f"lpips-{name}:clean": partial(_lpips, name) for name in LPIPS_FILES},
}
# Without a convention: clean-fid's for Inception, and what the papers' own code does elsewhere.
_DEFAULTS = {name.partition(":")[0]: name for name in reversed(_BUILDERS) if ":" in name}
