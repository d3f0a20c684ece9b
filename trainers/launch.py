"""The processes of a run and its experiment trackers, by accelerate."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from flowkit.errors import FlowkitError
from flowkit.trainers.settings import RunOptions

__all__ = ["log_picture", "make_accelerator"]

# The others wait while one process measures, encodes latents or writes its last shard: hours of
# work, where torch gives up after 10 minutes (nccl) or 30 (gloo).  Launchers notice a dead process.
PATIENCE = timedelta(days=7)


def make_accelerator(run: RunOptions) -> Accelerator:
    """The accelerator of a run; refuses a launch in which every process would train alone."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=run.mixed_precision,
        log_with=None if run.report_to == "none" else run.report_to,
        project_dir=run.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if run.report_to != "none" and not accelerator.log_with:
        raise FlowkitError(
            f"report_to={run.report_to} needs {run.report_to}; install it, or report_to=none"
        )
    world = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != world:
        raise FlowkitError(
            f"the launcher started {world} processes but accelerate sees "
            f"{accelerator.num_processes}, so each would train alone; "
            "without GPUs, launch with ACCELERATE_USE_CPU=true torchrun --nproc_per_node N"
        )
    return accelerator


def log_picture(accelerator: Accelerator, name: str, path: Path, step: int) -> None:
    """Send a picture file to the trackers that take pictures."""
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            import wandb

            tracker.log({name: wandb.Image(str(path))}, step=step)
        elif tracker.name == "tensorboard":
            from torchvision.io import decode_image

            tracker.writer.add_image(name, decode_image(str(path)), step)
