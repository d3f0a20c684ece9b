"""Solvers, time grids and densities of t, the driver that samples with them and inverts, and the
schedulers that put the same solvers into diffusers pipelines."""

from __future__ import annotations

from flowkit.samplers.editing import edit, edit_latents, reconstruct
from flowkit.samplers.encoder_sharing import shared_encoder
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
from flowkit.samplers.scheduler import FlowScheduler
from flowkit.samplers.sharing import optimal_sharing
from flowkit.samplers.solve import Result, Step, evaluation_times, invert, sample

__all__ = [
    "AB2Scheduler",
    "BDIADDIMScheduler",
    "BDIAScheduler",
    "DEISFlowScheduler",
    "DPMSolverFlowScheduler",
    "FireFlowScheduler",
    "FlowScheduler",
    "RFSolverScheduler",
    "Result",
    "Step",
    "UniPCFlowScheduler",
    "edit",
    "edit_latents",
    "evaluation_times",
    "invert",
    "optimal_sharing",
    "reconstruct",
    "sample",
    "shared_encoder",
]
