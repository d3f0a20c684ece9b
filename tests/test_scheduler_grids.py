"""The grids that our scheduler runs on, the noise it draws, and what it refuses."""

from __future__ import annotations

import diffusers
import pytest
import torch
from tiny_pipelines import BETAS, dit, draw, flux, generate, sana, sd3, sd15, sdxl, wan

from flowkit.errors import FlowkitError
from flowkit.samplers import FlowScheduler, RFSolverScheduler, sample
from flowkit.samplers.solve import SOLVERS, is_adaptive


def ours(pipe, solver="euler", **options):
    """The same pipeline under our scheduler, made from the config of its own."""
    pipe.scheduler = FlowScheduler.from_config(pipe.scheduler.config, solver=solver, **options)
    return pipe


# -- Grids --------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [sd3, wan, sdxl, dit])
def test_every_evaluation_has_a_timestep_and_a_sigma(build):
    pipe = build()
    # EDM's sigma is infinite at t = 0, where a flow's grid begins.
    unfit = {"bdia_edm"} if build in (sd3, wan) else set()
    for solver in {name for name in SOLVERS if not is_adaptive(SOLVERS[name])} - unfit:
        scheduler = ours(pipe, solver).scheduler
        scheduler.set_timesteps(6)
        assert scheduler.num_inference_steps == 6
        assert len(scheduler.sigmas) == len(scheduler.timesteps) + 1 and scheduler.sigmas[-1] == 0
        assert abs(len(scheduler.timesteps) - 6 * scheduler.order) <= scheduler.order
        assert scheduler.timesteps.dtype == scheduler.sigmas.dtype == torch.float32


def test_the_grid_of_a_flow_is_uniform_and_shifted_once():
    scheduler = FlowScheduler(solver="euler")
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]
    for options in ({"shift": 3.0}, {"use_flow_sigmas": True, "flow_shift": 3.0, "shift": 7.0}):
        scheduler = FlowScheduler(solver="euler", **options)
        scheduler.set_timesteps(4)
        assert scheduler.sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
        assert scheduler.timesteps.tolist() == pytest.approx([1000, 900, 750, 500])


def test_grid_power_crowds_the_steps_near_the_data():
    scheduler = FlowScheduler(solver="euler", grid_power=2.0)
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() == [1, 0.5625, 0.25, 0.0625, 0]
    scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])
    assert scheduler.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize("build", [flux, sd3, sana])
def test_final_sigmas_are_kept_to_the_last_digit(build):
    sigmas = [1.0, 0.87654321, 0.31415926, 0.01]
    pipe = ours(build(), sigmas_are_final=True)
    generate(pipe, sigmas=sigmas)
    kept = torch.tensor([*sigmas, 0.0])
    assert torch.equal(pipe.scheduler.sigmas, kept)
    assert torch.equal(pipe.scheduler.timesteps, 1000 * kept[:-1].double().float())
    generate(moved := ours(build()), sigmas=sigmas)
    assert not torch.allclose(moved.scheduler.sigmas, kept, atol=1e-3)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("steps", [1, 4, 20, 25])
def test_the_grid_of_a_diffusion_model_is_ddims(spacing, offset, steps):
    ddim = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset, **BETAS)
    scheduler = FlowScheduler.from_config(ddim.config, solver="euler")
    ddim.set_timesteps(steps)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(scheduler.timesteps, ddim.timesteps.float(), rtol=0, atol=1e-3)


def test_positions_in_the_noise_table_may_be_fractions():
    for spacing, expected in {
        "linspace": [999, 799.2, 599.4, 399.6, 199.8, 0],
        "trailing": [999, 832 + 1 / 3, 665 + 2 / 3, 499, 332 + 1 / 3, 165 + 2 / 3],
    }.items():
        scheduler = FlowScheduler(
            solver="euler", prediction_type="epsilon", timestep_spacing=spacing
        )
        scheduler.set_timesteps(6)
        assert scheduler.timesteps.tolist() == pytest.approx(expected, abs=1e-3)


def test_zero_terminal_snr_is_that_of_ddim():
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe = sd15("v_prediction")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, **config, clip_sample=False, set_alpha_to_one=True
    )
    expected = generate(pipe, num_inference_steps=5)
    result = generate(ours(pipe), num_inference_steps=5)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("build", [sana, sd15, sdxl])
def test_a_caller_may_give_timesteps(build):
    timesteps = [900, 500.0, 120]
    generate(pipe := ours(build()), timesteps=timesteps)
    torch.testing.assert_close(pipe.scheduler.timesteps, torch.tensor(timesteps))


