"""Whatever a model was trained to predict, here it becomes a velocity v(x_t, t).

ADAPTERS names every adapter, `from_description` rebuilds one, and `from_diffusers` picks one for a
diffusers pipeline or model, a network of flowkit, or a saved folder.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowkit import nets
from flowkit.diffusion_adapters import (
    EDMVelocity,
    PreconditionedVelocity,
    VPLinearVelocity,
    VPVelocity,
)
from flowkit.errors import FlowkitError
from flowkit.files import read_json
from flowkit.flow_adapters import (
    DiffusersFlowVelocity,
    FlowVelocity,
    FluxVelocity,
    ReversedFlowVelocity,
)
from flowkit.velocity import VelocityModel

__all__ = [
    "ADAPTERS",
    "DiffusersFlowVelocity",
    "EDMVelocity",
    "FlowVelocity",
    "FluxVelocity",
    "PreconditionedVelocity",
    "ReversedFlowVelocity",
    "VPLinearVelocity",
    "VPVelocity",
    "alphas_cumprod",
    "from_description",
    "from_diffusers",
]

ADAPTERS: dict[str, type[VelocityModel]] = {
    cls.adapter: cls
    for cls in (
        FlowVelocity,
        ReversedFlowVelocity,
        DiffusersFlowVelocity,
        FluxVelocity,
        EDMVelocity,
        PreconditionedVelocity,
        VPVelocity,
        VPLinearVelocity,
    )
}


def from_description(net: nn.Module, description: Mapping[str, Any]) -> VelocityModel:
    """The adapter around `net` that `description()` described.

    Raises FlowkitError for an unknown adapter name or an option that the adapter does not have.
    """
    options = dict(description)
    name = options.pop("adapter", None)
    if name not in ADAPTERS:
        raise FlowkitError(f"unknown adapter {name!r}; expected one of {', '.join(ADAPTERS)}")
    try:
        return ADAPTERS[name](net, **options)
    except TypeError as error:
        raise FlowkitError(
            f"adapter {name!r} does not fit its options {options}: {error}"
        ) from None


def from_diffusers(
    source: Any,
    scheduler: Any = None,
    *,
    torch_dtype: torch.dtype | None = None,
) -> VelocityModel:
    """The velocity of a diffusers pipeline or model, of a network of flowkit, or of a saved one.

    source: a pipeline, a model, a local folder or a hub id.  Of a pipeline's folder only the
    transformer or U-Net and the scheduler's config are read, in `torch_dtype`.
    scheduler: a diffusers scheduler or its config, for a diffusion model given without its
    pipeline; it says the noise table and what is predicted, not how to sample.
    x_t lives where the pipeline's latents do: a VAE's scaling is applied before and after.
    Raises FlowkitError when the model is not recognised, or a scheduler is needed.
    """
    if isinstance(source, str | os.PathLike):
        source, scheduler = _load(os.fspath(source), scheduler, torch_dtype)
    if isinstance(source, VelocityModel):
        return source
    if not isinstance(source, nn.Module) and hasattr(source, "scheduler"):
        scheduler = source.scheduler if scheduler is None else scheduler
        denoiser = getattr(source, "transformer", None)
        source = denoiser if denoiser is not None else getattr(source, "unet", None)
    if not isinstance(source, nn.Module):
        raise FlowkitError(f"cannot read a velocity off a {type(source).__name__}; {_SUPPORTED}")
    for cls in type(getattr(source, "_orig_mod", source)).__mro__:  # _orig_mod: torch.compile
        build = _MODELS.get(f"{cls.__module__.partition('.')[0]}.{cls.__name__}")
        if build is not None:
            return build(source, _scheduler_config(scheduler))
    raise FlowkitError(f"{type(source).__name__} is not a known model; {_SUPPORTED}")


# What a model is: its package and class name -> the adapter, given the scheduler's config.
# By name, so that nothing is imported for a model that is not there.


def _native(net: nn.Module, scheduler: dict[str, Any] | None) -> VelocityModel:
    return FlowVelocity(net)


def _flow_transformer(net: Any, scheduler: dict[str, Any] | None) -> VelocityModel:
    if getattr(net.config, "guidance_embeds", False):
        raise FlowkitError(
            f"{type(net).__name__} with embedded guidance (Sana Sprint) is a consistency model on "
            "another path, not a velocity; give the model it was distilled from"
        )
    return DiffusersFlowVelocity(net, time_scale=1000.0 * getattr(net.config, "timestep_scale", 1))


def _flux(net: nn.Module, scheduler: dict[str, Any] | None) -> VelocityModel:
    return FluxVelocity(net)


def _dit(net: Any, scheduler: dict[str, Any] | None) -> VelocityModel:
    return _diffusion(net, scheduler, null_class=net.config.num_embeds_ada_norm)


def _diffusion(
    net: nn.Module, scheduler: dict[str, Any] | None, null_class: int | None = None
) -> VelocityModel:
    """A network that predicts whatever its scheduler was configured for."""
    if scheduler is None:
        raise FlowkitError(
            f"a bare {type(net).__name__} does not say its noise schedule; pass its pipeline, or "
            "scheduler=the scheduler it was trained with (its prediction_type and betas are used)"
        )
    name = scheduler.get("_class_name", "the scheduler")
    prediction = scheduler.get("prediction_type", "epsilon")
    if name.startswith("FlowMatch") or prediction == "flow_prediction":
        return DiffusersFlowVelocity(net)
    if name.startswith("EDM") and prediction == "epsilon":
        sigmas = {
            k: scheduler[k] for k in ("sigma_min", "sigma_max", "sigma_data") if k in scheduler
        }
        return PreconditionedVelocity(net, **sigmas)
    return VPVelocity(
        net, alphas_cumprod=alphas_cumprod(scheduler), prediction=prediction, null_class=null_class
    )


_MODELS: dict[str, Callable[[Any, dict[str, Any] | None], VelocityModel]] = {
    "flowkit.MLP": _native,
    "flowkit.DiT": _native,
    "flowkit.DDT": _native,
    "diffusers.SD3Transformer2DModel": _flow_transformer,
    "diffusers.SanaTransformer2DModel": _flow_transformer,
    "diffusers.FluxTransformer2DModel": _flux,
    "diffusers.DiTTransformer2DModel": _dit,
    "diffusers.UNet2DModel": _diffusion,
    "diffusers.UNet2DConditionModel": _diffusion,
}

_SUPPORTED = (
    f"supported are {', '.join(_MODELS)}, pipelines with one of them, and folders or hub ids that "
    "hold one; wrap any other network yourself with an adapter of flowkit.adapters: "
    f"{', '.join(cls.__name__ for cls in ADAPTERS.values())} (NCSNpp and ADM with EDM's weights: "
    "PreconditionedVelocity)"
)


def _scheduler_config(scheduler: Any) -> dict[str, Any] | None:
    if scheduler is None:
        return None
    if isinstance(scheduler, Mapping):
        return dict(scheduler)
    if not isinstance(getattr(scheduler, "config", None), Mapping):
        raise FlowkitError(
            f"scheduler must be a diffusers scheduler or its config, got {type(scheduler).__name__}"
        )
    return dict(scheduler.config) | {"_class_name": type(scheduler).__name__}


def alphas_cumprod(scheduler: Mapping[str, Any]) -> list[float]:
    """The table that diffusers computes from the betas of a scheduler's config.

    Raises FlowkitError when the config has no betas.
    """
    from diffusers import DDPMScheduler

    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    options = {name: scheduler[name] for name in names if name in scheduler}
    if not options.keys() & {"beta_schedule", "beta_start", "trained_betas"}:
        raise FlowkitError(
            f"{scheduler.get('_class_name', 'the scheduler')} has no betas in its config; "
            "give scheduler=the DDPM, DDIM, ... scheduler that the model was trained with"
        )
    zero_snr = bool(scheduler.get("rescale_betas_zero_snr", False))
    table: Any = DDPMScheduler(**options, rescale_betas_zero_snr=zero_snr)
    return table.alphas_cumprod.tolist()


def _load(source: str, scheduler: Any, torch_dtype: torch.dtype | None) -> tuple[Any, Any]:
    """The model of a folder or hub id, and the scheduler's config when that is stored with it."""
    if (record := _read(source, "flowkit.json")) is not None:
        try:
            module, name = record["net"]["module"], record["net"]["class"]
            description = record["velocity"]
        except (KeyError, TypeError) as error:
            raise FlowkitError(
                f"{source}/flowkit.json lacks {error}; expected net: {{module, class}}, velocity"
            ) from None
        net = _pretrained(module, name, source, torch_dtype=torch_dtype)
        return from_description(net, description), None
    if (parts := _read(source, "model_index.json")) is not None:
        part = "transformer" if parts.get("transformer") else "unet"
        if not parts.get(part):
            raise FlowkitError(f"{source}: a pipeline without a transformer or unet; {_SUPPORTED}")
        if scheduler is None:
            scheduler = _read(source, "scheduler/scheduler_config.json")
        module, name = parts[part]
        options = {"subfolder": part, "torch_dtype": torch_dtype}
        return _pretrained(module, name, source, **options), scheduler
    if (config := _read(source, "config.json")) is not None:
        name = config.get("_class_name", "")
        module = "flowkit.nets" if name in nets.__all__ else "diffusers"
        return _pretrained(module, name, source, torch_dtype=torch_dtype), scheduler
    raise FlowkitError(
        f"{source}: neither flowkit.json, model_index.json nor config.json in it; "
        "give the folder that save_pretrained wrote"
    )


