"""PSNR and SSIM against their definitions, written out place by place."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from flowkit.data import load_data
from flowkit.errors import FlowkitError
from flowkit.eval.picture_quality import psnr, ssim


def _brute_force_ssim(a: np.ndarray, b: np.ndarray, peak: float) -> float:
    """Wang et al., 2004, eqs. 13 to 17: one window after another on one plane."""
    places = np.arange(11) - 5
    window = np.exp(-(places[:, None] ** 2 + places**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            x, y = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mx, my = (window * x).sum(), (window * y).sum()
            xx, yy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            xy = (window * (x - mx) * (y - my)).sum()
            top = (2 * mx * my + c1) * (2 * xy + c2)
            values.append(top / ((mx**2 + my**2 + c1) * (xx + yy + c2)))
    return float(np.mean(values))


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Two smooth RGB pictures with edges, 3 x 17 x 14, in [-1, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 3, 17), torch.linspace(0, 4, 14), indexing="ij")
    planes = [torch.sin(k * x + y) * torch.sign(x - 0.4 * k) for k in range(1, 7)]
    return torch.stack(planes).reshape(2, 3, 17, 14)


def test_ssim_is_the_brute_force_one(pictures: Tensor) -> None:
    noise = 0.2 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    other = (pictures + noise).clamp(-1, 1)
    found = ssim(pictures, other)
    for a, b, value in zip(pictures.double().numpy(), other.double().numpy(), found, strict=True):
        by_hand = np.mean([_brute_force_ssim(p, q, 2.0) for p, q in zip(a, b, strict=True)])
        assert float(value) == pytest.approx(by_hand, rel=1e-10)


def test_ssim_of_levels_and_of_floats(pictures: Tensor) -> None:
    """C1 and C2 scale with the range, but a shift by half of it moves the luminance term."""
    levels = ((pictures + 1) * 127.5).round().to(torch.uint8)
    other = levels.flip(-1)
    value = float(ssim(levels, other)[0])
    planes = zip(levels[0].double().numpy(), other[0].double().numpy(), strict=True)
    assert value == pytest.approx(np.mean([_brute_force_ssim(p, q, 255.0) for p, q in planes]))
    assert float(ssim(levels / 255.0, other / 255.0, data_range=1.0)[0]) == pytest.approx(value)
    assert abs(float(ssim(levels / 127.5 - 1, other / 127.5 - 1)[0]) - value) > 1e-3


def test_ssim_agrees_with_scikit_image(pictures: Tensor) -> None:
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    other = pictures.roll(1, -1)
    for a, b, value in zip(pictures, other, ssim(pictures, other), strict=True):
        theirs = metrics.structural_similarity(
            a.double().numpy(), b.double().numpy(), channel_axis=0, data_range=2.0,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )  # fmt: skip
        assert float(value) == pytest.approx(theirs, rel=1e-9)


def test_ssim_of_a_constant_shift() -> None:
    """Flat pictures m and m + s have no structure: (2 m (m + s) + C1) / (m^2 + (m + s)^2 + C1)."""
    m, s, c1 = 0.4, 0.3, (0.01 * 2) ** 2
    flat = torch.full((1, 1, 12, 12), m, dtype=torch.float64)
    expected = (2 * m * (m + s) + c1) / (m**2 + (m + s) ** 2 + c1)
    assert float(ssim(flat, flat + s)) == pytest.approx(expected, rel=1e-12)


def test_equal_pictures(pictures: Tensor) -> None:
    assert torch.equal(psnr(pictures, pictures), torch.full((2,), math.inf, dtype=torch.float64))
    torch.testing.assert_close(ssim(pictures, pictures), torch.ones(2, dtype=torch.float64))


def test_psnr_picture_by_picture() -> None:
    a = torch.zeros(2, 1, 4, 4)
    b = torch.stack([torch.full((1, 4, 4), 0.2), torch.full((1, 4, 4), 2.0)])
    torch.testing.assert_close(psnr(a, b), torch.tensor([20.0, 0.0], dtype=torch.float64))
    one = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)  # 0 - 1 must not wrap round
    assert float(psnr(one, one + 1)) == pytest.approx(20 * math.log10(255))
    assert float(psnr(a, b, data_range=1.0)[0]) == pytest.approx(20 - 20 * math.log10(2), abs=1e-5)


def test_real_pictures_rank_as_they_look() -> None:
    """A faint noise, a strong one, another digit: further and further by both."""
    digits = load_data("digits", "test").fetch(range(64))["data"]
    digits = torch.nn.functional.interpolate(digits, scale_factor=2, mode="nearest")
    noise = torch.randn(digits.shape, generator=torch.Generator().manual_seed(0))
    worse = [(digits + level * noise).clamp(-1, 1) for level in (0.05, 0.3)] + [digits.roll(1, 0)]
    for quality in (psnr, ssim):
        near, far, other = (float(quality(digits, x).mean()) for x in worse)
        assert near > far > other, quality.__name__


@pytest.mark.parametrize(
    "a, b, words",
    [
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 15), "one shape"),
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "one shape"),
        (torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16), "11 pixels a side"),
        (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), r"\(B, C, H, W\)"),
    ],
)
def test_pictures_that_do_not_go_together(a: Tensor, b: Tensor, words: str) -> None:
    with pytest.raises(FlowkitError, match=words):
        ssim(a, b)


def test_integers_need_their_range() -> None:
    a = torch.zeros(1, 1, 4, 4, dtype=torch.int64)
    with pytest.raises(FlowkitError, match="data_range"):
        psnr(a, a)
    assert float(psnr(a, a + 100, data_range=1000)) == pytest.approx(20)
