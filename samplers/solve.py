"""The driver: it runs a solver's generator on a velocity, forwards (sample) or back (invert).

x_t = (1 - t) * noise + t * data        dx/dt = v(x, t)        t: 0 (noise) -> 1 (data)
"""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from flowkit.errors import FlowkitError
from flowkit.registry import check_options, look_up
from flowkit.samplers.adaptive import ADAPTIVE, dopri5
from flowkit.samplers.current_run import Run, under_way
from flowkit.samplers.dpm import dpmpp_2m, dpmpp_3m, unipc
from flowkit.samplers.dual import dual_fast
from flowkit.samplers.evaluations import Evaluations, Solver
from flowkit.samplers.exact import bdia, bdia_ddim, bdia_edm, ddim
from flowkit.samplers.exponential import deis
from flowkit.samplers.few_step import consistency, rfpp
from flowkit.samplers.multistep import ab2, ab3, ab4, abm, fireflow
from flowkit.samplers.runge_kutta import euler, heun, midpoint, rk4
from flowkit.samplers.stochastic import edm_heun, sde
from flowkit.samplers.unified import unified
from flowkit.velocity import Velocity

__all__ = [
    "DEFAULT_SOLVER",
    "SOLVERS",
    "STOCHASTIC",
    "Callback",
    "Evaluations",
    "Result",
    "Solver",
    "Step",
    "evaluation_times",
    "find_solver",
    "invert",
    "is_adaptive",
    "sample",
]

SOLVERS: dict[str, Solver] = {
    "euler": euler,
    "midpoint": midpoint,
    "rf_solver": midpoint,
    "heun": heun,
    "rk4": rk4,
    "ab2": ab2,
    "ab3": ab3,
    "ab4": ab4,
    "abm": abm,
    "fireflow": fireflow,
    "deis": deis,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "unipc": unipc,
    "dual_fast": dual_fast,
    "ddim": ddim,
    "bdia": bdia,
    "bdia_ddim": bdia_ddim,
    "bdia_edm": bdia_edm,
    "edm_heun": edm_heun,
    "sde": sde,
    "dopri5": dopri5,
    "rfpp": rfpp,
    "consistency": consistency,
    "unified": unified,
}

DEFAULT_SOLVER = "abm"
STOCHASTIC = frozenset({"sde", "consistency"})  # random whatever their options are


@dataclass(frozen=True)
class Result:
    """What a run gives.

    x: (B, *), the last state.  nfe: evaluations of the velocity (a guided one counts once).
    state: what the solver leaves for running back, the `state` option of its inverse, or None.
    """

    x: Tensor
    nfe: int
    state: Any = None


@dataclass(frozen=True)
class Step:
    """Where a run is: the state x (B, *) at time t, with `index` of `num_steps` steps done."""

    index: int
    num_steps: int
    t: float
    x: Tensor


Callback = Callable[[Step], Tensor | None]


def sample(
    velocity: Velocity,
    noise: Tensor,
    times: Sequence[float],
    solver: str | Solver = DEFAULT_SOLVER,
    *,
    progress: bool = False,
    callback: Callback | None = None,
    **options: Any,
) -> Result:
    """Solve dx/dt = v(x, t) along `times`, from noise towards data.

    velocity: called with t as a Python float; fix its conditioning with flowkit.velocity.bind.
    noise: (B, *), the state at times[0]; the state is kept in float32, in float64 if noise is.
    times: n + 1 floats that increase within [0, 1], for n steps (flowkit.samplers.grids).
    solver: a name in SOLVERS or a generator function; `options` are its keyword parameters.
    callback: sees the state at every time of `times` where the solver evaluates, and at the end;
    what it returns, if not None, takes the state's place.
    Gradients flow as torch's grad mode says: wrap the call in torch.no_grad() to save memory.
    For noise that depends on (seed, sample) alone: flowkit.noise.keyed_noise(seed, range(B), shape)
    Raises FlowkitError for an unknown solver or option, and for times that do not increase.
    """
    grid = _checked(times, "to go from data to noise, use invert()")
    return _drive(velocity, noise, grid, solver, progress, callback, options)


def invert(
    velocity: Velocity,
    data: Tensor,
    times: Sequence[float],
    solver: str | Solver = DEFAULT_SOLVER,
    *,
    progress: bool = False,
    callback: Callback | None = None,
    **options: Any,
) -> Result:
    """Solve the same equation backwards: from data at times[-1] to noise at times[0].

    data: (B, *).  times: increasing, the same as for `sample`.  Everything else is as there.
    """
    grid = _checked(times, "invert() takes the times of sample() and runs them backwards itself")
    return _drive(velocity, data, grid[::-1], solver, progress, callback, options)


def evaluation_times(solver: str | Solver, times: Sequence[float], **options: Any) -> list[float]:
    """The times at which a solver evaluates the velocity, in order; their number is its NFE.

    times: in the order of the run, decreasing for an inversion.
    Raises FlowkitError for an adaptive solver, whose times depend on the state.
    """
    found = find_solver(solver, options)
    if is_adaptive(found):
        raise FlowkitError(f"solver {solver!r} chooses its times as it goes; run it to know them")
    grid = list(times)
    falling = len(grid) > 1 and grid[0] > grid[-1]
    grid = _checked(grid[::-1] if falling else grid, "or fall all the way, to invert")
    return list(_dry_run(found, grid[::-1] if falling else grid, options))


