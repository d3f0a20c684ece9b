"""How near pictures are to their originals, picture by picture: PSNR and SSIM.

    PSNR = 10 log10(R^2 / MSE)
    SSIM = mean over places of
           (2 m_a m_b + C1) (2 c_ab + C2) / ((m_a^2 + m_b^2 + C1) (c_aa + c_bb + C2))

R is the range of the values, C1 = (0.01 R)^2, C2 = (0.03 R)^2; m and c are means and covariances
under a Gaussian window, 11 wide, sigma 1.5 (Wang et al., 2004, IEEE TIP 13(4), eq. 13).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkit.errors import FlowkitError

__all__ = ["psnr", "ssim"]

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def psnr(a: Tensor, b: Tensor, *, data_range: float | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture: (B,), float64; inf for equal ones.

    a, b: (B, *), of one shape.  data_range: R; None is 255 for uint8, 2 for floats in [-1, 1].
    FlowkitError: shapes or kinds that differ.
    """
    a, b, peak = _pair(a, b, data_range)
    return 10 * torch.log10(peak**2 / (a - b).square().flatten(1).mean(1))


def ssim(a: Tensor, b: Tensor, *, data_range: float | None = None) -> Tensor:
    """Structural similarity of each picture, at most 1: (B,), float64.

    a, b: (B, C, H, W), H and W at least 11; windows lie inside the picture, channels count alike.
    data_range: as of `psnr`.  FlowkitError: shapes or kinds that differ, pictures too small.
    """
    a, b, peak = _pair(a, b, data_range)
    if a.ndim != 4 or min(a.shape[-2:]) < WINDOW:
        raise FlowkitError(
            f"SSIM takes pictures (B, C, H, W) of {WINDOW} pixels a side or more, got "
            f"{tuple(a.shape)}; resize them, and say so beside the number"
        )
    mean_a, mean_b = _windowed(a), _windowed(b)
    c_aa, c_bb = _windowed(a * a) - mean_a**2, _windowed(b * b) - mean_b**2
    c_ab = _windowed(a * b) - mean_a * mean_b
    c1, c2 = (K1 * peak) ** 2, (K2 * peak) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * (2 * c_ab + c2) / (c_aa + c_bb + c2)).flatten(1).mean(1)


def _pair(a: Tensor, b: Tensor, data_range: float | None) -> tuple[Tensor, Tensor, float]:
    """Both in float64, and R."""
    if a.shape != b.shape or a.is_floating_point() != b.is_floating_point() or a.ndim < 2:
        raise FlowkitError(
            "expected two batches of pictures of one shape and kind, got "
            f"{tuple(a.shape)} of {a.dtype} and {tuple(b.shape)} of {b.dtype}"
        )
    if not a.is_floating_point() and {a.dtype, b.dtype} != {torch.uint8} and data_range is None:
        raise FlowkitError(f"pictures of {a.dtype} need data_range, the range of their values")
    peak = (2.0 if a.is_floating_point() else 255.0) if data_range is None else data_range
    if not peak > 0:
        raise FlowkitError(f"data_range is the length of the values' range, above 0, got {peak}")
    return wide(a), wide(b), peak


def wide(x: Tensor) -> Tensor:
    """x in float64, on the CPU if its device has none (MPS)."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def _windowed(x: Tensor) -> Tensor:
    """The mean under the window at each place where it fits: (B, C, H - 10, W - 10)."""
    places = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = torch.exp(-0.5 * (places / SIGMA) ** 2)
    weights = weights / weights.sum()
    planes = x.reshape(-1, 1, *x.shape[-2:])
    rows = F.conv2d(planes, weights.view(1, 1, -1, 1))
    return F.conv2d(rows, weights.view(1, 1, 1, -1)).reshape(
        *x.shape[:2], x.shape[-2] - WINDOW + 1, x.shape[-1] - WINDOW + 1
    )
