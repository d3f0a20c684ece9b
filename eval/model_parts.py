"""What a model's folder says beside its network: what it takes, its classes, its decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.eval.settings import FidConfig
from flowkit.files import read_json
from flowkit.latents import Latents, decode_latents, load_vae

__all__ = ["Parts", "model_parts", "null_class", "own_sampler"]

_AT_ONCE = 32  # latents that are decoded together: a VAE needs far more memory than a flow
_PROMPTED = ("cross_attention_dim", "joint_attention_dim", "caption_channels")


@dataclass(frozen=True)
class Parts:
    """shape: of one sample.  num_classes: None for an unconditional model.  decode: what the flow
    makes (B, *) to pictures (B, C, H, W) in [-1, 1]."""

    shape: tuple[int, ...]
    num_classes: int | None
    decode: Callable[[Tensor], Tensor]


def model_parts(name: str, model: Any, options: FidConfig, device: torch.device) -> Parts:
    """The parts of a loaded model; the options say what it does not.

    FlowkitError: a network that needs prompts, no shape, a latent model without its decoder.
    """
    config: Mapping[str, Any] = getattr(getattr(model, "net", None), "config", {})
    if prompted := next((key for key in _PROMPTED if isinstance(config.get(key), int)), None):
        raise FlowkitError(
            f"{name} takes prompts ({prompted} in its config); sample it with its pipeline into a "
            "folder and measure that with pictures=FOLDER"
        )
    record = _json(name, "flowkit.json")
    shape = options.shape or record.get("shape") or _shape(config)
    if shape is None:
        raise FlowkitError(f"{name} does not say what it takes; give shape, e.g. shape=[3,32,32]")
    classes = options.num_classes or record.get("num_classes") or _classes(config)
    return Parts(tuple(shape), classes, _decoder(name, record, options, device))


def null_class(model: Any) -> int:
    """The label that stands for none; FlowkitError when the network has no such label."""
    config: Mapping[str, Any] = getattr(getattr(model, "net", None), "config", {})
    count = getattr(model, "null_class", None)
    if count is None and config.get("label_dropout"):
        count = config.get("num_classes")
    if count is None:
        raise FlowkitError(
            "this network has no unconditional class to guide with; say guidance.scale=1, or "
            "train it with net.options.label_dropout=0.1"
        )
    return int(count)


def own_sampler(name: str) -> tuple[str, list[float]] | None:
    """The solver and the times that a model was trained to be sampled with, where it says so."""
    told = _json(name, "flowkit.json").get("sampler")
    return (str(told["solver"]), [float(t) for t in told["times"]]) if told else None


def _json(name: str, file: str) -> dict[str, Any]:
    """A JSON file of a model's folder, or of a hub repository that was just loaded."""
    path: Any = Path(name) / file
    if not Path(name).is_dir() and ":" not in name:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(name, file)
    return read_json(path) if isinstance(path, str | Path) and Path(path).is_file() else {}


def _shape(config: Mapping[str, Any]) -> list[int] | None:
    if config.get("shape"):
        return list(config["shape"])
    channels, side = config.get("in_channels"), config.get("sample_size")
    if not isinstance(channels, int) or side is None:
        return None
    return [channels, *(side if isinstance(side, list | tuple) else (side, side))]


def _classes(config: Mapping[str, Any]) -> int | None:
    names = ("num_classes", "num_class_embeds", "num_embeds_ada_norm")
    return next((int(config[name]) for name in names if config.get(name)), None)


def _decoder(
    name: str, record: Mapping[str, Any], options: FidConfig, device: torch.device
) -> Callable[[Tensor], Tensor]:
    pipeline = _json(name, "model_index.json")
    inside = bool(pipeline.get("vae") and pipeline["vae"][0])
    latents = record.get("latents")
    source = options.vae or record.get("vae") or (name if inside else None)
    if source is None and latents is None:
        return lambda x: x
    if source is None:
        raise FlowkitError(f"{name} makes latents and names no decoder; say vae=FOLDER")
    vae = load_vae(source).to(device, getattr(torch, options.dtype))
    config: Any = getattr(vae, "config", {})
    if latents is None:  # a pipeline's latents are scaled and shifted, not normalised
        channels = int(config.get("latent_channels", 4))
        shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
        latents = {"mean": [shift] * channels, "std": [1.0] * channels, "scale": scale}
    statistics = Latents(**latents)

    def decode(x: Tensor) -> Tensor:
        parts = [decode_latents(part, vae, statistics) for part in x.split(_AT_ONCE)]
        return torch.cat(parts)

    return decode
