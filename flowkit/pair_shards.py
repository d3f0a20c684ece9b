"""The files of a pair store: shards with their records, verified, then mapped into memory."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.noise import keyed_noise
from flowkit.pair_format import PairIndex
from flowkit.storage import Folder, file_sha256

__all__ = ["INDEX", "Record", "Shards", "noise_sha256", "publish", "read_index", "shard_name"]

INDEX = "index.json"


@dataclass(frozen=True)
class Record:
    """What shard-NNNNNN.json says of its shard."""

    start: int
    stop: int
    bytes: int
    sha256: str
    noise_sha256: str | None  # of the first pair's keyed noise: tells when numpy changed its stream
    index_sha256: str


class Shards:
    """The files of a store with their records, as found on opening.

    path: a folder or URL.  cache: where copies of remote shards go.
    FlowkitError when every record was written for another index.
    """

    def __init__(self, path: str | os.PathLike[str], cache: str | os.PathLike[str] | None) -> None:
        self.folder = Folder(path)
        self.index = read_index(self.folder)
        home = cache or os.environ.get("FLOWKIT_CACHE") or "~/.cache/flowkit"
        self.cache = Path(home).expanduser() / "pairs"
        self.records: dict[int, Record] = {}
        self.unusable: dict[int, str] = {}
        names = {shard_name(shard, "json"): shard for shard in range(self.index.num_shards)}
        texts = self.folder.read(names)
        for name, text in texts.items():
            try:
                self._accept(names[name], Record(**json.loads(text)))
            except (ValueError, TypeError):
                self.unusable[names[name]] = f"{name} is not a record of this {INDEX}"
        if texts and not self.records:
            raise FlowkitError(
                f"{self.folder}: its shards were not written for its {INDEX}; restore that file, "
                "or generate the pairs in an empty folder"
            )

    def _accept(self, shard: int, record: Record) -> None:
        pairs = self.index.pairs_of(shard)
        if (record.start, record.stop) != (pairs.start, pairs.stop):
            raise ValueError("another shard's record")
        if record.index_sha256 != self.index.digest:
            raise ValueError("another store's record")
        self.records[shard] = record

    def damaged(self, verify: str) -> dict[int, str]:
        """What is wrong with each damaged shard.  verify: "hash" or "size"."""
        sizes = self.folder.sizes()

        def problem(shard: int) -> str | None:
            name, record = shard_name(shard, "safetensors"), self.records[shard]
            if sizes.get(name) != record.bytes:
                return (
                    f"{name} is truncated or altered: {sizes.get(name, 0)} of {record.bytes} bytes"
                )
            if verify == "hash":
                try:
                    copy = self.folder.local_copy(name, record.sha256, self.cache, verify=True)
                except FlowkitError as error:
                    return str(error)
                if self.folder.is_local and file_sha256(copy) != record.sha256:
                    return f"{name} is altered: its sha256 is not the recorded one"
            return None

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing frees the GIL
            problems = dict(zip(self.records, pool.map(problem, self.records), strict=True))
        return self.unusable | {shard: text for shard, text in problems.items() if text}

    def require_complete(self, verify: str) -> None:
        """FlowkitError when shards are missing or damaged."""
        count = self.index.num_shards
        if absent := sorted(set(range(count)) - self.records.keys() - self.unusable.keys()):
            raise FlowkitError(
                f"{self.folder}: {len(absent)} of {count} shards are missing, first "
                f"{shard_name(absent[0], 'safetensors')}; run the generation again to fill the gaps"
            )
        if damaged := self.damaged(verify):
            raise FlowkitError(
                f"{self.folder}: {len(damaged)} of {count} shards are damaged: "
                f"{'; '.join(list(damaged.values())[:5])}; run "
                f"python -c \"from flowkit.pairs import repair; repair('{self.folder}')\" and then "
                "the same command again, which makes them anew"
            )

    def open(self, shard: int) -> dict[str, Tensor]:
        """The tensors of a shard, mapped from its file."""
        name, record = shard_name(shard, "safetensors"), self.records[shard]
        copy = self.folder.local_copy(name, record.sha256, self.cache, verify=False)
        try:
            with safetensors.safe_open(copy, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (safetensors.SafetensorError, OSError) as error:
            raise FlowkitError(f"{self.folder}/{name} cannot be read: {error}") from error
        found = {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
        expected = {
            key: (spec.torch_dtype, (record.stop - record.start, *spec.shape))
            for key, spec in self.index.tensors().items()
        }
        if found != expected:
            raise FlowkitError(f"{self.folder}/{name} holds {found}, {INDEX} says {expected}")
        return tensors


def publish(folder: Folder, index: PairIndex, shard: int, tensors: dict[str, Tensor]) -> None:
    """Write a shard: the tensors first, the record, which makes it count, last."""
    content, pairs = safetensors.torch.save(tensors), index.pairs_of(shard)
    record = Record(
        start=pairs.start,
        stop=pairs.stop,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        noise_sha256=noise_sha256(index, pairs.start),
        index_sha256=index.digest,
    )
    folder.write(shard_name(shard, "safetensors"), content)
    folder.write(shard_name(shard, "json"), (json.dumps(asdict(record), indent=2) + "\n").encode())


def read_index(folder: Folder) -> PairIndex:
    """The index of the store in `folder`; FlowkitError when there is none."""
    found = folder.read([INDEX])
    if INDEX not in found:
        raise FlowkitError(f"no pair store at {folder}: it has no {INDEX}; generate pairs first")
    try:
        return PairIndex.from_json(found[INDEX])
    except FlowkitError as error:
        raise FlowkitError(f"{folder}/{INDEX}: {error}") from error


def noise_sha256(index: PairIndex, pair: int) -> str | None:
    """Hash of the keyed noise of one pair; None when noise is stored."""
    if index.noise != "key":
        return None
    noise = keyed_noise(index.seed, [pair], index.shape)
    return hashlib.sha256(noise.numpy().tobytes()).hexdigest()


def shard_name(shard: int, kind: str) -> str:
    """File name of a shard's tensors (kind "safetensors") or record ("json")."""
    return f"shard-{shard:06d}.{kind}"
