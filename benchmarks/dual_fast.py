"""How DualFast's defaults were found: a search on a small flow of digits, then fresh noise.

  python benchmarks/dual_fast.py                    trains the flow first, as trainers/flow.py does
  python benchmarks/dual_fast.py runs/flow/model    takes a trained one

Every figure is a Fréchet distance to the held-out digits, of the feature network or of the plain
pixels, divided by that of the base solver alone with the same noise; tables show geometric means
over solvers and numbers of evaluations.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from flowkit.adapters import from_diffusers
from flowkit.data import load_data
from flowkit.eval import frechet_distance, load_extractor, picture_moments
from flowkit.eval.frechet import FrechetMoments
from flowkit.noise import keyed_noise
from flowkit.samplers import sample
from flowkit.samplers.dual import dual_fast
from flowkit.samplers.grids import uniform
from flowkit.trainers.settings import FlowConfig
from flowkit.trainers.straighten import train_flow

BASES, NFE = ("euler", "ab2", "dpmpp_2m"), (5, 10, 20)  # euler is DDIM
FEATURES = ("digits", "pixels")
STRENGTHS, POWERS = (0.1, 0.2, 0.3, 0.4, 0.6, 0.9, 1.3), (0.0, 1.0, 2.0)
SAMPLES, SEARCH_SEED, FRESH_SEEDS = 2000, 0, (1, 2, 3)

Ratios = dict[tuple[str, int], tuple[float, ...]]


class Digits:
    """The distances of a digits flow, and their ratios to those of the base solvers alone."""

    def __init__(self, folder: Path) -> None:
        data = load_data("digits", "test")
        self.model, self.shape = from_diffusers(folder), data.shape
        self.extractors = [load_extractor(name) for name in FEATURES]
        self.references = [
            picture_moments(data, extractor).moments for extractor in self.extractors
        ]
        self.alone: dict[tuple[str, int, int], list[float]] = {}

    @torch.inference_mode()
    def distances(self, nfe: int, seed: int, solver: Any, **options: Any) -> list[float]:
        """One for each of FEATURES."""
        noise = keyed_noise(seed, range(SAMPLES), self.shape)
        x = sample(self.model, noise, uniform(nfe), solver, **options).x.clamp(-1, 1)
        found = []
        for extractor, reference in zip(self.extractors, self.references, strict=True):
            moments = FrechetMoments()
            moments.update(extractor(x))
            found.append(frechet_distance(moments, reference))
        return found

    def ratios(self, seed: int, **options: Any) -> Ratios:
        """With DualFast / without, for every base and number of evaluations."""
        found = {}
        for base, nfe in product(BASES, NFE):
            if (base, nfe, seed) not in self.alone:
                self.alone[base, nfe, seed] = self.distances(nfe, seed, base)
            pairs = zip(
                self.distances(nfe, seed, dual_fast, base=base, **options),
                self.alone[base, nfe, seed],
                strict=True,
            )
            found[base, nfe] = tuple(ours / theirs for ours, theirs in pairs)
        return found


def mean(ratios: Iterable[float]) -> float:
    return statistics.geometric_mean(ratios)


def candidates() -> Iterator[dict[str, Any]]:
    for anchor, power, strength in product(("first", "previous"), POWERS, STRENGTHS):
        yield {"anchor": anchor, "power": power, "strength": strength}


def search(digits: Digits) -> None:
    """Print every candidate's means."""
    print("anchor    power  strength   digits  pixels    both   worst")
    for options in candidates():
        ratios = digits.ratios(SEARCH_SEED, **options).values()
        means = [mean(row[i] for row in ratios) for i in range(len(FEATURES))]
        columns = [*means, math.sqrt(math.prod(means)), max(max(row) for row in ratios)]
        print(
            f"{options['anchor']:9} {options['power']:5.1f} {options['strength']:9.2f} "
            + "".join(f"{value:8.3f}" for value in columns),
            flush=True,
        )


def validate(digits: Digits) -> None:
    """Print the defaults' means over fresh noise, base by base."""
    runs = [digits.ratios(seed) for seed in FRESH_SEEDS]
    print(f"\ndefaults, seeds {FRESH_SEEDS}\nbase        NFE    FD alone   digits  pixels")
    for base, nfe in product(BASES, NFE):
        alone = statistics.mean(digits.alone[base, nfe, seed][0] for seed in FRESH_SEEDS)
        means = [mean(run[base, nfe][i] for run in runs) for i in range(len(FEATURES))]
        print(f"{base:10} {nfe:4} {alone:11.2f} " + "".join(f"{value:8.3f}" for value in means))


def main() -> None:
    """Search, then validate."""
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) < 2:
            train_flow(FlowConfig(output_dir=folder))
        digits = Digits(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "model")
        search(digits)
        validate(digits)


if __name__ == "__main__":
    main()
