"""The reflow pair store: (noise, data) pairs in safetensors shards beside an immutable index.

    index.json                  PairIndex: shape, count, seed, chunking, dtypes, what made the pairs
    shard-000000.safetensors    "data", "noise" unless it is keyed, and conditioning, a row a pair
    shard-000000.json           its hash and range; written last: the shard is done iff it exists

A shard is a function of the index and its number, computed in chunks of a fixed size, so any
number of processes write the same bytes, and nothing but missing shards is left after a kill:

    create(path, index)
    for shard in missing_shards(path, rank=rank, world=world):
        write_shard(path, shard, compute)
    pairs = PairStore(path).fetch([0, 5, 2])
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.noise import keyed_noise
from flowkit.pair_format import PairIndex, TensorSpec, check_noise, decode, encode
from flowkit.pair_shards import INDEX, Shards, noise_sha256, publish, read_index, shard_name
from flowkit.storage import Folder

__all__ = [
    "Compute",
    "PairIndex",
    "PairStore",
    "TensorSpec",
    "create",
    "missing_shards",
    "repair",
    "write_shard",
]

Compute = Callable[[range, Tensor | None], Mapping[str, Tensor]]
"""compute(indices, noise) -> {"data": (n, *shape), ["noise": (n, *shape),] **cond}.

