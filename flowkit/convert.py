"""Weights of EDM, score_sde and RectifiedFlow as flowkit networks.

    net = load_edm("cifar10.safetensors")        net = load_score_sde("checkpoint_8.pth", 32)

The architecture is read off the names and shapes; what neither tells (dropout, the picture size of
a score_sde network) is an argument.  Files are safetensors, or .pt/.pth that hold tensors only.
What comes back is the raw network F: its time scale and sign belong to flowkit.adapters.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flowkit.convert_names import (
    Source,
    edm_config,
    edm_sources,
    score_sde_config,
    score_sde_sources,
)
from flowkit.errors import FlowkitError
from flowkit.nets.adm import ADM
from flowkit.nets.ncsnpp import NCSNpp

__all__ = ["load_edm", "load_score_sde"]

_WRAPPERS = ("module.", "model.", "net.", "_orig_mod.")  # DataParallel, preconditioning, compile
_NESTED = ("ema", "model", "net", "state_dict")


def load_edm(source: str | Path | Mapping[str, Any], *, dropout: float = 0.0) -> NCSNpp | ADM:
    """The network inside an EDM checkpoint (NVlabs/edm: SongUNet or DhariwalUNet), in eval mode.

    source: a file or a state dict, with or without the preconditioning around the network.
    dropout: for further training; the published runs used .13 (CIFAR-10), .25 (AFHQ), .05 (FFHQ)
    and .10 (ImageNet).  Raises FlowkitError that names what is missing, left over or misshapen.
    """
    state = _unwrapped(_flat(_read(source)))
    config = edm_config(state)
    net: NCSNpp | ADM = (ADM if config.pop("class") == "ADM" else NCSNpp)(**config, dropout=dropout)
    state = {key: value for key, value in state.items() if not key.endswith("resample_filter")}
    _fold_labels(state)
    _fill(net, state, edm_sources(net))
    return net


def load_score_sde(
    source: str | Path | Mapping[str, Any],
    sample_size: int,
    *,
    ema: bool = True,
    resample_filter: tuple[int, ...] | None = None,
    dropout: float = 0.0,
) -> NCSNpp:
    """The network of a score_sde checkpoint (yang-song/score_sde_pytorch, gnobitab/RectifiedFlow).

    source: a file or its contents, {"model", "ema", ...} or a bare state dict.  sample_size: H = W
    of its pictures.  ema: take the averaged weights where the file has them.  resample_filter:
    null for (1, 3, 3, 1) in a network with Fourier features and (1, 1) in others, as published.
    The factor 1 / sigma of nets trained with `scale_by_sigma`, and 2 x - 1 before nets trained
    with `centered = False`, are not part of the network.
    """
    found = _read(source)
    average = ema and isinstance(found.get("ema"), Mapping) and "shadow_params" in found["ema"]
    state = _unwrapped(_averaged(found) if average else _flat(found))
    state.pop("sigmas", None)  # a buffer that the network itself does not use
    config = score_sde_config(state, sample_size)
    if resample_filter is not None:
        config["resample_filter"] = resample_filter
    net = NCSNpp(**config, dropout=dropout)
    _fill(net, state, score_sde_sources(net))
    return net


def _read(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    if not path.is_file():
        raise FlowkitError(f"no checkpoint at {path}; give the path of a .safetensors or .pth file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise FlowkitError(f"{path} is not a complete safetensors file: {error}") from error
    refusal = (
        f"{path} holds pickled Python objects, which flowkit does not run; open it in the "
        "repository it comes from and export the weights with "
        "safetensors.torch.save_file(net.state_dict(), 'net.safetensors')"
    )
    if path.suffix in (".pkl", ".pickle"):
        raise FlowkitError(refusal)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError) as error:
        raise FlowkitError(
            f"{path} cannot be read as a PyTorch file; is it complete and not something else?"
        ) from error
    except (pickle.UnpicklingError, AttributeError) as error:
        raise FlowkitError(refusal) from error
    if not isinstance(found, Mapping):
        raise FlowkitError(f"{path} holds a {type(found).__name__}; expected a state dict")
    return found


def _flat(found: Mapping[str, Any]) -> dict[str, Tensor]:
    """The one level of `found` that maps names to tensors."""
    for level in (found, *(found[key] for key in _NESTED if key in found)):
        if isinstance(level, Mapping) and level:
            if all(isinstance(value, Tensor) for value in level.values()):
                return dict(level)
    raise FlowkitError(
        f"found no state dict under {sorted(map(str, found))[:8]}; pass net.state_dict()"
    )


def _averaged(found: Mapping[str, Any]) -> dict[str, Tensor]:
    """score_sde keeps its average as a list, in the order of the trainable parameters."""
    model, shadow = _flat(found.get("model", {})), list(found["ema"]["shadow_params"])
    frozen = {key for key in model if key.endswith((".W", "sigmas")) and model[key].ndim == 1}
    names = [key for key in model if key not in frozen]
    if [model[name].shape for name in names] != [value.shape for value in shadow]:
        raise FlowkitError(
            f"the checkpoint's average ({len(shadow)} tensors) does not match its {len(names)} "
            "weights; pass ema=False to take the weights themselves"
        )
    return {**{key: model[key] for key in frozen}, **dict(zip(names, shadow, strict=True))}


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DataParallel, compile and the preconditioning put in front of them."""
    for prefix in _WRAPPERS * 2:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def _fill(net: NCSNpp | ADM, state: dict[str, Tensor], sources: dict[str, Source]) -> None:
    """Every tensor of net from `state`; nothing may be missing, left over or of another shape."""
    new, misshapen = {}, []
    for key, ours in net.state_dict().items():
        source = sources[key]
        if source.key in state:
            new[key] = source.convert(state[source.key].float()).contiguous()
            if new[key].shape != ours.shape:
                found = tuple(state[source.key].shape)
                misshapen.append(f"{source.key} {found} for {key} {tuple(ours.shape)}")
    needed = {source.key for source in sources.values()}
    faults = {
        "missing": sorted(needed - set(state)),
        "unknown": sorted(set(state) - needed),
        "of another shape": misshapen,
    }
    for what, keys in faults.items():
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            raise FlowkitError(
                f"the state dict does not fit {type(net).__name__}: {what}: "
                f"{', '.join(keys[:5])}{more}; is it another architecture or incomplete?"
            )
    net.load_state_dict(new)
    net.eval()


def _fold_labels(state: dict[str, Tensor]) -> None:
    """One row per class out of SongUNet's W (sqrt(n) one_hot(y)) + b; ADM's W has no bias."""
    bias = state.pop("map_label.bias", None)
    if bias is not None and "map_label.weight" in state:
        weight = state["map_label.weight"].double()
        folded = weight * math.sqrt(weight.shape[1]) + bias.double()[:, None]
        state["map_label.weight"] = folded.float()
