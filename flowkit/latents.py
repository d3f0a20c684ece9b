"""Pictures as latents of a VAE, encoded once and kept with their statistics.

z = scale * (latent - mean) / std        mean, std: per channel, over all pictures and positions
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from flowkit.data import ImageData
from flowkit.errors import FlowkitError
from flowkit.files import atomic_folder, read_json, write_json
from flowkit.noise import keyed_noise

__all__ = [
    "LatentData",
    "Latents",
    "decode_latents",
    "encode_latents",
    "load_vae",
    "vae_identity",
]

CONVENTION = 1  # of the stored files; raised when their meaning changes
_RECORD = "latents.json"
_SHARD = 8192  # pictures a file, which bounds the memory that encoding needs


@dataclass(frozen=True)
class Latents:
    """Statistics that carry latents to what a flow sees and back; `asdict` of it is JSON.

    mean, std: per channel.  scale: standard deviation of the normalised latents.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))  # JSON has lists
        object.__setattr__(self, "std", tuple(self.std))
        if len(self.mean) != len(self.std) or not all(s > 0 for s in (*self.std, self.scale)):
            raise FlowkitError(
                f"latent statistics need as many stds as means ({len(self.mean)}), all above 0, "
                f"and a scale above 0; got std={self.std}, scale={self.scale}"
            )

    def normalise(self, latents: Tensor) -> Tensor:
        """(B, C, *) as the VAE makes them to mean 0 and standard deviation `scale`."""
        mean, std = self._like(latents)
        return (latents - mean) / std * self.scale

    def denormalise(self, normalised: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        mean, std = self._like(normalised)
        return normalised / self.scale * std + mean

    def _like(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        if latents.shape[1] != len(self.mean):
            raise FlowkitError(
                f"latents have {latents.shape[1]} channels, their statistics {len(self.mean)}"
            )
        shape = (-1, *(1,) * (latents.ndim - 2))
        mean, std = latents.new_tensor(self.mean), latents.new_tensor(self.std)
        return mean.view(shape), std.view(shape)


class LatentData:
    """A folder of latents, with ImageData's interface; `fetch` gives normalised latents.

    path: written by `encode_latents`.  scale: see `Latents`.  The files are mapped into memory,
    each in the process that reads it.  A mirrored latent is not the latent of the mirrored
    picture: couplings of latents are made without flips.
    """

    def __init__(self, path: str | os.PathLike[str], *, scale: float = 1.0) -> None:
        self.path = Path(path)
        self.record = _read_record(self.path)
        self.name: str = self.record["data"]["name"]
        self.split: str = self.record["data"]["split"]
        self.num_classes: int | None = self.record["num_classes"]
        self.shape: tuple[int, ...] = tuple(self.record["shape"])
        self.latents = Latents(self.record["mean"], self.record["std"], scale)
        self._shards: dict[int, dict[str, Tensor]] = {}
        for shard in range(math.ceil(len(self) / _SHARD)):
            self._shard(shard)  # finds a missing or truncated file now

    def __len__(self) -> int:
        return self.record["data"]["count"]

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.latents.scale)

    def fetch(self, indices: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """data: (B, C, H, W) float32, normalised; class_labels: (B,) int64, where labelled."""
        rows = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise IndexError(f"indices must lie in [0, {len(self)})")
        latents = torch.empty(len(rows), *self.shape)
        labels = torch.empty(len(rows), dtype=torch.int64)
        shards = rows // _SHARD
        for shard in shards.unique().tolist():
            here = shards == shard
            tensors = self._shard(shard)
            latents[here] = tensors["latents"][rows[here] % _SHARD]
            if self.num_classes is not None:
                labels[here] = tensors["class_labels"][rows[here] % _SHARD]
        found = {"data": self.latents.normalise(latents)}
        return found if self.num_classes is None else {**found, "class_labels": labels}

    def fingerprint(self) -> str:
        """sha256 of what the latents were made from, and of the scale."""
        text = json.dumps([self.record, self.latents.scale], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _shard(self, shard: int) -> dict[str, Tensor]:
        if shard not in self._shards:
            file = self.path / _shard_name(shard)
            try:
                self._shards[shard] = load_file(file)
            except (OSError, SafetensorError) as error:
                raise FlowkitError(
                    f"{file} is missing or broken ({error}); delete {self.path} and encode again"
                ) from error
        return self._shards[shard]


def encode_latents(
    data: ImageData,
    vae: nn.Module,
    path: str | os.PathLike[str],
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    seed: int = 0,
    scale: float = 1.0,
    progress: bool = False,
) -> LatentData:
    """The latents of `data`, read from the folder `path` or else encoded and written there.

    vae: takes pictures in [-1, 1]; `encode` gives a posterior (diffusers' AutoencoderKL, one draw
    a picture is kept, its noise keyed by (seed, index)) or latents (AutoencoderTiny, any module).
    It is put in eval mode, and on `device` if one is named.  With several processes call this on
    one first.  Raises FlowkitError if `path` holds anything but latents of this data by this vae.
    """
    path = Path(path)
    wanted = {
        "convention": CONVENTION,
        "seed": seed,
        "vae": vae_identity(vae),
        "data": {
            "name": data.name,
            "split": data.split,
            "count": len(data),
            "fingerprint": data.fingerprint(),
        },
    }
    if path.exists():
        _require_same(path, _read_record(path), wanted)
        return LatentData(path, scale=scale)
    vae.eval().to(device)
    with atomic_folder(path) as folder:
        statistics = _encode(data, vae, folder, batch_size, seed, progress)
        write_json(folder / _RECORD, {**wanted, "num_classes": data.num_classes, **statistics})
    return LatentData(path, scale=scale)


def load_vae(source: str) -> nn.Module:
    """A diffusers VAE, frozen: a folder or hub id of one, or of a pipeline that has one."""
    from diffusers import AutoModel

    subfolder = "vae" if (Path(source) / "vae").is_dir() else None
    try:
        vae = AutoModel.from_pretrained(source, subfolder=subfolder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FlowkitError(f"no diffusers VAE at {source!r} ({reason}); name its folder") from None
    return vae.eval().requires_grad_(False)


def decode_latents(normalised: Tensor, vae: nn.Module, latents: Latents) -> Tensor:
    """Pictures (B, C, H, W), float32 in [-1, 1], of normalised latents: what a flow samples."""
    z = latents.denormalise(normalised.float()).to(_example(vae))
    with torch.no_grad():
        decoded: Any = vae.decode(z)  # type: ignore[operator]
    return getattr(decoded, "sample", decoded).float().clamp(-1, 1)


def vae_identity(vae: nn.Module) -> str:
    """Class and sha256 of configuration and weights: equal for VAEs that encode alike."""
    config = {k: v for k, v in dict(getattr(vae, "config", {})).items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return f"{type(vae).__name__} {digest.hexdigest()}"


def _encode(
    data: ImageData, vae: nn.Module, folder: Path, batch_size: int, seed: int, progress: bool
) -> dict[str, Any]:
    """Write the shards; return the shape and, from float64 sums, mean and std per channel."""
    channels = getattr(getattr(vae, "config", None), "in_channels", data.shape[0])
    if channels != data.shape[0]:
        raise FlowkitError(
            f"the VAE takes pictures of {channels} channels, '{data.name}' has {data.shape[0]}"
        )
    total = squares = torch.zeros(())
    shape: tuple[int, ...] = ()
    with tqdm(total=len(data), desc="latents", unit="pictures", disable=not progress) as bar:
        for start in range(0, len(data), _SHARD):
            parts, labels = [], []
            for first in range(start, min(start + _SHARD, len(data)), batch_size):
                rows = range(first, min(first + batch_size, start + _SHARD, len(data)))
                batch = data.fetch(rows)
                latents = _posterior(vae, batch["data"], seed, rows)
                parts.append(latents)
                labels.append(batch.get("class_labels", torch.empty(0)))
                wide = latents.double().transpose(0, 1).flatten(1)
                total, squares = total + wide.sum(1), squares + wide.square().sum(1)
                bar.update(len(rows))
            tensors = {"latents": torch.cat(parts)}
            if data.num_classes is not None:
                tensors["class_labels"] = torch.cat(labels)
            shape = tuple(tensors["latents"].shape[1:])
            save_file(tensors, folder / _shard_name(start // _SHARD))
    count = len(data) * math.prod(shape[1:])
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    std[std <= 1e-7 * mean.abs()] = 1.0  # a constant channel carries nothing: it becomes 0
    return {"shape": list(shape), "mean": mean.tolist(), "std": std.tolist()}


def _posterior(vae: nn.Module, pictures: Tensor, seed: int, rows: range) -> Tensor:
    """(B, C, H, W) float32 on the CPU: the latents, or one keyed draw of their posterior."""
    example = _example(vae)
    with torch.no_grad():
        found: Any = vae.encode(pictures.to(example))  # type: ignore[operator]
    if hasattr(found, "latent_dist"):
        mean, std = (v.float().cpu() for v in (found.latent_dist.mean, found.latent_dist.std))
        latents = mean + std * keyed_noise(seed, rows, mean.shape[1:])
    else:
        latents = found if isinstance(found, Tensor) else getattr(found, "latents", None)
        if latents is None:
            kind = type(found).__name__
            raise FlowkitError(f"the VAE's encode gave {kind}, not a posterior, latents or tensor")
        latents = latents.float().cpu()
    if not latents.isfinite().all():
        raise FlowkitError(
            f"the VAE's latents of pictures {rows[0]} to {rows[-1]} are not finite in "
            f"{example.dtype}; run it in float32 or bfloat16"
        )
    return latents.contiguous()


def _example(vae: nn.Module) -> Tensor:
    """A tensor of the device and dtype in which the VAE computes."""
    return next(vae.parameters(), torch.zeros(()))


def _require_same(path: Path, record: dict[str, Any], wanted: dict[str, Any]) -> None:
    if all(record[key] == value for key, value in wanted.items()):
        return
    raise FlowkitError(
        f"{path} holds latents of {_told(record)}; asked for {_told(wanted)}; "
        "give another path, or delete it"
    )


def _told(record: dict[str, Any]) -> str:
    data, vae = record["data"], record["vae"]
    kind, _, digest = vae.partition(" ")
    return (
        f"'{data['name']}' ({data['split']}, {data['count']} pictures, "
        f"{data['fingerprint'][:8]}) by {kind} {digest[:8]}, seed {record['seed']}"
    )


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = read_json(path / _RECORD)
        version = record["convention"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise FlowkitError(f"{path} is not a folder of latents: no readable {_RECORD}") from error
    if version != CONVENTION:
        raise FlowkitError(
            f"{path} has latents of convention {version}, this flowkit reads {CONVENTION}; "
            "delete it and encode again"
        )
    return record


def _reopen(path: Path, scale: float) -> LatentData:
    return LatentData(path, scale=scale)


def _shard_name(shard: int) -> str:
    return f"latents-{shard:05d}.safetensors"
