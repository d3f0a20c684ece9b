"""What a pair store holds: its index, how data is coded, and what its noise must look like.

pictures in [-1, 1] as uint8:  q = round(127.5 x + 127.5)      x = q / 127.5 - 1
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from flowkit.errors import FlowkitError

__all__ = ["CONVENTION", "PairIndex", "TensorSpec", "check_noise", "decode", "encode"]

CONVENTION = 1  # x_t = (1 - t) * noise + t * data; t: 0 (noise) -> 1 (data)

_DATA_DTYPES = ("float32", "float16", "uint8")
_COND_DTYPES = (
    *("float32", "float16", "bfloat16", "float64"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)


@dataclass(frozen=True)
class TensorSpec:
    """Dtype (a torch name such as "int64") and per-pair shape of one conditioning tensor."""

    dtype: str
    shape: tuple[int, ...] = ()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        return getattr(torch, self.dtype)


@dataclass(frozen=True, kw_only=True)
class PairIndex:
    """The immutable description of a pair store: with the teacher, it fixes every byte.

    shape: of one picture, latent or point, without the batch.  seed: in [0, 2**64).
    shard_size: pairs in one file.  chunk_size: pairs the teacher computes at once; the last chunk
    of a shard and the last shard may be shorter.
    noise: "key", regenerated as keyed_noise(seed, index, shape), or "tensor", stored as float32.
    dtype: how data is stored, "float32", "float16", or "uint8" (pictures in [-1, 1] alone).
    cond: the conditioning tensors by name.  source: what made the pairs (model, weights' hash,
    solver, NFE, times, ...), any JSON object.
    FlowkitError when a value is out of range.
    """

    shape: tuple[int, ...]
    num_pairs: int
    seed: int = 0
    shard_size: int = 4096
    chunk_size: int = 256
    noise: str = "key"
    dtype: str = "float32"
    cond: Mapping[str, TensorSpec] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    convention: int = CONVENTION

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "cond", dict(self.cond))
        object.__setattr__(self, "source", _json_object(self.source))
        _require(_is_shape(self.shape) and self.shape, "shape", self.shape, "positive integers")
        _require(_is_count(self.num_pairs), "num_pairs", self.num_pairs, "a positive integer")
        good = isinstance(self.seed, int) and 0 <= self.seed < 2**64
        _require(good, "seed", self.seed, "an integer in [0, 2**64)")
        _require(_is_count(self.shard_size), "shard_size", self.shard_size, "a positive integer")
        good = _is_count(self.chunk_size) and self.chunk_size <= self.shard_size
        _require(good, "chunk_size", self.chunk_size, f"in [1, shard_size = {self.shard_size}]")
        _require(self.noise in ("key", "tensor"), "noise", self.noise, "'key' or 'tensor'")
        _require(self.dtype in _DATA_DTYPES, "dtype", self.dtype, f"one of {_DATA_DTYPES}")
        for name, spec in self.cond.items():
            _require(name not in ("data", "noise"), "cond", name, "a name other than data, noise")
            _require(spec.dtype in _COND_DTYPES, f"cond.{name}", spec.dtype, f"in {_COND_DTYPES}")
            _require(_is_shape(spec.shape), f"cond.{name}", spec.shape, "a shape")
        _require_convention(self.convention)

    @property
    def num_shards(self) -> int:
        """Files that hold the pairs."""
        return math.ceil(self.num_pairs / self.shard_size)

    def pairs_of(self, shard: int) -> range:
        """Global indices of a shard's pairs; FlowkitError when there is no such shard."""
        if not 0 <= shard < self.num_shards:
            raise FlowkitError(f"shard must lie in [0, {self.num_shards}), got {shard}")
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.num_pairs))

    def tensors(self) -> dict[str, TensorSpec]:
        """What a shard's file holds for one pair, by name."""
        held = {"data": TensorSpec(self.dtype, self.shape)}
        if self.noise == "tensor":
            held["noise"] = TensorSpec("float32", self.shape)
        return held | dict(self.cond)

    def to_json(self) -> str:
        """The text of index.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> PairIndex:
        """The index whose `to_json` is `text`; FlowkitError when it is not one."""
        try:
            values = json.loads(text)
            _require_convention(values["convention"])
            cond = {
                name: TensorSpec(spec["dtype"], tuple(spec["shape"]))
                for name, spec in values.pop("cond").items()
            }
            return cls(**values, cond=cond)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, FlowkitError):
                raise
            raise FlowkitError(f"not the index of a pair store: {error}") from error

    @property
    def digest(self) -> str:
        """sha256 of `to_json()`: ties every shard to its index."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def first_difference(self, other: PairIndex) -> str | None:
        """Name and both values of the first field that differs ("seed: 7 != 8"), or None."""
        mine, theirs = json.loads(self.to_json()), json.loads(other.to_json())
        for name in (f.name for f in fields(self) if f.name != "source"):
            if mine[name] != theirs[name]:
                return f"{name}: {mine[name]} != {theirs[name]}"
        for key in sorted(mine["source"].keys() | theirs["source"].keys()):
            a, b = mine["source"].get(key), theirs["source"].get(key)
            if a != b:
                return f"source.{key}: {a} != {b}"
        return None


