"""Pictures by name, as float32 (B, C, H, W) in [-1, 1] with their class labels.

data = 2 * level / peak - 1        peak: 255, or 16 for scikit-learn's digits
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.pictures import UNREADABLE, FilePictures, channels_first, one_line, resized
from flowkit.registry import look_up

__all__ = ["ImageData", "data_folder", "load_data"]

_PACKS = {
    "cifar10-jpeg": {"train": "cifar10_train_jpeg.npz", "test": "cifar10_test_jpeg.npz"},
    "mnist": {"train": "mnist_train.npz", "test": "mnist_test.npz"},
}
_TORCHVISION = ["cifar10", "cifar100", "fashionmnist", "svhn", "stl10", "celeba", "imagenet"]
_SPLITS = {"train", "test", "val", "validation"}
_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


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
        on = self.pictures.device if isinstance(self.pictures, Tensor) else "cpu"
        rows = torch.as_tensor(indices, dtype=torch.int64, device=on)
        found = {"data": self.pictures[rows].float().div_(self.peak / 2).sub_(1)}
        return found if self.labels is None else {**found, "class_labels": self.labels[rows]}

    def to(self, device: torch.device | str) -> ImageData:
        """The same pictures in a device's memory, as uint8; FlowkitError for files."""
        if not isinstance(self.pictures, Tensor):
            raise FlowkitError(
                f"{self.name} is decoded from files, not held on a device; set data_on_device=false"
            )
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, pictures=self.pictures.to(device), labels=labels)

    def fingerprint(self) -> str:
        """sha256 of shape, levels and labels; files count by name, length and zip checksum."""
        digest = hashlib.sha256(f"{tuple(self.pictures.shape)}/{self.peak}".encode())
        for part in (self.pictures, self.labels):
            if isinstance(part, Tensor):
                digest.update(part.contiguous().numpy().data)
            elif part is not None:
                digest.update(part.identity.encode())
        return digest.hexdigest()


