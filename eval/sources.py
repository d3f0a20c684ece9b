"""Pictures to be measured as uint8 (B, C, H, W), from folders, zips, arrays and data sets.

Pictures that are not square, not of one size, grey among colours or transparent are refused until
a rule says what to do with them, since every such rule moves the numbers.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowkit.data import load_data
from flowkit.errors import FlowkitError
from flowkit.eval.picture_rules import conformed, decoded
from flowkit.eval.settings import PictureRules
from flowkit.pictures import UNREADABLE, one_line, to_uint8

__all__ = ["PictureSet", "open_pictures", "picked"]

_SUFFIXES = (
    *(".bmp", ".gif", ".jpeg", ".jpg", ".npy", ".pbm", ".pgm", ".png", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
_SPLITS = ("train", "test", "val", "validation")
_ARRAYS = ("arr_0", "images", "pictures", "samples")  # in the order in which they are looked for


@dataclass(eq=False)
class PictureSet:
    """Pictures by index.

    name: what records call it.  read: index -> levels (C, H, W) uint8.  title: index -> what errors
    call that picture.  identity: a text that changes when the pictures do.
    """

    name: str
    count: int
    read: Callable[[int], Tensor]
    title: Callable[[int], str]
    identity: str
    rules: PictureRules = field(default_factory=PictureRules)

    def __len__(self) -> int:
        return self.count

    def fetch(self, rows: Sequence[int]) -> Tensor:
        """uint8 (B, C, H, W) of these rows; FlowkitError names the picture that cannot be taken."""
        return torch.stack([self._picture(row) for row in rows])

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W), which is the first picture's."""
        return tuple(conformed(self.read(0), self.rules, self.title(0)).shape)

    def _picture(self, row: int) -> Tensor:
        picture = conformed(self.read(row), self.rules, self.title(row))
        if tuple(picture.shape) != self.shape:
            raise _unlike(self.title(0), self.shape, self.title(row), tuple(picture.shape))
        return picture


def picked(count: int, wanted: int | None, seed: int, what: str) -> list[int]:
    """Which of `count` pictures are taken: all, or `wanted` drawn by the seed, in rising order.

    FlowkitError: there are fewer than asked for.
    """
    if wanted is None or wanted == count:
        return list(range(count))
    if wanted > count:
        raise FlowkitError(f"{what} has {count} pictures, {wanted} were asked for; lower that")
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(count, generator=generator)[:wanted].tolist())


def open_pictures(name: str, rules: PictureRules | None = None) -> PictureSet:
    """The pictures that a name stands for, checked as far as their headers tell.

    name: a folder or zip (every picture below it, hidden files left out, in the order of their
    paths), an npz or npy of uint8 (N, H, W), (N, H, W, C) or (N, C, H, W), or a data set of
    flowkit.data with its split, as in "cifar10-train" or "digits-test" (no split: train).
    FlowkitError: nothing there, files that cannot be read, pictures that need a rule.
    """
    rules = rules or PictureRules()
    if rules.crop == "adm" and rules.size is None:
        raise FlowkitError("rules.crop=adm needs rules.size, the side to crop to")
    if rules.size is not None and rules.crop not in ("center", "adm"):
        raise FlowkitError(f"rules.size={rules.size} needs rules.crop=center or adm")
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(name, path, rules)
    if path.is_file() and path.suffix.lower() in (".npz", ".npy"):
        return _from_array(name, path, rules)
    if path.is_file() and path.suffix.lower() == ".zip":
        return _from_zip(name, path, rules)
    if path.is_file():
        raise FlowkitError(f"{name} is no folder, zip, npz or npy of pictures")
    return _from_data(name, rules)


def _from_folder(name: str, path: Path, rules: PictureRules) -> PictureSet:
    walk = os.walk(path, followlinks=True)
    files = [Path(folder, file).relative_to(path) for folder, _, found in walk for file in found]
    names = _kept([file.as_posix() for file in files])
    stats = [(path / file).stat() for file in names]
    stamps = [f"{n} {s.st_size} {s.st_mtime_ns}" for n, s in zip(names, stats, strict=True)]
    identity = "\n".join([str(path.resolve()), *stamps])
    return _from_files(
        name, names, lambda file: open(path / file, "rb"), identity=identity, rules=rules
    )


def _from_zip(name: str, path: Path, rules: PictureRules) -> PictureSet:
    stamp = path.stat().st_mtime_ns
    try:
        listed = _archive(path, stamp, os.getpid()).infolist()
    except UNREADABLE as error:
        raise FlowkitError(f"{path} is not a readable zip: {one_line(error)}") from error
    entries = {entry.filename: entry.CRC for entry in listed}
    names = _kept(list(entries))
    identity = "\n".join(f"{file} {entries[file]}" for file in names)

    def opened(file: str) -> Any:
        return _archive(path, stamp, os.getpid()).open(file)

    return _from_files(name, names, opened, identity=identity, rules=rules)


