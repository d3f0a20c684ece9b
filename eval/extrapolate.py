"""Fréchet distances without their sample-size bias, and their error bars.

FD_N of N generated samples is about FD_inf + c / N, with a c of the model's own, so that models may
change places with N; a line through several N gives FD_inf (Chong and Forsyth, 2020,
arXiv:1911.07023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flowkit.errors import FlowkitError
from flowkit.eval.frechet import Features, FrechetMoments, FrechetReference, Rows, feature_rows

__all__ = ["Extrapolation", "Jackknife", "frechet_infinity", "frechet_jackknife"]

SMALLEST = 5000


@dataclass(frozen=True)
class Extrapolation:
    """A line through Fréchet distances against 1 / N: value where 1 / N = 0, slope per 1 / N.

    sizes, distances: the points.  residual: their root mean square distance from the line.
    """

    value: float
    slope: float
    residual: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


@dataclass(frozen=True)
class Jackknife:
    """A Fréchet distance, its standard error, and the distance less its 1 / N bias."""

    value: float
    std: float
    corrected: float
    groups: int


def frechet_infinity(
    real: Features, generated: Rows, *, points: int = 15, smallest: int | None = None, seed: int = 0
) -> Extrapolation:
    """FID-infinity of generated features (N, d) against real ones, features or moments.

    points: sizes evenly from `smallest` (5000, or a tenth of fewer than 50,000) to N, each with
    samples of its own, drawn without replacement by numpy's generator of (seed, point).
    The real set is used whole; the bias of its own size stays.
    FlowkitError: fewer than two different sizes, and as frechet_distance.
    """
    rows = feature_rows(generated)
    n = len(rows)
    least = min(SMALLEST, max(n // 10, 2)) if smallest is None else smallest
    sizes = np.linspace(least, n, max(points, 1)).astype(int)
    if not 2 <= least < n or len(set(sizes.tolist())) < 2:
        raise FlowkitError(
            f"cannot fit a line through {points} sizes from {least} to {n} samples; give more "
            "samples, or a smaller `smallest`"
        )
    reference, distances = FrechetReference(real), []
    for point, size in enumerate(sizes):
        chosen = np.random.default_rng([seed, point]).choice(n, size, replace=False)
        moments = FrechetMoments()
        moments.update(rows[torch.from_numpy(chosen).to(rows.device)])
        distances.append(reference.parts(moments).value)
    slope, value = np.polyfit(1 / sizes, distances, 1)
    residual = np.sqrt(np.mean((value + slope / sizes - distances) ** 2))
    kept = tuple(sizes.tolist()), tuple(distances)
    return Extrapolation(float(value), float(slope), float(residual), *kept)


def frechet_jackknife(
    chunks: Sequence[FrechetMoments], reference: Features | FrechetReference, *, groups: int = 20
) -> Jackknife:
    """The error of a Fréchet distance, from distances that each leave one group of chunks out.

    chunks: moments of parts of the generated set, joined in their order into at most `groups`
    groups, which may differ in size (Busing, Meijer and van der Leeden, 1999, eq. 7 to 9): with
    h = N / m of a group of m samples, and FD' the distance without it, corrected is
    g FD - sum (1 - 1 / h) FD', and std^2 the mean of (h FD - (h - 1) FD' - corrected)^2 / (h - 1).
    Equal groups give Quenouille's correction and the error of Efron and Stein (1981, eq. 1.4).
    FlowkitError: fewer than two chunks with samples, or one group that holds nearly all.
    """
    filled = [chunk for chunk in chunks if chunk.n]
    g = min(groups, len(filled))
    if g < 2:
        raise FlowkitError(f"got {len(filled)} chunks in {groups} groups; give two or more of both")
    whole, parts = FrechetMoments(), [FrechetMoments() for _ in range(g)]
    for i, chunk in enumerate(filled):
        parts[i * g // len(filled)].merge(chunk)
        whole.merge(chunk)
    if not isinstance(reference, FrechetReference):
        reference = FrechetReference(reference)
    value = reference.parts(whole).value
    left_out = np.array([reference.parts(whole.without(part)).value for part in parts])
    h = np.array([whole.n / part.n for part in parts])
    corrected = g * value - ((1 - 1 / h) * left_out).sum()
    pseudo = h * value - (h - 1) * left_out
    spread = np.mean((pseudo - corrected) ** 2 / (h - 1))
    return Jackknife(value, float(spread**0.5), float(corrected), g)
