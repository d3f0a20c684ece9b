"""Features as points whose distances come from matrix products, with a proven error, and the exact
distances of the few pairs for which that is not enough.

    |computed - true| <= e (|x|^2 + |y|^2),    e = t / (1 - t),  t = (d + 16) u

bounds the error of |x|^2 + |y|^2 - 2 x.y, where u is the rounding unit and d the dimension (Higham,
2002, Accuracy and Stability of Numerical Algorithms, 3.1). Exact ones are sums of squared float64
differences, in which equal distances of whole-numbered or repeated samples are equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.eval.frechet import Rows, same_dimension

__all__ = [
    "BLOCK",
    "FLOOR",
    "Cloud",
    "clouds",
    "compact_pair",
    "compact_rows",
    "error_bound",
    "squares",
    "tile_dtype",
]

BLOCK = 1024  # rows of a set at once: a piece of distances takes 4 MB in float32
GROUP = 1 << 19  # numbers in a group of exact differences
FLOOR = 1e-30  # below it products underflow, where coordinates are near 1 or scaled to it


def compact_rows(features: Rows) -> Tensor:
    """Features (N, d), checked, in float32, or in float64 where they were; nothing is copied.

    FlowkitError: another shape, values that are not finite.
    """
    rows = torch.as_tensor(features)
    if rows.ndim != 2 or not rows.numel():
        raise FlowkitError(f"features must be (N, d), got shape {tuple(rows.shape)}")
    if not rows.is_floating_point():
        rows = rows.double()
    elif rows.dtype not in (torch.float32, torch.float64):
        rows = rows.float()
    low, high = rows.aminmax()  # an infinity or nan shows in them, and no mask is made
    if not (low.isfinite() and high.isfinite()):
        raise FlowkitError("features are not finite; check the pictures that they were made from")
    return rows.cpu() if rows.device.type == "mps" else rows  # MPS has no float64


def compact_pair(real: Rows, generated: Rows) -> tuple[Tensor, Tensor]:
    """Two sets as compact_rows has them, on the first one's device."""
    first, second = compact_rows(real), compact_rows(generated)
    same_dimension(first.shape[1], second.shape[1])
    return first, second.to(first.device)


@dataclass(frozen=True)
class Cloud:
    """Features about a centre, scaled by a power of two, a block at a time; copied only if need be.

    norms: |x|^2 of each, (N,) float64.
    """

    rows: Tensor
    centre: Tensor | None
    scale: float
    norms: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def block(self, index: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the cloud in that precision."""
        found = self.rows[index]
        if self.centre is not None:
            wide = torch.promote_types(found.dtype, dtype)
            found = (found.to(wide) - self.centre.to(wide)).mul_(self.scale)
        return found.to(dtype)

    def slices(self, size: int = BLOCK) -> list[slice]:
        """The rows in order, `size` at a time."""
        return [slice(i, min(i + size, len(self))) for i in range(0, len(self), size)]


def clouds(*sets: Tensor) -> list[Cloud]:
    """Sets in one frame: about zero where that costs no more than a digit, else about the first
    one's mean."""
    mean = sets[0].mean(0).to(torch.promote_types(sets[0].dtype, sets[-1].dtype))
    found = [_cloud(rows, None, 1.0) for rows in sets]
    second = sum(float(cloud.norms.mean()) for cloud in found) / len(found)
    if 1e-16 < second < 1e16 and float(mean.double().square().sum()) < 0.9 * second:
        return found
    parts = (part for rows in sets for part in rows.split(BLOCK))
    largest = max(float((part - mean).abs_().amax()) for part in parts)
    if not math.isfinite(largest):
        raise FlowkitError("features lie too far apart for their precision; scale them down")
    return [_cloud(rows, mean, 2.0 ** -math.frexp(largest)[1]) for rows in sets]


def _cloud(rows: Tensor, centre: Tensor | None, scale: float) -> Cloud:
    cloud = Cloud(rows, centre, scale, rows.new_empty(len(rows), dtype=torch.float64))
    for part in cloud.slices(BLOCK // 4):
        if centre is None:
            lengths = torch.linalg.vector_norm(rows[part], dim=1, dtype=torch.float64)
        else:
            lengths = cloud.block(part, torch.float64).norm(dim=1)
        cloud.norms[part] = lengths.square()
    return cloud
    for part in cloud.slices(BLOCK // 4):
        cloud.norms[part] = cloud.block(part, torch.float64).square().sum(1)
    return cloud


def error_bound(d: int, dtype: torch.dtype) -> float:
    """e of the module's formula."""
    t = (d + 16) * torch.finfo(dtype).eps / 2
    return t / (1 - t)


def tile_dtype(d: int, device: torch.device) -> torch.dtype:
    """float32, unless it says too little or its products are set to be rounded to TF32 or bf16."""
    value = 1 + 2.0**-20
    probe = torch.full((256, 256), value, device=device) @ torch.eye(256, device=device)
    sound = bool((probe == value).all()) and error_bound(d, torch.float32) < 0.1
    return torch.float32 if sound else torch.float64


def squares(a: Tensor, b: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """|a_i - b_j|^2 of index pairs, from float64 differences: (len(i),).

    Groups are of one size, so that a pair's sum does not depend on the pairs beside it.
    """
    size = max(1, GROUP // a.shape[1])
    found = a.new_empty(len(i), dtype=torch.float64)
    for start in range(0, len(i), size):
        pad = max(0, start + size - len(i))
        left, right = (torch.nn.functional.pad(x[start : start + size], (0, pad)) for x in (i, j))
        sums = (a[left].double() - b[right].double()).square_().sum(1)
        found[start : start + size] = sums[: size - pad]
    return found
