"""The unified step: the solvers it holds, its weights, its file, its way back."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from flowkit.analytic import Gaussian, Mixture, normal_quantiles
from flowkit.errors import FlowkitError
from flowkit.samplers import FlowScheduler, evaluation_times, grids, invert, sample
from flowkit.samplers.schedule_file import QUANTITIES, RELAXATIONS, Schedule, Step
from flowkit.samplers.unified import derivative_weights, unified

A = Mixture((0.4, 0.6), (-0.9, 0.7), (0.3, 0.2))
X = normal_quantiles()


def alike(times, *first, then=None):
    """A schedule of these first steps, the last of them (or `then`) to the end."""
    count = len(times) - 1
    steps = [*first, *[then or first[-1]] * count][:count]
    return Schedule(tuple(times), tuple(steps))


MIXED = alike(
    grids.power(6),
    Step("noise", 3, 3, "exp-", "pseudo", "bh1"),
    Step("velocity", 2, 1, 0.4, "pseudo", -0.3),
    Step("data", 3, 2, "exp+", "pseudo", "bh2"),
    Step("noise", 2, 2, "bh2", "pseudo", 0.2),
    Step("data", 4, 3, 0.1),
    Step("velocity", 4, 3),
)


# -- What it holds ------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [grids.uniform(7), grids.power(7), grids.log_snr(7)])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_order_1_is_euler_whatever_the_quantity(grid, quantity):
    mine = sample(A, X, grid, "unified", schedule=alike(grid, Step(quantity))).x
    torch.testing.assert_close(mine, sample(A, X, grid, "euler").x, rtol=0, atol=1e-12)


PSEUDO = {"corrector": "pseudo"}
TWINS = {
    "ab2": ([Step(order=2, stencil=1)], "ab2", {}),
    "deis tab 3": ([Step(order=3, stencil=2)], "deis", {"order": 3}),
    "abm 2": ([Step(order=1, **PSEUDO)], "abm", {"order": 2}),
    "abm": ([Step(order=2, stencil=1, **PSEUDO)], "abm", {}),
    "abm 4": ([Step(order=3, stencil=2, **PSEUDO)], "abm", {"order": 4}),
    "2M": ([Step("data", 2, 1, "bh2")], "dpmpp_2m", {}),
    "2M taylor": ([Step("data", 2, 1)], "dpmpp_2m", {"variant": "taylor"}),
    "3M": ([Step("data", 3, 2)], "dpmpp_3m", {}),
    "UniC-1": (
        [Step("data", 1, 0, corrector_relaxation="bh2", **PSEUDO)], "unipc", {"order": 1},
    ),
    "UniC-1 bh1": (
        [Step("data", 1, 0, corrector_relaxation="bh1", **PSEUDO)],
        "unipc", {"order": 1, "variant": "bh1"},
    ),
    # The second step's corrector has two points alone, one of which is infinitely far at t = 0.
    "UniPC": (
        [*[Step("data", 2, 1, "bh2", "pseudo", "bh2")] * 2, Step("data", 2, 1, "bh2", "pseudo")],
        "unipc", {"order": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("steps, solver, options", TWINS.values(), ids=TWINS)
@pytest.mark.parametrize("grid", [grids.uniform(7), grids.power(9)], ids=["uniform", "power"])
def test_known_solvers_are_points_in_its_space(steps, solver, options, grid):
    mine = sample(A, X, grid, "unified", schedule=alike(grid, *steps)).x
    known = sample(A, X, grid, solver, **options).x
    torch.testing.assert_close(mine, known, rtol=0, atol=1e-12)


def test_without_a_schedule_it_is_the_default_solver():
    grid = grids.power(6)
    torch.testing.assert_close(
        sample(A, X, grid, "unified").x, sample(A, X, grid, "abm").x, rtol=0, atol=1e-12
    )


# -- Weights ------------------------------------------------------------------------------------


def log_snr(t):
    return math.log(t / (1 - t))


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("points", [2, 3, 4])
def test_weights_integrate_polynomials_of_the_points_exactly(quantity, points):
    nodes, s = [0.45, 0.3, 0.22, 0.1][:points], 0.62
    tau = (lambda t: t) if quantity == "velocity" else log_snr
    for degree in range(1, points):
        # The same integral over the time itself: dm = dt, d(1/t) or d(1/(1 - t)).
        u = torch.linspace(nodes[0], s, 20001, dtype=torch.float64)
        taus = u if quantity == "velocity" else (u / (1 - u)).log()
        scale = {"velocity": u * 0 + 1, "noise": -s / u**2, "data": (1 - s) / (1 - u) ** 2}
        exact = torch.trapezoid((taus - tau(nodes[0])) ** degree * scale[quantity], u).item()
        weights = derivative_weights(quantity, nodes, s, order=points)
        sums = sum(
            w * (tau(t) - tau(nodes[0])) ** degree for w, t in zip(weights, nodes[1:], strict=True)
        )
        assert sums == pytest.approx(exact, rel=1e-6)


def test_the_order_cuts_the_series_and_the_stencil_fits_it():
    nodes, s = [0.45, 0.3, 0.22], 0.62
    weights = derivative_weights("velocity", nodes, s, order=2)
    offsets = [t - nodes[0] for t in nodes[1:]]
    # Of a + b h + c h^2 through the three points only b's term stays, and b is the true slope.
    assert sum(w * o for w, o in zip(weights, offsets, strict=True)) == pytest.approx(0.17**2 / 2)
    assert sum(w * o**2 for w, o in zip(weights, offsets, strict=True)) == pytest.approx(0)


@pytest.mark.parametrize("quantity, sign", [("noise", 1), ("data", -1)])
def test_relaxations_scale_the_first_derivative(quantity, sign):
    nodes, s = [0.45, 0.3], 0.62
    h = sign * (log_snr(s) - log_snr(nodes[0]))
    d = math.expm1(h)
    factors = {
        "bh1": 0.5 * h * h / (d - h), "bh2": 0.5 * h * d / (d - h),
        "exp+": 1 + 0.5 * d, "exp-": 1 - 0.5 * d, 0.3: 1 + 0.3 * abs(h),
    }  # fmt: skip
    assert {*RELAXATIONS} < {*factors}
    (plain,) = derivative_weights(quantity, nodes, s, 2)
    for relaxation, factor in factors.items():
        (relaxed,) = derivative_weights(quantity, nodes, s, 2, relaxation)
        assert relaxed == pytest.approx(factor * plain)


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("order, corrector, expected", [(1, "pseudo", 2), (2, "pseudo", 3)])
def test_the_corrector_adds_an_order(quantity, order, corrector, expected):
    times = [[0.1 + 0.7 * i / n for i in range(n + 1)] for n in (80, 160)]
    truth = sample(A, X, [0.1 + 0.7 * i / 400 for i in range(401)], "rk4").x
    step = Step(quantity, order, order - 1, corrector=corrector)
    errors = [
        (sample(A, X, t, "unified", schedule=alike(t, step)).x - truth).square().mean().item()
        for t in times
    ]
    assert 0.5 * math.log2(errors[0] / errors[1]) > expected - 0.25


# -- Running ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_directions_end_to_end_in_both_dtypes(dtype):
    x = X.to(dtype)
    there = sample(A, x, MIXED.times, "unified", schedule=MIXED)
    assert there.x.dtype == dtype and there.x.isfinite().all() and there.nfe == 6
    back = invert(A, there.x, MIXED.times, "unified", schedule=MIXED)
    assert back.x.dtype == dtype and back.x.isfinite().all() and back.nfe == 6


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("corrector", ["none", "pseudo"])
def test_the_way_back_converges_to_the_noise(quantity, corrector):
    flow, errors = Gaussian(), []
    for n in (40, 80):
        times = [0.1 + 0.7 * i / n for i in range(n + 1)]
        plan = alike(times, Step(quantity, 2, 1, corrector=corrector))
        found = invert(flow, flow.flow(X, 0.1, 0.8), times, "unified", schedule=plan).x
        errors.append((found - X).abs().max().item())
    assert errors[1] < 0.35 * errors[0] and errors[1] < 1e-2


def test_an_edit_between_two_steps_stays():
    def shift(step):
        return step.x + 0.5 if step.index == 3 else None

    class Still:
        def __call__(self, x, t):
            return torch.zeros_like(x)

    moved = sample(Still(), X, MIXED.times, "unified", schedule=MIXED, callback=shift).x
    assert (moved - X).abs().min() > 0.05  # noise and data predictions see the edit, v does not
    plan = alike(MIXED.times, Step(order=2, stencil=1, corrector="pseudo"))
    moved = sample(Still(), X, MIXED.times, "unified", schedule=plan, callback=shift).x
    torch.testing.assert_close(moved, X + 0.5)


def test_each_step_is_taken_where_it_lies_on_any_grid():
    plan = Schedule((0.0, 0.4, 1.0), (Step("data"), Step("noise")))
    assert [plan.step_at(t).quantity for t in (0.0, 0.39, 0.4, 1.0)] == [
        "data", "data", "noise", "noise",
    ]  # fmt: skip
    rest = MIXED.times[2:]
    whole = sample(A, X, rest, "unified", schedule=MIXED).x
    cut = Schedule(rest, MIXED.steps[2:])
    assert torch.equal(whole, sample(A, X, rest, "unified", schedule=cut).x)


MEAN = 0.4 * -0.9 + 0.6 * 0.7  # of A's data


def test_an_analytic_first_step_is_free_and_exact_where_the_mean_is():
    analytic = replace(MIXED, analytic=True, mean=MEAN)
    whole = sample(A, X, MIXED.times, "unified", schedule=MIXED)
    free = sample(A, X, MIXED.times, "unified", schedule=analytic)
    assert free.nfe == whole.nfe - 1 == len(MIXED.steps) - 1
    assert evaluation_times("unified", MIXED.times, schedule=analytic) == list(MIXED.times[1:-1])
    torch.testing.assert_close(free.x, whole.x, rtol=0, atol=1e-12)
    given = replace(analytic, mean=None)
    mean = torch.full_like(X[0], MEAN)
    x = sample(A, X, MIXED.times, "unified", schedule=given, mean=mean).x
    torch.testing.assert_close(x, whole.x, rtol=0, atol=1e-12)


def test_an_analytic_step_is_taken_from_noise_alone():
    """Not backwards, and not in a run that begins in the middle."""
    analytic = replace(MIXED, analytic=True, mean=MEAN)
    for times in (MIXED.times[::-1], MIXED.times[2:]):
        runs = [
            sample(A, X, times, "unified", schedule=plan) if times[0] < times[1]
            else invert(A, X, MIXED.times, "unified", schedule=plan)
            for plan in (MIXED, analytic)
        ]  # fmt: skip
        assert runs[0].nfe == runs[1].nfe and torch.equal(runs[0].x, runs[1].x)


def test_an_analytic_step_shows_its_state_to_the_callback():
    seen = []
    analytic = replace(MIXED, analytic=True, mean=MEAN)
    sample(
        A, X, MIXED.times, "unified", schedule=analytic,
        callback=lambda step: seen.append(step.index) or None,
    )  # fmt: skip
    assert seen == list(range(1, len(MIXED.times)))


@pytest.mark.parametrize(
    "mean, words",
    [(None, ["no mean", "mean="]), ([[1.0, 2.0, 3.0]], ["(1, 3)", "size"])],
)
def test_an_analytic_step_needs_a_mean_that_fits(mean, words):
    with pytest.raises(FlowkitError) as error:
        sample(A, X, MIXED.times, "unified", schedule=replace(MIXED, analytic=True, mean=mean))
    assert all(word in str(error.value) for word in words)


# -- The file -----------------------------------------------------------------------------------


def test_a_file_keeps_every_digit(tmp_path):
    plan = Schedule((0.0, 1 / 3, math.pi / 4, 1.0), MIXED.steps[:3], info={"score": 0.125})
    plan.save(tmp_path / "plan.json")
    again = Schedule.load(tmp_path / "plan.json")
    assert again == plan and again.times == plan.times and again.info == {"score": 0.125}
    assert torch.equal(
        sample(A, X, plan.times, "unified", schedule=str(tmp_path / "plan.json")).x,
        sample(A, X, plan.times, unified, schedule=plan).x,
    )


def test_another_solver_may_be_in_the_file(tmp_path):
    plan = Schedule((0.0, 0.3, 1.0), solver="abm", options={"order": 2})
    plan.save(tmp_path / "plan.json")
    again = Schedule.load(tmp_path / "plan.json")
    assert again == plan and again.solver_options == {"order": 2}


GOOD = {"version": 1, "times": [0.0, 0.5, 1.0], "steps": [{}, {"order": 2, "stencil": 1}]}
BAD = [
    ({"version": 2}, ["version 1", "got version 2"]),
    ({"times": [0.0, 0.5]}, ["1 steps, got 2"]),
    ({"times": [0.0, 0.5, 0.5]}, ["increase"]),
    ({"times": [0.0, 0.5, 1.5]}, ["[0, 1]"]),
    ({"times": [0.0, float("nan"), 1.0]}, ["[0, 1]"]),
    ({"times": 3}, ["times"]),
    ({"steps": [{}]}, ["2 steps, got 1"]),
    ({"steps": [{}, 3]}, ["mapping", "3"]),
    ({"steps": [{}, {"order": 5, "stencil": 4}]}, ["order", "1 to 4", "got 5"]),
    ({"steps": [{}, {"order": 2}]}, ["stencil", "1 to 3", "got 0"]),
    ({"steps": [{}, {"order": True}]}, ["order", "True"]),
    ({"steps": [{}, {"quantity": "score"}]}, ["quantity", "velocity, noise, data", "'score'"]),
    ({"steps": [{}, {"corrector": "implicit"}]}, ["corrector", "'implicit'"]),
    ({"steps": [{}, {"quantity": "data", "relaxation": "bh3"}]}, ["bh1", "a number", "'bh3'"]),
    ({"steps": [{}, {"relaxation": "bh2"}]}, ["noise and the data"]),
    ({"steps": [{}, {"relaxation": float("inf")}]}, ["relaxation", "inf"]),
    ({"steps": [{}, {"ordr": 2}]}, ["'ordr'", "order"]),
    ({"grid": []}, ["'grid'", "times"]),
    ({"solver": "euler"}, ["'euler'", "0 steps, got 2"]),
    ({"options": {"order": 2}}, ["no options"]),
    ({"analytic": True, "steps": [], "solver": "euler"}, ["analytic", "'euler'"]),
    ({"analytic": True, "mean": [[1.0], [2.0, 3.0]]}, ["mean", "[[1.0], [2.0, 3.0]]"]),
    ({"analytic": True, "mean": float("nan")}, ["mean", "nan"]),
]


@pytest.mark.parametrize("change, words", BAD)
def test_a_bad_file_is_refused_in_one_line(change, words, tmp_path):
    Schedule.from_dict(GOOD)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(GOOD | change))
    with pytest.raises(FlowkitError) as error:
        Schedule.load(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "\xff"])
def test_what_is_no_schedule_is_refused(text, tmp_path):
    (tmp_path / "plan.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FlowkitError, match=r"plan\.json: (not a JSON|a schedule is)"):
        Schedule.load(tmp_path / "plan.json")


# -- The scheduler ------------------------------------------------------------------------------


def run(scheduler, x, **asked):
    scheduler.set_timesteps(**asked)
    for timestep in scheduler.timesteps:
        v = A(x, 1 - float(timestep) / 1000)
        x = scheduler.step(-v, timestep, x).prev_sample
    return x


@pytest.mark.parametrize("solver", ["unified", "abm"])
def test_a_scheduler_has_the_files_times_to_the_last_digit(solver, tmp_path):
    plan = MIXED if solver == "unified" else Schedule(MIXED.times, solver="abm")
    plan.save(tmp_path / "plan.json")
    for shift in (1.0, 3.0):
        scheduler = FlowScheduler.from_schedule(tmp_path / "plan.json", {"shift": shift})
        scheduler.set_timesteps(6)
        assert scheduler.times == list(plan.times)
        exact = 1 - torch.tensor(plan.times, dtype=torch.float64)
        assert torch.equal(scheduler.sigmas, exact.float())
        x = run(scheduler, X, num_inference_steps=6)
        known = sample(A, X, plan.times, plan.solver, **plan.solver_options).x
        torch.testing.assert_close(x, known, rtol=0, atol=1e-4)  # float32 timesteps


def test_a_scheduler_evaluates_an_analytic_step_and_says_so(tmp_path):
    plan = replace(MIXED, analytic=True, mean=[[[MEAN]]])
    plan.save(tmp_path / "plan.json")
    assert Schedule.load(tmp_path / "plan.json") == plan
    with pytest.warns(UserWarning, match="6 evaluations instead of 5; search with analytic=false"):
        scheduler = FlowScheduler.from_schedule(tmp_path / "plan.json")
    x = run(scheduler, X, num_inference_steps=6)
    known = sample(A, X, plan.times, "unified", schedule=plan).x
    torch.testing.assert_close(x, known, rtol=0, atol=1e-4)


def test_a_pipelines_own_sigmas_and_mu_do_not_move_the_times(tmp_path):
    MIXED.save(tmp_path / "plan.json")
    config = {"use_dynamic_shifting": True, "shift": 3.0}
    scheduler = FlowScheduler.from_schedule(tmp_path / "plan.json", config)
    scheduler.set_timesteps(sigmas=[1 - i / 6 for i in range(6)], mu=0.8)
    assert scheduler.times == list(MIXED.times)
    scheduler.save_pretrained(tmp_path / "saved")
    again = FlowScheduler.from_pretrained(tmp_path / "saved")
    again.set_timesteps(6)
    assert again.times == list(MIXED.times) and again.config["solver"] == "unified"
    ours, theirs = (run(one, X, num_inference_steps=6) for one in (again, scheduler))
    assert torch.equal(ours, theirs)
    for asked in ({"num_inference_steps": 28}, {"sigmas": [1.0, 0.5]}):
        with pytest.raises(FlowkitError, match="pass num_inference_steps=6"):
            again.set_timesteps(**asked)


@pytest.mark.parametrize("shift", [1.0, 3.0, "dynamic"])
def test_searched_sigmas_survive_the_shift_of_a_pipeline(shift):
    """What a pipeline hands over unshifted comes out as the grid that was wanted."""
    dynamic = shift == "dynamic"
    options = {"use_dynamic_shifting": True} if dynamic else {"shift": shift}
    mu = {"mu": 1.1} if dynamic else {}
    wanted = list(MIXED.times)
    handed = grids.unshifted(wanted, math.exp(1.1) if dynamic else shift)
    scheduler = FlowScheduler(**options)
    scheduler.set_timesteps(sigmas=[1 - t for t in handed[:-1]], **mu)
    assert scheduler.times == pytest.approx(wanted, abs=1e-6)
    final = FlowScheduler(sigmas_are_final=True, **options)
    final.set_timesteps(sigmas=[1 - t for t in wanted[:-1]], **mu)
    assert final.times == pytest.approx(wanted, abs=1e-15)


def test_it_evaluates_at_the_start_of_each_step():
    assert evaluation_times("unified", MIXED.times, schedule=MIXED) == list(MIXED.times[:-1])
    assert all(t < s for t, s in pairwise(MIXED.times))