@lru_cache(maxsize=8)
def _archive(path: Path, stamp: int, process: int) -> zipfile.ZipFile:
    """The zip as this process opened it: a handle inherited by a fork shares its position."""
    return zipfile.ZipFile(path)


def _kept(names: list[str]) -> list[str]:
    """The pictures among the files, none hidden or of an archiver's, in one order everywhere."""
    shown = (n for n in names if not any(p[:1] == "." or p == "__MACOSX" for p in n.split("/")))
    return sorted(n for n in shown if n.lower().endswith(_SUFFIXES))


def _from_files(
    name: str,
    names: list[str],
    opened: Callable[[str], Any],
    *,
    identity: str,
    rules: PictureRules,
) -> PictureSet:
    if not names:
        raise FlowkitError(f"{name} holds no pictures; known endings: {', '.join(_SUFFIXES)}")

    def title(index: int) -> str:
        return f"{name}/{names[index]}"

    def read(index: int) -> Tensor:
        with _named(title(index)), opened(names[index]) as handle:
            with _image(handle, names[index]) as image:
                return decoded(image, rules, title(index))

    found = PictureSet(name, len(names), read, title, identity, rules)
    if rules.crop in ("refuse", "stretch"):
        _same_sizes(names, opened, title)
    return found


def _same_sizes(
    names: list[str], opened: Callable[[str], Any], title: Callable[[int], str]
) -> None:
    """Refuse mixed sizes by the headers, before anything is computed."""
    first: tuple[int, int] | None = None
    for index, file in enumerate(names):
        with _named(title(index)), opened(file) as handle, _image(handle, file) as image:
            size = image.size
        first = first or size
        if size != first:
            shapes = [(3, height, width) for width, height in (first, size)]
            raise _unlike(title(0), shapes[0], title(index), shapes[1])


def _image(handle: Any, name: str) -> Image.Image:
    if not name.lower().endswith(".npy"):
        return Image.open(handle)
    array = np.load(io.BytesIO(handle.read()), allow_pickle=False)
    if array.dtype != np.uint8 or not (array.ndim == 2 or array.shape[2:] in ((1,), (3,), (4,))):
        raise ValueError(f"an array of {array.dtype} {array.shape}, not uint8 (H, W, C)")
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def _from_array(name: str, path: Path, rules: PictureRules) -> PictureSet:
    with _named(name):
        loaded: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            array = loaded
        else:
            array = loaded[next((key for key in (*_ARRAYS, *loaded.files) if key in loaded), "")]
    if array.dtype != np.uint8 or array.ndim not in (3, 4):
        raise FlowkitError(
            f"{name} holds {array.dtype} {array.shape}, not pictures: uint8 (N, H, W, C)"
        )
    if not len(array):
        raise FlowkitError(f"{name} holds no pictures")
    if array.ndim == 3:
        array = array[..., None]
    elif array.shape[-1] not in (1, 3, 4) and array.shape[1] in (1, 3, 4):
        array = array.transpose(0, 2, 3, 1)
    if array.shape[-1] not in (1, 3, 4):
        raise FlowkitError(f"{name} has {array.shape[-1]} channels; pictures have 1, 3 or 4")

    def title(index: int) -> str:
        return f"{name}[{index}]"

    def read(index: int) -> Tensor:
        picture = np.array(array[index])
        if picture.shape[-1] == 4:
            return decoded(Image.fromarray(picture), rules, title(index))
        return torch.from_numpy(picture.transpose(2, 0, 1).copy())

    stat = path.stat()
    identity = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    return PictureSet(name, len(array), read, title, identity, rules)


def _from_data(name: str, rules: PictureRules) -> PictureSet:
    base, _, split = name.rpartition("-")
    base, split = (base, split) if base and split in _SPLITS else (name, "train")
    data = load_data(base, split, size=rules.size if rules.crop == "center" else None)

    def read(index: int) -> Tensor:
        return to_uint8(data.fetch([index])["data"])[0]

    title = f"{base}-{split}"
    return PictureSet(
        title, len(data), read, partial("{}[{}]".format, title), data.fingerprint(), rules
    )


def _unlike(
    first: str, shape: tuple[int, ...], other: str, theirs: tuple[int, ...]
) -> FlowkitError:
    if shape[1:] != theirs[1:]:
        sizes = f"{first} is {shape[2]}x{shape[1]}, {other} is {theirs[2]}x{theirs[1]}"
        return FlowkitError(
            f"pictures differ in size: {sizes}; say rules.crop=center (or adm) and rules.size"
        )
    kinds = {1: "grey", 3: "colour"}
    return FlowkitError(
        f"{first} is {kinds[shape[0]]}, {other} is {kinds[theirs[0]]}; say rules.channels=rgb"
        " to repeat the grey channel, or rules.channels=grey"
    )


@contextmanager
def _named(title: str) -> Iterator[None]:
    """What reading raises becomes one line that names the picture."""
    try:
        yield
    except FlowkitError:
        raise
    except (*UNREADABLE, RuntimeError, NotImplementedError) as error:  # zip: encrypted, unknown
        raise FlowkitError(f"{title} is not a readable picture: {one_line(error)}") from error
