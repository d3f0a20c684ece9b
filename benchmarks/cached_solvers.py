"""What a cache adds to the best solver: 50 cached steps beside as many steps as it has full passes.

    python benchmarks/cached_solvers.py runs/cifar10-dit16/model   # configs/cifar10/dit16-flow.yaml

Errors are relative distances of the final pictures to the true solution.  The full steps are placed
by optimal_sharing on other noise than they are tested on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from cache_costs import STEPS
from caches import Trial, distance, their_steps, theirs

from flowkit.noise import keyed_noise
from flowkit.samplers import forecast_errors, grids, optimal_sharing, sample, taylorseer

PLACES = {10: 6, 14: 4, 18: 3}  # full passes: the interval at which diffusers' TaylorSeer has them
ORDERS = (1, 2, 3)  # 2 is the default
PLACED_ON, TESTED_ON = 1, (0, 2)  # seeds
SAMPLES = 16


def noise_of(trial: Trial, seed: int) -> torch.Tensor:
    return keyed_noise(seed, range(SAMPLES), trial.noise.shape[1:])


def evenly(count: int) -> list[int]:
    """The first two steps, and the others evenly over the rest."""
    return [0, 1, *(round(1 + (STEPS - 1) * i / (count - 1)) for i in range(1, count - 1))]


def print_table(trial: Trial) -> None:
    """One row for each number of full passes and each seed."""
    times = grids.power(STEPS)
    errors = {
        order: forecast_errors(trial.ours, noise_of(trial, PLACED_ON), times, order=order)
        for order in ORDERS
    }
    print("\nratio: to the default solver without a cache, in as many steps\n")
    head = [f"placed, order {order}" for order in ORDERS] + ["evenly, order 2"]
    columns = [
        "full passes",
        "seed",
        "uncached",
        *head,
        "Euler, diffusers' TaylorSeer",
        "ours / it",
    ]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for count, interval in PLACES.items():
        steps = {order: optimal_sharing(found, count) for order, found in errors.items()}
        for seed in TESTED_ON:
            noise = noise_of(trial, seed)
            true = sample(trial.ours, noise, grids.power(200), "rk4").x
            uncached = distance(sample(trial.ours, noise, grids.power(count)).x, true)

            def cached(full: Sequence[int], order: int) -> float:
                with taylorseer(trial.net, steps=full, order=order):  # noqa: B023
                    return distance(sample(trial.ours, noise, times).x, true)  # noqa: B023

            found = [cached(steps[order], order) for order in ORDERS] + [cached(evenly(count), 2)]
            trial.ran = 0
            with theirs(trial.other, their_steps(interval, 1))():
                x = sample(trial.theirs, noise, grids.uniform(STEPS), "euler").x
            peer, passes = distance(x, true), trial.ran
            cells = [f"{e:.4f} ({e / uncached:.2f})" for e in found]
            row = [
                f"{count}",
                f"{seed}",
                f"{uncached:.4f}",
                *cells,
                f"{peer:.4f} ({passes})",
            ]
            print("| " + " | ".join([*row, f"{found[1] / peer:.2f}"]) + " |", flush=True)
        print(f"|  |  | steps, order 2: {steps[2]} |" + " |" * (len(columns) - 3))


def main() -> None:
    """Print the table for each folder."""
    torch.set_num_threads(1)
    with torch.no_grad():
        for folder in sys.argv[1:]:
            print_table(Trial(folder))


if __name__ == "__main__":
    main()
