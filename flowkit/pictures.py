"""Pictures of any kind as uint8 (B, C, H, W): decoded, cropped to a square, resized."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from flowkit.errors import FlowkitError

__all__ = ["UNREADABLE", "FilePictures", "channels_first", "one_line", "resized", "to_uint8"]

# What Pillow, numpy and zipfile raise over a file that is not whole, or not of the kind it claims.
UNREADABLE = (
    OSError,
    EOFError,
    KeyError,
    SyntaxError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
    Image.DecompressionBombError,
)
_GREY = ("1", "L", "LA")


@dataclass(eq=False)
class FilePictures:
    """Pictures that stay on disk: indexed by rows (B,) they are decoded to uint8 (B, C, H, W).

    open_image: name to Pillow image, picklable.  source: what errors call the set.  names: one a
    picture.  identity: a text that changes when the pictures do.  size: side after a central
    square crop and a resize; without it all must be of one size, which is read at once off the
    headers.  Grey or colour is the first picture's choice.  FlowkitError: no pictures, one that
    cannot be read, or one that does not go with the first.
    """

    open_image: Callable[[Any], Image.Image]
    source: str
    names: Sequence[Any]
    identity: str
    size: int | None = None
    shape: tuple[int, int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        if not self.names:
            raise FlowkitError(f"{self.source} holds no pictures")
        with self._opened(0) as image:
            mode, (width, height) = image.mode, image.size
        sides = (height, width) if self.size is None else (self.size, self.size)
        self.shape = (len(self.names), 1 if mode in _GREY else 3, *sides)
        for index in range(1, len(self.names) if self.size is None else 0):
            with self._opened(index) as image:
                other = image.size
            if other != (width, height):
                raise FlowkitError(
                    f"pictures differ in size: {self._title(0)} is {width}x{height}, "
                    f"{self._title(index)} is {other[0]}x{other[1]}; set size to crop and resize"
                )

    def __getitem__(self, rows: Tensor) -> Tensor:
        levels = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8)
        for place, index in enumerate(rows.tolist()):
            levels[place] = self._decode(index)
        return levels

    def _decode(self, index: int) -> Tensor:
        grey = self.shape[1] == 1
        with self._opened(index) as image:
            mode = image.mode
            levels = np.array(image.convert("L" if grey else "RGB"))
        if mode.startswith(("I", "F")) or (grey and mode not in _GREY):
            raise FlowkitError(
                f"{self._title(index)} has Pillow mode {mode}, which is not 8-bit "
                f"{'grey as the first picture' if grey else 'colour'}; convert it"
            )
        picture = channels_first(levels[None])
        return picture[0] if self.size is None else resized(picture, self.size)[0]

    @contextmanager
    def _opened(self, index: int) -> Iterator[Image.Image]:
        try:
            with self.open_image(self.names[index]) as image:
                yield image
        except UNREADABLE as error:
            title = self._title(index)
            raise FlowkitError(f"{title} is not a readable picture: {one_line(error)}") from error

    def _title(self, index: int) -> str:
        return f"{self.source}/{self.names[index]}"


def channels_first(levels: np.ndarray) -> Tensor:
    """uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) to (N, C, H, W), C being 1 or 3."""
    if levels.ndim == 3:
        levels = levels[..., None]
    if levels.shape[-1] in (1, 3):
        levels = levels.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(levels))


def resized(levels: Tensor, size: int, peak: int = 255) -> Tensor:
    """Central square at (size, size): uint8 (N, C, H, W) in [0, peak] to uint8 in [0, 255].

    The resize is bicubic and antialiased.
    """
    side = min(levels.shape[-2:])
    top, left = ((extent - side) // 2 for extent in levels.shape[-2:])
    square = levels[..., top : top + side, left : left + side]
    if side == size and peak == 255:
        return square.contiguous()
    parts = []
    for part in square.split(1024):  # bounds the float copy
        scaled = part.float().mul_(255 / peak)
        out = F.interpolate(scaled, (size, size), mode="bicubic", antialias=True)
        parts.append(out.round_().clamp_(0, 255).to(torch.uint8))
    return torch.cat(parts)


def to_uint8(pictures: Tensor) -> Tensor:
    """Floats in [-1, 1] of any shape as levels 0..255: 127.5 x + 127.5, rounded half up, clamped.

    FlowkitError: a value is not finite, which as a level would pass for black.
    """
    if bad := int((~pictures.isfinite()).sum()):
        raise FlowkitError(
            f"{bad} of {pictures.numel()} pixel values are not finite; check the model's weights"
        )
    levels = pictures.to(torch.promote_types(pictures.dtype, torch.float32)) * 127.5
    return levels.add_(128).clamp_(0, 255).to(torch.uint8)


def one_line(error: Exception) -> str:
    """What the error says, on one line; its type if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
