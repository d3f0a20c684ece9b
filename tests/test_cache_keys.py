"""Where passes stand in a run: steps, stages and branches, in plain loops and in pipelines."""

from __future__ import annotations

import diffusers
import pytest
import torch
from small_networks import distance, dit, draw, moving
from tiny_pipelines import (
    PIPELINES,
    flux,
    flux_img2img,
    generate,
    sana,
    sd3,
    sd15,
    sd15_img2img,
    wan,
)
from torch import nn

from flowkit.adapters import from_diffusers
from flowkit.samplers import FlowScheduler, RFSolverScheduler, invert, sample
from flowkit.samplers.grids import uniform
from flowkit.samplers.taylor import enable_taylorseer, taylorseer
from flowkit.velocity import bind, guided

LEVELS = ["block", "each", "module"]
SOLVERS = ["euler", "abm", "midpoint", "heun", "rk4", "fireflow", "unipc"]
TIMES = uniform(12)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# Steps, stages, branches.


@pytest.mark.parametrize("solver, stages", [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_a_followed_run_counts_the_solvers_steps(solver, stages):
    net, noise = dit(), draw(2, 1, 8, 8)
    velocity = from_diffusers(net)
    with taylorseer(net, interval=4, last=True) as cache:
        for run, grid in ((sample, TIMES), (invert, TIMES[::-1])):
            run(cache.follow(velocity, solver, grid), noise, TIMES, solver)
            assert cache.stats.full_steps == [0, 1, 5, 9, 11]
            assert cache.stats.computed == 5 * stages
            assert cache.stats.forecast == 7 * stages


@pytest.mark.parametrize("solver", SOLVERS)
def test_runs_do_not_see_each_other(solver):
    net, noise = dit(), draw(2, 1, 8, 8)
    velocity = from_diffusers(net)
    with taylorseer(net, interval=3):
        first = sample(velocity, noise, TIMES, solver).x
        sample(velocity, noise.flip(0), TIMES, solver)
        assert torch.equal(sample(velocity, noise, TIMES, solver).x, first)
        invert(velocity, first, TIMES, solver)
        assert torch.equal(sample(velocity, noise, TIMES, solver).x, first)


def test_batch_and_resolution_may_change_between_runs():
    net, other = dit(), dit()
    velocity = from_diffusers(net)
    with taylorseer(net, interval=3) as cache:
        for shape in ((2, 1, 8, 8), (3, 1, 8, 8), (3, 1, 16, 8), (1, 1, 4, 4)):
            x = sample(velocity, draw(*shape), TIMES).x
            assert cache.stats.full_steps == [0, 1, 4, 7, 10]
            with taylorseer(other, interval=3):
                assert torch.equal(sample(from_diffusers(other), draw(*shape), TIMES).x, x)


def test_another_shape_within_a_run_begins_anew():
    net = moving(1)
    with taylorseer(net, interval=9) as cache:
        for t in TIMES[:4]:
            net(torch.ones(1, 4), t)
        for t in TIMES[4:8]:
            net(torch.ones(2, 4), t)
        assert cache.stats.full_steps == [0, 1]


def test_the_plain_loop_says_where_a_run_ends():
    net, noise = dit(), draw(2, 1, 8, 8)
    velocity = from_diffusers(net)
    with taylorseer(net, interval=4, last=True) as cache:
        for solver in ("abm", "euler"):
            sample(velocity, noise, TIMES, solver)
            assert cache.stats.full_steps == [0, 1, 5, 9, 11]
        invert(velocity, noise, TIMES, "euler")
        assert cache.stats.full_steps == [0, 1, 5, 9, 11]
        sample(velocity, noise, TIMES, "midpoint")  # 24 times
        assert cache.stats.full_steps == [0, 1, 5, 9, 13, 17, 21, 23]


@pytest.mark.parametrize("level", LEVELS)
def test_guidance_in_one_doubled_call_is_guidance_in_two(level):
    net, noise = dit(num_classes=4), draw(2, 1, 8, 8)
    model = from_diffusers(net)
    labels, null = torch.tensor([0, 1]), torch.full((2,), 4)

    def doubled(x, t):
        both = model(torch.cat([x, x]), t, class_labels=torch.cat([labels, null]))
        conditional, unconditional = both.chunk(2)
        return unconditional + 3.0 * (conditional - unconditional)

    two = guided(bind(model, class_labels=labels), bind(model, class_labels=null), 3.0)
    with taylorseer(net, interval=3, level=level) as cache:
        once = sample(doubled, noise, TIMES).x
        assert cache.stats.computed == 5
        twice = sample(two, noise, TIMES).x
        assert cache.stats.computed == 10
        assert cache.stats.full_steps == [0, 1, 4, 7, 10]
    torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-5)
    assert distance(once, sample(two, noise, TIMES).x) > 1e-4


def test_a_branch_that_comes_late_is_computed_first():
    net, noise = dit(num_classes=4), draw(2, 1, 8, 8)
    model = from_diffusers(net)
    labels, null = torch.tensor([0, 1]), torch.full((2,), 4)
    branches = bind(model, class_labels=labels), bind(model, class_labels=null)
    inside = guided(*branches, 3.0, interval=(0.45, 0.95))  # steps 6 to 11 of 12
    with taylorseer(net, interval=20) as cache:
        sample(inside, noise, TIMES)
        # Both branches compute the first two of their steps.
        assert cache.stats.computed == 4
        assert cache.stats.full_steps == [0, 1, 6, 7]


def test_a_step_said_outright_wins():
    net = moving(1)
    x, seen = torch.ones(1, 4), []
    with taylorseer(net, interval=4, num_steps=8, last=True) as cache:
        for step in range(8):
            for branch in ("text", "none"):
                with cache.at(step, branch=branch):
                    seen.append(net(x, 0.5))  # the time says nothing
        assert cache.stats.full_steps == [0, 1, 5, 7]
        assert (cache.stats.computed, cache.stats.forecast) == (8, 8)
        with cache.at(0):  # an earlier step: another run
            net(x, 0.5)
        assert cache.stats.full_steps == [0]


def test_the_time_said_outright_is_where_features_stand():
    class Timeless(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])
            self.now = 0.0

        def forward(self, x):
            for block in self.blocks:
                x = block(x + self.now)
            return x

    net, x = Timeless(), torch.zeros(1, 2)
    with taylorseer(net, interval=9, residual=False) as cache:
        for step, t in enumerate((0.0, 0.1, 0.7)):
            net.now = t
            with cache.at(step, t=t):
                torch.testing.assert_close(net(x), torch.full((1, 2), 2 * t))
    assert cache.stats.forecast_steps == [2]