def _pretrained(module: str, name: str, source: str, **options: Any) -> nn.Module:
    """A saved model of a class of flowkit or diffusers; code of the folder itself never runs."""
    cls: Any = None
    if module.partition(".")[0] in ("flowkit", "diffusers"):
        with contextlib.suppress(ImportError):
            cls = getattr(importlib.import_module(module), name, None)
    if not hasattr(cls, "from_pretrained"):
        raise FlowkitError(
            f"{source}: its model class {module}.{name} is not known here; {_SUPPORTED}"
        )
    try:
        return cls.from_pretrained(source, **options)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FlowkitError(f"{source}: cannot load its {name}: {reason}") from error


def _read(source: str, name: str) -> dict[str, Any] | None:
    """A JSON file of a local folder or of a hub repository; None when it has no such file."""
    folder = Path(source)
    if not folder.is_dir():
        return _read_hub(source, name)
    file = folder / name
    try:
        return read_json(file) if file.is_file() else None
    except ValueError as error:
        raise FlowkitError(f"{file} is not JSON: {error}") from None


def _read_hub(source: str, name: str) -> dict[str, Any] | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return read_json(hf_hub_download(source, name))
    except Exception as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None  # the repository is there, the file is not
        raise FlowkitError(
            f"{source}: no such folder, and not to be had as a hub id either "
            f"({type(error).__name__}); give the folder that save_pretrained wrote"
        ) from None
