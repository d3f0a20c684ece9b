"""flowkit's own networks: MLP, DiT, DDT, NCSN++/DDPM++ and ADM, as diffusers models.

The classes load on first use, so that importing this package does not import torch; PRESETS
names published architectures.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from flowkit.nets.presets import PRESETS

__all__ = ["ADM", "DDT", "MLP", "PRESETS", "DiT", "NCSNpp"]  # noqa: F822 - see __getattr__

_HOME = {"ADM": "adm", "DDT": "ddt", "DiT": "dit", "MLP": "mlp", "NCSNpp": "ncsnpp"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"flowkit.nets.{_HOME[name]}"), name)
