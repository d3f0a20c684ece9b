"""Pictures by name, as float32 (B, C, H, W) in [-1, 1] with their class labels.

data = 2 * level / peak - 1        peak: 255, or 16 for scikit-learn's digits
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from flowkit.errors import FlowkitError

__all__ = ["FilePictures", "ImageData", "data_folder", "load_data"]

_PACKS = {"cifar10-jpeg": "cifar10_{}_jpeg.npz", "mnist": "mnist_{}.npz"}
_TORCHVISION = ["cifar10", "cifar100", "fashionmnist", "svhn", "stl10", "celeba", "imagenet"]
_SPLITS = {"train", "test", "val", "validation"}
_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_GREY = ("1", "L", "LA")
_UNREADABLE = (OSError, SyntaxError, ValueError, zipfile.BadZipFile, Image.DecompressionBombError)


@dataclass(frozen=True, eq=False)
class ImageData:
    """One split of a picture data set, addressed by index; `fetch` may run in any process.

    pictures: uint8 in [0, peak], a tensor (N, C, H, W) or files that decode when indexed.
    labels: (N,) int64 in [0, num_classes), or None.
    """

    name: str
    split: str
    pictures: Tensor | FilePictures
    labels: Tensor | None = None
    num_classes: int | None = None
    peak: int = 255

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self.pictures.shape
        return channels, height, width

    def __len__(self) -> int:
        return self.pictures.shape[0]

    def fetch(self, indices: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """data: (B, C, H, W) float32 in [-1, 1]; class_labels: (B,) int64, where labelled."""
        rows = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        found = {"data": self.pictures[rows].float().div_(self.peak / 2).sub_(1)}
        return found if self.labels is None else {**found, "class_labels": self.labels[rows]}

    def fingerprint(self) -> str:
        """sha256 of shape, levels and labels; files count by name, length and zip checksum."""
        digest = hashlib.sha256(f"{tuple(self.pictures.shape)}/{self.peak}".encode())
        if isinstance(self.pictures, Tensor):
            digest.update(self.pictures.contiguous().numpy().data)
        else:
            digest.update(self.pictures.identity.encode())
        if self.labels is not None:
            digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()


@dataclass(eq=False)
class FilePictures:
    """Pictures that stay on disk: indexed by rows (B,) they are decoded to uint8 (B, C, H, W).

    open_image: index to Pillow image, picklable.  titles: what errors call the pictures.
    identity: a text that changes when the pictures do.  size: side after a central square crop
    and a resize; without it all must be of one size, which is read at once off the headers.
    Grey or colour is the first picture's choice.
    """

    open_image: Callable[[int], Image.Image]
    titles: Sequence[str]
    identity: str
    size: int | None = None
    shape: tuple[int, int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        with self._opened(0) as image:
            mode, (width, height) = image.mode, image.size
        sides = (height, width) if self.size is None else (self.size, self.size)
        self.shape = (len(self.titles), 1 if mode in _GREY else 3, *sides)
        for index in range(1, len(self.titles) if self.size is None else 0):
            with self._opened(index) as image:
                other = image.size
            if other != (width, height):
                raise FlowkitError(
                    f"pictures differ in size: {self.titles[0]} is {width}x{height}, "
                    f"{self.titles[index]} is {other[0]}x{other[1]}; set size to crop and resize"
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
                f"{self.titles[index]} has Pillow mode {mode}, which is not 8-bit "
                f"{'grey as the first picture' if grey else 'colour'}; convert it"
            )
        picture = _channels_first(levels[None])
        return picture[0] if self.size is None else _resized(picture, self.size)[0]

    @contextmanager
    def _opened(self, index: int) -> Iterator[Image.Image]:
        try:
            with self.open_image(index) as image:
                yield image
        except _UNREADABLE as error:
            title = self.titles[index]
            raise FlowkitError(f"{title} is not a readable picture: {_line(error)}") from error


def data_folder(root: str | os.PathLike[str] | None = None) -> Path:
    """Where data sets lie: `root`, else $FLOWKIT_DATA, else ../shared/data beside the checkout."""
    chosen = root or os.environ.get("FLOWKIT_DATA")
    if chosen:
        return Path(chosen).expanduser()
    return Path(__file__).resolve().parents[2] / "shared" / "data"


def load_data(
    name: str,
    split: str = "train",
    *,
    root: str | os.PathLike[str] | None = None,
    size: int | None = None,
    download: bool = False,
) -> ImageData:
    """The data set called `name`.

    name: `digits` (scikit-learn's), `cifar10-jpeg` and `mnist` (packs), `cifar10` or
    `torchvision:CIFAR10`, a folder or zip of pictures (a path, or `folder:PATH`), `hf:NAME` or
    `hf:PATH` (the datasets package).  root: folder of packs and torchvision files (else see
    `data_folder`), or where a relative path starts.  size: side after a central square crop and
    an antialiased bicubic resize.  download: let torchvision fetch what is missing.

    A folder that holds only train/, test/ or val/ has these splits, any other has `train`.  Class
    folders become labels in the order of their names, unless a dataset.json (as in EDM's zips)
    gives the labels, or null for none; without it a zip has none.
    """
    if size is not None and size < 1:
        raise FlowkitError(f"size must be at least 1 pixel, got {size}")
    kind, _, rest = name.partition(":")
    if name == "digits":
        return _digits(split, size)
    if name in _PACKS:
        return _pack(name, split, data_folder(root), size)
    if kind == "torchvision" or name.lower() in _TORCHVISION:
        return _torchvision(rest or name, split, data_folder(root), size, download)
    if kind == "hf":
        return _hub(rest, split, size)
    path = Path(root or "").expanduser() / Path(rest if kind == "folder" else name).expanduser()
    if path.is_dir() or (path.suffix == ".zip" and path.is_file()):
        return _folder_or_zip(name, path, split, size)
    if kind == "folder" or path.suffix == ".zip" or "/" in name:
        raise FlowkitError(f"data set '{name}': no folder or zip of pictures at {path.absolute()}")
    known = ["digits", *_PACKS, *_TORCHVISION]
    others = "torchvision:NAME, hf:NAME, and paths of folders and zips"
    near = _nearest(name, known)
    raise FlowkitError(f"unknown data set '{name}'{near}; there are {', '.join(known)}, {others}")


def _digits(split: str, size: int | None) -> ImageData:
    from sklearn.datasets import load_digits

    _require_split("digits", split, {"train", "test"})
    bunch = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    rows = (order[:1297] if split == "train" else order[1297:]).numpy()
    levels = bunch.images[rows].astype(np.uint8)
    return _in_memory("digits", split, levels, bunch.target[rows], size, peak=16)


def _pack(name: str, split: str, folder: Path, size: int | None) -> ImageData:
    _require_split(name, split, {"train", "test"})
    path = folder / _PACKS[name].format(split)
    if not path.is_file():
        raise FlowkitError(f"data set '{name}' ({split}): no {path}; set FLOWKIT_DATA or root")
    try:
        with np.load(path) as pack:
            levels = pack["images"] if "images" in pack else _jpeg_levels(pack)
            return _in_memory(name, split, levels, pack["labels"], size)
    except (*_UNREADABLE, KeyError, EOFError) as error:
        raise FlowkitError(f"{path} is not a whole '{name}' pack: {_line(error)}") from error


def _jpeg_levels(pack: Any) -> np.ndarray:
    """uint8 (N, H, W, 3) of JPEG scans that share one header: header + scan + end mark."""
    header, scans = pack["header"].tobytes(), pack["scans"].tobytes()
    pictures, start = [], 0
    for end in np.cumsum(pack["lengths"], dtype=np.int64).tolist():
        jpeg = io.BytesIO(header + scans[start:end] + b"\xff\xd9")
        pictures.append(np.asarray(Image.open(jpeg)))
        start = end
    return np.stack(pictures)


def _torchvision(
    name: str, split: str, folder: Path, size: int | None, download: bool
) -> ImageData:
    from torchvision import datasets

    classes = {known.lower(): known for known in datasets.__all__}
    if name.lower() not in classes:
        raise FlowkitError(f"torchvision has no data set '{name}'{_nearest(name, classes)}")
    make = getattr(datasets, classes[name.lower()])
    title, takes = f"torchvision:{make.__name__}", inspect.signature(make).parameters
    if "train" in takes:
        _require_split(title, split, {"train", "test"})
    options: dict[str, Any] = {"train": split == "train"} if "train" in takes else {"split": split}
    try:
        dataset = make(folder, **options, **({"download": True} if download else {}))
    except (RuntimeError, OSError, ValueError, TypeError, ImportError) as error:
        below = f"{make.__name__}/raw" if issubclass(make, datasets.MNIST) else ""
        raise FlowkitError(
            f"{title} ({split}) cannot be read: {_line(error)}; its files belong in "
            f"{folder / getattr(make, 'base_folder', below)}, where load_data(..., download=True) "
            "lets torchvision fetch them"
        ) from error
    keys = ("targets", "labels", "_labels")  # torchvision has no one name for them
    labels = next((getattr(dataset, key) for key in keys if hasattr(dataset, key)), None)
    if hasattr(dataset, "data"):
        return _in_memory(title, split, np.asarray(dataset.data), labels, size)
    titles = [f"{title} ({split}) picture {i}" for i in range(len(dataset))]
    return _on_disk(title, split, partial(_item, dataset), titles, title, labels, size)


def _item(dataset: Any, index: int) -> Image.Image:
    return dataset[index][0]


def _hub(name: str, split: str, size: int | None) -> ImageData:
    try:
        import datasets
    except ImportError as error:
        raise FlowkitError(f"hf:{name} needs `pip install datasets`") from error
    path = Path(name).expanduser()
    saved = any((path / file).is_file() for file in ("dataset_dict.json", "state.json"))
    try:
        table = datasets.load_from_disk(path) if saved else datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise FlowkitError(f"hf:{name} cannot be loaded: {_line(error)}") from error
    splits = table if isinstance(table, dict) else {str(table.split or "train"): table}
    _require_split(f"hf:{name}", split, splits)
    table, kinds = splits[split], splits[split].features
    column = next((key for key, kind in kinds.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise FlowkitError(f"hf:{name} has no column of pictures, only {', '.join(kinds)}")
    classes = (key for key, kind in kinds.items() if isinstance(kind, datasets.ClassLabel))
    key = next(classes, "label")
    labels = table[key][:] if key in kinds else None
    opener = partial(_record, table.cast_column(column, datasets.Image(decode=False)), column)
    titles = [f"hf:{name} ({split}) picture {i}" for i in range(len(table))]
    return _on_disk(f"hf:{name}", split, opener, titles, table._fingerprint, labels, size)


def _record(table: Any, column: str, index: int) -> Image.Image:
    record = table[index][column]
    return Image.open(record["path"] if record["bytes"] is None else io.BytesIO(record["bytes"]))


def _folder_or_zip(name: str, path: Path, split: str, size: int | None) -> ImageData:
    below = {entry.name for entry in path.iterdir() if entry.is_dir()} if path.is_dir() else set()
    has_splits = bool(below) and below <= _SPLITS
    _require_split(name, split, below if has_splits else {"train"})
    path = path / split if has_splits else path
    stamp = None if path.is_dir() else path.stat().st_mtime_ns
    files = _listing(path, stamp)
    names = [file for file in files if file.lower().endswith(_SUFFIXES)]
    labels = _named_labels(path, stamp, names, "dataset.json" in files)
    titles = [f"{path}/{file}" for file in names]
    identity = "\n".join(f"{file} {files[file]}" for file in names)
    return _on_disk(
        name, split, partial(_member, path, stamp, names), titles, identity, labels, size
    )


def _listing(path: Path, stamp: int | None) -> dict[str, str]:
    """Files below a folder or in a zip, sorted, each with its length and checksum; none hidden."""
    if stamp is None:
        walk = os.walk(path, followlinks=True)
        files = [Path(folder, file) for folder, _, found in walk for file in found]
        sizes = {file.relative_to(path).as_posix(): str(file.stat().st_size) for file in files}
    else:
        try:
            entries = _archive(path, stamp, os.getpid()).infolist()
        except _UNREADABLE as error:
            raise FlowkitError(f"{path} is not a readable zip: {_line(error)}") from error
        sizes = {entry.filename: f"{entry.file_size} {entry.CRC}" for entry in entries}
    return {n: sizes[n] for n in sorted(sizes) if not any(p[0] in "._" for p in n.split("/") if p)}


@lru_cache(maxsize=8)
def _archive(path: Path, stamp: int, process: int) -> zipfile.ZipFile:
    """The zip as this process opened it: a handle inherited by a fork shares its position."""
    return zipfile.ZipFile(path)


def _member(path: Path, stamp: int | None, names: Sequence[str], index: int) -> Image.Image:
    if stamp is None:
        return Image.open(path / names[index])
    return Image.open(_archive(path, stamp, os.getpid()).open(names[index]))


def _named_labels(
    path: Path, stamp: int | None, names: Sequence[str], manifest: bool
) -> list[int] | None:
    if manifest:
        file = path / "dataset.json"
        text = (
            file.read_bytes()
            if stamp is None
            else _archive(path, stamp, os.getpid()).read(file.name)
        )
        try:
            table = json.loads(text)["labels"]
            labels = None if table is None else dict(table)
            return None if labels is None else [labels[name] for name in names]
        except (ValueError, KeyError, TypeError) as error:
            raise FlowkitError(f"{file} does not give each picture's label: {error!r}") from error
    folders = [name.rpartition("/")[0].partition("/")[0] for name in names]
    if stamp is not None or not any(folders):
        return None
    if not all(folders):
        raise FlowkitError(f"{path} holds pictures both in class folders and beside them")
    places = {folder: place for place, folder in enumerate(sorted(set(folders)))}
    return [places[folder] for folder in folders]


def _on_disk(
    name: str,
    split: str,
    opener: Callable[[int], Image.Image],
    titles: Sequence[str],
    identity: str,
    labels: Any,
    size: int | None,
) -> ImageData:
    if not titles:
        raise FlowkitError(f"data set '{name}' ({split}) holds no pictures")
    pictures = FilePictures(opener, titles, identity, size)
    return ImageData(name, split, pictures, *_classes(labels))


def _in_memory(
    name: str, split: str, levels: np.ndarray, labels: Any, size: int | None, peak: int = 255
) -> ImageData:
    pictures = _channels_first(levels)
    if size is not None and tuple(pictures.shape[-2:]) != (size, size):
        pictures, peak = _resized(pictures, size, peak), 255
    return ImageData(name, split, pictures, *_classes(labels), peak)


def _classes(labels: Any) -> tuple[Tensor | None, int | None]:
    """Labels as int64 and their number; (None, None) unless they are whole numbers from 0 up."""
    numbers = np.asarray([] if labels is None else labels)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or numbers.min() < 0:
        return None, None
    return torch.from_numpy(numbers.astype(np.int64)), int(numbers.max()) + 1


def _channels_first(levels: np.ndarray) -> Tensor:
    """uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) to (N, C, H, W)."""
    if levels.ndim == 3:
        levels = levels[..., None]
    if levels.shape[-1] in (1, 3):
        levels = levels.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(levels))


def _resized(levels: Tensor, size: int, peak: int = 255) -> Tensor:
    """Central square at (size, size): uint8 (N, C, H, W) in [0, peak] to uint8 in [0, 255]."""
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


def _require_split(name: str, split: str, splits: Iterable[str]) -> None:
    if split not in splits:
        have = ", ".join(sorted(splits))
        raise FlowkitError(f"data set '{name}' has no split '{split}'; it has {have}")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
