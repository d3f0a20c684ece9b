"""The search of schedules: evolution, times alone, polishing, the objective, the command."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from flowkit import config as configs
from flowkit.analytic import Mixture
from flowkit.errors import FlowkitError
from flowkit.noise import keyed_noise
from flowkit.samplers import grids, sample
from flowkit.samplers.evolution import Scored, encoded, evolve, forest, scored
from flowkit.samplers.polishing import minimise, polish
from flowkit.samplers.schedule_file import QUANTITIES, RELAXATIONS, Schedule, Step
from flowkit.samplers.schedule_moves import (
    RESOLUTION,
    on_cells,
    unified_schedules,
    vary_steps,
    vary_times,
)
from flowkit.samplers.schedule_search import (
    SampleError,
    data_mean,
    find_schedule,
    find_times,
    fixed_schedules,
)
from flowkit.samplers.search import SearchConfig, run

ROOT = Path(__file__).resolve().parent.parent
A = Mixture((0.4, 0.6), (-0.9, 0.7), (0.3, 0.2))
NOISE = keyed_noise(0, range(1), (8, 4, 4)).double()
OTHER_NOISE = keyed_noise(1, range(16), (8, 4, 4)).double()


def toy(schedule):
    """A score for nothing: how far times and orders are from a wish."""
    wish = [0.1, 0.2, 0.6]
    off = sum((t - w) ** 2 for t, w in zip(schedule.times[1:-1], wish, strict=True))
    return math.sqrt(off) + 0.1 * sum(abs(step.order - 2) for step in schedule.steps)


def start():
    return unified_schedules(grids.uniform(4))


@pytest.fixture(scope="module")
def error():
    return SampleError(A, NOISE)


@pytest.fixture(scope="module")
def held_out():
    return SampleError(A, OTHER_NOISE)


# -- Evolution ----------------------------------------------------------------------------------


@pytest.mark.parametrize("predictor", [None, forest])
def test_the_best_never_gets_worse_and_nothing_is_scored_twice(predictor):
    calls = []

    def objective(schedule):
        calls.append(schedule)
        return toy(schedule)

    found = evolve(
        objective, start(), vary_steps, generations=4, children=8, keep=4, predictor=predictor
    )
    assert len(calls) == len(found.archive) == len(start()) + 4 * 8
    assert len({(one.times, one.steps) for one in calls}) == len(calls)
    assert len(found.best) == 5 and all(a >= b for a, b in pairwise(found.best))
    assert found.best[0] == min(map(toy, start())) > found.best[-1]
    assert found.top(1)[0].score == found.best[-1] == toy(found.top(1)[0].schedule)


def test_the_same_seed_gives_the_same_evolution():
    runs = [evolve(toy, start(), vary_steps, generations=3, seed=s).archive for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("predictor", [None, forest])
def test_an_interrupted_evolution_ends_where_a_whole_one_does(predictor, tmp_path):
    options = {"children": 6, "keep": 4, "predictor": predictor}
    whole = evolve(toy, start(), vary_steps, generations=5, **options)
    calls = []

    def breaks(schedule):
        calls.append(schedule)
        if len(calls) > 25:  # in the middle of a generation
            raise KeyboardInterrupt
        return toy(schedule)

    state = tmp_path / "state.json"
    with pytest.raises(KeyboardInterrupt):
        evolve(breaks, start(), vary_steps, generations=5, state=state, **options)
    kept = len(json.loads(state.read_text())["archive"])
    assert kept == len(start()) + 2 * 6
    calls.clear()
    resumed = evolve(
        lambda one: calls.append(one) or toy(one),
        start(), vary_steps, generations=5, state=state, **options,
    )  # fmt: skip
    assert resumed == whole and len(calls) == len(whole.archive) - kept
    longer = evolve(toy, start(), vary_steps, generations=6, state=state, **options)
    assert longer.archive[: len(whole.archive)] == whole.archive


def test_the_state_of_another_evolution_is_refused(tmp_path):
    state = tmp_path / "state.json"
    evolve(toy, start(), vary_steps, generations=1, state=state)
    with pytest.raises(FlowkitError, match="its seed differs; remove"):
        evolve(toy, start(), vary_steps, generations=1, state=state, seed=1)
    with pytest.raises(FlowkitError, match="its start differs"):
        evolve(toy, start()[1:], vary_steps, generations=1, state=state)
    for text in ("{", "[]", '{"setting": {}}'):
        state.write_text(text)
        with pytest.raises(FlowkitError, match="not the state of an evolution"):
            evolve(toy, start(), vary_steps, generations=1, state=state)


def test_a_score_that_is_no_number_is_the_worst():
    def objective(schedule):
        return math.nan if schedule.steps[0].quantity == "velocity" else toy(schedule)

    found = evolve(objective, start(), vary_steps, generations=2)
    assert math.isfinite(found.best[0]) and found.top(1)[0].schedule.steps[0].quantity != "velocity"


@pytest.mark.parametrize(
    "change", [{"children": 0}, {"keep": 0}, {"generations": -1}, {"start": []}]
)
def test_an_impossible_evolution_is_refused(change):
    population = change.pop("start", start())
    with pytest.raises(FlowkitError, match="an evolution needs"):
        evolve(toy, population, vary_steps, **change)


def test_the_forest_ranks_unseen_schedules():
    rng = random.Random(0)
    known = start()
    known += [vary_steps(known, rng) for _ in range(300)]
    new = [vary_steps(known, rng) for _ in range(100)]
    predicted = forest([scored(toy, one) for one in known], new)
    ranks = [np.argsort(np.argsort(values)) for values in (predicted, [toy(one) for one in new])]
    assert np.corrcoef(*ranks)[0, 1] > 0.6


def test_the_forest_learns_from_schedules_of_two_lengths():
    known = [*start(), *unified_schedules(grids.uniform(5), analytic=True)]
    scores = [Scored(float(one.analytic), one) for one in known]
    rng = random.Random(0)
    new = [vary_steps(known, rng) for _ in range(40)]
    predicted = forest(scores, new)
    analytic = [p for p, one in zip(predicted, new, strict=True) if one.analytic]
    others = [p for p, one in zip(predicted, new, strict=True) if not one.analytic]
    assert analytic and others and min(analytic) > max(others)


def test_schedules_that_differ_are_encoded_differently():
    named = [Step("data", relaxation=one) for one in RELAXATIONS]
    steps = [*map(Step, QUANTITIES), *named, Step(order=2, stencil=1), Step(stencil=2)]
    steps += [Step(relaxation=0.5), Step(corrector="pseudo"), Step(corrector_relaxation=0.5)]
    plans = [Schedule((0.0, 1.0), (step,)) for step in steps]
    plans.append(Schedule((0.0, 1.0), (Step(),), analytic=True))
    codes = [tuple(encoded(plan)) for plan in plans]
    assert len(set(codes)) == len(plans) and len({len(code) for code in codes}) == 1


# -- Children -----------------------------------------------------------------------------------


def test_children_of_steps_keep_the_ends_and_are_schedules():
    rng = random.Random(0)
    population = unified_schedules([0.05, 0.3, 0.31, 0.9, 1.0])
    for _ in range(500):
        child = vary_steps(population[-20:], rng)
        assert (child.times[0], child.times[-1]) == (0.05, 1.0) and len(child.steps) == 4
        population.append(child)
    steps = {step for one in population for step in one.steps}
    assert {step.quantity for step in steps} == set(QUANTITIES)
    assert {step.order for step in steps} == {1, 2, 3, 4}
    assert {step.corrector for step in steps} == {"none", "pseudo"}
    assert {*RELAXATIONS} < {step.relaxation for step in steps}


def test_steps_need_a_parent_with_steps():
    with pytest.raises(FlowkitError, match="unified"):
        vary_steps([Schedule((0.0, 1.0), solver="abm")], random.Random(0))


@pytest.mark.parametrize("count", [1, 2, 5, 40])
@pytest.mark.parametrize("first", [0.0, 0.0123])
def test_children_of_times_are_sorted_unique_and_pinned(count, first):
    rng = random.Random(0)
    base = Schedule((first, *[first + (1 - first) * i / count for i in range(1, count)], 1.0),
                    solver="ab2")  # fmt: skip
    population = [on_cells(base), *(on_cells(base, rng) for _ in range(10))]
    for _ in range(300):
        population.append(vary_times(population[-30:], rng))
    for child in population:
        assert (child.times[0], child.times[-1]) == (first, 1.0)
        assert len(child.times) == count + 1 and child.solver == "ab2"
        assert all(t < s for t, s in pairwise(child.times))
        cells = [RESOLUTION * (t - first) / (1 - first) for t in child.times]
        assert cells == pytest.approx([round(cell) for cell in cells], abs=1e-9)
    if count > 1:
        assert len({one.times for one in population}) > 20


def test_rounding_to_the_grid_moves_times_apart():
    crowded = Schedule((0.0, 1e-5, 2e-5, 3e-5, 0.99999, 1.0), solver="euler")
    assert on_cells(crowded).times == (0.0, 0.001, 0.002, 0.003, 0.999, 1.0)
    many = Schedule(tuple(i / 1200 for i in range(1201)), solver="euler")
    with pytest.raises(FlowkitError, match="at most 1000 steps"):
        on_cells(many)


# -- Polishing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 6])
def test_cma_finds_the_bottom_of_a_narrow_valley(n):
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((n, n)))[0]
    bottom = np.arange(n) / n

    def score(z):
        return float((turn @ (z - bottom)) ** 2 @ 10.0 ** np.linspace(0, 4, n))

    found = minimise(score, np.full(n, 2.0), 0.5, 600 * n)
    assert score(found) < 1e-8 < score(np.full(n, 2.0))


def test_polishing_moves_times_and_numbers_only_and_is_never_worse(error):
    step = Step(order=2, stencil=1, corrector="pseudo")
    plan = Schedule((0.0, 0.3, 0.6, 1.0), (step, step, Step("data", 2, 1, "bh2")))
    before = scored(error, plan)
    after = polish(error, before, evaluations=150)
    assert after.score < 0.5 * before.score and after.score == error(after.schedule)
    assert (after.schedule.times[0], after.schedule.times[-1]) == (0.0, 1.0)
    for old, new in zip(plan.steps, after.schedule.steps, strict=True):
        assert (old.quantity, old.order, old.stencil) == (new.quantity, new.order, new.stencil)
    assert after.schedule.steps[0].relaxation == 0.0  # there is nothing to relax yet
    assert after.schedule.steps[1].relaxation != 0.0
    assert after.schedule.steps[2].relaxation == "bh2"
    best = Scored(0.0, plan)
    assert polish(error, best, evaluations=20) is best
    single = scored(error, Schedule((0.0, 1.0), (Step(),)))
    assert polish(error, single) is single


# -- Objective ----------------------------------------------------------------------------------


def test_the_error_is_that_of_the_same_noise(error):
    plan = unified_schedules(grids.power(5))[3]
    fine = sample(A, NOISE, grids.uniform(100), "rk4").x
    x = sample(A, NOISE, plan.times, "abm").x
    assert error(plan) == pytest.approx((x - fine).square().mean().sqrt().item())
    assert error(plan) == error(plan)
    noise = keyed_noise(0, range(7), (2, 2)).double()
    whole, parts = (SampleError(A, noise, batch_size=size) for size in (512, 3))
    assert whole(plan) == pytest.approx(parts(plan), rel=1e-12)
    assert not whole.samples(plan).requires_grad


def test_a_measure_of_the_samples_takes_the_errors_place():
    objective = SampleError(A, NOISE, measure=lambda x: x.std().item())
    plan = Schedule((0.0, 0.5, 1.0), solver="heun")
    assert objective(plan) == objective.samples(plan).std().item()


def test_a_schedule_begins_with_as_much_noise_as_its_first_time_says():
    plan = Schedule((0.25, 0.5, 1.0), solver="euler")
    x = sample(A, 0.75 * NOISE, plan.times, "euler").x
    assert torch.equal(SampleError(A, NOISE, start=0.25).samples(plan), x)


# -- The searches -------------------------------------------------------------------------------


def test_what_is_found_is_no_worse_than_any_fixed_solver(error):
    fixed = [error(one) for one in fixed_schedules(4)]
    found, evolution = find_schedule(error, 4, generations=0, polished=0)
    assert found.score == min(fixed) == evolution.best[0]
    worst = min(error(one) for one in fixed_schedules(4) if one.solver != "unified")
    better, _ = find_schedule(error, 4, generations=3, polished=1, polish_evaluations=50)
    assert better.score < found.score <= worst


def test_fixed_solvers_keep_to_the_budget():
    for nfe in (1, 2, 5):
        fixed = fixed_schedules(nfe, start=0.1)
        assert len({one.info["name"] for one in fixed}) == len(fixed) >= 20
        for one in fixed:
            made = sample(A, NOISE, one.times, one.solver, **one.solver_options)
            assert made.nfe <= nfe and (one.times[0], one.times[-1]) == (0.1, 1.0)


def test_a_short_search_beats_the_best_fixed_solver_on_other_noise(error, held_out):
    found, _ = find_schedule(
        error, 5, generations=12, children=24, polished=1, polish_evaluations=300
    )
    best = min(held_out(one) for one in fixed_schedules(5))
    assert len(found.schedule.steps) == 5
    assert held_out(found.schedule) < 0.75 * best


def test_an_analytic_first_step_buys_a_step_at_no_evaluation():
    mean = data_mean(A, keyed_noise(2, range(64), (8, 4, 4)).double())
    exact = sum(w * m for w, m in zip((0.4, 0.6), (-0.9, 0.7), strict=True))
    torch.testing.assert_close(mean, torch.full_like(mean, exact))
    train, held_out = (SampleError(A, noise, mean=mean) for noise in (NOISE, OTHER_NOISE))
    found, evolution = find_schedule(
        train, 3, analytic=True, generations=6, children=16, polished=1, polish_evaluations=200
    )
    assert evolution.best[0] <= min(train(one) for one in fixed_schedules(3))
    assert found.schedule.analytic and len(found.schedule.steps) == 4
    assert {len(one.schedule.times) for one in evolution.archive if one.schedule.steps} == {4, 5}
    assert held_out(found.schedule) < 0.5 * min(held_out(one) for one in fixed_schedules(3))


@pytest.mark.parametrize(
    "solver, options", [("euler", {}), ("midpoint", {}), ("deis", {"order": 3})]
)
def test_times_alone_for_any_solver(error, held_out, solver, options):
    found, evolution = find_times(
        error, 6, solver=solver, options=options, generations=6, children=24
    )
    assert all(a >= b for a, b in pairwise(evolution.best))
    steps = 3 if solver == "midpoint" else 6
    even = Schedule(tuple(grids.uniform(steps)), solver=solver, options=options)
    assert found.score == evolution.best[-1] < error(even)
    assert held_out(found.schedule) < held_out(even)
    assert len(found.schedule.times) == steps + 1 and found.schedule.solver == solver
    again, _ = find_times(error, 6, solver=solver, options=options, generations=6, children=24)
    assert again == found


def test_a_solver_too_dear_for_the_budget_is_refused(error):
    with pytest.raises(FlowkitError, match="'rk4' has no run of 3 evaluations"):
        find_times(error, 3, solver="rk4")


# -- The command --------------------------------------------------------------------------------


def velocity(x, t):
    return A(x, t)


def mean_square(x):
    return x.square().mean().item()


SMALL = {"model": f"{__name__}:velocity", "shape": [4], "generations": 2, "children": 4,
         "polished": 1, "polish_evaluations": 20, "num_samples": 16, "held_out": 16,
         "progress": False}  # fmt: skip


@pytest.fixture
def importable(monkeypatch):
    """`module:attribute` finds this file, under whatever name it was collected."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])


