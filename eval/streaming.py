"""Work in chunks of fixed size that any number of processes share, and that a kill does not lose.

A chunk is a range of sample indices, computed in one batch.  Each finished one is a file, written
under a temporary name and renamed:

    hashes     (n, 32) uint8     sha256 of each picture's levels
    features   (n, d) float32    and whatever else the extractor's pass gave: logits, spatial
    pictures   (k, C, H, W)      uint8, of the first samples, for the grid

Results are read off the files in the order of their indices, so they do not know how many processes
wrote them, in which order, or after how many restarts.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from flowkit.errors import FlowkitError
from flowkit.eval.frechet import FrechetMoments
from flowkit.eval.picture_rules import pictures_sha256
from flowkit.files import atomic_file

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Chunks", "FeatureSet", "chunk_ranges", "share"]


ABANDONED = 24 * 3600  # seconds after which nobody works on what a launch has taken


def chunk_ranges(start: int, end: int, size: int) -> list[range]:
    """[start, end) in ranges of `size`, the last perhaps shorter."""
    return [range(first, min(first + size, end)) for first in range(start, end, size)]


@dataclass(frozen=True)
class Chunks:
    """A folder of finished chunks of one kind.  parts: the tensors that each must hold."""

    folder: Path
    parts: frozenset[str]

    def path(self, indices: range) -> Path:
        """The file of a chunk."""
        return self.folder / f"chunk-{indices.start:09d}-{indices.stop:09d}.safetensors"

    def done(self, indices: range) -> bool:
        """Whether a chunk is there, with all parts; FlowkitError when its file is damaged."""
        if not self.path(indices).is_file():
            return False
        with self._opened(indices) as chunk:
            return self.parts <= set(chunk.keys())

    def write(self, indices: range, tensors: Mapping[str, Tensor], info: dict[str, Any]) -> None:
        """Publish a chunk.  info: JSON-able."""
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with atomic_file(self.path(indices)) as temporary:
            temporary.write_bytes(save(whole, {"info": json.dumps(info)}))

    def read(self, indices: range, part: str) -> Tensor:
        """One part of a chunk; FlowkitError when it is missing, damaged or not of that length."""
        with self._opened(indices) as chunk:
            rows = chunk.get_tensor(part)
        if part != "pictures" and len(rows) != len(indices):
            raise FlowkitError(f"{self.path(indices)} has {len(rows)} rows, expected its range's")
        return rows

    def info(self, indices: range) -> dict[str, Any]:
        """What was recorded with a chunk."""
        with self._opened(indices) as chunk:
            return json.loads(chunk.metadata()["info"])

    def _opened(self, indices: range) -> _Opened:
        return _Opened(self.path(indices))


class _Opened:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        try:
            self.file = safe_open(self.path, framework="pt").__enter__()
        except (SafetensorError, OSError) as error:
            raise FlowkitError(
                f"{self.path} is missing or damaged ({error}); delete it and run again"
            ) from None
        return self.file

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)


def share(
    ranges: Sequence[range],
    done: Callable[[range], bool],
    compute: Callable[[range], None],
    *,
    folder: Path,
    accelerator: Accelerator,
    title: str,
    progress: bool = True,
) -> None:
    """Compute every range that is not done, each in the process that is free for it.

    A process takes a range by making an empty file in a folder of this launch, so that a slow one
    holds up nobody; what a killed launch had taken is free again.  Returns when all are done.
    """
    from accelerate.utils import broadcast_object_list, gather_object

    [launch] = broadcast_object_list([uuid.uuid4().hex])
    claims = folder / f".claims-{launch}"
    if accelerator.is_main_process:
        _forget(folder)
        claims.mkdir(parents=True)
    accelerator.wait_for_everyone()
    missing = [indices for indices in ranges if not done(indices)]
    total = sum(map(len, missing))
    off = not (progress and accelerator.is_main_process and missing)
    error: FlowkitError | None = None
    with tqdm(total=total, desc=title, unit="pictures", disable=off) as bar:
        try:
            for indices in missing:
                if (claims / "failed").exists():
                    break
                if _claim(claims / str(indices.start)):
                    compute(indices)
                    taken = sum(1 for _ in os.scandir(claims)) * len(missing[0])
                    bar.update(min(taken, total) - bar.n)
        except FlowkitError as caught:  # the others must hear of it, not wait
            error = caught
            _claim(claims / "failed")
    told = [text for text in gather_object([None if error is None else str(error)]) if text]
    if accelerator.is_main_process:
        shutil.rmtree(claims, ignore_errors=True)
    if told:
        raise error or FlowkitError(told[0])


def _forget(folder: Path) -> None:
    """Remove what killed launches had taken, but not from one that may be running here as well.

    Two that run at once may compute a chunk twice, which publishing by rename makes harmless.
    """
    for old in folder.glob(".claims-*"):
        with suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > ABANDONED:
                shutil.rmtree(old, ignore_errors=True)


def _claim(path: Path) -> bool:
    """Whether this process is the first to ask; atomic, on network file systems too."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


@dataclass
class FeatureSet:
    """Features of a set of pictures, read from finished chunks in the order of their indices.

    ranges: the chunks, which must follow on each other.  FlowkitError: gaps or overlaps.
    """

    chunks: Chunks
    ranges: list[range]
    _cached: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for before, after in zip(self.ranges, self.ranges[1:], strict=False):
            if before.stop != after.start:
                raise FlowkitError(f"chunks {before} and {after} leave a gap or overlap")
        for indices in self.ranges:
            if not self.chunks.done(indices):
                raise FlowkitError(f"{self.chunks.path(indices)} is missing; run the command again")

    def __len__(self) -> int:
        return self.ranges[-1].stop - self.ranges[0].start

    def rows(self, part: str = "features") -> Tensor:
        """(N, d) float32 of all pictures."""
        if part not in self._cached:
            self._cached[part] = torch.cat([self.chunks.read(r, part) for r in self.ranges])
        return self._cached[part]

    def groups(self, count: int, part: str = "features") -> Iterator[FrechetMoments]:
        """The moments of `count` runs of chunks of nearly one length, fewer if there are fewer."""
        for group in np.array_split(np.arange(len(self.ranges)), min(count, len(self.ranges))):
            moments = FrechetMoments()
            for place in group:
                chunk = FrechetMoments()
                chunk.update(self.chunks.read(self.ranges[place], part))
                moments.merge(chunk)
            yield moments

    def moments(self, part: str = "features") -> FrechetMoments:
        """Of all pictures."""
        moments = FrechetMoments()
        for group in self.groups(len(self.ranges), part):
            moments.merge(group)
        return moments

    def sha256(self) -> str:
        """Over the hashes of all pictures, so that it does not depend on the chunks' size."""
        return pictures_sha256(torch.cat([self.chunks.read(r, "hashes") for r in self.ranges]))

    def infos(self) -> list[dict[str, Any]]:
        """What was recorded with each chunk."""
        return [self.chunks.info(indices) for indices in self.ranges]

    def pictures(self) -> Tensor | None:
        """uint8 (k, C, H, W), the first pictures, as far as chunks keep them."""
        kept: list[Tensor] = []
        for indices in self.ranges:
            try:
                kept.append(self.chunks.read(indices, "pictures"))
            except SafetensorError:
                break
        return torch.cat(kept) if kept else None
