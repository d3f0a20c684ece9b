"""The resizes: each equal to the package that made the published numbers, and bands to matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from flowkit.data import load_data
from flowkit.errors import FlowkitError
from flowkit.eval.resize import CONVENTIONS, axis_matrix, exact_float32, resize

SIZES = [(32, 32), (47, 300), (299, 299), (512, 512), (1000, 31), (1, 1)]


def _levels(height: int, width: int, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(height + width)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def _through_package(mode: str, levels: Tensor) -> Tensor:
    """clean-fid's resize, which takes one picture (H, W, 3) at a time."""
    build_resizer = pytest.importorskip("cleanfid.resize", reason="needs clean-fid").build_resizer
    resized = [build_resizer(mode)(picture) for picture in levels.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("mode", ["clean", "legacy_pytorch"])
@pytest.mark.parametrize("height, width", SIZES)
def test_equal_to_clean_fid(mode: str, height: int, width: int) -> None:
    levels = _levels(height, width)
    expected = _through_package(mode, levels)
    torch.testing.assert_close(resize(levels, 299, mode), expected, rtol=0, atol=2e-3)


def test_equal_to_clean_fid_on_real_pictures(data_root: Path) -> None:
    levels = load_data("cifar10-jpeg", "test", root=data_root).fetch(range(8))["data"]
    levels = (levels * 127.5 + 127.5).round().to(torch.uint8)
    found = resize(levels, 299, "clean")
    torch.testing.assert_close(found, _through_package("clean", levels), rtol=0, atol=1e-3)
    others = {m: (resize(levels, 299, m) - found).abs().mean() for m in CONVENTIONS}
    assert others["clean"] == 0
    assert 1 < others["legacy_pytorch"] < 4 < 6 < others["legacy_tensorflow"]


@pytest.mark.parametrize("height, width", SIZES)
def test_equal_to_tensorflow_by_its_formula(height: int, width: int) -> None:
    """Pixel i lies at i * inputs / outputs; lerp across, then down, past the end the last pixel."""
    x = _levels(height, width).double().numpy()
    axes = []
    for inputs in (height, width):
        place = (np.arange(299, dtype=np.float32) * np.float32(inputs / 299)).astype(np.float64)
        low = np.minimum(np.floor(place).astype(int), inputs - 1)
        axes.append((low, np.minimum(low + 1, inputs - 1), place - low))
    (top, bottom, down), (left, right, across) = axes
    upper = x[:, :, top][..., left] * (1 - across) + x[:, :, top][..., right] * across
    lower = x[:, :, bottom][..., left] * (1 - across) + x[:, :, bottom][..., right] * across
    expected = torch.from_numpy(upper * (1 - down)[:, None] + lower * down[:, None]).float()
    found = resize(_levels(height, width), 299, "legacy_tensorflow")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("height, width", SIZES[:4])
def test_equal_to_torch_fidelity(height: int, width: int) -> None:
    package = pytest.importorskip("torch_fidelity", reason="needs torch-fidelity")
    interpolate = package.interpolate_compat_tensorflow.interpolate_bilinear_2d_like_tensorflow1x
    levels = _levels(height, width)
    expected = interpolate(levels.float(), size=(299, 299), align_corners=False)
    found = resize(levels, 299, "legacy_tensorflow")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("height, width", [(32, 32), (47, 300), (224, 224), (512, 512), (1, 1)])
def test_equal_to_pillow_on_levels(height: int, width: int) -> None:
    """Pillow adds whole numbers, so a value halfway between levels may fall on the other side."""
    levels = _levels(height, width)
    found = resize(levels, 224, "pillow")
    assert torch.equal(found, found.round())
    for picture, ours in zip(levels.permute(0, 2, 3, 1).numpy(), found, strict=True):
        image = Image.fromarray(picture).resize((224, 224), Image.Resampling.BICUBIC)
        difference = (ours - torch.from_numpy(np.array(image)).permute(2, 0, 1)).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


def test_the_matrices_are_pytorchs_and_pillows() -> None:
    for inputs, outputs in ((5, 9), (9, 5), (32, 299), (500, 299)):
        eye = torch.eye(inputs)[None, None]
        down = F.interpolate(eye, (outputs, inputs), mode="bilinear")[0, 0]
        torch.testing.assert_close(axis_matrix("legacy_pytorch", inputs, outputs).float(), down)
        image = Image.fromarray(eye[0, 0].numpy())
        pillow = np.asarray(image.resize((inputs, outputs), Image.Resampling.BICUBIC))
        clean = axis_matrix("clean", inputs, outputs).float()
        torch.testing.assert_close(clean, torch.from_numpy(pillow.copy()), rtol=0, atol=1e-6)
        for convention in CONVENTIONS:
            sums = axis_matrix(convention, inputs, outputs).sum(1)
            torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("convention", ["clean", "legacy_pytorch", "legacy_tensorflow"])
@pytest.mark.parametrize("side", [8, 64, 65, 128, 700])
def test_bands_are_the_whole_matrix(convention: str, side: int) -> None:
    levels = _levels(side, side + 3)
    down, across = (axis_matrix(convention, n, 299) for n in (side, side + 3))
    expected = (down @ levels.double() @ across.T).clamp(0, 255)
    found = resize(levels, 299, convention)
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)


def test_scale_and_shift_come_after_the_clamp() -> None:
    checks = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    checks[..., ::2, :] = 255
    levels = resize(checks, 40, "clean")
    assert levels.min() == 0 and levels.max() == 255
    assert axis_matrix("clean", 16, 40).min() < 0  # the kernel itself overshoots
    scaled = resize(checks, 40, "clean", scale=1 / 128, shift=-1)
    torch.testing.assert_close(scaled, levels / 128 - 1, rtol=0, atol=1e-6)


def test_floats_and_views_and_none_at_all() -> None:
    levels = _levels(40, 40, 3)
    found = resize(levels, 20, "clean")
    assert torch.equal(resize(levels.float(), 20, "clean"), found)
    turned = resize(levels.permute(0, 1, 3, 2), 20, "clean")
    torch.testing.assert_close(turned, found.transpose(2, 3), rtol=0, atol=1e-4)
    grey = levels[:, :1]
    repeated = resize(grey.expand(-1, 3, -1, -1), 20, "clean")
    assert torch.equal(repeated[:, 2], resize(grey, 20, "clean")[:, 0])
    assert resize(levels[:0], 20, "clean").shape == (0, 3, 20, 20)


def test_products_stay_exact_whatever_the_program_wants() -> None:
    levels = _levels(512, 512, 1)
    expected = resize(levels, 299, "clean")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # bfloat16 products, where the CPU has them
        assert torch.equal(resize(levels, 299, "clean"), expected)
        with pytest.raises(ZeroDivisionError), exact_float32():
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_unknown_conventions() -> None:
    with pytest.raises(FlowkitError, match="'bicubic'.*known: clean, legacy_pytorch"):
        resize(_levels(8, 8), 4, "bicubic")
