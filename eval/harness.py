"""Few-step quality of a flow: Fréchet distances at several numbers of solver steps, streamed.

Pictures are measured as levels 0..255, those that a file would hold, as eval/fid.py does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.eval.features import Extractor
from flowkit.eval.frechet import Frechet, FrechetMoments, frechet_parts
from flowkit.eval.picture_rules import digests_of, pictures_sha256
from flowkit.noise import derive_seed, keyed_noise
from flowkit.pictures import to_uint8
from flowkit.samplers import sample
from flowkit.samplers.evaluations import per_sample
from flowkit.samplers.grids import from_start
from flowkit.samplers.solve import STOCHASTIC
from flowkit.velocity import Velocity

__all__ = ["FewSteps", "MeasuredPictures", "few_step_distances", "picture_moments"]


class MeasuredPictures:
    """Moments of pictures that arrive in batches, and a hash of their levels."""

    def __init__(self, extractor: Extractor) -> None:
        self.extractor, self.moments = extractor, FrechetMoments()
        self._digests: list[Tensor] = []

    def update(self, pictures: Tensor) -> None:
        """Add pictures (B, C, H, W) in [-1, 1]; FlowkitError when one is not finite."""
        levels = to_uint8(pictures)
        self.moments.update(self.extractor(levels))
        self._digests.append(digests_of(levels))

    @property
    def sha256(self) -> str:
        """Over the pictures' own hashes, in order: the same however they were batched."""
        return pictures_sha256(torch.cat(self._digests))


@dataclass(frozen=True)
class FewSteps:
    """What a number of steps of a solver gives.  samples_sha256: of all pictures' levels."""

    steps: int
    distance: Frechet
    samples_sha256: str
    solver: str = "euler"


def picture_moments(data: Any, extractor: Extractor, *, chunk_size: int = 500) -> MeasuredPictures:
    """A data set's pictures, measured; data: flowkit.data.ImageData or anything with its fetch."""
    seen = MeasuredPictures(extractor)
    for start in range(0, len(data), chunk_size):
        rows = range(start, min(start + chunk_size, len(data)))
        seen.update(data.fetch(rows)["data"])
    return seen


@torch.no_grad()
def few_step_distances(
    velocity_of: Callable[[range], Velocity],
    shape: Sequence[int],
    *,
    nfe: Sequence[int],
    num_samples: int,
    seed: int,
    extractor: Extractor,
    reference: FrechetMoments,
    start: float = 0.0,
    chunk_size: int = 500,
    device: torch.device | str = "cpu",
    decode: Callable[[Tensor], Tensor] | None = None,
    own: tuple[str, Sequence[float]] | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[FewSteps]:
    """Fréchet distance to `reference` of the pictures that each number of Euler steps makes.

    velocity_of: the flow for the samples of a range of indices, their conditioning fixed.
    shape: of one sample.  start: the time to start at, from (1 - start) * noise.
    decode: latents to pictures.  progress: told how many samples were made.
    own: a solver and its times, measured after Euler's steps.
    Sample i's noise is keyed_noise(seed, [i], shape); chunks have a fixed size, so the numbers do
    not depend on what else is running.  Returns one result per entry of nfe, and one for `own`.
    FlowkitError: nothing to measure, or pictures that are not finite.
    """
    if num_samples < 2 or min(nfe, default=0) < 1:
        raise FlowkitError(f"need 2 samples and 1 step or more, got {num_samples} and nfe={nfe}")
    plans: list[tuple[str, Sequence[float]]] = [("euler", from_start(start, n)) for n in nfe]
    plans += [] if own is None else [own]
    measured = [MeasuredPictures(extractor) for _ in plans]
    for first in range(0, num_samples, chunk_size):
        indices = range(first, min(first + chunk_size, num_samples))
        velocity = velocity_of(indices)
        noise = keyed_noise(seed, indices, shape).to(device)
        draw = per_sample(derive_seed(seed, "draw"), indices)
        for (solver, times), seen in zip(plans, measured, strict=True):
            options: dict[str, Any] = {"draw": draw} if solver in STOCHASTIC else {}
            x = sample(velocity, (1 - times[0]) * noise, times, solver, **options).x
            pictures = x if decode is None else decode(x)
            if not pictures.isfinite().all():
                raise FlowkitError(
                    f"the flow makes pictures that are not finite in {len(times) - 1} steps "
                    f"(samples {indices.start} to {indices.stop - 1}); check the model's weights"
                )
            seen.update(pictures)
            if progress is not None:
                progress(len(indices))
    return [
        FewSteps(len(times) - 1, frechet_parts(seen.moments, reference), seen.sha256, solver)
        for (solver, times), seen in zip(plans, measured, strict=True)
    ]