@pytest.mark.parametrize("method", ["steps", "times"])
def test_the_command_writes_what_it_found_and_resumes(method, importable, tmp_path, capsys):
    options = SearchConfig(**SMALL, nfe=3, method=method, output_dir=str(tmp_path / "run"))
    found = run(options)
    assert "found: " in capsys.readouterr().out
    written = Schedule.load(tmp_path / "run/schedule.json")
    assert written == found and written.info["nfe"] == 3
    assert {"held_out", "best_fixed", "its_held_out", "seconds", "model"} < set(written.info)
    state = (tmp_path / "run/state.json").read_bytes()
    assert run(options) == found and (tmp_path / "run/state.json").read_bytes() == state
    x = sample(velocity, OTHER_NOISE, found.times, found.solver, **found.solver_options)
    assert x.nfe == 3 and found.analytic == (method == "steps")
    with pytest.raises(FlowkitError, match="other options: 'nfe' is 4, not 3"):
        run(SearchConfig(**SMALL, nfe=4, method=method, output_dir=str(tmp_path / "run")))


def test_the_command_takes_a_measure_and_a_predictor(importable, tmp_path):
    measured = SearchConfig(
        **SMALL, nfe=2, predictor=True, measure=f"{__name__}:mean_square",
        output_dir=str(tmp_path),
    )  # fmt: skip
    found = run(measured)
    noise = run(SearchConfig(**SMALL, nfe=2, output_dir=str(tmp_path / "other")))
    assert found != noise and found.info["score"] < noise.info["score"] + 1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"shape": None}, ["shape=[1,8,8]"]),
        ({"model": "nowhere:flow"}, ["nowhere:flow", "module:attribute"]),
        ({"measure": "math:pi"}, ["math:pi", "float", "function"]),
        ({"method": "times", "solver": "abn"}, ["abn", "abm"]),
    ],
)
def test_the_command_refuses_in_one_line(change, words, importable, tmp_path):
    with pytest.raises(FlowkitError) as refusal:
        run(SearchConfig(**SMALL | {"output_dir": str(tmp_path)} | change))
    assert all(word in str(refusal.value) for word in words) and "\n" not in str(refusal.value)


def test_help_needs_no_torch(tmp_path):
    for name in ("torch", "diffusers"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('asked for')")
    done = subprocess.run(
        [sys.executable, "-m", "flowkit.samplers.search", "--help"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "nfe=5" in done.stdout and "S^3" in done.stdout and "generations=" in done.stdout


def test_run_as_a_command_the_package_still_has_its_names():
    code = "import sys; sys.argv[0] = '-m'; import flowkit.samplers as s; assert 'torch' not in "
    code += "sys.modules; assert all(hasattr(s, name) for name in s.__all__); s.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip().endswith("has no attribute 'nothing'"), done.stderr


def test_the_configuration_is_read():
    options = configs.parse(SearchConfig, ["--config", "digits/search.yaml"], doc="")
    assert (options.nfe, options.model, options.analytic) == (5, "runs/flow/model", True)