@pytest.mark.parametrize("cls", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_noise_of_a_diffusion_model_is_added_as_by_ddim(cls):
    ddim = diffusers.DDIMScheduler(**BETAS)
    scheduler = FlowScheduler.from_config(getattr(diffusers, cls)(**BETAS).config)
    x, noise, at = draw(3, 4, 2, 2), draw(3, 4, 2, 2, seed=1), torch.tensor([0, 501, 999])
    expected = ddim.add_noise(x, noise, at)
    torch.testing.assert_close(scheduler.add_noise(x, noise, at), expected, rtol=1e-5, atol=1e-5)


# -- Noise on the way ---------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["sde", "consistency"])
def test_the_generator_decides_the_noise(solver):
    before = torch.get_rng_state()
    x, results = draw(1, 64), []
    for seed in (1, 1, 2):
        scheduler = FlowScheduler(solver=solver)
        scheduler.set_timesteps(4)
        generator, state = torch.Generator().manual_seed(seed), x
        for t in scheduler.timesteps:
            state = scheduler.step(state, t, state, generator=generator).prev_sample
        results.append(state)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert torch.equal(torch.get_rng_state(), before)  # planning a run draws nothing


@pytest.mark.parametrize("solver", ["sde", "consistency"])
def test_a_second_run_repeats_the_first(solver):
    pipe = ours(sd15(), solver)
    assert torch.equal(generate(pipe), generate(pipe))


@pytest.mark.parametrize("churn", [0.0, 2.0])
def test_noise_before_the_first_evaluation_is_that_of_the_plain_loop(churn):
    """With s_churn the solver evaluates what a pipeline does not have yet when it begins."""
    sigmas, start = [0.8, 0.5, 0.2], draw(2, 64)
    options = {"s_churn": churn}
    scheduler = FlowScheduler(solver="edm_heun", solver_options=options, sigmas_are_final=True)
    scheduler.set_timesteps(sigmas=sigmas)
    x, generator = start, torch.Generator().manual_seed(0)
    for t in scheduler.timesteps:
        x = scheduler.step(-x.sin() * t / 1000, t, x, generator=generator).prev_sample
    generator.manual_seed(0)
    expected = sample(
        lambda x, t: x.sin() * (1 - t),
        start,
        [1 - sigma for sigma in sigmas] + [1.0],
        "edm_heun",
        draw=lambda x, k: torch.randn(x.shape, generator=generator),
        **options,
    ).x
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


# -- What it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"solver": "dopri5"}, "chooses its steps"),
        ({"solver": "eular"}, "unknown solver"),
        ({"solver": "euler", "solver_options": {"order": 3}}, "order"),
        ({"prediction_type": "data"}, "prediction"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas"),
    ],
)
def test_a_scheduler_that_cannot_be_is_not_made(options, message):
    with pytest.raises(FlowkitError, match=message) as caught:
        FlowScheduler(**options)
    assert "\n" not in str(caught.value)


def test_a_named_class_takes_no_other_solver():
    with pytest.raises(FlowkitError, match="use FlowScheduler"):
        RFSolverScheduler(solver="euler")


def test_the_scheduler_of_another_kind_of_model_is_refused():
    with pytest.raises(FlowkitError, match="EDM"):
        FlowScheduler.from_config(diffusers.EDMEulerScheduler().config)


@pytest.mark.parametrize("build", [sd3, sd15])
@pytest.mark.parametrize(
    "arguments",
    [
        {"num_inference_steps": 0},
        {"num_inference_steps": -1},
        {},
        {"sigmas": [0.2, 0.5, 0.9]},
        {"sigmas": [0.9, 0.5, 0.5]},
        {"sigmas": [0.9, 0.5, 0.0]},
        {"sigmas": [0.9, float("nan"), 0.1]},
        {"sigmas": []},
        {"timesteps": [200.0, 500.0]},
        {"timesteps": [500.0, 500.0]},
        {"timesteps": [500.0], "sigmas": [0.5]},
        {"num_inference_steps": 3, "sigmas": [0.9, 0.5]},
    ],
    ids=str,
)
def test_a_grid_that_does_not_fall_is_refused(build, arguments):
    with pytest.raises(FlowkitError) as caught:
        ours(build()).scheduler.set_timesteps(**arguments)
    assert "\n" not in str(caught.value)


def test_dynamic_shifting_needs_mu():
    with pytest.raises(FlowkitError, match="mu"):
        FlowScheduler(use_dynamic_shifting=True).set_timesteps(3)


def test_step_takes_what_comes_next():
    x, scheduler = draw(2, 3), FlowScheduler(solver="euler")
    with pytest.raises(FlowkitError, match=r"before set_timesteps\(\)"):
        scheduler.step(x, 1000.0, x)
    scheduler.set_timesteps(4)
    x = expected = scheduler.step(x, 1000.0, x).prev_sample
    for timestep in (1000.0, 500.0, torch.tensor(0.0)):
        with pytest.raises(FlowkitError, match="where 750 comes next"):
            scheduler.step(x, timestep, x)
    for output, state in ((x[:1], x), (x, x[:1]), (x[:1], x[:1]), (x.T, x.T)):
        with pytest.raises(FlowkitError, match="shape"):
            scheduler.step(output, 750.0, state)
    for timestep in scheduler.timesteps[1:]:  # nothing above left a trace
        x, expected = scheduler.step(x, timestep, x).prev_sample, expected - 0.25 * expected
    torch.testing.assert_close(x, expected)
    with pytest.raises(FlowkitError, match="after the last timestep"):
        scheduler.step(x, 0.0, x)
