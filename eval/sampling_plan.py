"""How many evaluations, which solver, which times: what a measurement of a flow samples with."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flowkit.errors import FlowkitError
from flowkit.eval.model_parts import own_sampler
from flowkit.eval.settings import FidConfig
from flowkit.registry import check_options, look_up
from flowkit.samplers import grids
from flowkit.samplers.solve import evaluation_times, find_solver, is_adaptive

__all__ = ["Plan", "sampling_plans", "times_of"]

OWN = "own"  # the solver and the times that the model's folder names
GRIDS: dict[str, Callable[..., list[float]]] = {
    "power": grids.power,
    "uniform": grids.uniform,
    "shifted": grids.shifted,
    "dynamic": grids.dynamic,
    "edm": grids.edm,
    "karras": grids.karras,
    "log_snr": grids.log_snr,
    "cosine": grids.cosine,
    "beta": grids.beta,
}


@dataclass(frozen=True)
class Plan:
    """One way to sample.  grid: its name and options as text.  nfe: None, not known beforehand."""

    name: str
    solver: str
    times: list[float]
    grid: str
    nfe: int | None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> list[Any]:
        """What it does, whatever its name: a searched schedule may have been replaced."""
        return [self.solver, list(self.times), self.options]

    @property
    def takes_draws(self) -> bool:
        """Whether the solver draws noise on its way."""
        return "draw" in inspect.signature(find_solver(self.solver, self.options)).parameters


def sampling_plans(options: FidConfig, start: float = 0.0) -> list[Plan]:
    """One plan per number of evaluations that is asked for.

    start: the model's noisiest time.  FlowkitError: no such solver, grid or option; a number of
    evaluations that the solver cannot spend; one given to a solver that chooses it itself.
    """
    if options.solver == OWN:
        return [_own(options)]
    if options.solver.endswith(".json"):
        return [_searched(options, start)]
    solver = find_solver(options.solver, options.solver_options)
    kind = str(options.grid.get("name"))
    grid = json.dumps(options.grid, separators=(",", ":"))
    if is_adaptive(solver):
        if options.nfe is not None:
            raise FlowkitError(
                f"solver {options.solver!r} chooses its evaluations itself, got nfe={options.nfe}; "
                "say nfe=null"
            )
        times = times_of({"name": "uniform"}, 1, start)
        return [Plan("nfe-free", options.solver, times, "free", None, options.solver_options)]
    if options.nfe is None:
        raise FlowkitError(f"solver {options.solver!r} needs nfe, e.g. nfe=[1,2,4,8]")
    if repeated := {n for n in options.nfe if options.nfe.count(n) > 1}:
        raise FlowkitError(f"nfe={options.nfe} names {min(repeated)} twice")
    look_up("grid", kind, GRIDS)

    def plan(nfe: int) -> Plan:
        times = _spending(nfe, options, start)
        return Plan(f"nfe-{nfe:04d}", options.solver, times, grid, nfe, options.solver_options)

    return [plan(nfe) for nfe in options.nfe]


def times_of(grid: dict[str, Any], num_steps: int, start: float = 0.0) -> list[float]:
    """The times of a grid {"name", **options} from `start`, the noisiest time that a model knows.

    Grids that begin at 0 are squeezed into [start, 1]; "edm" begins at the model's largest sigma.
    """
    options = {name: value for name, value in grid.items() if name != "name"}
    build = look_up("grid", str(grid.get("name")), GRIDS)
    check_options(f"grid {grid.get('name')!r}", build, options, skip=1)
    if build is grids.edm and start > 0:
        options = {"sigma_max": 1 / start - 1, **options}
    times = build(num_steps, **options)
    if times[0] < start - 1e-9:
        times = [start + (1 - start) * t for t in times[:-1]] + [1.0]
    return times


def _spending(nfe: int, options: FidConfig, start: float) -> list[float]:
    """The times with which the solver takes exactly nfe evaluations."""

    def cost(num_steps: int) -> int:
        times = times_of(options.grid, num_steps, start)
        return len(evaluation_times(options.solver, times, **options.solver_options))

    low, high = 1, nfe
    while low < high:  # the cost rises with the steps
        middle = (low + high) // 2
        low, high = (middle + 1, high) if cost(middle) < nfe else (low, middle)
    spent = cost(low)
    if spent != nfe:
        near = sorted({spent, cost(max(low - 1, 1))})
        raise FlowkitError(
            f"solver {options.solver!r} cannot take {nfe} evaluations; near it are "
            f"{' and '.join(map(str, near))}"
        )
    return times_of(options.grid, low, start)


def _own(options: FidConfig) -> Plan:
    """The sampler that the model's folder names."""
    found = own_sampler(str(options.model))
    if found is None:
        raise FlowkitError(
            f"{options.model} names no sampler of its own; say a solver, such as solver=abm"
        )
    if options.solver_options:
        raise FlowkitError("solver=own takes no options; leave solver_options out")
    solver, times = found
    nfe = len(evaluation_times(solver, times))
    if options.nfe is not None and options.nfe != [nfe]:
        raise FlowkitError(
            f"the sampler of {options.model} takes {nfe} evaluations, got nfe={options.nfe}; "
            "say nfe=null"
        )
    grid = json.dumps({"name": OWN, "times": times}, separators=(",", ":"))
    return Plan(f"nfe-{nfe:04d}", solver, times, grid, nfe)


def _searched(options: FidConfig, start: float) -> Plan:
    """A schedule that flowkit.samplers.search has found."""
    from flowkit.samplers.schedule_file import Schedule

    found = Schedule.load(options.solver)
    if options.solver_options:
        raise FlowkitError(f"{options.solver} holds its own options; leave solver_options out")
    if abs(found.times[0] - start) > 1e-3:
        raise FlowkitError(
            f"{options.solver} begins at t={found.times[0]:.4g}, this model's noise at {start:.4g};"
            " it was searched for another"
        )
    solver, given = found.solver, dict(found.solver_options)
    nfe = len(evaluation_times(solver, found.times, **given))
    if options.nfe is not None and options.nfe != [nfe]:
        raise FlowkitError(f"{options.solver} takes {nfe} evaluations, got nfe={options.nfe}")
    return Plan(f"nfe-{nfe:04d}", solver, list(found.times), options.solver, nfe, given)
