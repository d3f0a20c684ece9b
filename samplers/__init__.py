"""Solvers, time grids and densities of t, the driver that samples with them and inverts, the
schedulers that put the same solvers into diffusers pipelines, and caches of network features.

All of it loads at once, so that diffusers finds the schedulers of saved pipelines here; only a
command, `python -m flowkit.samplers.search`, takes what it needs, and its --help needs no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or sys.argv[:1] != ["-m"]:  # what it is while Python looks for a -m module
    from flowkit.samplers.editing import edit, edit_latents, reconstruct
    from flowkit.samplers.encoder_sharing import shared_encoder
    from flowkit.samplers.gated import (
        cg_taylor,
        enable_cg_taylor,
        enable_first_block_cache,
        first_block_cache,
    )
    from flowkit.samplers.named_schedulers import (
        AB2Scheduler,
        BDIADDIMScheduler,
        BDIAScheduler,
        DEISFlowScheduler,
        DPMSolverFlowScheduler,
        FireFlowScheduler,
        RFSolverScheduler,
        UniPCFlowScheduler,
    )
    from flowkit.samplers.placement import ForecastErrors, forecast_errors
    from flowkit.samplers.scheduler import FlowScheduler
    from flowkit.samplers.sharing import optimal_sharing
    from flowkit.samplers.solve import Result, Step, evaluation_times, invert, sample
    from flowkit.samplers.taylor import (
        enable_step_rehash,
        enable_taylorseer,
        step_rehash,
        taylorseer,
    )

__all__ = [
    "AB2Scheduler",
    "BDIADDIMScheduler",
    "BDIAScheduler",
    "DEISFlowScheduler",
    "DPMSolverFlowScheduler",
    "FireFlowScheduler",
    "FlowScheduler",
    "ForecastErrors",
    "RFSolverScheduler",
    "Result",
    "Step",
    "UniPCFlowScheduler",
    "cg_taylor",
    "edit",
    "edit_latents",
    "enable_cg_taylor",
    "enable_first_block_cache",
    "enable_step_rehash",
    "enable_taylorseer",
    "evaluation_times",
    "first_block_cache",
    "forecast_errors",
    "invert",
    "optimal_sharing",
    "reconstruct",
    "sample",
    "shared_encoder",
    "step_rehash",
    "taylorseer",
]

_HOMES = "editing encoder_sharing gated named_schedulers placement scheduler sharing solve taylor"


def __getattr__(name: str) -> Any:
    for home in _HOMES.split() if name in __all__ else ():
        module = import_module(f"flowkit.samplers.{home}")
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
