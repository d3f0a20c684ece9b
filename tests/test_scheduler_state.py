"""What our scheduler saves, restores, takes back from a pipeline, and runs back itself."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from tiny_pipelines import dit, draw, flux, generate, sana, sd3, sd15, sdxl, wan

from flowkit.errors import FlowkitError
from flowkit.samplers import (
    BDIADDIMScheduler,
    BDIAScheduler,
    DEISFlowScheduler,
    FlowScheduler,
    RFSolverScheduler,
    invert,
    sample,
)

STEPS = 4
UNIFORM = [0.0, 0.25, 0.5, 0.75, 1.0]


def ours(pipe, solver="euler", **options):
    """The same pipeline under our scheduler, made from the config of its own."""
    pipe.scheduler = FlowScheduler.from_config(pipe.scheduler.config, solver=solver, **options)
    return pipe


def ready(solver="euler", **options):
    """A scheduler for 4 steps."""
    scheduler = FlowScheduler(solver=solver, **options)
    scheduler.set_timesteps(STEPS)
    return scheduler


def velocity(x, t):
    return (0.3 + t) * x.sin()


def run(scheduler, x, timesteps=None):
    """A pipeline's loop on `velocity`."""
    for t in scheduler.timesteps if timesteps is None else timesteps:
        output = -velocity(x.float(), 1 - float(t) / 1000).to(x.dtype)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


# -- Saving, loading, copying -------------------------------------------------------------------


@pytest.mark.parametrize("build", [flux, sd3, sana, wan, sd15, sdxl, dit])
def test_a_saved_pipeline_comes_back_with_its_scheduler(build, tmp_path):
    pipe = ours(build(), "deis", solver_options={"method": "rhoab", "order": 3})
    expected = generate(pipe)
    pipe.save_pretrained(tmp_path)
    absent = {name: None for name, part in pipe.components.items() if part is None}
    again = type(pipe).from_pretrained(tmp_path, **absent)
    assert type(again.scheduler) is FlowScheduler
    assert again.scheduler.config.solver_options == {"method": "rhoab", "order": 3}
    assert torch.equal(generate(again), expected)


LOAD = """
import sys
import diffusers
import flowkit.samplers
scheduler = diffusers.DiTPipeline.from_pretrained(sys.argv[1]).scheduler
print(type(scheduler).__module__, type(scheduler).__name__, scheduler.config.solver)
"""


def test_importing_the_samplers_is_enough_to_load_a_saved_pipeline(tmp_path):
    pipe = dit()
    pipe.scheduler = RFSolverScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [RFSolverScheduler.__module__, "RFSolverScheduler", "rf_solver"]


def test_a_saved_scheduler_is_json_and_keeps_every_option(tmp_path):
    options = {
        "solver": "bdia",
        "solver_options": {"gamma": 0.9},
        "invert": True,
        "sigmas_are_final": True,
        "grid_power": 1.5,
        "shift": 2.5,
    }
    FlowScheduler(**options).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert options.items() <= saved.items()
    loaded = FlowScheduler.from_pretrained(tmp_path)
    assert options.items() <= dict(loaded.config).items()
    copied = FlowScheduler.from_config(loaded.config)
    assert options.items() <= dict(copied.config).items()


@pytest.mark.parametrize("cls", [RFSolverScheduler, DEISFlowScheduler, BDIADDIMScheduler])
@pytest.mark.parametrize("build", [sd3, sd15])
def test_a_named_class_is_its_solver(build, cls):
    pipe = build()
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    result = generate(pipe)
    assert torch.equal(generate(ours(build(), pipe.scheduler.config.solver)), result)


def test_pipelines_go_to_our_scheduler_and_back():
    pipe = sd3(shift=2.0)
    expected = generate(pipe)
    own = type(pipe.scheduler)
    pipe.scheduler = RFSolverScheduler.from_config(ours(pipe, "ab4").scheduler.config)
    assert (pipe.scheduler.config.solver, pipe.scheduler.config.shift) == ("rf_solver", 2.0)
    pipe.scheduler = own.from_config(pipe.scheduler.config)
    assert torch.equal(generate(pipe), expected)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "ab2", "bdia"])
def test_copies_run_by_themselves(solver):
    first, x = ready(solver), draw(2, 3)
    second, expected = copy.deepcopy(first), run(ready(solver), x)
    middle = len(first.timesteps) // 2
    halfway = run(first, x, first.timesteps[:middle])
    assert torch.equal(run(second, x), expected)
    assert torch.equal(run(first, halfway, first.timesteps[middle:]), expected)
    assert torch.equal(copy.deepcopy(first).timesteps, first.timesteps)


def test_a_copy_in_the_middle_of_a_run_is_refused():
    scheduler = ready("ab2")
    run(scheduler, draw(2, 3), scheduler.timesteps[:2])
    with pytest.raises(FlowkitError, match="cannot be copied in the middle of a run"):
        copy.deepcopy(scheduler)


def test_set_timesteps_starts_over():
    scheduler, x = ready("ab2"), draw(2, 3)
    run(scheduler, x, scheduler.timesteps[:2])
    scheduler.set_timesteps(STEPS)
    assert scheduler.step_index is None
    assert torch.equal(run(scheduler, x), sample(velocity, x, UNIFORM, "ab2").x)


