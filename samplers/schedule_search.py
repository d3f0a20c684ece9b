"""Searching schedules: an objective, what to be no worse than, and the two searches themselves.

The command is flowkit.samplers.search.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.samplers import grids
from flowkit.samplers.evolution import Evolution, Objective, Predictor, Scored, evolve
from flowkit.samplers.polishing import polish
from flowkit.samplers.schedule_file import UNIFIED, Schedule
from flowkit.samplers.schedule_moves import on_cells, unified_schedules, vary_steps, vary_times
from flowkit.samplers.solve import evaluation_times, sample
from flowkit.velocity import Velocity

__all__ = ["SampleError", "data_mean", "find_schedule", "find_times", "fixed_schedules"]

# Solvers outside the space of steps that a search is to be no worse than.
_OTHERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ab3", {}),
    ("ab4", {}),
    ("fireflow", {}),
    ("midpoint", {}),
    ("deis", {"quantity": "data"}),
    ("unipc", {"order": 3}),
)
_GRIDS = {"uniform": grids.uniform, "power": grids.power}


class SampleError:
    """The objective that a search has by default: how far samples are from the true ones.

    velocity: bound to its conditioning.  noise: (N, *), common to all schedules.
    measure: what to call the samples' score instead, a callable on (N, *) such as a Frechet
    distance to reference features; else it is the root mean square distance to a run of
    `reference_steps` steps of rk4 from the same noise.
    start: where the reference begins.  A schedule begins with (1 - times[0]) * noise.
    mean: of the data, for schedules whose first step is analytic; see `data_mean`.
    batch_size: samples at once.
    """

    def __init__(
        self,
        velocity: Velocity,
        noise: Tensor,
        *,
        measure: Callable[[Tensor], float] | None = None,
        start: float = 0.0,
        mean: Tensor | None = None,
        reference_steps: int = 100,
        batch_size: int = 512,
    ) -> None:
        self.velocity, self.noise, self.batch_size = velocity, noise, batch_size
        self.measure, self.mean = measure, mean
        if measure is None:
            fine = _from(start, grids.uniform(reference_steps))
            self.reference = self.samples(Schedule(fine, solver="rk4"))

    def __call__(self, schedule: Schedule) -> float:
        x = self.samples(schedule)
        if self.measure is not None:
            return float(self.measure(x))
        return (x - self.reference).square().mean().sqrt().item()

    @torch.no_grad()
    def samples(self, schedule: Schedule) -> Tensor:
        """What a schedule makes of the noise."""
        options = schedule.options
        if schedule.solver == UNIFIED:
            options = {"schedule": schedule, "mean": self.mean}
        starts = ((1 - schedule.times[0]) * self.noise).split(self.batch_size)
        runs = [
            sample(self.velocity, x, schedule.times, schedule.solver, **options).x for x in starts
        ]
        return torch.cat(runs)


@torch.no_grad()
def data_mean(velocity: Velocity, noise: Tensor, start: float = 0.0) -> Tensor:
    """The data's mean (*) as the velocity has it: what it predicts where a run starts, on average
    over noise (N, *)."""
    chunks = ((1 - start) * noise).split(512)
    predicted = [(x + (1 - start) * velocity(x, start)).double() for x in chunks]
    return torch.cat(predicted).mean(0).to(noise.dtype)


def fixed_schedules(nfe: int, *, start: float = 0.0) -> list[Schedule]:
    """The fixed solvers with at most `nfe` evaluations, on even times and on grids.power's."""
    schedules = []
    for name, grid in _GRIDS.items():
        here = unified_schedules(_from(start, grid(nfe)))
        for solver, options in _OTHERS:
            if steps := _steps_for(solver, options, nfe):
                title = " ".join([solver, *map(str, options.values())])
                times, info = _from(start, grid(steps)), {"name": title}
                here.append(Schedule(times, solver=solver, options=options, info=info))
        schedules += [
            replace(one, info={"name": f"{one.info['name']}, {name} grid"}) for one in here
        ]
    return schedules


def find_schedule(
    objective: Objective,
    nfe: int,
    *,
    start: float = 0.0,
    analytic: bool = False,
    generations: int = 60,
    children: int = 32,
    keep: int = 15,
    polished: int = 2,
    polish_evaluations: int = 1000,
    seed: int = 0,
    predictor: Predictor | None = None,
    state: Path | None = None,
    progress: bool = False,
) -> tuple[Scored, Evolution]:
    """The best schedule of nfe evaluations, every step with switches of its own, for "unified".

    S^3 (Liu et al., 2023, arXiv:2312.07243) at a fixed number of steps: evolution from the fixed
    solvers, then `polish` for the best few.  Never worse than a fixed solver under the objective.
    analytic: add a first step that costs no evaluation; the objective must know the data's mean.
    The other options are those of `evolve`.
    """
    population = fixed_schedules(nfe, start=start)
    if analytic:
        for grid in _GRIDS.values():
            population += unified_schedules(_from(start, grid(nfe + 1)), analytic=True)
    evolution = evolve(
        objective,
        population,
        vary_steps,
        generations=generations,
        children=children,
        keep=keep,
        seed=seed,
        predictor=predictor,
        state=state,
        progress=progress,
    )
    ranked = evolution.top(len(evolution.archive))
    best = ranked[0]
    for one in [one for one in ranked if one.schedule.steps][:polished]:
        better = polish(
            objective, one, evaluations=polish_evaluations, seed=seed, progress=progress
        )
        best = min(best, better, key=lambda scored: scored.score)
    return best, evolution


def find_times(
    objective: Objective,
    nfe: int,
    *,
    solver: str = "abm",
    options: dict[str, Any] | None = None,
    start: float = 0.0,
    generations: int = 20,
    children: int = 50,
    keep: int = 10,
    seed: int = 0,
    state: Path | None = None,
    progress: bool = False,
) -> tuple[Scored, Evolution]:
    """The best times for a solver as it is, with at most nfe evaluations, ends fixed, none twice.

    AutoDiffusion (Li et al., 2023, arXiv:2309.10438); it begins with the even grid, grids.power's
    and random ones.  Never worse than the first two under the objective.
    The other options are those of `evolve`.
    """
    options = options or {}
    if not (steps := _steps_for(solver, options, nfe)):
        raise FlowkitError(f"solver {solver!r} has no run of {nfe} evaluations or fewer")
    bases = [
        Schedule(_from(start, grid(steps)), solver=solver, options=options)
        for grid in _GRIDS.values()
    ]
    rng = random.Random(f"{seed}/start")
    population = [*bases, *map(on_cells, bases)]
    population += [on_cells(bases[0], rng) for _ in range(children // 2)]
    evolution = evolve(
        objective,
        population,
        vary_times,
        generations=generations,
        children=children,
        keep=keep,
        seed=seed,
        state=state,
        progress=progress,
    )
    return evolution.top(1)[0], evolution


def _from(start: float, times: list[float]) -> tuple[float, ...]:
    """A grid of [0, 1] on [start, 1]."""
    return (*(start + (1 - start) * t for t in times[:-1]), 1.0)


def _steps_for(solver: str, options: dict[str, Any], nfe: int) -> int:
    """The most steps that cost at most nfe evaluations, or 0."""
    costs = [len(evaluation_times(solver, grids.uniform(n), **options)) for n in range(1, nfe + 1)]
    return max((n for n, cost in enumerate(costs, 1) if cost <= nfe), default=0)
