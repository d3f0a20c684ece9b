from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowkit.errors import FlowkitError
from flowkit.pictures import FilePictures, channels_first, one_line, resized


def levels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def opened(folder, name):
    return Image.open(folder / name)


@pytest.fixture
def saved(tmp_path):
    """Saves arrays as PNG files, and gives them back as FilePictures."""

    def save(*arrays, size=None):
        names = [f"{place}.png" for place in range(len(arrays))]
        for name, array in zip(names, arrays, strict=True):
            Image.fromarray(array).save(tmp_path / name)
        return FilePictures(partial(opened, tmp_path), str(tmp_path), names, "a set", size)

    return save


def rows(*indices):
    return torch.tensor(indices)


def test_files_are_decoded_in_the_order_asked(saved):
    arrays = [levels(seed, 5, 6, 3) for seed in range(3)]
    pictures = saved(*arrays)
    assert pictures.shape == (3, 3, 5, 6)
    expected = torch.from_numpy(np.stack([arrays[2], arrays[0], arrays[2]])).permute(0, 3, 1, 2)
    for reader in (pictures, pickle.loads(pickle.dumps(pictures))):
        found = reader[rows(2, 0, 2)]
        assert found.dtype == torch.uint8 and torch.equal(found, expected)


def test_narrow_grey_pictures_are_not_taken_for_colour(saved):
    array = levels(0, 4, 3)
    assert torch.equal(saved(array)[rows(0)], torch.from_numpy(array)[None, None])


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_come_first(channels):
    first = torch.from_numpy(levels(0, 2, channels, 5, 6))
    last = first.permute(0, 2, 3, 1).numpy()
    for array in (first.numpy(), last, last[..., 0] if channels == 1 else last):
        assert torch.equal(channels_first(array), first)


def test_resizing_keeps_constant_pictures_and_the_mean():
    flat = torch.full((1, 1, 32, 32), 200, dtype=torch.uint8)
    assert torch.equal(resized(flat, 16), flat[..., :16, :16])
    ramp = (torch.arange(32) * 8).to(torch.uint8).expand(1, 1, 32, 32)
    inner = resized(ramp, 16)[0, 0, 8, 2:-2]  # antialiased halving of a ramp: means of neighbours
    assert (inner - (torch.arange(16)[2:-2] * 16 + 4.0)).abs().max() <= 0.51


def test_resizing_antialiases():
    columns = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    columns[..., ::4] = 255  # finer than 8 pixels can show: their mean
    assert (resized(columns, 8)[..., 2:-2] - 255 / 4).abs().max() < 6


def test_resizing_crops_the_centre_and_scales_to_255():
    wide = torch.zeros(1, 1, 4, 8, dtype=torch.uint8)
    wide[..., 2:6] = 16
    for picture in (wide, wide.mT):
        assert torch.equal(resized(picture, 4), torch.full((1, 1, 4, 4), 16, dtype=torch.uint8))
        assert torch.equal(resized(picture, 4, peak=16), torch.full_like(picture[..., :4, :4], 255))


def test_resizing_many_pictures_is_resizing_each():
    many = torch.from_numpy(levels(0, 1030, 1, 6, 6))
    assert torch.equal(resized(many, 3)[1020:], resized(many[1020:], 3))


def test_files_are_cropped_and_resized(saved):
    wide, tall = levels(0, 6, 9, 3), levels(1, 8, 6, 3)
    pictures = saved(wide, tall, size=4)
    assert pictures.shape == (2, 3, 4, 4)
    for index, array in enumerate([wide, tall]):
        assert torch.equal(pictures[rows(index)], resized(channels_first(array[None]), 4))


def test_pictures_of_different_sizes(saved):
    with pytest.raises(FlowkitError, match=r"0.png is 6x6, \S+1.png is 9x6; set size to crop"):
        saved(levels(0, 6, 6, 3), levels(1, 6, 9, 3), levels(2, 2, 2, 3))


def test_no_pictures(saved, tmp_path):
    with pytest.raises(FlowkitError, match=f"{tmp_path} holds no pictures"):
        saved()


def test_grey_and_palette_pictures_join_colour_ones(saved, tmp_path):
    colour, grey = levels(0, 6, 6, 3), levels(1, 6, 6)
    pictures = saved(colour, grey, grey)
    Image.fromarray(grey).convert("P").save(tmp_path / "2.png")
    expected = np.stack([colour, *[np.repeat(grey[..., None], 3, 2)] * 2])
    assert torch.equal(pictures[rows(0, 1, 2)], channels_first(expected))


def test_colour_does_not_join_grey_pictures(saved):
    pictures = saved(levels(0, 6, 6), levels(1, 6, 6, 3))
    assert pictures.shape == (2, 1, 6, 6)
    with pytest.raises(FlowkitError, match="1.png has Pillow mode RGB, which is not 8-bit grey as"):
        pictures[rows(0, 1)]


def test_deep_pictures_are_refused(saved):
    with pytest.raises(FlowkitError, match="0.png has Pillow mode I;16, which is not 8-bit"):
        saved(levels(0, 6, 6).astype(np.uint16) * 256)[rows(0)]


def test_a_corrupted_picture_is_named(saved, tmp_path):
    pictures, path = saved(*[levels(seed, 6, 6, 3) for seed in range(3)]), Path(tmp_path / "1.png")
    path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(FlowkitError, match="/1.png is not a readable picture"):
        pictures[rows(0, 1)]
    path.unlink()
    with pytest.raises(FlowkitError, match="/1.png is not a readable picture: .*No such file"):
        pictures[rows(1)]
    path.write_bytes(b"hello")
    with pytest.raises(FlowkitError, match="/1.png is not a readable picture: cannot identify"):
        FilePictures(pictures.open_image, pictures.source, pictures.names, "the same")


def test_an_error_becomes_one_line():
    assert one_line(OSError("first\n  second")) == "first second"
    assert one_line(KeyError()) == "KeyError"
