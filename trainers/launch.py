"""The processes of a run and its experiment trackers, by accelerate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.processes import launched
from flowkit.trainers.order import Order
from flowkit.trainers.settings import RunOptions, TrainOptions

__all__ = ["banner", "log_picture", "make_accelerator"]


def make_accelerator(run: RunOptions) -> Accelerator:
    """The accelerator of a run; refuses a launch in which every process would train alone."""
    accelerator = launched(
        mixed_precision=run.mixed_precision,
        log_with=None if run.report_to == "none" else run.report_to,
        project_dir=run.output_dir,
    )
    if run.report_to != "none" and not accelerator.log_with:
        raise FlowkitError(
            f"report_to={run.report_to} needs {run.report_to}; install it, or report_to=none"
        )
    return accelerator


def banner(name: str, options: TrainOptions, order: Order, parameters: Sequence[Tensor]) -> str:
    """What a stage of training says of itself when it starts."""
    micro = order.micro_batch_size or 0
    return (
        f"***** Running training: {name} *****\n"
        f"  Num examples = {order.size:,}\n"
        f"  Num parameters = {sum(p.numel() for p in parameters):,}\n"
        f"  Batch size per device = {micro}\n"
        f"  Gradient accumulation steps = {options.batch_size // (micro * order.world)}\n"
        f"  Total train batch size (parallel, accumulated) = {options.batch_size}\n"
        f"  Total optimization steps = {options.steps:,}"
    )


def log_picture(accelerator: Accelerator, name: str, path: Path, step: int) -> None:
    """Send a picture file to the trackers that take pictures."""
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            import wandb

            tracker.log({name: wandb.Image(str(path))}, step=step)
        elif tracker.name == "tensorboard":
            from torchvision.io import decode_image

            tracker.writer.add_image(name, decode_image(str(path)), step)
