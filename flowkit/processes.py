"""The processes of a launch, by accelerate."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from flowkit.errors import FlowkitError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["launched"]

# The others wait while one process measures, encodes latents or writes its last shard: hours of
# work, where torch gives up after 10 minutes (nccl) or 30 (gloo).  Launchers notice a dead process.
PATIENCE = timedelta(days=7)


def launched(
    *,
    mixed_precision: str | None = None,
    log_with: str | None = None,
    project_dir: str | None = None,
) -> Accelerator:
    """The processes of this launch, on accelerators or else on CPUs.

    mixed_precision, log_with, project_dir: as of accelerate.Accelerator.
    FlowkitError: a launch in which every process would work alone.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=mixed_precision,
        log_with=log_with,
        project_dir=project_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    world = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != world:
        raise FlowkitError(
            f"the launcher started {world} processes but accelerate sees "
            f"{accelerator.num_processes}, so each would work alone; without GPUs, launch with "
            "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N"
        )
    return accelerator
