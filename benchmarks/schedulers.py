"""What one step() of our scheduler costs, next to diffusers' scheduler for the same solver.

  python benchmarks/schedulers.py

The two run alternately in this one process, on the same states and predictions; a figure is the
median over the rounds, and the ratio the median of the rounds' own ratios.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from flowkit.samplers import FlowScheduler

ROUNDS, STEPS, SHAPE = 30, 50, (1, 4, 32, 32)
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
PAIRS: list[tuple[str, type[Any], dict[str, Any]]] = [
    ("euler", FlowMatchEulerDiscreteScheduler, {}),
    ("heun", FlowMatchHeunDiscreteScheduler, {}),
    ("dpmpp_2m", DPMSolverMultistepScheduler, FLOW),
    ("unipc", UniPCMultistepScheduler, FLOW),
    ("deis", DEISMultistepScheduler, FLOW),
    ("ddim", DDIMScheduler, {"clip_sample": False}),
]


def microseconds(scheduler: Any) -> float:
    """Of one step(), in a whole run as a pipeline makes it; set_timesteps is not counted."""
    scheduler.set_timesteps(STEPS)
    x, prediction = torch.ones(SHAPE), torch.full(SHAPE, 0.1)
    timesteps = list(scheduler.timesteps)
    start = time.perf_counter()
    for t in timesteps:
        x = scheduler.step(prediction, t, x, return_dict=False)[0]
    return 1e6 * (time.perf_counter() - start) / len(timesteps)


def compare(solver: str, cls: type[Any], config: dict[str, Any]) -> tuple[float, float, float]:
    """Ours, diffusers' and their ratio, for one solver."""
    theirs = cls(**config)
    ours = FlowScheduler.from_config(theirs.config, solver=solver)
    microseconds(ours), microseconds(theirs)  # what is slow the first time only
    rounds = [(microseconds(ours), microseconds(theirs)) for _ in range(ROUNDS)]
    ratio = statistics.median(a / b for a, b in rounds)
    return *(statistics.median(column) for column in zip(*rounds, strict=True)), ratio


def main() -> None:
    """Print one line for each solver."""
    torch.set_num_threads(1)
    print(f"microseconds per step(), {SHAPE} float32, {STEPS} steps, median of {ROUNDS} rounds")
    print(f"{'solver':10} {'ours':>7} {'diffusers':>10} {'ratio':>7}")
    for solver, cls, config in PAIRS:
        mine, theirs, ratio = compare(solver, cls, config)
        print(f"{solver:10} {mine:7.1f} {theirs:10.1f} {ratio:7.2f}   {cls.__name__}")


if __name__ == "__main__":
    main()
