"""What a scheduler reads from the config of another, and what it refuses there."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch

from flowkit.errors import FlowkitError
from flowkit.pipelines import FlowLatents, VPLatents
from flowkit.samplers import FlowScheduler, RFSolverScheduler

FLOWS = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
DIFFUSIONS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "RePaintScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]
UNKNOWN = [
    "CogVideoXDDIMScheduler",
    "EDMEulerScheduler",
    "IPNDMScheduler",
    "ScoreSdeVeScheduler",
]


def configs(name: str) -> list[dict[str, Any]]:
    """In memory, and as saved."""
    scheduler = getattr(diffusers, name)()
    return [scheduler.config, dict(scheduler.config) | {"_class_name": name}]


@pytest.mark.parametrize("name", FLOWS)
def test_flow_schedulers_give_flows(name: str) -> None:
    for config in configs(name):
        assert isinstance(FlowScheduler.from_config(config).latents, FlowLatents)


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_the_others_give_their_noise_table(name: str) -> None:
    """Also where a saved config leaves out what its scheduler takes for granted."""
    table = getattr(diffusers, name)().alphas_cumprod
    for config in [*configs(name), {"_class_name": name}]:
        latents = FlowScheduler.from_config(config).latents
        assert isinstance(latents, VPLatents)
        s = torch.tensor([0.0, 500.0, 999.0], dtype=torch.float64)
        alpha, _ = latents.mixture(latents.time(s))
        torch.testing.assert_close(alpha.square().float(), table[[0, 500, 999]])


@pytest.mark.parametrize("name", UNKNOWN)
def test_models_of_other_paths_are_refused(name: str) -> None:
    for config in configs(name):
        with pytest.raises(FlowkitError, match="whose path is not known here|on EDM's path"):
            FlowScheduler.from_config(config)


def test_another_solver_s_options_do_not_come_along() -> None:
    bdia = FlowScheduler(solver="bdia", solver_options={"gamma": 0.9})
    assert FlowScheduler.from_config(bdia.config).config.solver_options == {"gamma": 0.9}
    assert FlowScheduler.from_config(bdia.config, solver="euler").config.solver == "euler"
    assert RFSolverScheduler.from_config(bdia.config).config.solver == "rf_solver"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_karras_sigmas": True}, "use_karras_sigmas=True is not supported"),
        ({"use_beta_sigmas": True}, "give the pipeline sigmas of flowkit.samplers.grids"),
        ({"invert_sigmas": True}, "Mochi"),
        ({"time_shift_type": "foo"}, "'exponential' or 'linear', got 'foo'"),
        ({"num_train_timesteps": 0}, "positive whole number, got 0"),
        ({"prediction_type": "foo"}, "got 'foo'"),
        ({"prediction_type": "epsilon", "beta_schedule": "foo"}, "beta_schedule='foo'"),
        ({"solver": "foo"}, "unknown solver 'foo'"),
        ({"solver": "dopri5"}, "'dopri5' chooses its steps as it goes"),
        ({"solver": "bdia", "solver_options": {"gama": 1.0}}, "did you mean 'gamma'"),
        ({"solver_options": "order=3"}, "solver_options must be a dict, got 'order=3'"),
    ],
)
def test_options_that_cannot_be_honoured(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FlowkitError, match=message):
        FlowScheduler(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"grid_power": -1.0},
        {"grid_power": 0.0},
        {"grid_power": math.nan},
        {"shift": 0.0},
        {"shift": -1.0},
        {"shift": math.nan},
        {"shift_terminal": 2.0},
    ],
)
def test_shifts_that_make_no_grid_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(FlowkitError, match="sigmas must fall within"):
        FlowScheduler(**options).set_timesteps(4)


@pytest.mark.parametrize("steps", [0, -1, 4.5, "4", None])
def test_numbers_of_steps_that_are_none(steps: Any) -> None:
    for scheduler in (FlowScheduler(), FlowScheduler(prediction_type="epsilon")):
        with pytest.raises(FlowkitError, match="num_inference_steps"):
            scheduler.set_timesteps(steps)


@pytest.mark.parametrize("timesteps", [[1500, 500], [500, -5], [math.nan, 3]])
def test_timesteps_outside_the_table(timesteps: list[float]) -> None:
    with pytest.raises(FlowkitError, match=r"timesteps must lie in \[0, 999\]"):
        FlowScheduler(prediction_type="epsilon").set_timesteps(timesteps=timesteps)


@pytest.mark.parametrize("begin", [-1, 4])
def test_a_begin_index_beyond_the_timesteps(begin: int) -> None:
    scheduler = FlowScheduler()
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(begin)
    with pytest.raises(FlowkitError, match=r"begin_index must lie in \[0, 3\]"):
        scheduler.step(torch.zeros(1, 2), scheduler.timesteps[0], torch.zeros(1, 2))


@pytest.mark.parametrize("solver", ["rf_solver", "heun", "rk4", "abm", "fireflow"])
def test_a_run_may_begin_inside_the_last_step(solver: str) -> None:
    """Euler's rule leads to the end, as image-to-image of little strength asks."""
    scheduler = FlowScheduler(solver=solver)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(len(scheduler.timesteps) - 1)
    last = scheduler.timesteps[-1]
    data, noise = torch.full((1, 2), 0.25), torch.ones(1, 2)
    x = scheduler.scale_noise(data, last[None], noise)
    x = scheduler.step(noise - data, last, x).prev_sample
    torch.testing.assert_close(x, data)


@pytest.mark.parametrize("solver", ["euler", "heun", "rk4", "bdia", "abm", "edm_heun", "rf_solver"])
def test_a_pipeline_may_write_into_its_latents(solver: str) -> None:
    def run(buffer: torch.Tensor | None) -> torch.Tensor:
        scheduler = FlowScheduler(solver=solver)
        scheduler.set_timesteps(5)
        x = torch.linspace(-1, 1, 6).reshape(1, 6)
        for t in scheduler.timesteps:
            new = scheduler.step(torch.sin(x) - t / 1000, t, x).prev_sample
            x = new if buffer is None else buffer.copy_(new)
        return x

    assert torch.equal(run(torch.empty(1, 6)), run(None))