def encode(data: Tensor, dtype: str) -> Tensor:
    """Data as it is stored.  data: (B, *), floating.  FlowkitError when uint8 would clip it badly.

    uint8 clips to [-1, 1]: overshoot of a solver is fine, an RMS excess over 0.25 (latents of unit
    variance have 0.39) is not.
    """
    if dtype != "uint8":
        return data.to(getattr(torch, dtype))
    data = data.float()
    clipped = data.clamp(-1, 1)
    if (data - clipped).square().mean() > 0.25**2:
        low, high = data.min().item(), data.max().item()
        raise FlowkitError(
            f"dtype uint8 holds pictures in [-1, 1], got values in [{low:.3g}, {high:.3g}]; "
            "use float16 or float32"
        )
    return (clipped * 127.5 + 127.5).round().to(torch.uint8)


def decode(stored: Tensor) -> Tensor:
    """Stored data as float32: (B, *)."""
    return stored.float() / 127.5 - 1 if stored.dtype == torch.uint8 else stored.float()


def check_noise(noise: Tensor, data: Tensor, *, exact: bool) -> None:
    """FlowkitError unless `noise` looks like white noise; says so when `data` does instead.

    noise, data: (B, *), floating.  exact: drawn noise, so only chance may move mean, variance and
    correlation of neighbours; otherwise noise from inverting real data, held to 0.25, 0.5, 0.5.
    """
    if (problem := _not_noise(noise, exact)) is None:
        return
    if _not_noise(data, exact=True) is None:
        raise FlowkitError(
            f"noise and data are swapped: 'noise' has {problem} and 'data' is white noise; "
            "in flowkit noise is at t = 0, data at t = 1"
        )
    raise FlowkitError(
        f"'noise' is not standard normal: {problem}; expected mean 0, variance 1, no correlation"
    )


def _not_noise(x: Tensor, exact: bool) -> str | None:
    """Moments of x (B, *) when they are not those of white noise, else None.

    A chi-square mean of n squares leaves 1 +- (2 sqrt(a / n) + 2 a / n) with probability under
    2 exp(-a) (Laurent & Massart, 2000, lemma 1); a = 16 gives 2e-7, and the same bound is ample
    for the mean and for products of neighbours.
    """
    x = x.double()
    n = x.numel()
    slack = 2 * math.sqrt(16 / n) + 2 * 16 / n
    mean, variance = x.mean().item(), x.square().mean().item() - x.mean().item() ** 2
    centred = x - mean
    products = centred[..., 1:] * centred[..., :-1]
    neighbours = products.mean().item() / max(variance, 1e-12) if products.numel() else 0.0
    bounds = (0.0, 0.0, 0.0) if exact else (0.25, 0.5, 0.5)
    errors = (abs(mean), abs(variance - 1), abs(neighbours))
    if all(error <= bound + slack for error, bound in zip(errors, bounds, strict=True)):
        return None
    return f"mean {mean:.3g}, variance {variance:.3g}, correlation {neighbours:.3g}"


def _require(good: object, name: str, value: object, expected: str) -> None:
    if not good:
        raise FlowkitError(f"pair store: {name} must be {expected}, got {value!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_shape(shape: object) -> bool:
    return isinstance(shape, tuple) and all(_is_count(size) for size in shape)


def _require_convention(version: object) -> None:
    meaning = f"{CONVENTION} (x_t = (1 - t) noise + t data); generate the pairs again"
    _require(version == CONVENTION, "convention", version, meaning)


def _json_object(value: object) -> dict[str, Any]:
    """As it will read back, with tuples as lists."""
    try:
        plain = json.loads(json.dumps(dict(value), allow_nan=False))  # type: ignore[call-overload]
    except (TypeError, ValueError) as error:
        raise FlowkitError(f"pair store: source must be a JSON object: {error}") from error
    return plain
