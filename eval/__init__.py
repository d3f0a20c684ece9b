"""Evaluation: distances of picture sets, measures of flows, the harness, records, leaderboards.

Names load when they are first asked for, so that the commands' --help needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowkit.eval.clip_score import ClipScore, clip_scores
    from flowkit.eval.diversity import vendi_score
    from flowkit.eval.extrapolate import frechet_infinity, frechet_jackknife
    from flowkit.eval.features import Extractor, load_extractor
    from flowkit.eval.flow_measures import (
        FewStepGap,
        PathShape,
        Straightness,
        acceleration,
        few_step_gap,
        path_shape,
        straightness,
    )
    from flowkit.eval.frechet import (
        Frechet,
        FrechetMoments,
        FrechetReference,
        frechet_distance,
        frechet_parts,
    )
    from flowkit.eval.harness import (
        FewSteps,
        MeasuredPictures,
        few_step_distances,
        picture_moments,
    )
    from flowkit.eval.inception_scores import inception_score
    from flowkit.eval.inversion import InversionError, inversion_error, normality
    from flowkit.eval.kernel import cmmd, kernel_distance, kernel_parts
    from flowkit.eval.manifold import (
        authentic_percentage,
        density_coverage,
        precision_recall,
        realism,
    )
    from flowkit.eval.picture_quality import psnr, ssim
    from flowkit.eval.records import Record, comparable, read_record, write_record
    from flowkit.eval.sliced import sliced_distance
    from flowkit.eval.speed import measure_speed

_HOME = {
    "clip_score": ("ClipScore", "clip_scores"),
    "diversity": ("vendi_score",),
    "extrapolate": ("frechet_infinity", "frechet_jackknife"),
    "features": ("Extractor", "load_extractor"),
    "flow_measures": (
        "FewStepGap",
        "PathShape",
        "Straightness",
        "acceleration",
        "few_step_gap",
        "path_shape",
        "straightness",
    ),
    "frechet": (
        "Frechet",
        "FrechetMoments",
        "FrechetReference",
        "frechet_distance",
        "frechet_parts",
    ),
    "harness": ("FewSteps", "MeasuredPictures", "few_step_distances", "picture_moments"),
    "inception_scores": ("inception_score",),
    "inversion": ("InversionError", "inversion_error", "normality"),
    "kernel": ("cmmd", "kernel_distance", "kernel_parts"),
    "manifold": ("authentic_percentage", "density_coverage", "precision_recall", "realism"),
    "picture_quality": ("psnr", "ssim"),
    "records": ("Record", "comparable", "read_record", "write_record"),
    "sliced": ("sliced_distance",),
    "speed": ("measure_speed",),
}

__all__ = [
    "ClipScore",
    "Extractor",
    "FewStepGap",
    "FewSteps",
    "Frechet",
    "FrechetMoments",
    "FrechetReference",
    "InversionError",
    "MeasuredPictures",
    "PathShape",
    "Record",
    "Straightness",
    "acceleration",
    "authentic_percentage",
    "clip_scores",
    "cmmd",
    "comparable",
    "density_coverage",
    "few_step_distances",
    "few_step_gap",
    "frechet_distance",
    "frechet_infinity",
    "frechet_jackknife",
    "frechet_parts",
    "inception_score",
    "inversion_error",
    "kernel_distance",
    "kernel_parts",
    "load_extractor",
    "measure_speed",
    "normality",
    "path_shape",
    "picture_moments",
    "precision_recall",
    "psnr",
    "read_record",
    "realism",
    "sliced_distance",
    "ssim",
    "straightness",
    "vendi_score",
    "write_record",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"flowkit.eval.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