# -- What a pipeline hands back -----------------------------------------------------------------


def halve_in_place(x):
    x *= 0.5


def edited(pipe, at, edit):
    """The result when callback_on_step_end changes the latents after step `at`."""

    def callback(pipe, index, timestep, kwargs):
        latents = edit(kwargs["latents"]) if index == at else None
        return {} if latents is None else {"latents": latents}

    return generate(pipe, num_inference_steps=STEPS, callback_on_step_end=callback)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", [flux, sd3, sd15, wan])
def test_an_edit_of_the_latents_counts(build, dtype):
    pipe = ours(build().to(dtype), "ab2")
    plain = generate(pipe, num_inference_steps=STEPS)
    assert torch.equal(edited(pipe, 1, torch.clone), plain)
    halved = edited(pipe, 1, lambda x: 0.5 * x)
    assert (halved - plain).abs().max() > 0.1
    assert torch.equal(edited(pipe, 1, halve_in_place), halved)
    corner = edited(pipe, 1, lambda x: x.index_fill(-1, torch.tensor([0]), 0.0))
    assert not torch.equal(corner, plain)
    assert torch.equal(edited(pipe, STEPS - 1, torch.zeros_like), torch.zeros_like(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("solver", ["euler", "ab2", "bdia", "unipc"])
def test_an_edit_is_that_of_the_plain_loop(solver, dtype):
    scheduler, start = ready(solver), draw(2, 3).to(dtype)
    x = 0.5 * run(scheduler, start, scheduler.timesteps[:2])
    result = run(scheduler, x, scheduler.timesteps[2:])

    def seen(x, t):
        return velocity(x.to(dtype).float(), t).to(dtype)

    def callback(step):
        return 0.5 * step.x.to(dtype) if step.index == 2 else None

    expected = sample(seen, start, UNIFORM, solver, callback=callback).x
    assert torch.equal(result, expected.to(dtype))


def test_a_rounding_is_no_edit():
    """Of 256 steps in bfloat16 without a state of its own, most would change nothing."""
    start, times = draw(64, 64).to(torch.bfloat16), [i / 256 for i in range(257)]
    scheduler = FlowScheduler(solver="euler")
    scheduler.set_timesteps(256)
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(-velocity(x, 1 - float(t) / 1000), t, x.clone()).prev_sample
    seen = sample(lambda x, t: velocity(x.to(torch.bfloat16), t), start, times, "euler").x
    assert torch.equal(x, seen.to(torch.bfloat16))


def test_double_precision_is_kept():
    x = draw(2, 3).double()
    expected = sample(velocity, x, UNIFORM, "midpoint").x
    scheduler = ready("midpoint")
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(-velocity(x, i / 8), t, x).prev_sample
    assert x.dtype == torch.float64
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)


# -- Running back -------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "midpoint", "ab3", "dpmpp_2m"])
def test_inversion_is_that_of_the_plain_loop(solver):
    data, scheduler = draw(2, 3), ready(solver, invert=True, shift=3.0)
    times = [t / (t + 3 * (1 - t)) for t in UNIFORM]
    expected = invert(velocity, data, times, solver).x
    assert scheduler.timesteps[0] == 0
    torch.testing.assert_close(run(scheduler, data), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", [BDIAScheduler, BDIADDIMScheduler])
@pytest.mark.parametrize("build", [sd3, sd15])
def test_bdia_runs_back_to_the_noise_it_came_from(build, cls):
    pipe, options, noise = build(), {"solver_options": {"gamma": 1.0}}, draw(2, 4, 8, 8)
    if build is sd15:
        pipe.scheduler.register_to_config(timestep_spacing="trailing")
    pipe.scheduler = there = cls.from_config(pipe.scheduler.config, **options)
    picture = generate(pipe, latents=noise, num_inference_steps=6)
    pipe.scheduler = cls.from_config(there.config, invert=True, **options)
    far = generate(pipe, latents=picture, num_inference_steps=6)
    pipe.scheduler = cls.from_config(there.config, invert=True, **options)
    pipe.scheduler.initial_state = there.state
    near = generate(pipe, latents=picture, num_inference_steps=6)
    error = (near - noise).abs().max()
    assert error < 1e-3 and (far - noise).abs().max() > 10 * error


@pytest.mark.parametrize("gamma", [0.9, 1.0])
@pytest.mark.parametrize("build, cls", [(sd3, BDIAScheduler), (sd15, BDIADDIMScheduler)])
def test_bdia_s_round_trip_through_a_double_pipeline_is_exact(build, cls, gamma):
    """Guidance 1; the network's rounding is the same both ways, the solver's is that of float64."""
    pipe, options = build().to(torch.float64), {"solver_options": {"gamma": gamma}}
    noise = draw(1, 4, 8, 8).double()
    pipe.scheduler = there = cls.from_config(pipe.scheduler.config, **options)
    picture = generate(pipe, batch=1, latents=noise, num_inference_steps=40)
    pipe.scheduler = cls.from_config(there.config, invert=True, **options)
    pipe.scheduler.initial_state = there.state
    back = generate(pipe, batch=1, latents=picture, num_inference_steps=40)
    assert picture.dtype == torch.float64
    assert (back - noise).abs().max() < 1e-10
    assert (picture - noise).abs().max() > 0.1
