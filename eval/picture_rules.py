"""Pictures as uint8 levels: their hashes, and the rules for those that are not square RGB."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.eval.settings import PictureRules
from flowkit.pictures import resized

__all__ = ["conformed", "decoded", "digests_of", "pictures_sha256"]


def decoded(image: Image.Image, rules: PictureRules, title: str) -> Tensor:
    """A Pillow image as (C, H, W), C being 1 or 3; transparency by the rule."""
    if image.mode.startswith(("I", "F")):
        raise FlowkitError(f"{title} has Pillow mode {image.mode}, which is not 8-bit; convert it")
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        if rules.alpha == "refuse":
            raise FlowkitError(
                f"{title} is transparent ({image.mode}); say rules.alpha=drop, white or black"
            )
        image = image.convert("RGBA")
        if rules.alpha != "drop":
            image = Image.alpha_composite(Image.new("RGBA", image.size, rules.alpha), image)
        image = image.convert("RGB")
    array = np.array(image.convert("L" if grey else "RGB"))
    return torch.from_numpy(array[None] if grey else array.transpose(2, 0, 1).copy())


def conformed(levels: Tensor, rules: PictureRules, title: str) -> Tensor:
    """A picture (C, H, W) as the rules for channels, crop and size have it."""
    height, width = levels.shape[-2:]
    if rules.crop == "refuse" and height != width:
        raise FlowkitError(
            f"{title} is not square ({width}x{height}); say rules.crop=center, adm or stretch"
        )
    if rules.crop == "center":
        levels = resized(levels[None], rules.size or min(height, width))[0]
    elif rules.crop == "adm":
        levels = _adm_crop(levels, rules.size or min(height, width))
    if rules.channels == "rgb":
        return levels.expand(3, -1, -1)
    if rules.channels == "grey" and len(levels) == 3:  # Pillow's integer luma, ITU-R 601-2
        r, g, b = levels.int()
        return ((19595 * r + 38470 * g + 7471 * b + 32768) >> 16).to(torch.uint8)[None]
    return levels


def _adm_crop(levels: Tensor, size: int) -> Tensor:
    """Dhariwal & Nichol's crop (2021, arXiv:2105.05233): halve by boxes, resize, take the middle.

    Their ImageNet statistics are of pictures that were made so.
    """
    array = levels.permute(1, 2, 0).numpy()
    image = Image.fromarray(array if len(levels) == 3 else array[..., 0])
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    sides = round(image.width * scale), round(image.height * scale)
    image = image.resize(sides, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    cropped = np.array(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(np.atleast_3d(cropped).transpose(2, 0, 1).copy())


def pictures_sha256(digests: Tensor) -> str:
    """sha256 over the pictures' own hashes (N, 32), in order: what a set of pictures is."""
    return hashlib.sha256(digests.contiguous().numpy().tobytes()).hexdigest()


def digests_of(levels: Tensor) -> Tensor:
    """sha256 of each picture's bytes, channels first: uint8 (B, C, H, W) -> uint8 (B, 32)."""
    rows = [hashlib.sha256(row.contiguous().numpy().data).digest() for row in levels.cpu()]
    return torch.from_numpy(np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, 32).copy())
