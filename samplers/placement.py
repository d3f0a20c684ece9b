"""Where a cache that forecasts should compute in full: what its run errs by, known before it runs.

    errors = forecast_errors(velocity, noise, times, order=2)       # two full runs
    steps = optimal_sharing(errors, 14)
    with taylorseer(model, steps=steps, order=2):
        x = sample(velocity, noise, times).x

A forecast is a sum of values kept, so the error of a whole run is a sum of one full run's
velocities with known weights, and the errors of its forecasts may cancel or add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.samplers.forecast import Rule
from flowkit.samplers.solve import invert, sample
from flowkit.velocity import Velocity

__all__ = ["ForecastErrors", "forecast_errors"]

Way = tuple[np.ndarray, tuple[int, ...]]  # an error, and the steps that lead to it, newest first


@dataclass(frozen=True, eq=False)
class ForecastErrors:
    """What N steps err by at their end where only some are computed and the others are forecast.

    velocities: (N, M), of a full run, in any coordinates that keep lengths.  weights: (N, M), how
    far each of them moves the end.  times: (N,).  order: of the forecasts.
    """

    velocities: np.ndarray
    weights: np.ndarray
    times: np.ndarray
    order: int

    def __len__(self) -> int:
        return len(self.weights)

    def cost(self, steps: Sequence[int]) -> float:
        """The length of the error when `steps`, which increase from 0, are computed."""
        error = np.zeros(self.velocities.shape[1])
        for i, (a, e) in enumerate(pairwise([*steps, len(self)])):
            error += self.since(tuple(steps[: i + 1][::-1]))[e - a - 1]
        return float(np.linalg.norm(error))

    def place(self, count: int) -> list[int]:
        """The `count` steps to compute, the first always one, that leave the least error.

        C(a, e) = min over a' of |E(a', a) + W(a', a, e)|       E: the errors up to a on the way
                                                               that had the least, C(a', a)
        W(.., a', a, e) = sum over a < k < e of weight_k (forecast_k - velocity_k)

        A dynamic program over the last two steps computed.  Errors have signs and directions, so it
        is exact only where they all point one way; else it finds a good answer, not surely the
        best.  In O(count N^3), some seconds for 50 steps and 16 samples.
        """
        n = len(self)
        start: Way = np.zeros(self.velocities.shape[1]), (0,)
        ways = {0: [start]}  # to each newest step, from each before it
        for left in reversed(range(count)):  # steps still to be placed
            better: dict[int, list[Way]] = {}
            for a, before in ways.items():
                ends = range(a + 1, n - left + 1) if left else range(n, n + 1)
                reach = slice(ends.start - a - 1, ends.stop - a - 1)
                totals = np.array([error + self.since(chosen)[reach] for error, chosen in before])
                least = np.linalg.norm(totals, axis=2).argmin(axis=0)
                for j, (i, e) in enumerate(zip(least, ends, strict=True)):
                    better.setdefault(e, []).append((totals[i, j], (e, *before[i][1])))
            ways = better
        _, chosen = min(ways[n], key=lambda way: np.linalg.norm(way[0]))
        return list(chosen[:0:-1])

    def since(self, chosen: Sequence[int]) -> np.ndarray:
        """The errors since the newest of `chosen`, newest first: (N - a, M), row i up to a + 1 + i.

        A forecast is the polynomial through the velocities of the newest order + 1.
        """
        nodes = list(chosen[: self.order + 1])
        after = slice(nodes[0] + 1, None)
        t, at = self.times, self.times[after]
        weights = [
            np.prod([(at - t[b]) / (t[a] - t[b]) for b in nodes if b != a], 0) for a in nodes
        ]
        weights = [weight * np.ones(len(at)) for weight in weights]  # order 0 has an empty product
        wrong = np.transpose(weights) @ self.velocities[nodes] - self.velocities[after]
        errors = np.cumsum(self.weights[after] * wrong, axis=0)
        return np.concatenate([np.zeros((1, errors.shape[1])), errors])


@torch.no_grad()
def forecast_errors(
    velocity: Velocity,
    noise: Tensor,
    times: Sequence[float],
    *,
    order: int = 2,
    push: float = 0.01,
) -> ForecastErrors:
    """What `optimal_sharing` needs to place the full steps of a cache that forecasts.

    noise: (B, *), the state at times[0], of a few samples; the steps serve any others.  times: in
    the order of the run, decreasing for an inversion.  order: the cache's, in mode "newton".
    It runs the default solver twice with everything computed, under no cache: from noise, and from
    noise pushed by `push` of its length along the first change of the velocity, where forecasts err
    too: by how much that grows, sample by sample, is what an error at each step does to the end.

    The velocities stand for the features, whose errors cost nearly the same.  sharing_cost gives
    the error of any steps, relative to the last state; discretisation is not in it.
    Raises FlowkitError for velocities that are not finite, and for an order that no cache has.
    """
    grid = [float(t) for t in times]
    Rule(order)  # checks it
    states, velocities = _full_run(velocity, noise, grid)
    towards = _unit(velocities[min(1, len(velocities) - 1)] - velocities[0])
    others, _ = _full_run(velocity, noise + push * _lengths(noise) * towards, grid)
    apart = torch.stack([_lengths(a - b).flatten() for a, b in zip(others, states, strict=True)])
    growth = torch.where(apart[:-1] > 0, apart[-1] / apart[:-1], 1.0).double().cpu().numpy()
    samples = [_coordinates(rows) for rows in zip(*velocities, strict=True)]
    end = max(float(states[-1].norm()), torch.finfo(torch.float32).tiny)
    return ForecastErrors(
        np.concatenate(samples, axis=1) / end,
        np.diff(grid)[:, None] * growth.repeat([s.shape[1] for s in samples], axis=1),
        np.array(grid[:-1]),
        order,
    )


def _full_run(
    velocity: Velocity, noise: Tensor, times: Sequence[float]
) -> tuple[list[Tensor], list[Tensor]]:
    """The states at all times and the velocities of all steps."""
    states, velocities = [], []

    def watched(x: Tensor, t: float | Tensor) -> Tensor:
        states.append(x)
        velocities.append(velocity(x, t))
        return velocities[-1]

    forwards = times[0] < times[-1]
    run = sample if forwards else invert
    states.append(run(watched, noise, times if forwards else times[::-1]).x)
    return states, velocities


def _lengths(x: Tensor) -> Tensor:
    """Of each sample, to multiply it with."""
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


def _unit(x: Tensor) -> Tensor:
    """x with samples of length 1; 0 stays 0."""
    return x / _lengths(x).clamp_min(torch.finfo(x.dtype).tiny)


def _coordinates(vectors: Sequence[Tensor]) -> np.ndarray:
    """(N, r): N vectors as they lie to one another, in coordinates of what they span.

    Directions in which they are a 10^-4 of their greatest extent are left out.
    """
    wide = torch.stack([vector.cpu().double().flatten() for vector in vectors])
    if not wide.isfinite().all():
        raise FlowkitError("the velocities of the full run are not finite; check model and times")
    squares, axes = np.linalg.eigh((wide @ wide.T).numpy())
    kept = squares >= 1e-8 * squares[-1]
    return axes[:, kept] * np.sqrt(squares[kept].clip(0))
