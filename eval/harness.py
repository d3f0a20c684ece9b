"""Few-step quality of a flow: Fréchet distances at several numbers of solver steps, streamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.eval.features import Extractor
from flowkit.eval.frechet import FrechetMoments, frechet_distance
from flowkit.noise import keyed_noise
from flowkit.samplers import sample
from flowkit.samplers.grids import from_start
from flowkit.velocity import Velocity

__all__ = ["few_step_distances", "picture_moments"]


def picture_moments(data: Any, extractor: Extractor, *, chunk_size: int = 500) -> FrechetMoments:
    """Moments of a data set's features; data: flowkit.data.ImageData or anything with its fetch."""
    moments = FrechetMoments()
    for start in range(0, len(data), chunk_size):
        rows = range(start, min(start + chunk_size, len(data)))
        moments.update(extractor(data.fetch(rows)["data"]))
    return moments


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
    progress: Callable[[int], object] | None = None,
) -> list[float]:
    """Fréchet distance to `reference` of the pictures that each number of Euler steps makes.

    velocity_of: the flow for the samples of a range of indices, their conditioning fixed.
    shape: of one sample.  start: the time to start at, from (1 - start) * noise.
    decode: latents to pictures.  progress: told how many samples were made.
    Sample i's noise is keyed_noise(seed, [i], shape); chunks have a fixed size, so the numbers do
    not depend on what else is running.  Returns one distance per entry of nfe.
    FlowkitError: nothing to measure, or pictures that are not finite.
    """
    if num_samples < 2 or min(nfe, default=0) < 1:
        raise FlowkitError(f"need 2 samples and 1 step or more, got {num_samples} and nfe={nfe}")
    moments = [FrechetMoments() for _ in nfe]
    for first in range(0, num_samples, chunk_size):
        indices = range(first, min(first + chunk_size, num_samples))
        velocity = velocity_of(indices)
        noise = (1 - start) * keyed_noise(seed, indices, shape).to(device)
        for steps, seen in zip(nfe, moments, strict=True):
            x = sample(velocity, noise, from_start(start, steps), solver="euler").x
            pictures = x if decode is None else decode(x)
            if not pictures.isfinite().all():  # clamping would hide an infinity
                raise FlowkitError(
                    f"the flow makes pictures that are not finite in {steps} steps "
                    f"(samples {indices.start} to {indices.stop - 1}); check the model's weights"
                )
            seen.update(extractor(pictures.clamp(-1, 1)))
            if progress is not None:
                progress(len(indices))
    return [frechet_distance(seen, reference) for seen in moments]