One chunk: n global pair indices and their noise (n, *shape), float32 on the CPU, or None when
the index says that noise is a tensor, which compute then returns.  What it returns may lie on any
device; data is floating, or already of the stored dtype.
"""

_NOISE_SAMPLE = 256  # pairs on which noise is checked


def create(path: str | os.PathLike[str], index: PairIndex) -> None:
    """Start a store, or accept the one that is there; safe in several processes at once.

    FlowkitError when the store there has another index; its first different field is named.
    """
    folder = Folder(path)
    folder.remove_stale()
    folder.write_new(INDEX, index.to_json().encode())
    if difference := read_index(folder).first_difference(index):
        raise FlowkitError(
            f"{folder} is a pair store made with another {difference} (there != asked for); "
            "choose another folder or the settings it was made with"
        )


def missing_shards(path: str | os.PathLike[str], *, rank: int = 0, world: int = 1) -> list[int]:
    """Shards still to be written by process `rank` of `world`: those with shard % world == rank."""
    if not 0 <= rank < world:
        raise FlowkitError(f"rank must lie in [0, world), got rank {rank} of world {world}")
    folder = Folder(path)
    index, found = read_index(folder), folder.sizes()
    shards = range(rank, index.num_shards, world)
    return [shard for shard in shards if shard_name(shard, "json") not in found]


def write_shard(path: str | os.PathLike[str], shard: int, compute: Compute) -> None:
    """Compute a shard chunk by chunk and publish it: the tensors first, the record last.

    FlowkitError when compute returns other names, shapes or dtypes than the index says, values
    that are not finite, or noise that is not noise; nothing is written then.
    """
    folder = Folder(path)
    index = read_index(folder)
    pairs = index.pairs_of(shard)
    starts = range(pairs.start, pairs.stop, index.chunk_size)
    chunks = [
        _chunk(index, range(start, min(start + index.chunk_size, pairs.stop)), compute)
        for start in starts
    ]
    tensors = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    publish(folder, index, shard, tensors)


def repair(
    path: str | os.PathLike[str], *, cache: str | os.PathLike[str] | None = None
) -> list[int]:
    """Remove truncated and altered shards, so that generation makes them again; returns them."""
    shards = Shards(path, cache)
    damaged = shards.damaged("hash")
    for shard in damaged:
        shards.folder.remove(shard_name(shard, "json"))
        shards.folder.remove(shard_name(shard, "safetensors"))
    return sorted(damaged)


class PairStore:
    """Reader of a complete store: len(), shape, index and fetch(indices).

    path: a folder or an fsspec URL.  Files of a remote store are copied to `cache` (default
    $FLOWKIT_CACHE, else ~/.cache/flowkit) and checked against their hash as they arrive.
    verify: "hash" reads every byte once on opening; "size" compares sizes alone, for further
    processes that open what one has verified, and copies remote files when first needed.
    shape: what the caller expects.  FlowkitError when shards are missing, truncated or altered,
    when shape or convention are others, when noise is not noise, or data and noise are swapped.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        verify: Literal["hash", "size"] = "hash",
        shape: Sequence[int] | None = None,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        if verify not in ("hash", "size"):
            raise FlowkitError(f"verify must be 'hash' or 'size', got {verify!r}")
        self._shards = shards = Shards(path, cache)
        self._open: dict[int, dict[str, Tensor]] = {}  # memory maps
        self._memory: dict[str, Tensor] = {}
        self.index, self.shape = shards.index, shards.index.shape
        if shape is not None and tuple(shape) != self.shape:
            raise FlowkitError(
                f"{shards.folder} holds pairs of shape {self.shape}, expected {tuple(shape)}; "
                "generate pairs for this model in another folder"
            )
        shards.require_complete(verify)
        self._check_noise(range(len(self) if verify == "hash" else len(shards.index.pairs_of(0))))

    def __len__(self) -> int:
        return self.index.num_pairs

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # another process maps the files itself

    @property
    def nbytes(self) -> int:
        """Bytes of memory that `preload` takes."""
        held = {"noise": TensorSpec("float32", self.shape)} | self.index.tensors()
        sizes = (spec.torch_dtype.itemsize * math.prod(spec.shape) for spec in held.values())
        return len(self) * sum(sizes)

    def preload(self, device: torch.device | str = "cpu") -> PairStore:
        """Hold all pairs in a device's memory, noise included: fetch then only copies rows, there.
        Returns self."""
        parts = [self._tensors(shard) for shard in range(self.index.num_shards)]
        memory = {name: torch.cat([part[name] for part in parts]) for name in self.index.tensors()}
        if self.index.noise == "key":
            memory["noise"] = keyed_noise(self.index.seed, range(len(self)), self.shape)
        self._memory = {name: tensor.to(device) for name, tensor in memory.items()}
        self._open = {}
        return self

    def fetch(self, indices: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """Rows of the store, in the order asked for.

        indices: n integers in [0, len).  Returns "noise" and "data": (n, *shape), float32, and the
        conditioning (n, *its shape) in its own dtype, all on the CPU unless preloaded elsewhere.
        """
        rows = torch.as_tensor(indices, dtype=torch.int64).reshape(-1)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            low, high = int(rows.min()), int(rows.max())
            raise IndexError(f"pairs are numbered 0..{len(self) - 1}, got {low}..{high}")
        if self._memory:
            rows = rows.to(self._memory["noise"].device)
            found = {name: tensor[rows] for name, tensor in self._memory.items()}
        else:
            found = self._gather(rows)
        found["data"] = decode(found["data"])
        return found

    def _gather(self, rows: Tensor) -> dict[str, Tensor]:
        found = {
            name: torch.empty((len(rows), *spec.shape), dtype=spec.torch_dtype)
            for name, spec in self.index.tensors().items()
        }
        shards = rows // self.index.shard_size
        for shard in shards.unique().tolist():
            places = (shards == shard).nonzero().squeeze(1)
            offsets = rows[places] - shard * self.index.shard_size
            for name, tensor in self._tensors(shard).items():
                found[name][places] = tensor[offsets]
        if self.index.noise == "key":
            found["noise"] = keyed_noise(self.index.seed, rows.tolist(), self.shape)
        return found

    def _tensors(self, shard: int) -> dict[str, Tensor]:
        """The memory-mapped tensors of a shard."""
        if shard not in self._open:
            self._open[shard] = self._shards.open(shard)
        return self._open[shard]

    def _check_noise(self, pairs: range) -> None:
        index, folder = self.index, self._shards.folder
        if self._shards.records[0].noise_sha256 != noise_sha256(index, 0):
            raise FlowkitError(
                f"{folder}: this numpy draws other noise for the same key than the one that made "
                "the pairs; install that version or generate the pairs again"
            )
        exact = index.noise == "key"
        parts = [pairs] if exact else [index.pairs_of(s) for s in range(index.num_shards)]
        for part in (part for part in parts if part.start < pairs.stop):
            some = self.fetch(part[:: max(1, len(part) // _NOISE_SAMPLE)])
            try:
                check_noise(some["noise"], some["data"], exact=exact)
            except FlowkitError as error:
                name = shard_name(part.start // index.shard_size, "safetensors")
                raise FlowkitError(f"{folder}/{name}: {error}") from error


def _chunk(index: PairIndex, pairs: range, compute: Compute) -> dict[str, Tensor]:
    """The tensors of one chunk as they are stored, checked against the index."""
    noise = keyed_noise(index.seed, pairs, index.shape) if index.noise == "key" else None
    made, specs = dict(compute(pairs, noise)), index.tensors()
    try:
        if made.keys() != specs.keys():
            raise FlowkitError(f"expected tensors {sorted(specs)}, got {sorted(made)}")
        stored = {name: _stored(name, made[name], spec, len(pairs)) for name, spec in specs.items()}
        if noise is None:
            check_noise(stored["noise"], decode(stored["data"]), exact=False)
    except FlowkitError as error:
        raise FlowkitError(f"pairs {pairs.start}..{pairs.stop - 1}: {error}") from error
    return stored


def _stored(name: str, tensor: Tensor, spec: TensorSpec, count: int) -> Tensor:
    tensor, dtype = tensor.detach().cpu(), spec.torch_dtype
    if tensor.shape != (count, *spec.shape):
        raise FlowkitError(f"{name} has shape {tuple(tensor.shape)}, not {(count, *spec.shape)}")
    if not tensor.isfinite().all():
        raise FlowkitError(f"{name} has values that are not finite; check the teacher in float32")
    if name == "data" and tensor.is_floating_point():
        stored = encode(tensor, spec.dtype)
    elif tensor.dtype == dtype or (tensor.is_floating_point() and dtype.is_floating_point):
        stored = tensor.to(dtype)
    else:
        raise FlowkitError(f"{name} is {tensor.dtype}, the index says {spec.dtype}")
    if not stored.isfinite().all():
        raise FlowkitError(f"{name} overflows {spec.dtype}; store it as float32")
    return stored.contiguous()
