"""Where measured pictures come from: their order, the rules, and what is refused and named."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from flowkit.data import load_data
from flowkit.errors import FlowkitError
from flowkit.eval.picture_rules import digests_of, pictures_sha256
from flowkit.eval.settings import PictureRules
from flowkit.eval.sources import open_pictures, picked
from flowkit.pictures import to_uint8


def levels(count=6, height=8, width=8, channels=3, seed=0):
    shape = (count, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def image(array, mode=None):
    return Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array, mode)


def write(folder, names, pictures):
    for name, picture in zip(names, pictures, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image(picture).save(folder / name)


def zipped(path, names, pictures):
    with zipfile.ZipFile(path, "w") as archive:
        for name, picture in zip(names, pictures, strict=True):
            stream = io.BytesIO()
            image(picture).save(stream, format="PNG")
            archive.writestr(name, stream.getvalue())


def everything(source):
    return source.fetch(range(len(source)))


NAMES = ["b/2.PNG", "a.png", "b/1.png", "c/d/e.Png", "z.bmp", "b.tiff"]


def test_a_folder_is_read_whole_and_sorted(tmp_path):
    """Every level, every spelling of an ending, each file once; hidden files are left out."""
    array = levels()
    write(tmp_path, NAMES, array)
    (tmp_path / ".hidden.png").write_bytes(b"x")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "a.png").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    source = open_pictures(str(tmp_path))
    order = np.argsort(NAMES)
    assert len(source) == len(NAMES)
    assert torch.equal(everything(source), torch.from_numpy(array[order].transpose(0, 3, 1, 2)))


def test_names_may_begin_with_an_underscore(tmp_path):
    names = ["_a.png", "_class/b.png", "__c/__d.png", "e.png"]
    write(tmp_path / "folder", names, levels(4))
    zipped(tmp_path / "all.zip", names, levels(4))
    assert len(open_pictures(str(tmp_path / "folder"))) == 4
    assert len(open_pictures(str(tmp_path / "all.zip"))) == 4


def test_zip_order_is_the_names_whatever_the_archive_says(tmp_path):
    array = levels()
    for file, order in (("one.zip", range(6)), ("two.zip", [3, 1, 5, 0, 2, 4])):
        zipped(tmp_path / file, [NAMES[i].lower() + ".png" for i in order], array[list(order)])
    one, two = (everything(open_pictures(str(tmp_path / f))) for f in ("one.zip", "two.zip"))
    assert torch.equal(one, two)


def test_every_container_gives_the_same_pictures(tmp_path):
    array = levels()
    names = [f"{i}.png" for i in range(6)]
    write(tmp_path / "folder", names, array)
    zipped(tmp_path / "set.zip", names, array)
    np.savez(tmp_path / "set.npz", arr_0=array, arr_1=np.zeros(6, dtype=np.int64))
    np.save(tmp_path / "set.npy", array)
    np.save(tmp_path / "first.npy", array.transpose(0, 3, 1, 2))
    found = ["folder", "set.zip", "set.npz", "set.npy", "first.npy"]
    sets = [everything(open_pictures(str(tmp_path / name))) for name in found]
    assert all(torch.equal(sets[0], other) for other in sets[1:])
    assert len({pictures_sha256(digests_of(one)) for one in sets}) == 1


def test_data_sets_by_name_and_split():
    source, data = open_pictures("digits-test"), load_data("digits", "test")
    assert source.name == "digits-test" and len(source) == 500 and source.shape == (1, 8, 8)
    expected = torch.floor(data.pictures[:9] * (255 / 16) + 0.5)
    assert torch.equal(source.fetch(range(9)).double(), expected.double())
    assert len(open_pictures("digits")) == 1297


def test_levels_survive_the_way_through_floats():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(every.float() / 127.5 - 1), every)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_counted(bad):
    with pytest.raises(FlowkitError, match="2 of 12 pixel values are not finite"):
        to_uint8(torch.tensor([0.0] * 10 + [bad] * 2))


def test_grey_among_colours_needs_a_rule(tmp_path):
    colour, grey = levels(2), levels(2, channels=1)
    write(tmp_path, ["a.png", "b.png"], colour)
    write(tmp_path, ["c.png", "d.png"], grey)
    with pytest.raises(FlowkitError, match="a.png is colour, .*c.png is grey; say rules.channels"):
        everything(open_pictures(str(tmp_path)))
    rgb = everything(open_pictures(str(tmp_path), PictureRules(channels="rgb")))
    assert torch.equal(rgb[2], torch.from_numpy(grey[0].transpose(2, 0, 1)).expand(3, -1, -1))
    one = everything(open_pictures(str(tmp_path), PictureRules(channels="grey")))
    luma = np.asarray(Image.fromarray(colour[0]).convert("L"))
    assert one.shape == (4, 1, 8, 8) and torch.equal(one[0, 0], torch.from_numpy(luma.copy()))


def test_a_grey_folder_stays_grey(tmp_path):
    write(tmp_path, ["a.png", "b.png"], levels(2, channels=1))
    assert open_pictures(str(tmp_path)).shape == (1, 8, 8)


@pytest.mark.parametrize("container", ["folder", "npy"])
def test_transparency_needs_a_rule(container, tmp_path):
    array = levels(2, channels=4)
    path = tmp_path / "set.npy"
    if container == "folder":
        path = tmp_path / "folder"
        write(path, ["a.png", "b.png"], array)
    else:
        np.save(path, array)
    with pytest.raises(FlowkitError, match="is transparent .RGBA.; say rules.alpha"):
        everything(open_pictures(str(path)))
    dropped = everything(open_pictures(str(path), PictureRules(alpha="drop")))
    assert torch.equal(dropped, torch.from_numpy(array[..., :3].transpose(0, 3, 1, 2)))
    alpha = array[..., 3:] / 255
    for rule, ground in (("white", 255), ("black", 0)):
        laid = everything(open_pictures(str(path), PictureRules(alpha=rule)))
        blend = (array[..., :3] * alpha + ground * (1 - alpha)).transpose(0, 3, 1, 2)
        assert (laid - torch.from_numpy(blend)).abs().max() <= 1


def test_mixed_sizes_are_found_at_once_and_named(tmp_path):
    write(tmp_path, ["a.png", "b.png"], levels(2))
    write(tmp_path, ["c.png"], levels(1, height=9, width=9))
    with pytest.raises(FlowkitError, match=r"differ in size: .*a.png is 8x8, .*c.png is 9x9; say"):
        open_pictures(str(tmp_path))
    both = open_pictures(str(tmp_path), PictureRules(crop="center", size=8))
    assert everything(both).shape == (3, 3, 8, 8)


def test_pictures_that_are_not_square_need_a_rule(tmp_path):
    array = levels(2, height=8, width=12)
    write(tmp_path, ["a.png", "b.png"], array)
    with pytest.raises(FlowkitError, match=r"a.png is not square \(12x8\); say rules.crop"):
        everything(open_pictures(str(tmp_path)))
    stretched = open_pictures(str(tmp_path), PictureRules(crop="stretch"))
    assert stretched.shape == (3, 8, 12)
    middle = everything(open_pictures(str(tmp_path), PictureRules(crop="center")))
    assert torch.equal(middle, torch.from_numpy(array[:, :, 2:10].transpose(0, 3, 1, 2)))


def test_adm_crop_halves_by_boxes(tmp_path):
    """Side 32 to 8: twice the mean of 2x2 boxes, rounded along each axis; no resize is left."""
    array = levels(1, height=32, width=48)
    np.save(tmp_path / "set.npy", array)
    rules = PictureRules(crop="adm", size=8)
    found = everything(open_pictures(str(tmp_path / "set.npy"), rules))[0]
    half = array[0].astype(float)
    for _ in range(2):
        half = half.reshape(half.shape[0] // 2, 2, -1, 2, 3).mean((1, 3))
    assert found.shape == (3, 8, 8)
    expected = torch.from_numpy(half[:, 2:10].transpose(2, 0, 1))
    assert (found.double() - expected).abs().max() <= 2


@pytest.mark.parametrize("name", ["empty", "void.zip"])
def test_empty_sets_are_refused(name, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    zipfile.ZipFile(tmp_path / "void.zip", "w").close()
    with pytest.raises(FlowkitError, match="holds no pictures"):
        open_pictures(str(tmp_path / name))


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "npy"])
def test_truncated_files_are_named(ending, tmp_path):
    array = levels(3, height=64, width=64)
    for name, picture in zip("abc", array, strict=True):
        path = tmp_path / f"{name}.{ending}"
        np.save(path, picture) if ending == "npy" else image(picture).save(path)
    path = tmp_path / f"b.{ending}"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(FlowkitError, match=rf"/b\.{ending} is not a readable picture") as caught:
        everything(open_pictures(str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_truncated_zip_is_named(tmp_path):
    path = tmp_path / "set.zip"
    zipped(path, ["a.png"], levels(1))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(FlowkitError, match="set.zip is not a readable zip"):
        open_pictures(str(path))


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((4, 8, 8, 3), dtype=np.float32), "holds float32"),
        (np.zeros((4, 8), dtype=np.uint8), r"holds uint8 \(4, 8\)"),
        (np.zeros((0, 8, 8, 3), dtype=np.uint8), "holds no pictures"),
        (np.zeros((4, 8, 8, 5), dtype=np.uint8), "has 5 channels"),
        (np.array([object()]), "not a readable picture: .*Python objects"),
    ],
)
def test_arrays_that_are_no_pictures(array, message, tmp_path):
    np.save(tmp_path / "set.npy", array, allow_pickle=True)
    with pytest.raises(FlowkitError, match=message):
        open_pictures(str(tmp_path / "set.npy"))


def test_sixteen_bit_pictures_are_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(FlowkitError, match="a.png has Pillow mode I;16, which is not 8-bit"):
        everything(open_pictures(str(tmp_path)))


@pytest.mark.parametrize(
    "rules, message",
    [
        (PictureRules(crop="adm"), "needs rules.size"),
        (PictureRules(size=8), "needs rules.crop"),
    ],
)
def test_rules_that_do_not_go_together(rules, message):
    with pytest.raises(FlowkitError, match=message):
        open_pictures("digits", rules)


def test_draws_are_the_seeds_and_never_more_than_there_are():
    assert picked(5, None, 0, "x") == picked(5, 5, 3, "x") == [0, 1, 2, 3, 4]
    drawn = picked(1000, 100, 0, "x")
    assert drawn == picked(1000, 100, 0, "x") != picked(1000, 100, 1, "x")
    assert len(set(drawn)) == 100 and drawn == sorted(drawn) and drawn[-1] > 900
    with pytest.raises(FlowkitError, match="a folder has 5 pictures, 6 were asked for"):
        picked(5, 6, 0, "a folder")