def find_solver(solver: str | Solver, options: Mapping[str, Any]) -> Solver:
    """The solver of a name, or the function itself, once `options` are known to fit it.

    Raises FlowkitError for an unknown name or option, a missing one, and for other things.
    """
    found = look_up("solver", solver, SOLVERS) if isinstance(solver, str) else solver
    if not inspect.isgeneratorfunction(found):
        raise FlowkitError(
            f"a solver is a name or a generator function (x, times) -> Evaluations, got {solver!r}"
        )
    name = solver if isinstance(solver, str) else found.__name__
    check_options(f"solver {name!r}", found, options, skip=2)
    return found


def is_adaptive(solver: Solver) -> bool:
    """Whether a solver chooses its times by the state it sees."""
    return solver in ADAPTIVE


def _dry_run(
    solver: Solver, grid: list[float], options: dict[str, Any]
) -> Generator[float, None, None]:
    """Run the solver on a single sample, one number, that stands still."""
    state = options.get("state")
    if "draw" in options:  # a dry run must not advance the caller's generator
        options = options | {"draw": lambda x, k: torch.zeros_like(x)}
    x = torch.zeros(1, dtype=torch.float64) if state is None else torch.zeros_like(state[0])
    evaluations = solver(x, grid, **options)
    reply: Any = None
    while True:
        try:
            x, t = evaluations.send(reply)
        except StopIteration:
            return
        yield t
        reply = x, torch.zeros_like(x)


def _drive(
    velocity: Velocity,
    x: Tensor,
    grid: list[float],
    solver: str | Solver,
    progress: bool,
    callback: Callback | None,
    options: dict[str, Any],
) -> Result:
    run = find_solver(solver, options)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise FlowkitError(f"the state must be a tensor of floating-point numbers, got {kind}")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if callback and is_adaptive(run):
        raise FlowkitError(
            f"solver {solver!r} chooses its steps as it goes, so it has no step for a callback; "
            "call sample() from one time to the next instead"
        )
    visit = _Visits(callback, grid, run, options) if callback else None
    evaluations, reply, nfe = run(x, grid, **options), None, 0
    bar = tqdm(total=len(grid) - 1, disable=not progress, unit="step")
    with bar, under_way(Run(run, grid, options)):
        while True:
            try:
                x, t = evaluations.send(reply)  # type: ignore[arg-type]  # None starts it
            except StopIteration as end:
                bar.update(bar.total - bar.n)
                x, state = end.value if isinstance(end.value, tuple) else (end.value, None)
                return Result(visit.end(x) if visit else x, nfe, state)
            bar.update(max(_steps_done(grid, t) - bar.n, 0))
            if visit:
                x = visit(x, t)
            reply, nfe = (x, _velocity(velocity, x, t)), nfe + 1


class _Visits:
    """Shows the callback the state at step boundaries, and takes its edit.

    A grid time may be evaluated more than once, first as the end of a step's inner stage; its last
    evaluation is the boundary, and a dry run tells how many there are.
    """

    def __init__(
        self, callback: Callback, grid: list[float], solver: Solver, options: dict[str, Any]
    ) -> None:
        self.callback, self.grid = callback, grid
        self.index = {t: i for i, t in enumerate(grid)}
        self.left = Counter(_dry_run(solver, grid, options))

    def __call__(self, x: Tensor, t: float) -> Tensor:
        self.left[t] -= 1
        at_boundary = t in self.index and self.left[t] == 0 and t != self.grid[-1]
        return self._show(self.index[t], x) if at_boundary else x

    def end(self, x: Tensor) -> Tensor:
        return self._show(len(self.grid) - 1, x)

    def _show(self, index: int, x: Tensor) -> Tensor:
        edited = self.callback(Step(index, len(self.grid) - 1, self.grid[index], x))
        if edited is None:
            return x
        if not isinstance(edited, Tensor) or edited.shape != x.shape:
            got = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
            raise FlowkitError(
                f"the callback must return a state of shape {tuple(x.shape)} or None, got {got}"
            )
        return edited.to(x)


def _velocity(velocity: Velocity, x: Tensor, t: float) -> Tensor:
    v = velocity(x, t)
    if not isinstance(v, Tensor):
        raise FlowkitError(
            f"the velocity must return a tensor, got {type(v).__name__}; networks of diffusers and "
            "others become velocities in flowkit.adapters"
        )
    if v.shape != x.shape:
        raise FlowkitError(
            f"the velocity must have the state's shape {tuple(x.shape)}, got {tuple(v.shape)} "
            f"at t={t:.4g}"
        )
    return v.to(x.dtype)


def _checked(times: Sequence[float], hint: str) -> list[float]:
    try:
        grid = [float(t) for t in times]
    except (TypeError, ValueError):
        raise FlowkitError(
            "times must be numbers in [0, 1], such as flowkit.samplers.grids.power(10), "
            f"got {times!r}"
        ) from None
    if len(grid) < 2:
        raise FlowkitError(f"times must hold at least a start and an end, got {grid}")
    if not (grid[0] >= 0 and grid[-1] <= 1 and all(t < s for t, s in pairwise(grid))):
        raise FlowkitError(
            f"times must increase from noise (0) to data (1), got {grid[0]:.3g} -> {grid[-1]:.3g} "
            f"in {len(grid) - 1} steps; {hint}"
        )
    return grid


def _steps_done(grid: list[float], t: float) -> int:
    """How many steps of the grid lie behind time t."""
    if grid[0] < grid[-1]:
        return bisect_right(grid, t) - 1
    return bisect_right(grid, -t, key=lambda s: -s) - 1
