"""Pictures to the size that a network takes, by the rules that published numbers were made with.

clean               Pillow's antialiased bicubic on floats, kept in [0, 255], not rounded (Parmar
                    et al., 2021, arXiv:2104.11222)
legacy_pytorch      bilinear between pixel centres, without antialias, as PyTorch interpolates
legacy_tensorflow   bilinear on a grid aligned to the top left corners, as TensorFlow 1 does
pillow              clean's kernel on 8-bit pictures, as Pillow resizes them: rounded to levels
                    after each axis

All are linear along each axis, so each is a matrix: resized = A_height @ picture @ A_width^T.
On the CPU the matrices' bands are multiplied block by block, which is quicker than any resize that
looks at single pixels; elsewhere the whole matrices are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowkit.registry import look_up

__all__ = ["CONVENTIONS", "axis_matrix", "exact_float32", "resize"]

_DENSE = 64  # up to this height one product is quicker than several
_BLOCKS = (64, 32)  # outputs that are multiplied at once, enlarging and shrinking: the quickest


def resize(
    levels: Tensor, size: int, convention: str, *, scale: float = 1.0, shift: float = 0.0
) -> Tensor:
    """Pictures (B, C, H, W), uint8 or float levels in [0, 255], at (size, size), times scale plus
    shift: float32 (B, C, size, size), on their device.

    The aspect is not kept.  FlowkitError: no such convention.
    """
    matrix = look_up("resize convention", convention, CONVENTIONS)
    bounds = (shift, 255 * scale + shift) if matrix is _bicubic else None  # bilinear stays inside
    height, width = levels.shape[-2:]
    if height == width == size:  # every convention leaves such pictures alone
        return levels.to(torch.float32, copy=True).mul_(scale).add_(shift)
    with exact_float32():
        if convention == "pillow":
            return _rounded(levels, size, matrix).mul_(scale).add_(shift)
        if levels.device.type == "cpu":
            return _banded(levels, size, matrix, scale=scale, shift=shift, bounds=bounds)
        down = _on_device(matrix, height, size, levels.device) * scale
        across = _on_device(matrix, width, size, levels.device)
        resized = down @ levels.float() @ across.T + shift
        return resized if bounds is None else resized.clamp_(*bounds)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Products and convolutions of float32 in float32 inside, whatever the program has chosen:
    TF32 moves features in their third digit."""
    switches = list(_precision_switches())
    before = [getattr(owner, name) for owner, name, _ in switches]
    try:
        for owner, name, exact in switches:
            setattr(owner, name, exact)
        yield
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


def _precision_switches() -> Iterator[tuple[Any, str, Any]]:
    """(owner, attribute, its value for exact products); PyTorch 2.9 renamed them."""
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):
        kinds = (backends.cuda, backends.mkldnn)
        for owner in (*(kind.matmul for kind in kinds), backends.cudnn.conv, backends.mkldnn.conv):
            yield owner, "fp32_precision", "ieee"
    else:
        yield backends.cuda.matmul, "allow_tf32", False
        yield backends.cudnn, "allow_tf32", False


def axis_matrix(convention: str, inputs: int, outputs: int) -> Tensor:
    """What a convention does along one axis: (outputs, inputs), float64, rows that sum to 1."""
    return look_up("resize convention", convention, CONVENTIONS)(inputs, outputs)


def _bicubic(inputs: int, outputs: int) -> Tensor:
    """Keys' kernel with a = -1/2, stretched by the scale when that shrinks."""
    scale = inputs / outputs
    stretch = max(scale, 1.0)
    centre = (torch.arange(outputs, dtype=torch.float64)[:, None] + 0.5) * scale
    pixel = torch.arange(inputs, dtype=torch.float64) + 0.5
    x = ((pixel - centre) / stretch).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


def _centred(inputs: int, outputs: int) -> Tensor:
    """PyTorch makes this grid in float32, and TensorFlow the next: so do we, to the same digits."""
    grid = (torch.arange(outputs, dtype=torch.float32) + 0.5) * _scale(inputs, outputs) - 0.5
    return _linear(grid.clamp(min=0).double(), inputs)


def _top_left(inputs: int, outputs: int) -> Tensor:
    grid = torch.arange(outputs, dtype=torch.float32) * _scale(inputs, outputs)
    return _linear(grid.double(), inputs)


