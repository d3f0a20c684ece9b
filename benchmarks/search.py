"""Searched schedules beside the best fixed solvers at equal NFE, on noise the search never saw.

  python benchmarks/search.py                 mixtures A and C: minutes
  python benchmarks/search.py runs/flow/model and a trained flow, as trainers/flow.py leaves it

Every fixed solver runs on even times and on grids.power's; the best of all is the one to beat.
Errors are on held-out noise, with their ratio to the best's; seconds are wall time of the search
alone, on one CPU thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowkit.adapters import from_diffusers
from flowkit.analytic import Mixture
from flowkit.noise import keyed_noise
from flowkit.samplers.evolution import Evolution, Scored
from flowkit.samplers.schedule_search import (
    SampleError,
    data_mean,
    find_schedule,
    find_times,
    fixed_schedules,
)
from flowkit.velocity import Velocity

NFES = (5, 8)
MIXTURES: dict[str, Velocity] = {
    "A": Mixture((0.4, 0.6), (-0.9, 0.7), (0.3, 0.2)),
    "C": Mixture((0.2, 0.5, 0.3), (-1.2, 0.1, 1.1), (0.2, 0.3, 0.15)),
}


def row(title: str, nfe: int, noises: Sequence[Tensor], velocity: Velocity) -> str:
    """One line of the table; noises: to search with, held out, for the data's mean."""
    mean = data_mean(velocity, noises[2])
    train, held_out = (SampleError(velocity, noise, mean=mean) for noise in noises[:2])
    fixed = {one.info["name"]: held_out(one) for one in fixed_schedules(nfe)}
    even = min(error for name, error in fixed.items() if name.endswith("uniform grid"))
    name = min(fixed, key=lambda name: fixed[name])
    searches: list[Callable[[], tuple[Scored, Evolution]]] = [
        lambda: find_times(train, nfe, solver="abm", generations=20),
        lambda: find_schedule(train, nfe),
        lambda: find_schedule(train, nfe, analytic=True),
    ]
    cells = [title, nfe, name, f"{fixed[name]:.4f}", f"{even:.4f}"]
    for search in searches:
        began = time.perf_counter()
        schedule = search()[0].schedule
        seconds = time.perf_counter() - began
        ratio = held_out(schedule) / fixed[name]
        cells.append(f"{held_out(schedule):.4f}, {ratio:.2f} ({seconds:.0f} s)")
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Print the table for the mixtures, and for a trained flow if given."""
    torch.set_num_threads(1)
    print(
        "\n| flow | NFE | best fixed solver | its error | best on even times "
        "| AutoDiffusion, abm | S^3 | S^3 and an analytic first step |"
    )
    print("|" + "---|" * 8)
    for title, flow in MIXTURES.items():
        noises = [keyed_noise(i, range(n), (16, 4, 4)).double() for i, n in enumerate((1, 64, 64))]
        for nfe in NFES:
            print(row(f"Mixture {title}", nfe, noises, flow), flush=True)
    for folder in sys.argv[1:]:
        velocity = from_diffusers(folder).requires_grad_(False)
        noises = [keyed_noise(i, range(n), (1, 8, 8)) for i, n in enumerate((64, 512, 512))]
        for nfe in NFES:
            print(row(folder, nfe, noises, velocity), flush=True)


if __name__ == "__main__":
    main()
