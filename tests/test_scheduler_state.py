"""What our scheduler keeps, restores, takes back and refuses, in diffusers pipelines and alone."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from tiny_pipelines import arguments, dit, draw, flux, generate, sana, sd3, sd15, sdxl

from flowkit.errors import FlowkitError
from flowkit.samplers import (
    BDIADDIMScheduler,
    DEISFlowScheduler,
    FlowScheduler,
    RFSolverScheduler,
    sample,
)

STEPS = 4


def ours(pipe, solver="euler", **options):
    """The same pipeline under our scheduler, made from the config of its own."""
    pipe.scheduler = FlowScheduler.from_config(pipe.scheduler.config, solver=solver, **options)
    return pipe


def flow(solver="euler", **options):
    """A scheduler ready for 4 steps."""
    scheduler = FlowScheduler(solver=solver, **options)
    scheduler.set_timesteps(STEPS)
    return scheduler


def run(scheduler, x=None, timesteps=None):
    """The scheduler's own loop on the velocity -x, whose prediction (reversed) is x."""
    x = draw(2, 3) if x is None else x
    for t in scheduler.timesteps if timesteps is None else timesteps:
        x = scheduler.step(x, t, x, return_dict=False)[0]
    return x


# -- Saving and loading -------------------------------------------------------------------------


@pytest.mark.parametrize("build", [flux, sd3, sana, sd15, sdxl, dit])
def test_a_saved_pipeline_comes_back_with_its_scheduler(build, tmp_path):
    pipe = ours(build(), "midpoint", invert=False)
    expected = generate(pipe)
    pipe.save_pretrained(tmp_path)
    absent = {name: None for name, part in pipe.components.items() if part is None}
    again = type(pipe).from_pretrained(tmp_path, **absent)
    assert type(again.scheduler) is FlowScheduler
    assert dict(again.scheduler.config) == dict(pipe.scheduler.config)
    assert torch.equal(generate(again), expected)


LOAD = """
import sys
import diffusers
pipe = diffusers.DiTPipeline.from_pretrained(sys.argv[1])
scheduler = pipe.scheduler
print(type(scheduler).__module__, type(scheduler).__name__, scheduler.config.solver)
"""


def test_another_process_needs_no_import_of_ours(tmp_path):
    pipe = dit()
    pipe.scheduler = RFSolverScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = f"{RFSolverScheduler.__module__} RFSolverScheduler {pipe.scheduler.config.solver}"
    assert done.stdout.strip() == expected


@pytest.mark.parametrize("cls", [RFSolverScheduler, DEISFlowScheduler, BDIADDIMScheduler])
def test_named_classes_are_their_solvers(cls):
    pipe = sd15()
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    named = generate(pipe)
    solver, options = pipe.scheduler.config.solver, pipe.scheduler.config.solver_options
    assert torch.equal(generate(ours(sd15(), solver, solver_options=options)), named)


def test_options_survive_a_scheduler_of_another_class():
    first = FlowScheduler(solver="ab2", shift=2.0, sigmas_are_final=True)
    second = RFSolverScheduler.from_config(first.config)
    assert second.config.shift == 2.0 and second.config.sigmas_are_final
    euler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(first.config)
    assert euler.config.shift == 2.0


@pytest.mark.parametrize("solver", ["euler", "midpoint", "ab2", "rk4"])
def test_a_copy_made_midway_runs_on_by_itself(solver):
    whole, first = flow(solver), flow(solver)
    middle = len(first.timesteps) // 2 + 1
    timesteps = list(first.timesteps)
    x = run(first, timesteps=timesteps[:middle])
    second = copy.deepcopy(first)
    expected = run(whole)
    assert torch.equal(run(second, x, timesteps[middle:]), expected)
    assert torch.equal(run(first, x, timesteps[middle:]), expected)


def test_set_timesteps_starts_over():
    scheduler = flow("ab2")
    expected = run(scheduler)
    scheduler.set_timesteps(STEPS)
    run(scheduler, timesteps=scheduler.timesteps[:2])
    scheduler.set_timesteps(STEPS)
    assert torch.equal(run(scheduler), expected)


# -- Edits at the end of a step -----------------------------------------------------------------


def edited(pipe, at, edit, **options):
    """The result when callback_on_step_end changes the latents after call `at` of the network."""

    def callback(pipe, index, timestep, kwargs):
        return {"latents": edit(kwargs["latents"])} if index == at else {}

    return generate(pipe, num_inference_steps=STEPS, callback_on_step_end=callback, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", [flux, sd3, sd15])
def test_an_edit_of_the_latents_counts(build, dtype):
    pipe = ours(build().to(dtype))
    plain = generate(pipe, num_inference_steps=STEPS)
    assert torch.equal(edited(pipe, 1, lambda x: x.clone()), plain)
    assert not torch.equal(edited(pipe, 1, lambda x: 0.5 * x), plain)
    last = edited(pipe, STEPS - 1, lambda x: torch.full_like(x, 7.0))
    assert torch.equal(last, torch.full_like(last, 7.0))
