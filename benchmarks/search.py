"""Searched schedules beside the best fixed solvers at equal NFE, on noise the search never saw.

  python benchmarks/search.py                 mixtures A and C: minutes
  python benchmarks/search.py runs/flow/model and a trained flow, as trainers/flow.py leaves it

Every fixed solver runs on even times and on grids.power's; the best of all is the one to beat.
Seconds are wall time of the search alone, on one CPU thread.
"""

from __future__ import annotations

import sys
import time

import torch

from flowkit.adapters import from_diffusers
from flowkit.analytic import Mixture
from flowkit.noise import keyed_noise
from flowkit.samplers.schedule_search import (
    SampleError,
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


def row(title: str, nfe: int, train: SampleError, held_out: SampleError, generations: int) -> str:
    """One line of the table."""
    fixed = {one.info["name"]: held_out(one) for one in fixed_schedules(nfe)}
    even = {name: error for name, error in fixed.items() if name.endswith("uniform grid")}
    (name, best), best_even = min(fixed.items(), key=lambda item: item[1]), min(even.values())
    began = time.perf_counter()
    times, _ = find_times(train, nfe, solver="abm", generations=20)
    middle = time.perf_counter()
    found, _ = find_schedule(train, nfe, generations=generations)
    end = time.perf_counter()
    error, times_error = held_out(found.schedule), held_out(times.schedule)
    cells = [
        title, nfe, name, f"{best:.4f}", f"{best_even:.4f}",
        f"{times_error:.4f} ({middle - began:.0f} s)", f"{found.score:.4f}",
        f"{error:.4f} ({end - middle:.0f} s)", f"{error / best:.2f}", f"{error / best_even:.2f}",
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Print the table for the mixtures, and for a trained flow if given."""
    torch.set_num_threads(1)
    print(
        "\n| flow | NFE | best fixed solver | its error | best on even times | AutoDiffusion, abm "
        "| S^3, search noise | S^3, held-out noise | over the best fixed | over the best even |"
    )
    print("|" + "---|" * 10)
    for title, flow in MIXTURES.items():
        train = SampleError(flow, keyed_noise(0, range(1), (16, 4, 4)).double())
        held_out = SampleError(flow, keyed_noise(1, range(64), (16, 4, 4)).double())
        for nfe in NFES:
            print(row(f"Mixture {title}", nfe, train, held_out, 60), flush=True)
    for folder in sys.argv[1:]:
        velocity = from_diffusers(folder).requires_grad_(False)
        train = SampleError(velocity, keyed_noise(0, range(64), (1, 8, 8)))
        held_out = SampleError(velocity, keyed_noise(1, range(512), (1, 8, 8)))
        for nfe in NFES:
            print(row(folder, nfe, train, held_out, 80), flush=True)


if __name__ == "__main__":
    main()
