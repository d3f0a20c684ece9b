"""The options of the trainers, as dataclasses: what YAML files and key=value overrides may say.

This module knows nothing of torch, so that --help answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from flowkit.config import option

__all__ = [
    "DataOptions",
    "EvaluateOptions",
    "FlowConfig",
    "NetOptions",
    "PairOptions",
    "PictureOptions",
    "ReflowConfig",
    "RunOptions",
    "TrainOptions",
]


@dataclass
class DataOptions:
    """Which pictures."""

    name: str = option(
        "digits", "digits, cifar10-jpeg, mnist, a torchvision name, folder:PATH, a zip, hf:NAME"
    )
    root: str | None = option(None, "where the files lie, for the sets that have files")
    download: bool = option(False, "let torchvision fetch what is missing")
    size: int | None = option(None, "resize to this many pixels a side (antialiased)", low=1)
    flip: bool = option(False, "mirror pictures left-right at random (pairs: noise with them)")
    conditional: bool = option(False, "train on class labels")
    vae: str | None = option(None, "train on latents of this diffusers VAE (path or hub id)")


@dataclass
class NetOptions:
    """Which network, when one is built: a name and its constructor's arguments."""

    name: str = option("mlp", "mlp, dit, ncsnpp, adm, or unet2d (diffusers' UNet2DModel)")
    options: dict[str, Any] = option({}, "constructor arguments, e.g. net.options.width=128")


@dataclass
class TrainOptions:
    """One stage of training."""

    steps: int = option(
        6500, "optimizer steps; 0 leaves the stage out where that makes sense", low=0
    )
    minutes: float | None = option(
        None, "end the stage after so many minutes of training, whatever steps it has made", low=0
    )
    batch_size: int = option(256, "pictures a step, over all processes", low=1)
    micro_batch_size: int | None = option(
        None, "pictures a forward pass; gradients accumulate up to batch_size", low=1
    )
    optimizer: Literal["adamw", "adam", "radam"] = option("adamw", "which torch optimizer")
    learning_rate: float = option(1e-3, "peak learning rate", low=0)
    betas: tuple[float, float] = option((0.9, 0.999), "Adam's betas", low=0, high=1)
    eps: float = option(1e-8, "Adam's epsilon", low=0)
    weight_decay: float = option(0.0, "weight decay", low=0)
    warmup_steps: int = option(200, "linear warm-up", low=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = option(
        "constant", "what the rate does after the warm-up"
    )
    max_grad_norm: float | None = option(None, "clip the gradient's norm to this", low=0)
    ema_decay: float = option(
        0.999, "EMA decay at step k is min(this, (1 + k) / (10 + k))", low=0, high=1
    )
    times: dict[str, Any] = option(
        {"name": "uniform"},
        "density of t: uniform, logit_normal, mode, cosmap, u_shaped, edm, shifted, constant, "
        "curriculum (easy to hard; base: another)",
    )
    loss: dict[str, Any] = option(
        {"name": "squared"}, "premetric: squared, huber, lpips, lpips_huber, lpips_huber_1/t"
    )
    dropout: float | None = option(
        None, "dropout of the network in this stage; null: as built", low=0, high=1
    )


@dataclass
class PairOptions:
    """The (noise, picture) pairs that a flow's ODE makes."""

    num_pairs: int = option(10_000, "pairs a round", low=1)
    solver: str = option("heun", "solver of the teacher's ODE")
    num_steps: int = option(12, "solver steps (Heun: two network evaluations each)", low=1)
    grid: Literal["uniform", "edm"] = option(
        "uniform", "times of those steps: of one length, or EDM's (rho 7), for EDM teachers"
    )
    guidance_scale: float = option(1.0, "classifier-free guidance of the first teacher; 1: none")
    shard_size: int = option(2_000, "pairs a file", low=1)
    chunk_size: int = option(
        500, "pairs the teacher makes at once; fixes the pairs' last bits", low=1
    )
    dtype: Literal["float32", "float16", "uint8"] = option(
        "float32", "how pictures are stored; uint8 rounds to grey levels"
    )
    real_share: float = option(
        0.0,
        "share of real pictures, paired with their own inversions (rfpp's config G)",
        low=0,
        high=1,
    )
    real_steps: int = option(64, "solver steps of that inversion", low=1)


@dataclass
class EvaluateOptions:
    """How the flows are compared."""

    nfe: list[int] = option([1, 2, 4, 8, 16], "Euler steps to measure", low=1)
    num_samples: int = option(3_000, "pictures a measurement", low=2)
    features: str = option("digits", "digits, cifar-resnet20, pixels, or module:attribute")
    weights: str | None = option(None, "weights file of the feature network")
    split: str = option("test", "the reference pictures")
    straightness_samples: int = option(1_000, "noises for the straightness, over 100 steps", low=1)


@dataclass
class RunOptions:
    """What every trainer takes."""

    output_dir: str = option("runs/run", "everything is written here; the same folder resumes")
    seed: int = option(0, "seed of everything", low=0)
    mixed_precision: Literal["no", "bf16", "fp16"] = option("no", "autocast of the network")
    compile: bool = option(False, "torch.compile the network")
    channels_last: bool = option(False, "keep weights channels last; faster convolutions on GPUs")
    data_on_device: bool = option(False, "hold data and pairs in the device's memory")
    gradient_checkpointing: bool = option(False, "recompute activations to save memory")
    num_workers: int = option(0, "processes that read the data", low=0)
    checkpoint_every: int = option(1_000, "steps between checkpoints", low=1)
    keep_checkpoints: int = option(2, "how many of a stage are kept", low=1)
    sample_every: int = option(1_000, "steps between sample grids; 0: none", low=0)
    log_every: int = option(50, "steps between logged values", low=1)
    max_skipped_steps: int = option(20, "stop after this many non-finite steps in a row", low=0)
    report_to: Literal["none", "wandb", "tensorboard"] = option("none", "experiment tracker")
    push_to_hub: str | None = option(
        None, "hub repository that gets the result, e.g. me/digits-2rf"
    )


@dataclass
class PictureOptions(RunOptions):
    """What every trainer takes that makes pictures and measures them."""

    data: DataOptions = field(default_factory=DataOptions)
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)