def data_folder(root: str | os.PathLike[str] | None = None) -> Path:
    """Where data sets lie: `root`, else $FLOWKIT_DATA, else ../shared/data beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(root or os.environ.get("FLOWKIT_DATA") or beside).expanduser()


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
    names = ["digits", *_PACKS, *_TORCHVISION]
    near = "".join(f", did you mean '{n}'?" for n in get_close_matches(name.lower(), names, n=1))
    known = ", ".join([*names, "torchvision:NAME", "hf:NAME", "paths of folders and zips"])
    raise FlowkitError(f"unknown data set '{name}'{near}; known: {known}")


def _digits(split: str, size: int | None) -> ImageData:
    from sklearn.datasets import load_digits

    part = look_up("digits split", split, {"train": slice(1297), "test": slice(1297, None)})
    bunch = load_digits()
    rows = torch.randperm(1797, generator=torch.Generator().manual_seed(0))[part].numpy()
    levels = bunch.images[rows].astype(np.uint8)
    return _in_memory("digits", split, levels, bunch.target[rows], size, peak=16)


def _pack(name: str, split: str, folder: Path, size: int | None) -> ImageData:
    path = folder / look_up(f"{name} split", split, _PACKS[name])
    if not path.is_file():
        raise FlowkitError(
            f"data set '{name}' ({split}): no {path}; set FLOWKIT_DATA or data.root, "
            "or take torchvision:NAME"
        )
    try:
        with np.load(path) as pack:
            levels = pack["images"] if "images" in pack else _jpeg_levels(pack)
            return _in_memory(name, split, levels, pack["labels"], size)
    except UNREADABLE as error:
        raise FlowkitError(f"{path} is not a whole '{name}' pack: {one_line(error)}") from error


def _jpeg_levels(pack: Any) -> np.ndarray:
    """uint8 (N, H, W, 3) of JPEG scans that share one header: header + scan + end mark."""
    header, scans = pack["header"].tobytes(), pack["scans"].tobytes()
    pictures, start = [], 0
    for end in np.cumsum(pack["lengths"], dtype=np.int64).tolist():
        jpeg = io.BytesIO(header + scans[start:end] + b"\xff\xd9")
        pictures.append(np.asarray(Image.open(jpeg)))
        start = end
    return np.stack(pictures)


def _torchvision(name: str, split: str, root: Path, size: int | None, download: bool) -> ImageData:
    from torchvision import datasets

    classes = {known.lower(): known for known in datasets.__all__ if known[0].isupper()}
    make = getattr(datasets, look_up("torchvision data set", name.lower(), classes))
    title = f"torchvision:{make.__name__}"
    options: dict[str, Any] = {"download": True} if download else {}
    if "train" in inspect.signature(make).parameters:
        options["train"] = look_up(f"{title} split", split, {"train": True, "test": False})
    else:
        options["split"] = split
    try:
        dataset = make(root, **options)
    except (RuntimeError, OSError, ValueError, TypeError, ImportError) as error:
        below = f"{make.__name__}/raw" if issubclass(make, datasets.MNIST) else ""
        raise FlowkitError(
            f"{title} ({split}) cannot be read: {one_line(error)}; its files belong in "
            f"{root / getattr(make, 'base_folder', below)}, where data.download=true "
            "lets torchvision fetch them"
        ) from error
    keys = ("targets", "labels", "_labels")  # torchvision has no one name for them
    labels = next((getattr(dataset, key) for key in keys if hasattr(dataset, key)), None)
    if isinstance(getattr(dataset, "data", None), (np.ndarray, Tensor)):
        return _in_memory(title, split, np.asarray(dataset.data), labels, size)
    source = f"{title} ({split})"
    files = FilePictures(partial(_item, dataset), source, range(len(dataset)), source, size)
    return ImageData(title, split, files, *_classes(labels))


def _item(dataset: Any, index: int) -> Image.Image:
    return dataset[index][0]


def _hub(name: str, split: str, size: int | None) -> ImageData:
    title = f"hf:{name}"
    try:
        import datasets
    except ImportError as error:
        raise FlowkitError(f"{title} needs `pip install datasets`") from error
    path = Path(name).expanduser()
    saved = any((path / file).is_file() for file in ("dataset_dict.json", "state.json"))
    try:
        table = datasets.load_from_disk(path) if saved else datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise FlowkitError(f"{title} cannot be loaded: {one_line(error)}") from error
    splits = table if isinstance(table, dict) else {str(table.split or "train"): table}
    table = look_up(f"{title} split", split, splits)
    kinds = table.features
    column = next((key for key, kind in kinds.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise FlowkitError(f"{title} has no column of pictures, only {', '.join(kinds)}")
    key = next((k for k, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)), "label")
    labels = table[key][:] if key in kinds else None
    opener = partial(_record, table.cast_column(column, datasets.Image(decode=False)), column)
    source = f"{title} ({split})"
    files = FilePictures(opener, source, range(len(table)), table._fingerprint, size)
    return ImageData(title, split, files, *_classes(labels))


def _record(table: Any, column: str, index: int) -> Image.Image:
    record = table[index][column]
    return Image.open(record["path"] if record["bytes"] is None else io.BytesIO(record["bytes"]))


def _folder_or_zip(name: str, path: Path, split: str, size: int | None) -> ImageData:
    below = {entry.name for entry in path.iterdir() if entry.is_dir()} if path.is_dir() else set()
    parts = {part: path / part for part in sorted(below)} if below <= _SPLITS else {}
    path = look_up(f"{name} split", split, parts or {"train": path})
    stamp = None if path.is_dir() else path.stat().st_mtime_ns
    files = _listing(path, stamp)
    names = [file for file in files if file.lower().endswith(_SUFFIXES)]
    labels = _labels(path, stamp, names, "dataset.json" in files)
    identity = "\n".join(f"{file} {files[file]}" for file in names)
    pictures = FilePictures(partial(_member, path, stamp), str(path), names, identity, size)
    return ImageData(name, split, pictures, *_classes(labels))


def _listing(path: Path, stamp: int | None) -> dict[str, str]:
    """Files below a folder or in a zip, sorted, each with its length and checksum; none hidden."""
    if stamp is None:
        walk = os.walk(path, followlinks=True)
        files = [Path(folder, file) for folder, _, found in walk for file in found]
        sizes = {file.relative_to(path).as_posix(): str(file.stat().st_size) for file in files}
    else:
        try:
            entries = _archive(path, stamp, os.getpid()).infolist()
        except UNREADABLE as error:
            raise FlowkitError(f"{path} is not a readable zip: {one_line(error)}") from error
        sizes = {entry.filename: f"{entry.file_size} {entry.CRC}" for entry in entries}
    return {n: sizes[n] for n in sorted(sizes) if not any(p[0] in "._" for p in n.split("/") if p)}


@lru_cache(maxsize=8)
def _archive(path: Path, stamp: int, process: int) -> zipfile.ZipFile:
    """The zip as this process opened it: a handle inherited by a fork shares its position."""
    return zipfile.ZipFile(path)


def _member(path: Path, stamp: int | None, name: str) -> Image.Image:
    if stamp is None:
        return Image.open(path / name)
    return Image.open(_archive(path, stamp, os.getpid()).open(name))


def _labels(path: Path, stamp: int | None, names: list[str], manifest: bool) -> list[int] | None:
    if manifest:
        file = path / "dataset.json"
        try:
            archive = None if stamp is None else _archive(path, stamp, os.getpid())
            text = archive.read(file.name) if archive else file.read_bytes()
            labels = dict(json.loads(text)["labels"] or {})
            return [labels[name] for name in names] if labels else None
        except (*UNREADABLE, TypeError) as error:
            raise FlowkitError(f"{file} does not give each picture's label: {error!r}") from error
    folders = [name.rpartition("/")[0].partition("/")[0] for name in names]
    if stamp is not None or not any(folders):
        return None
    if not all(folders):
        raise FlowkitError(f"{path} holds pictures both in class folders and beside them")
    places = {folder: place for place, folder in enumerate(sorted(set(folders)))}
    return [places[folder] for folder in folders]


def _in_memory(
    name: str, split: str, levels: np.ndarray, labels: Any, size: int | None, peak: int = 255
) -> ImageData:
    pictures = channels_first(levels)
    if size is not None and tuple(pictures.shape[-2:]) != (size, size):
        pictures, peak = resized(pictures, size, peak), 255
    return ImageData(name, split, pictures, *_classes(labels), peak)


def _classes(labels: Any) -> tuple[Tensor | None, int | None]:
    """Labels as int64 and their number; (None, None) unless they are whole numbers from 0 up."""
    numbers = np.asarray([] if labels is None else labels)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or numbers.min() < 0:
        return None, None
    return torch.from_numpy(numbers.astype(np.int64)), int(numbers.max()) + 1