def _scale(inputs: int, outputs: int) -> Tensor:
    return torch.tensor(inputs, dtype=torch.float32) / outputs


def _linear(grid: Tensor, inputs: int) -> Tensor:
    """Between the pixels on either side of each place; past the last pixel, that pixel."""
    low = grid.floor().long().clamp(max=inputs - 1)
    high = (low + 1).clamp(max=inputs - 1)
    part = (grid - low)[:, None]
    weights = torch.zeros(len(grid), inputs, dtype=torch.float64)
    weights.scatter_add_(1, low[:, None], 1 - part)
    return weights.scatter_add_(1, high[:, None], part)


CONVENTIONS: dict[str, Callable[[int, int], Tensor]] = {
    "clean": _bicubic,
    "legacy_pytorch": _centred,
    "legacy_tensorflow": _top_left,
    "pillow": _bicubic,
}


class _Band(NamedTuple):
    """Rows [start, stop) of a matrix, which are zero outside columns [low, high)."""

    start: int
    stop: int
    low: int
    high: int
    weights: Tensor


@lru_cache(maxsize=32)
def _bands(
    matrix: Callable[[int, int], Tensor], inputs: int, outputs: int, *, whole: bool = False
) -> list[_Band]:
    weights, found = matrix(inputs, outputs), []
    block = outputs if whole else _BLOCKS[inputs > outputs]
    for start in range(0, outputs, block):
        rows = weights[start : start + block]
        used = rows.abs().sum(0).nonzero().flatten()
        low, high = int(used[0]), int(used[-1]) + 1
        found.append(_Band(start, start + len(rows), low, high, rows[:, low:high].float()))
    return found


@lru_cache(maxsize=32)
def _on_device(
    matrix: Callable[[int, int], Tensor], inputs: int, outputs: int, device: torch.device
) -> Tensor:
    return matrix(inputs, outputs).to(device, torch.float32)


def _banded(
    levels: Tensor,
    size: int,
    matrix: Callable[[int, int], Tensor],
    *,
    scale: float,
    shift: float,
    bounds: tuple[float, float] | None,
) -> Tensor:
    """One picture at a time, in buffers that stay in the processor's cache."""
    count, channels, height, width = levels.shape
    down = _bands(matrix, height, size, whole=height <= _DENSE)
    across = [
        band._replace(weights=band.weights.T.contiguous()) for band in _bands(matrix, width, size)
    ]
    down = [band._replace(weights=band.weights * scale) for band in down]
    taken = torch.empty(max(band.high - band.low for band in down), width)
    narrow = torch.empty(channels, size, width)
    rows = narrow.view(-1, width)
    out = torch.empty(count, channels, size, size)
    for source, target in zip(levels, out, strict=True):
        for channel, shorter in zip(source, narrow, strict=True):
            for start, stop, low, high, weights in down:
                used = taken[: high - low].copy_(channel[low:high])
                torch.mm(weights, used, out=shorter[start:stop])
        if shift:
            narrow.add_(shift)
        flat = target.view(-1, size)
        for start, stop, low, high, weights in across:
            torch.mm(rows[:, low:high], weights, out=flat[:, start:stop])
        if bounds is not None:
            flat.clamp_(*bounds)
    return out


def _rounded(levels: Tensor, size: int, matrix: Callable[[int, int], Tensor]) -> Tensor:
    """Across, rounded, then down, rounded; Pillow's own sums are of whole numbers, so that one
    pixel in ten thousand may differ by a level."""
    x = levels.float()
    for _ in range(2):
        x = _across(x, size, matrix).add_(0.5).floor_().clamp_(0, 255).transpose(2, 3)
    return x


def _across(x: Tensor, size: int, matrix: Callable[[int, int], Tensor]) -> Tensor:
    inputs = x.shape[-1]
    if x.device.type != "cpu":
        return x @ _on_device(matrix, inputs, size, x.device).T
    rows, out = x.reshape(-1, inputs), torch.empty(*x.shape[:-1], size)
    for start, stop, low, high, weights in _bands(matrix, inputs, size):
        torch.mm(rows[:, low:high], weights.T, out=out.view(-1, size)[:, start:stop])
    return out