# Pipelines.


def everywhere():
    return {**PIPELINES, "flux_img2img": flux_img2img, "sd15_img2img": sd15_img2img}


@pytest.mark.parametrize("level", [None, "module"])
@pytest.mark.parametrize("name", list(everywhere()))
def test_pipelines(name, level):
    pipe = everywhere()[name]()
    options = {"num_inference_steps": 8, "guided": name != "dit"}
    plain = generate(pipe, **options)
    with taylorseer(pipe, interval=3, level=level, last=True) as cache:
        fast = generate(pipe, **options)
        assert torch.equal(generate(pipe, **options), fast)
        assert cache.stats.full_steps == ([0, 1, 4] if "img2img" in name else [0, 1, 4, 7])
    assert not torch.equal(fast, plain)
    assert torch.equal(generate(pipe, **options), plain)


@pytest.mark.parametrize("build", [flux, sd3, wan, sana])
@pytest.mark.parametrize("scheduler", [FlowScheduler, RFSolverScheduler])
def test_our_schedulers_tell_steps_and_stages(build, scheduler):
    pipe = build()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    plain = generate(pipe, num_inference_steps=8)
    with taylorseer(pipe, interval=3, last=True) as cache:
        fast = generate(pipe, num_inference_steps=8)
        assert cache.stats.full_steps == [0, 1, 4, 7]
        stages = 2 if scheduler is RFSolverScheduler else 1
        assert cache.stats.computed == 4 * stages
    assert not torch.equal(fast, plain)


def test_a_scheduler_that_repeats_its_timesteps():
    pipe = sd3()
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    with taylorseer(pipe, interval=3) as cache:
        generate(pipe, num_inference_steps=8)
        assert cache.stats.computed + cache.stats.forecast == 15
        assert cache.stats.computed <= 8


def test_a_pipeline_that_has_ended_keeps_nothing():
    pipe = flux()
    cache = enable_taylorseer(pipe, interval=3)
    generate(pipe, num_inference_steps=8)
    assert cache._branches == {}
    assert cache.stats.nbytes > 0 and cache.stats.computed == 4
    cache.disable()


def test_a_pipeline_with_cache_contexts_names_its_branches():
    pipe = wan()
    with taylorseer(pipe.transformer, interval=3) as cache:
        names = []
        begin = cache._start
        cache._start = lambda *args: names.append(begin(*args)) or names[-1]
        generate(pipe, num_inference_steps=8, guided=True)
    assert {now.place.branch for now in names} == {("cond", 0), ("uncond", 0)}
    assert cache.stats.computed == 2 * 4


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("build", [flux, sd15])
def test_interval_1_changes_no_bit_of_a_pipeline(build, level):
    pipe = build()
    plain = generate(pipe, guided=True)
    with taylorseer(pipe, interval=1, level=level):
        assert torch.equal(generate(pipe, guided=True), plain)


def test_half_precision_pipelines():
    pipe = flux().to(torch.bfloat16)
    with taylorseer(pipe, interval=3) as cache:
        latents = generate(pipe, num_inference_steps=8)
        assert cache.stats.full_steps == [0, 1, 4, 7]
    assert latents.isfinite().all()
