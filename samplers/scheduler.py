"""Any solver as a diffusers scheduler: the very generator of the plain loop, driven by a pipeline.

    pipe.scheduler = RFSolverScheduler.from_config(pipe.scheduler.config)

A pipeline evaluates its network between two calls of step(), so step() is a reply to the solver's
last request, and what it returns is the next one.
"""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.pipelines import FlowLatents
from flowkit.registry import look_up
from flowkit.samplers.evaluations import Solver
from flowkit.samplers.pipeline_config import complete, find_latents
from flowkit.samplers.pipeline_grids import flow_times, own_times, vp_times
from flowkit.samplers.pipeline_run import PipelineRun
from flowkit.samplers.schedule_file import Schedule
from flowkit.samplers.solve import (
    DEFAULT_SOLVER,
    SOLVERS,
    evaluation_times,
    find_solver,
    is_adaptive,
)
from flowkit.velocity import expand_to

__all__ = ["FlowScheduler"]


_SAME = 1e-3  # timesteps nearer than this are one, written in another precision


class FlowScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler around a solver, for flow and for VP (epsilon, v_prediction, sample) pipelines.

    solver: a name in flowkit.samplers.solve.SOLVERS that chooses its evaluations beforehand.
    solver_options: its keyword options.  invert: run from the pictures (given as `latents`) to
    the noise.  sigmas_are_final: sigmas that a pipeline passes are kept as they are, unshifted.
    grid_power: where a pipeline passes no sigmas, sigma = (1 - i/N)^grid_power before the shift;
    1 is uniform, 1.5 suits the default solver at few steps.  times: the grid in flowkit's t,
    whatever a pipeline asks; it must ask for as many steps.  prediction_type: None or
    "flow_prediction" for flow models, else what the network of a VP path predicts.
    The rest has diffusers' names and meaning, but a VP grid always ends on the data, and
    `clip_sample` and `thresholding` do not apply to an ODE.
    Latents keep the pipeline's dtype, the solver's state is float32 (float64 in float64).
    `state` is what the solver left for running back; set `initial_state` to start from one.
    Raises FlowkitError for a solver or option that is unknown, an adaptive solver, a prediction
    type or a noise schedule that has no path here.
    """

    # Whose options a config may hold besides ours: they stay in it and do not warn.
    _compatibles = [
        *(kind.name for kind in KarrasDiffusionSchedulers),
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
    ]
    fixed_solver: str | None = None  # of a named class
    init_noise_sigma = 1.0  # pipelines of VP models multiply their noise by it

    @register_to_config
    def __init__(
        self,
        solver: str | None = None,
        solver_options: dict[str, Any] | None = None,
        invert: bool = False,
        sigmas_are_final: bool = False,
        grid_power: float = 1.0,
        times: list[float] | None = None,
        num_train_timesteps: int = 1000,
        prediction_type: str | None = None,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        invert_sigmas: bool = False,
    ) -> None:
        if self.fixed_solver and solver not in (None, self.fixed_solver):
            raise FlowkitError(
                f"{type(self).__name__} runs {self.fixed_solver!r}, got solver={solver!r}; "
                "use FlowScheduler for a solver by name"
            )
        solver = self.fixed_solver or solver or DEFAULT_SOLVER
        self.register_to_config(solver=solver)
        self.latents = find_latents(self.config)
        self._generator: Any = None  # of the step under way
        if not isinstance(solver_options, Mapping | None):
            raise FlowkitError(f"solver_options must be a dict, got {solver_options!r}")
        self._solver, self._options = self._find_solver(solver, dict(solver_options or {}))
        self.order = self._evaluations_per_step()
        self.num_inference_steps: int | None = None
        self.timesteps = self.sigmas = torch.empty(0)
        self.initial_state: Any = None  # of the next run
        self._run: PipelineRun | None = None
        self._begin_index: int | None = None
        self._timesteps_at = 0  # their address

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """The scheduler that samples what the scheduler of `config` samples.

        config: of any FlowMatch, DPM-Solver, UniPC, DDIM, ... scheduler, in memory or loaded.
        kwargs: options of this class, which come before the config's.
        """
        if isinstance(config, Mapping):
            config = complete(config)
            solver = config.get("solver")
            if solver != (cls.fixed_solver or kwargs.get("solver", solver)):
                config.pop("solver", None)  # with the options, which are of another
                config.pop("solver_options", None)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_schedule(
        cls, file: str | os.PathLike[str], config: Any = None, **kwargs: Any
    ) -> FlowScheduler:
        """The scheduler of a searched schedule's solver, on its times to the last digit.

        config: of the pipeline's own scheduler; a flow pipeline may go without.
        A pipeline evaluates its network before the first step, so an analytic one is not free: it
        is taken with the network's velocity, one evaluation more than searched for, with a warning.
        """
        found = Schedule.load(file)
        if found.analytic:
            warnings.warn(
                f"{os.fspath(file)}: its analytic first step takes the network's velocity in a "
                f"pipeline, {len(found.steps)} evaluations instead of {len(found.steps) - 1}; "
                "search with analytic=false for a pipeline",
                stacklevel=2,
            )
            found = replace(found, analytic=False, mean=None)
        kwargs |= {"solver": found.solver, "solver_options": found.solver_options}
        return cls.from_config(config or {}, times=list(found.times), **kwargs)

    def _find_solver(self, name: str, options: dict[str, Any]) -> tuple[Solver, dict[str, Any]]:
        """The solver, and its options with those that only a scheduler can know."""
        parameters = inspect.signature(look_up("solver", name, SOLVERS)).parameters
        if "path" in parameters:
            options = {"path": self.latents.path} | options
        if "draw" in parameters:
            options["draw"] = self._draw
        solver = find_solver(name, options)
        if is_adaptive(solver):
            raise FlowkitError(
                f"solver {name!r} chooses its steps as it goes, which a pipeline cannot follow; "
                "use it in flowkit.samplers.sample, or another solver here"
            )
        return solver, options

    def _evaluations_per_step(self) -> int:
        grid = [0.1 + 0.08 * i for i in range(11)]
        return round(len(evaluation_times(self._solver, grid, **self._options)) / 10)

    @property
    def step_index(self) -> int | None:
        """How many of the timesteps lie behind, None before the first step."""
        return self._run.index if self._run else None

    @property
    def begin_index(self) -> int | None:
        """The timestep to begin at, as a pipeline set it."""
        return self._begin_index

    @property
    def state(self) -> Any:
        """What the solver left at the end of the run, None before: see flowkit.samplers.Result."""
        return self._run.state if self._run else None

    @property
    def times(self) -> list[float]:
        """The solver's grid: flowkit's t at the ends of its steps, in the order of the run."""
        return self._run.grid if self._run else []

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin the run at timesteps[begin_index], as image-to-image does."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Choose the grid of the next run; `timesteps` is then where the network is evaluated.

        num_inference_steps: steps of the solver; a step has `order` timesteps.  sigmas: unshifted,
        falling, without the final 0 (flow models); noise-to-signal ratios (VP models).  mu: of the
        dynamic shift.  timesteps: what the network is to see at the beginning of each step.
        """
        if sigmas is not None and timesteps is not None:
            raise FlowkitError("set_timesteps() takes sigmas or timesteps, got both")
        if self.config["times"]:
            grid = own_times(self.config["times"], num_inference_steps, sigmas, timesteps)
        elif isinstance(self.latents, FlowLatents):
            asked = num_inference_steps, sigmas, mu, timesteps
            grid = flow_times(self.latents, self.config, *asked)
        else:
            grid = vp_times(self.latents, self.config, num_inference_steps, sigmas, timesteps)
        options = self._options
        if self.initial_state is not None:
            options = options | {"state": self.initial_state}
        if self.config["invert"]:
            grid.reverse()
        self._run = PipelineRun(self._solver, options, grid, self.latents)
        self.initial_state = None
        self._begin_index = None
        # A pipeline that gives sigmas counts timesteps as steps, and slices them by that count.
        self.order = 1 if sigmas is not None else self._evaluations_per_step()
        self.num_inference_steps = len(grid) - 1
        self.timesteps = torch.tensor(self._run.timesteps, dtype=torch.float32, device=device)
        self._timesteps_at = self.timesteps.data_ptr()
        times = torch.tensor([*self._run.times, grid[-1]], dtype=torch.float64)
        self.sigmas = self.latents.sigma(times).to(torch.float32)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself: latents are what the network sees."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Pictures (B, *) with the noise of `timesteps` (B,) in them."""
        steps = torch.as_tensor(timesteps, dtype=torch.float64, device="cpu").reshape(-1)
        alpha, sigma = self.latents.mixture(self.latents.time(steps))
        x = original_samples
        return expand_to(alpha, x) * x + expand_to(sigma, x) * noise.to(x)

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """`add_noise`, as pipelines of flow models call it."""
        return self.add_noise(sample, noise, timestep)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Answer the solver with the network's output at `sample`, and return its next request.

        model_output, sample: (B, *); a learned variance behind the output is dropped.
        timestep: the one that comes next.  generator: for the noise of a stochastic solver.
        Raises FlowkitError for another timestep than the next, and for another shape.
        """
        run = self._run
        if run is None or run.ended:
            raise FlowkitError(
                "step() was called before set_timesteps(), or after the last timestep; "
                "set_timesteps() begins a run"
            )
        if run.index is None:
            if not sample.is_floating_point():
                raise FlowkitError(f"latents must be floating-point numbers, got {sample.dtype}")
            begin = self._first_index(timestep)
            self._check_timestep(timestep, begin)
            run.begin(begin, sample)
            self._shape = sample.shape
        self._check_timestep(timestep, run.index or 0)
        if sample.shape != self._shape or model_output.shape != sample.shape:
            model_output = self._without_variance(model_output, sample)
        self._generator = generator
        previous = run.reply(model_output, sample)
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    def _without_variance(self, output: Tensor, sample: Tensor) -> Tensor:
        """The first half of an output whose second half is a learned variance."""
        shape = tuple(self._shape)
        learned = len(shape) > 1 and output.shape == (shape[0], 2 * shape[1], *shape[2:])
        if sample.shape != shape or not learned:
            raise FlowkitError(
                f"step() got a model output of shape {tuple(output.shape)} and a sample of "
                f"{tuple(sample.shape)}; both must have the shape that the run began with, "
                f"{shape}"
            )
        return output.chunk(2, dim=1)[0]

    def _first_index(self, timestep: float | Tensor) -> int:
        """Where to begin: where the pipeline said, else at the timestep it comes with."""
        own = self._run.timesteps if self._run else []
        if self._begin_index is not None:
            if not 0 <= self._begin_index < len(own):
                raise FlowkitError(
                    f"begin_index must lie in [0, {len(own) - 1}], got {self._begin_index}"
                )
            return self._begin_index
        wanted = float(torch.as_tensor(timestep).reshape(-1)[0])
        return next((i for i, known in enumerate(own) if abs(known - wanted) < _SAME), 0)

    def _check_timestep(self, timestep: float | Tensor, index: int) -> None:
        if isinstance(timestep, Tensor):
            # A view of ours, as pipelines pass it, is known without waiting for the device.
            if timestep.data_ptr() == self._timesteps_at + 4 * index:  # float32
                return
            timestep = float(timestep.reshape(-1)[0])
        expected = float(self._run.timesteps[index]) if self._run else math.nan
        if not abs(timestep - expected) < _SAME:
            raise FlowkitError(
                f"step() got timestep {timestep:g} where {expected:g} comes next; pass the "
                "timesteps in order, or call set_timesteps() to begin anew"
            )

    def _draw(self, x: Tensor, k: int) -> Tensor:
        return randn_tensor(x.shape, generator=self._generator, device=x.device, dtype=x.dtype)

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])
