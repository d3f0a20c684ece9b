"""State dicts of foreign checkpoints: read without running them, and put into a network.

Files are safetensors, or .pt/.pth that hold tensors only.
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

from flowkit.convert_names import Source
from flowkit.errors import FlowkitError
from flowkit.nets.adm import ADM
from flowkit.nets.ncsnpp import NCSNpp

__all__ = ["averaged", "fill", "flat", "fold_labels", "read_state", "unwrapped"]

_WRAPPERS = ("module.", "model.", "net.", "_orig_mod.")  # DataParallel, preconditioning, compile
_NESTED = ("ema", "model", "net", "state_dict")


def read_state(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """What a file holds; a mapping is returned as it is.

    Raises FlowkitError for a file that is absent, incomplete, or holds pickled objects.
    """
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
    except (EOFError, LookupError, RuntimeError) as error:
        raise FlowkitError(
            f"{path} cannot be read as a PyTorch file; is it complete and not something else?"
        ) from error
    except (pickle.UnpicklingError, AttributeError) as error:
        raise FlowkitError(refusal) from error
    if not isinstance(found, Mapping):
        raise FlowkitError(f"{path} holds a {type(found).__name__}; expected a state dict")
    return found


def flat(found: Mapping[str, Any]) -> dict[str, Tensor]:
    """The one level of `found` that maps names to tensors."""
    for level in (found, *(found[key] for key in _NESTED if key in found)):
        if isinstance(level, Mapping) and level:
            if all(isinstance(value, Tensor) for value in level.values()):
                return dict(level)
    raise FlowkitError(
        f"found no state dict under {sorted(map(str, found))[:8]}; pass net.state_dict()"
    )


def averaged(found: Mapping[str, Any]) -> dict[str, Tensor]:
    """score_sde keeps its average as a list, in the order of the trainable parameters."""
    model, shadow = flat(found.get("model", {})), list(found["ema"]["shadow_params"])
    frozen = {key for key in model if key.endswith((".W", "sigmas")) and model[key].ndim == 1}
    names = [key for key in model if key not in frozen]
    if [model[name].shape for name in names] != [value.shape for value in shadow]:
        raise FlowkitError(
            f"the checkpoint's average ({len(shadow)} tensors) does not match its {len(names)} "
            "weights; pass ema=False (--no-ema) to take the weights themselves"
        )
    return {**{key: model[key] for key in frozen}, **dict(zip(names, shadow, strict=True))}


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DataParallel, compile and the preconditioning put in front of them."""
    for prefix in _WRAPPERS * 2:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def fill(net: NCSNpp | ADM, state: dict[str, Tensor], sources: dict[str, Source]) -> None:
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


def fold_labels(state: dict[str, Tensor]) -> None:
    """One row per class out of SongUNet's W (sqrt(n) one_hot(y)) + b; ADM's W has no bias."""
    bias = state.pop("map_label.bias", None)
    if bias is not None and "map_label.weight" in state:
        weight = state["map_label.weight"].double()
        folded = weight * math.sqrt(weight.shape[1]) + bias.double()[:, None]
        state["map_label.weight"] = folded.float()
