"""Solvers: their measured orders, and their errors beside diffusers' at equal NFE.

  python benchmarks/solvers.py                 analytic flows alone: a minute
  python benchmarks/solvers.py runs/flow/model and a trained flow, as trainers/flow.py leaves it

The stochastic solvers (sde, consistency), the adaptive dopri5 and the wrapper dual_fast have no
row: they have no order, no NFE of their own, or the order of their base.

Errors are root mean squares over the batch, against a reference of many small steps.  Our grids
are uniform unless the row says otherwise; diffusers' schedulers have their own default grid.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor

from flowkit.adapters import from_diffusers
from flowkit.analytic import Gaussian, Mixture, normal_quantiles
from flowkit.noise import keyed_noise
from flowkit.paths import VPLinear
from flowkit.samplers import evaluation_times, grids, sample
from flowkit.samplers.solve import DEFAULT_SOLVER
from flowkit.velocity import Velocity

FLOWS: dict[str, Velocity] = {
    "G": Gaussian(),
    "A": Mixture((0.4, 0.6), (-0.9, 0.7), (0.3, 0.2)),
    "C": Mixture((0.2, 0.5, 0.3), (-1.2, 0.1, 1.1), (0.2, 0.3, 0.15)),
}
# A row's name -> the solver and its options.
SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("euler", "ddim", "midpoint", "rf_solver", "heun", "rk4")},
    **{name: (name, {}) for name in ("ab2", "ab3", "ab4", "abm", "fireflow")},
    "abm order 4": ("abm", {"order": 4}),
    **{
        f"deis {method} {order}{' ' + quantity if quantity else ''}": (
            "deis",
            {"method": method, "order": order} | ({"quantity": quantity} if quantity else {}),
        )
        for method, order, quantity in (
            ("tab", 2, "velocity"),
            ("tab", 3, "velocity"),
            ("tab", 4, "velocity"),
            ("tab", 2, "noise"),
            ("tab", 2, "data"),
            ("rhoab", 2, ""),
            ("rhoab", 3, ""),
            ("rhork", 2, ""),
            ("rhork", 3, ""),
            ("ipndm", 3, ""),
        )
    },
    **{name: (name, {}) for name in ("dpmpp_2m", "dpmpp_3m", "unipc")},
    "unipc bh1": ("unipc", {"variant": "bh1"}),
    "unipc order 1": ("unipc", {"order": 1}),
    "unipc order 3": ("unipc", {"order": 3}),
    "bdia gamma 1": ("bdia", {"gamma": 1.0}),
    "bdia gamma 0.5": ("bdia", {"gamma": 0.5}),
    "bdia_ddim gamma 1": ("bdia_ddim", {"gamma": 1.0, "path": VPLinear()}),
    "bdia_edm": ("bdia_edm", {}),
    "edm_heun": ("edm_heun", {}),
    "rfpp": ("rfpp", {}),
}
FROM_INSIDE = {"bdia_edm"}  # infinite at t = 0
NFES = (5, 10, 20)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
THEIRS: dict[str, Callable[[], Any]] = {
    "FlowMatchEuler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
    "FlowMatchHeun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(),
    "DPMSolver++ 2M": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW),
    "DPMSolver++ 3M": lambda: diffusers.DPMSolverMultistepScheduler(solver_order=3, **FLOW),
    "DPMSolver++ 2S": lambda: diffusers.DPMSolverSinglestepScheduler(
        lower_order_final=True, **FLOW
    ),
    "DPMSolver++ 3S": lambda: diffusers.DPMSolverSinglestepScheduler(
        solver_order=3, lower_order_final=True, **FLOW
    ),
    "UniPC 1": lambda: diffusers.UniPCMultistepScheduler(solver_order=1, **FLOW),
    "UniPC 2": lambda: diffusers.UniPCMultistepScheduler(**FLOW),
    "UniPC 3": lambda: diffusers.UniPCMultistepScheduler(solver_order=3, **FLOW),
    "DEIS 2": lambda: diffusers.DEISMultistepScheduler(**FLOW),
    "DEIS 3": lambda: diffusers.DEISMultistepScheduler(solver_order=3, **FLOW),
    "SASolver (tau 0)": lambda: diffusers.SASolverScheduler(tau_func=lambda t: 0, **FLOW),
}


def rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


def interval(n: int, a: float, b: float) -> list[float]:
    return [a + (b - a) * i / n for i in range(n + 1)]


def order(name: str, flow: Velocity, a: float, b: float, reference: Tensor) -> float:
    """The measured order, from runs of 80 and 160 steps."""
    solver, options = SOLVERS[name]
    errors = [
        rms(sample(flow, normal_quantiles(), interval(n, a, b), solver, **options).x - reference)
        for n in (80, 160)
    ]
    return math.log2(errors[0] / errors[1]) if min(errors) > 1e-13 else math.inf


def print_orders() -> None:
    """One row a solver: its order on each flow, end to end and inside."""
    ends = [(0.0, 1.0), (0.1, 0.8)]
    columns = [(flow, a, b) for flow in FLOWS for a, b in ends]
    references = {
        (flow, a, b): sample(FLOWS[flow], normal_quantiles(), interval(2000, a, b), "rk4").x
        for flow, a, b in columns
    }
    print("\nMeasured order, 80 to 160 steps\n")
    print("| solver |" + "".join(f" {flow} [{a:g}, {b:g}] |" for flow, a, b in columns))
    print("|---|" + "---|" * len(columns))
    for name in SOLVERS:
        cells = []
        for flow, a, b in columns:
            if name in FROM_INSIDE and a == 0:
                cells.append(" - ")
            else:
                value = order(name, FLOWS[flow], a, b, references[flow, a, b])
                cells.append(f" {value:.2f} ")
        print(f"| {name} |" + "|".join(cells) + "|")


def steps_for(name: str, nfe: int) -> int:
    """The most steps that cost at most `nfe` evaluations."""
    solver, options = SOLVERS[name]
    cost = [len(evaluation_times(solver, grids.uniform(n), **options)) for n in range(1, nfe + 1)]
    return max((n for n, c in enumerate(cost, 1) if c <= nfe), default=0)


def with_theirs(
    make: Callable[[], Any], velocity: Velocity, noise: Tensor, nfe: int
) -> tuple[Tensor, int]:
    """A diffusers scheduler's result with at most `nfe` evaluations, and how many it took."""
    for steps in range(nfe, 0, -1):
        scheduler = make()
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) <= nfe:
            break
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(-velocity(x, 1 - float(t) / 1000), t, x).prev_sample
    return x, len(scheduler.timesteps)