@dataclass
class FlowConfig(PictureOptions):
    """Options of trainers/flow.py."""

    output_dir: str = option("runs/flow", "everything is written here; the same folder resumes")
    net: NetOptions = field(default_factory=NetOptions)
    training: TrainOptions = field(default_factory=TrainOptions)


def _reflow_training() -> TrainOptions:
    return TrainOptions(
        steps=3250,
        learning_rate=5e-4,
        times={"name": "u_shaped"},
        loss={"name": "huber", "preset": "rfpp"},
    )


def _distillation() -> TrainOptions:
    return TrainOptions(
        steps=1625, learning_rate=5e-4, times={"name": "constant", "t": 0.0}, warmup_steps=100
    )


@dataclass
class ReflowConfig(PictureOptions):
    """Options of trainers/reflow.py."""

    output_dir: str = option("runs/reflow", "everything is written here; the same folder resumes")
    teacher: str = option("train", "train: train one first; else a folder or hub id of a model")
    net: NetOptions = field(default_factory=NetOptions)
    teacher_training: TrainOptions = field(default_factory=TrainOptions)
    student_net: NetOptions | None = option(
        None, "another network for the student, e.g. a smaller one; null: start from the teacher"
    )
    rounds: int = option(1, "1 gives a 2-rectified flow, 2 a 3-rectified flow, ...", low=1)
    pairs: PairOptions = field(default_factory=PairOptions)
    student_training: TrainOptions = field(default_factory=_reflow_training)
    distillation: TrainOptions = field(default_factory=_distillation)
    control: bool = option(
        True, "also train the teacher on for as long as the student, for a fair comparison"
    )
