"""Evaluation: distances of picture sets, measures of flows, reports."""

from __future__ import annotations

from flowkit.eval.features import Extractor, load_extractor
from flowkit.eval.flow_measures import Straightness, straightness
from flowkit.eval.frechet import Frechet, FrechetMoments, frechet_distance, frechet_parts
from flowkit.eval.harness import few_step_distances, picture_moments

__all__ = [
    "Extractor",
    "Frechet",
    "FrechetMoments",
    "Straightness",
    "few_step_distances",
    "frechet_distance",
    "frechet_parts",
    "load_extractor",
    "picture_moments",
    "straightness",
]