def print_errors(title: str, velocity: Velocity, noise: Tensor, reference: Tensor) -> None:
    """One row a solver: its error at each NFE, and that over the best of diffusers'."""
    best = dict.fromkeys(NFES, math.inf)
    print(f"\n{title}: RMS error at " + ", ".join(map(str, NFES)) + " NFE\n")
    print("| solver |" + "".join(f" {n} |" for n in NFES) + " over the best of diffusers |")
    print("|---|" + "---|" * (len(NFES) + 1))
    for name, make in THEIRS.items():
        cells = []
        for nfe in NFES:
            x, taken = with_theirs(make, velocity, noise, nfe)
            error = rms(x - reference)
            best[nfe] = min(best[nfe], error)
            cells.append(f" {error:.4f}{'' if taken == nfe else f' ({taken})'} ")
        print(f"| diffusers {name} |" + "|".join(cells) + "| |")
    rows: list[tuple[str, str, Callable[[int], Sequence[float]]]] = [
        (name, name, grids.uniform) for name in SOLVERS if name not in FROM_INSIDE
    ]
    on_power = (DEFAULT_SOLVER, "abm order 4", "ab2", "ab3", "dpmpp_2m", "unipc")
    rows += [(f"{name}, power grid", name, grids.power) for name in on_power]
    for title, name, grid in rows:
        solver, options = SOLVERS[name]
        cells, ratios = [], []
        for nfe in NFES:
            steps = steps_for(name, nfe)
            if not steps:
                cells.append(" - ")
                continue
            result = sample(velocity, noise, grid(steps), solver, **options)
            error = rms(result.x - reference)
            ratios.append(f"{error / best[nfe]:.2f}")
            cells.append(f" {error:.4f}{'' if result.nfe == nfe else f' ({result.nfe})'} ")
        print(f"| {title} |" + "|".join(cells) + f"| {' / '.join(ratios)} |")


@torch.no_grad()
def main() -> None:
    """Print the orders, then the errors on mixtures A and C and on a trained flow if given."""
    torch.set_num_threads(1)
    print_orders()
    noise = normal_quantiles()
    for name in ("A", "C"):
        reference = sample(FLOWS[name], noise, grids.uniform(4000), "rk4").x
        print_errors(f"Mixture {name}", FLOWS[name], noise, reference)
    for folder in sys.argv[1:]:
        velocity = from_diffusers(folder)
        noise = keyed_noise(1, range(512), (1, 8, 8))
        reference = sample(velocity, noise, grids.uniform(200), "heun").x
        print_errors(folder, velocity, noise, reference)


if __name__ == "__main__":
    main()
