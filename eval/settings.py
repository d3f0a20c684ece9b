"""The options of the measuring commands, as dataclasses: what YAML files and key=value may say.

This module knows nothing of torch, so that --help answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from flowkit.config import option

__all__ = ["FidConfig", "GuidanceOptions", "PictureRules", "ReferenceConfig"]

_PICTURES = (
    "a folder or zip (all below it, sorted), an npz or npy of uint8 pictures, or a data set as "
    "NAME-SPLIT: digits-test, cifar10-train, cifar10-jpeg-test, hf:NAME-train; no split: train"
)
_FEATURES = (
    "inception, inception:legacy_pytorch, inception:legacy_tensorflow, dinov2-vitl14, "
    "clip-vitl14-336, cifar-resnet20, digits, pixels, or module:attribute"
)


@dataclass
class PictureRules:
    """What to do with pictures that are not all square, of one size, and RGB (or all grey)."""

    channels: Literal["as_is", "rgb", "grey"] = option(
        "as_is", "as_is: all must agree; rgb: repeat a grey channel; grey: luma of colours"
    )
    alpha: Literal["refuse", "drop", "white", "black"] = option(
        "refuse", "transparent pictures: refuse, drop the channel, or lay them on a colour"
    )
    crop: Literal["refuse", "stretch", "center", "adm"] = option(
        "refuse",
        "pictures that are not square: refuse; stretch: the extractor resizes each side by itself; "
        "center: crop the middle; adm: guided-diffusion's box-halving, bicubic resize and crop",
    )
    size: int | None = option(
        None, "side after the crop (center: antialiased bicubic); null: as cropped", low=1
    )


@dataclass
class GuidanceOptions:
    """Classifier-free guidance of a class-conditional model."""

    scale: float = option(1.0, "v_u + scale (v_c - v_u); 1: none, and one network call a step")
    interval: tuple[float, float] | None = option(
        None, "guide only at times t inside it (0 noise, 1 data); null: everywhere"
    )
    rescale: float = option(0.0, "pull v's deviation back to the conditional one's", low=0, high=1)


@dataclass
class FidConfig:
    """Options of eval/fid.py."""

    reference: str = option(
        help=f"what to compare with: {_PICTURES}; or statistics: an npz with mu and sigma"
    )
    model: str | None = option(
        None,
        "what to sample: a folder of trainers/*.py, a diffusers pipeline or model (folder or hub "
        "id), or module:attribute, a velocity (x_t, t) -> v",
    )
    pictures: str | None = option(None, f"what to measure instead of a model: {_PICTURES}")
    output_dir: str = option(
        "runs/fid", "finished chunks, records and grids; the same folder resumes"
    )
    records: str | None = option(None, "folder for the records; null: output_dir/records")
    name: str | None = option(None, "the record's name; null: the model's folder or the pictures'")

    features: str = option("inception", f"what is measured on: {_FEATURES}")
    weights: str | None = option(None, "weights file of the extractor; null: where it belongs")
    metrics: list[str] = option(
        ["fid"],
        "of one feature pass: fid, sfid, kid, is, precision_recall, density_coverage, "
        "fid_infinity, mind, vendi, cmmd, authenticity",
    )
    metric_options: dict[str, Any] = option(
        {}, "options of a metric's function, e.g. metric_options.kid={subsets: 100}"
    )
    manifold_samples: int = option(
        10_000, "pictures of each set for neighbour measures, drawn with the seed", low=8
    )
    reference_convention: str | None = option(
        None, "what statistics without metadata were made with, e.g. legacy_tensorflow"
    )
    reference_dir: str = option("runs/references", "features of references are kept here")

    nfe: list[int] | None = option(
        [1, 2, 4, 8], "evaluations of the velocity, each a record; null: adaptive solver", low=1
    )
    solver: str = option(
        "abm",
        "any solver of flowkit.samplers, a searched schedule.json, or own: the solver and times "
        "that the model's folder names (with nfe=null)",
    )
    solver_options: dict[str, Any] = option({}, "its options")
    grid: dict[str, Any] = option(
        {"name": "power", "exponent": 1.5},
        "times: power, uniform, shifted, dynamic, edm, karras, log_snr, cosine or beta",
    )
    cache: dict[str, Any] | None = option(
        None, "feature cache, e.g. {name: taylorseer, interval: 4, order: 1}"
    )
    labels: Literal["balanced", "random"] = option(
        "balanced", "classes of a conditional model: sample i gets i mod classes, or a keyed draw"
    )
    num_classes: int | None = option(None, "of a model that does not say it", low=1)
    shape: list[int] | None = option(
        None, "(C, H, W) of a sample of a model that does not say it", low=1
    )
    vae: str | None = option(None, "decoder of a latent model; null: the one it names")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "of the model's weights")

    num_samples: int | None = option(
        None, "pictures a measurement; null: 50,000 of a model, all of a folder", low=2
    )
    repeats: int = option(1, "disjoint seed ranges of num_samples: mean, std and min", low=1)
    seed: int = option(0, "of the noise; sample i depends on (seed, i) alone", low=0)
    chunk_size: int = option(250, "pictures computed in one batch; part of the record", low=1)
    jackknife: int = option(
        10,
        "groups of chunks for the standard error of the Fréchet distance; fewer than 5: none",
        low=0,
    )
    straightness_samples: int = option(
        1_000, "noises for the straightness of a model's paths; 0: none", low=0
    )
    straightness_steps: int = option(100, "Euler steps of that path", low=2)
    save_pictures: bool = option(False, "also write each picture as PNG, to output_dir/pictures")
    progress: bool = option(True, "show a progress bar")

    rules: PictureRules = field(default_factory=PictureRules)
    guidance: GuidanceOptions = field(default_factory=GuidanceOptions)


@dataclass
class ReferenceConfig:
    """Options of eval/reference.py."""

    data: str = option(help=f"the pictures: {_PICTURES}")
    out: str = option(help="the npz to write; its metadata stand beside it as .json")
    features: str = option("inception", f"extractor: {_FEATURES}")
    weights: str | None = option(None, "weights file of the extractor; null: where it belongs")
    num_samples: int | None = option(None, "as many, drawn with the seed; null: all", low=2)
    seed: int = option(0, "of that draw", low=0)
    keep_features: bool = option(False, "store the features too, for KID and neighbour measures")
    chunk_size: int = option(250, "pictures computed in one batch", low=1)
    output_dir: str = option("runs/references", "finished chunks; the same folder resumes")
    progress: bool = option(True, "show a progress bar")
    rules: PictureRules = field(default_factory=PictureRules)
