"""New networks by their name in a configuration, seen as velocities."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from flowkit.adapters import FlowVelocity
from flowkit.errors import FlowkitError
from flowkit.trainers.settings import NetOptions
from flowkit.velocity import VelocityModel

__all__ = ["build_model", "checked"]

T = TypeVar("T")

# Network time of each net that can be trained from scratch, for flowkit's t in [0, 1]:
# NCSN++ as in gnobitab/RectifiedFlow, UNet2DModel as its own timesteps.
TIME_SCALES = {"mlp": 1.0, "dit": 1.0, "ncsnpp": 999.0, "adm": 999.0, "unet2d": 1000.0}


def build_model(net: NetOptions, shape: Sequence[int], num_classes: int | None) -> VelocityModel:
    """A new network of that name for pictures of `shape` (C, H, W), as a velocity."""
    from diffusers import UNet2DModel

    from flowkit.nets.adm import ADM
    from flowkit.nets.dit import DiT
    from flowkit.nets.mlp import MLP
    from flowkit.nets.ncsnpp import NCSNpp

    channels, height, width = shape
    square = {"sample_size": height, "in_channels": channels, "out_channels": channels}
    known: dict[str, tuple[Any, dict[str, Any]]] = {
        "mlp": (MLP, {"shape": list(shape), "num_classes": num_classes}),
        "dit": (DiT, {**square, "num_classes": num_classes}),
        "ncsnpp": (NCSNpp, {**square, "num_classes": num_classes}),
        "adm": (ADM, {**square, "num_classes": num_classes}),
        "unet2d": (UNet2DModel, {**square, "num_class_embeds": num_classes}),
    }
    if net.name not in known:
        raise FlowkitError(f"unknown net {net.name!r}; choose one of {', '.join(known)}")
    if net.name != "mlp" and height != width:
        raise FlowkitError(f"{net.name} takes square pictures, got {height}x{width}; set data.size")
    build, given = known[net.name]
    for name in net.options:
        names = inspect.signature(build).parameters
        if name not in names:
            close = get_close_matches(name, names, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
            raise FlowkitError(f"net {net.name!r} has no option {name!r}; {hint}")
    network = checked("net.options", build, {**given, **net.options})
    return FlowVelocity(network, time_scale=TIME_SCALES[net.name])


def checked(option: str, build: Callable[..., T], options: dict[str, Any]) -> T:
    """build(**options), where an option of the wrong type is the user's mistake, not ours."""
    try:
        return build(**options)
    except (TypeError, ValueError) as error:
        raise FlowkitError(f"{option}: {error}") from None
