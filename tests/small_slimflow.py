"""A SlimFlow run of seconds: its options, and LPIPS on random features."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision

from flowkit.config import parse
from flowkit.trainers.slimflow_settings import SlimFlowConfig

SHAPE = (1, 8, 8)
SMALL = [
    *("net.options.width=32", "net.options.num_blocks=1", "sample_every=0", "log_every=20"),
    *("teacher_training.steps=20", "teacher_training.batch_size=64", "checkpoint_every=5"),
    *("student_net.options.width=16", "student_net.options.num_blocks=1", "annealing.steps=12"),
    *("student_training.steps=20", "student_training.batch_size=64", "keep_checkpoints=9"),
    *("student_training.micro_batch_size=32", "distillation.micro_batch_size=32"),
    *("distillation.steps=15", "distillation.batch_size=64", "evaluate.nfe=[1]"),
    *("pairs.num_pairs=400", "pairs.shard_size=100", "pairs.chunk_size=50", "pairs.num_steps=4"),
    *("own_pairs.num_pairs=400", "own_pairs.shard_size=100", "own_pairs.chunk_size=50"),
    *("own_pairs.num_steps=4", "evaluate.num_samples=100", "evaluate.straightness_samples=1"),
]
FEW = [
    *("student_training.steps=2", "distillation.steps=2"),
    *("pairs.num_pairs=100", "own_pairs.num_pairs=100", "evaluate.num_samples=10"),
    *("teacher_training.steps=2", "annealing.steps=2"),
]


def small_config(folder: Path, *overrides: str) -> SlimFlowConfig:
    """SMALL with those overrides, in that folder."""
    return parse(SlimFlowConfig, [*SMALL, f"output_dir={folder}", *overrides], doc="")


def random_lpips(folder: Path, size: int) -> str:
    """The option of that distance, with a file of AlexNet's names and shapes in `folder`."""
    with torch.device("meta"):
        layers = torchvision.models.alexnet(weights=None).features.state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {
        f"features.{name}": torch.empty(value.shape).uniform_(-0.05, 0.05, generator=generator)
        for name, value in layers.items()
    }
    path = folder / "alexnet.pth"
    torch.save(state, path)
    return f"distillation.loss={{name: lpips, net: alex, weights: '{path}', size: {size}}}"
