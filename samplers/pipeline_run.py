"""One run of a solver whose network is evaluated by somebody else, between two calls of reply().

The plain loop asks a velocity; here the solver's request goes out as a pipeline's latents, and the
network's output comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.pipelines import FlowLatents, VPLatents
from flowkit.samplers.evaluations import Evaluations, Solver
from flowkit.samplers.runge_kutta import euler
from flowkit.samplers.solve import evaluation_times

__all__ = ["PipelineRun"]


class PipelineRun:
    """A solver on `grid`, in the latents of a pipeline.

    times: t of every evaluation in order; timesteps: what the pipeline calls them.  index: how many
    evaluations lie behind, None before begin().  state: what the solver left, after the end.
    The solver's state stays here in float32 (float64 for latents of float64), whatever the dtype
    of the latents.
    """

    def __init__(
        self,
        solver: Solver,
        options: dict[str, Any],
        grid: list[float],
        latents: FlowLatents | VPLatents,
    ) -> None:
        self.solver, self.options, self.grid, self.latents = solver, options, grid, latents
        self.times = evaluation_times(solver, grid, **options)
        # A pipeline evaluates the latents it starts from before the solver can say where it wants
        # to begin: elsewhere when it has a state from the other direction, or first adds noise.
        self._unasked = self.times[0] != grid[0]
        if self._unasked:
            self.times.insert(0, grid[0])
        t = torch.tensor(self.times, dtype=torch.float64)
        self.timesteps: list[float] = latents.timestep(t).tolist()
        scale, a, b = latents.coefficients(t)
        self._scale, self._a, self._b = scale.tolist(), (a * scale).tolist(), b.tolist()
        self.index: int | None = None
        self.state: Any = None
        self.ended = False
        self._evaluations: Evaluations | None = None
        self._x = self._given = torch.empty(0)
        self._version: int | None = None

    def begin(self, index: int, sample: Tensor) -> None:
        """Start at evaluation `index` from the latents `sample` (B, *)."""
        dtype = torch.promote_types(sample.dtype, torch.float32)
        scale = self._own_scale(self.times[index])
        x = sample.to(dtype) / scale  # a copy: pipelines may write into their latents
        self._evaluations = self._from(index, x)
        self._x, _ = next(self._evaluations)
        self._given, self._version, self.index = sample, _version(sample), index

    def reply(self, output: Tensor, sample: Tensor) -> Tensor:
        """The network's output at the latents `sample` (B, *); returns the next latents."""
        index = self.index
        if self._evaluations is None or index is None:
            raise FlowkitError("reply() was called before begin(), which starts the run")
        x = self._take_back(sample, self._scale[index])
        v = output if output.dtype == x.dtype else output.to(x.dtype)
        v = -v if (b := self._b[index]) == -1 else b * v
        if a := self._a[index]:
            v = v + a * x
        self.index = index + 1
        try:
            self._x, _ = self._evaluations.send((x, v))
            scale = self._scale[index + 1]
        except StopIteration as end:
            self._x, self.state = end.value if isinstance(end.value, tuple) else (end.value, None)
            self.ended = True
            scale = self._own_scale(self.grid[-1])
        given = self._x if scale == 1 else scale * self._x
        self._given = given if given.dtype == sample.dtype else given.to(sample.dtype)
        self._version = _version(self._given)
        return self._given

    def _take_back(self, sample: Tensor, scale: float) -> Tensor:
        """Our own state, unless the pipeline edited what it was given: then the edit counts."""
        if sample is self._given and self._version is not None:
            untouched = _version(sample) == self._version
        elif sample.dtype == self._x.dtype and scale == 1:
            return sample.clone()  # pipelines may write into their latents
        else:
            untouched = torch.equal(sample, (scale * self._x).to(sample.dtype))
        return self._x if untouched else sample.to(self._x.dtype) / scale

    def _from(self, begin: int, x: Tensor) -> Evaluations:
        """The solver from evaluation `begin` on; inside a step, Euler's rule leads to its end."""
        if begin == 0:
            run = self.solver(x, self.grid, **self.options)
            return _after_unasked(x, self.grid[0], run) if self._unasked else run
        for index, t in enumerate(self.times[begin:], begin):
            if t in self.grid[:-1]:
                rest = self.grid[self.grid.index(t) :]
                if evaluation_times(self.solver, rest, **self.options) == self.times[index:]:
                    lead = self.times[begin : index + 1]
                    return _led_by_euler(lead, x, self.solver, rest, self.options)
        low, high = sorted(self.grid[-2:])
        if all(low <= t <= high for t in self.times[begin:]):  # inside the last step
            return euler(x, [*self.times[begin:], self.grid[-1]])
        raise FlowkitError(
            f"solver {self.solver.__name__!r} cannot begin at evaluation {begin} of "
            f"{len(self.times)}; use another solver for image-to-image"
        )

    def _own_scale(self, t: float) -> float:
        """The latents' scale at t; 1 on the data, where the network's own path would be held."""
        return 1.0 if t == 1 else float(self.latents.coefficients(torch.tensor(t).double())[0])

    def __getstate__(self) -> dict[str, Any]:
        if self._evaluations is not None and not self.ended:
            raise FlowkitError(
                "a scheduler cannot be copied in the middle of a run; copy it before the first "
                "step or after the last"
            )
        return self.__dict__ | {"_evaluations": None}


def _after_unasked(x: Tensor, t: float, run: Evaluations) -> Evaluations:
    """The solver after an evaluation at (x, t) whose answer it does not need."""
    yield x, t
    return (yield from run)


def _led_by_euler(
    times: Sequence[float], x: Tensor, solver: Solver, grid: list[float], options: dict[str, Any]
) -> Evaluations:
    """Euler's rule along `times`, then the solver along `grid`, which begins where they end."""
    x = yield from euler(x, times)  # type: ignore[assignment]  # it leaves no state
    return (yield from solver(x, grid, **options))


def _version(x: Tensor) -> int | None:
    """torch's count of in-place edits, which tensors of inference mode do not have."""
    return None if x.is_inference() else x._version
