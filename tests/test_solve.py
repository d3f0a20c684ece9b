"""The driver: what it promises of every solver, forwards and backwards."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from flowkit.analytic import Gaussian, Mixture, normal_quantiles
from flowkit.errors import FlowkitError
from flowkit.noise import keyed_noise
from flowkit.paths import VPLinear
from flowkit.samplers import evaluation_times, grids, invert, sample
from flowkit.samplers.evaluations import Evaluations
from flowkit.samplers.solve import SOLVERS, STOCHASTIC, Step, is_adaptive

# What a solver needs to run at all, and where it begins when t = 0 is beyond it.
OPTIONS = {"bdia_ddim": {"path": VPLinear()}}
# Inverting with the gamma for few steps multiplies errors.
INVERTING = {"bdia_ddim": {"gamma": 1.0}, "bdia_edm": {"gamma": 1.0}}
FIRST = {"bdia_edm": 0.1}
FIXED = [name for name, solver in SOLVERS.items() if not is_adaptive(solver)]
INVERTIBLE = [name for name in FIXED if name not in [*STOCHASTIC, "dual_fast"]]
# fireflow evaluates between the grid times, where there is no step to show.
STEPPING = [name for name in FIXED if name != "fireflow"]
MIXTURE = Mixture((0.4, 0.6), (-0.9, 0.7), (0.3, 0.2))


def on(solver: str, n: int) -> dict[str, Any]:
    """Arguments of sample() and invert() that the solver can run on."""
    times = grids.from_start(FIRST.get(solver, 0.0), n)
    return {"times": times, "solver": solver, **OPTIONS.get(solver, {})}


@pytest.fixture(scope="module")
def start() -> Tensor:
    return normal_quantiles()


@pytest.mark.parametrize("solver", FIXED)
def test_nfe_is_the_dry_run_s_and_the_velocity_s(solver: str) -> None:
    seen: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        assert type(t) is float
        seen.append(t)
        return -x * x

    run = on(solver, 7)
    result = sample(velocity, torch.ones(2, 3), **run)
    assert seen == evaluation_times(**run)
    assert result.nfe == len(seen)


def test_a_dry_run_draws_no_noise() -> None:
    before = torch.get_rng_state()
    evaluation_times("sde", grids.uniform(4), draw=lambda x, k: torch.randn_like(x))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("solver", [*INVERTIBLE, "dopri5"])
def test_inversion_converges_to_the_noise(solver: str, start: Tensor) -> None:
    if solver == "rfpp":
        pytest.skip("a rule for few steps, which more steps do not make exact")
    field, run = Gaussian(), on(solver, 200) | INVERTING.get(solver, {})
    first = run["times"][0]
    noise = field.flow(start, 0.0, first)
    back = invert(field, field.flow(start, 0.0, 1.0), **run)
    assert (back.x - noise).abs().max() < 4e-2


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("way", [sample, invert])
def test_end_to_end_is_finite_and_close(solver: str, way: Any, start: Tensor) -> None:
    """Both ends are singular points of one parametrisation or another."""
    if way is invert and solver not in INVERTIBLE:
        return
    run = on(solver, 20) | INVERTING.get(solver, {})
    for dtype in (torch.float32, torch.float64):
        found = way(MIXTURE, start.to(dtype), **run).x
        assert found.dtype == dtype
        assert torch.isfinite(found).all()
        assert found.abs().max() < 30


class TestState:
    @pytest.mark.parametrize("solver", SOLVERS)
    @pytest.mark.parametrize(
        "given, kept",
        [
            (torch.float64, torch.float64),
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
        ],
    )
    def test_dtype(self, solver: str, given: torch.dtype, kept: torch.dtype) -> None:
        seen = set()

        def velocity(x: Tensor, t: float) -> Tensor:
            seen.add(x.dtype)
            return (-x).to(torch.bfloat16)

        result = sample(velocity, torch.ones(2, 2, dtype=given), **on(solver, 3))
        assert result.x.dtype == kept
        assert seen == {kept}

    def test_a_double_velocity_leaves_a_float_state(self) -> None:
        result = sample(lambda x, t: -x.double(), torch.ones(2), grids.uniform(3), solver="heun")
        assert result.x.dtype == torch.float32

    def test_float32_follows_float64(self, start: Tensor) -> None:
        for solver in FIXED:
            exact = sample(Gaussian(), start, **on(solver, 50)).x
            found = sample(Gaussian(), start.float(), **on(solver, 50)).x
            assert (found - exact).abs().max() < 2e-5, solver

    def test_gradients_flow_when_they_are_wanted(self) -> None:
        scale = torch.tensor(1.0, requires_grad=True)
        result = sample(lambda x, t: scale * x, torch.ones(2), grids.uniform(2), solver="euler")
        (gradient,) = torch.autograd.grad(result.x.sum(), scale)
        torch.testing.assert_close(gradient, torch.tensor(2 * 1.5))  # 2 d/ds (1 + s/2)^2
        with torch.no_grad():
            assert not sample(lambda x, t: scale * x, torch.ones(2), [0.0, 1.0]).x.requires_grad

    def test_the_noise_is_left_alone(self) -> None:
        noise = torch.ones(2)
        sample(lambda x, t: -x, noise, grids.uniform(3), solver="rk4")
        assert torch.equal(noise, torch.ones(2))

    def test_a_sample_does_not_depend_on_its_batch(self) -> None:
        noise = keyed_noise(3, range(6), (1, 2, 2))
        alone = keyed_noise(3, [4], (1, 2, 2))
        for solver in set(FIXED) - set(STOCHASTIC):
            whole = sample(MIXTURE, noise, **on(solver, 5)).x
            torch.testing.assert_close(sample(MIXTURE, alone, **on(solver, 5)).x, whole[4:5])


class TestCallback:
    @pytest.mark.parametrize("solver", STEPPING)
    def test_sees_every_step_boundary(self, solver: str) -> None:
        steps: list[Step] = []
        run = on(solver, 5)
        times = run["times"]
        result = sample(MIXTURE, torch.ones(3, 1), **run, callback=steps.append)
        assert [step.t for step in steps] == times
        assert [step.index for step in steps] == list(range(6))
        assert {step.num_steps for step in steps} == {5}
        assert torch.equal(steps[0].x, torch.ones(3, 1))
        assert torch.equal(steps[-1].x, result.x)
        if solver not in STOCHASTIC:
            # The state at a boundary is what a run that ends there gives.
            shorter = sample(MIXTURE, torch.ones(3, 1), **run | {"times": times[:4]})
            torch.testing.assert_close(steps[3].x, shorter.x)

    @pytest.mark.parametrize("solver", STEPPING)
    def test_edits_are_kept(self, solver: str) -> None:
        """A mask that holds half of the state on a known line, as in-painting does."""
        known_noise, known_data = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, 0.25]])
        held = torch.tensor([[True, False]])
        seen: list[tuple[float, float]] = []

        def hold(step: Step) -> Tensor:
            known = (1 - step.t) * known_noise + step.t * known_data
            return torch.where(held, known, step.x)

        def velocity(x: Tensor, t: float) -> Tensor:
            seen.append((t, x[0, 0].item()))
            return -x

        run = on(solver, 4)
        first, *_, before_last, _ = run["times"]
        x = sample(velocity, torch.ones(1, 2), **run, callback=hold).x
        free = sample(lambda x, t: -x, torch.ones(1, 2), **run).x
        assert x[0, 0] == known_data[0, 0]
        torch.testing.assert_close(x[0, 1], free[0, 1])
        for t in (first, before_last):  # the velocity is that of the edited state
            assert any(time == t and value == pytest.approx(2 - 1.5 * t) for time, value in seen)

    @pytest.mark.parametrize("solver", STEPPING)
    def test_an_edit_in_place_is_one_that_is_returned(self, solver: str) -> None:
        def in_place(step: Step) -> None:
            step.x.mul_(0.5 if step.index == 2 else 1.0)

        def returned(step: Step) -> Tensor | None:
            return 0.5 * step.x if step.index == 2 else None

        x, run = torch.ones(2, 3, dtype=torch.float64), on(solver, 5)
        found = sample(MIXTURE, x.clone(), **run, callback=in_place).x
        torch.testing.assert_close(found, sample(MIXTURE, x, **run, callback=returned).x)

    def test_one_edit_in_the_middle_changes_the_end(self) -> None:
        def reset(step: Step) -> Tensor | None:
            return torch.ones_like(step.x) if step.index == 2 else None

        for solver in ("euler", "midpoint", "heun", "rk4"):
            times = grids.uniform(4)
            edited = sample(lambda x, t: -x, torch.zeros(2), times, solver, callback=reset).x
            rest = sample(lambda x, t: -x, torch.ones(2), times[2:], solver=solver).x
            assert torch.equal(edited, rest)

    def test_works_in_inversion(self) -> None:
        steps: list[Step] = []
        invert(lambda x, t: -x, torch.ones(2), grids.uniform(3), "heun", callback=steps.append)
        assert [step.t for step in steps] == grids.uniform(3)[::-1]

    def test_another_shape_is_refused(self) -> None:
        with pytest.raises(FlowkitError, match=r"shape \(2,\) or None, got \(1, 2\)"):
            sample(lambda x, t: -x, torch.ones(2), [0.0, 1.0], callback=lambda step: step.x[None])


class TestCustomSolvers:
    @staticmethod
    def damped(x: Tensor, times: Sequence[float], *, factor: float = 1.0) -> Evaluations:
        for t, s in pairwise(times):
            x, v = yield x, t
            x = x + factor * (s - t) * v
        return x, {"factor": factor}

    def test_a_generator_function_with_options_and_state(self) -> None:
        result = sample(
            lambda x, t: torch.ones_like(x), torch.zeros(2), [0.0, 1.0], self.damped, factor=0.5
        )
        torch.testing.assert_close(result.x, torch.full((2,), 0.5))
        assert result.state == {"factor": 0.5}

    def test_an_unknown_option_is_named(self) -> None:
        message = "solver 'damped' has no option 'facto', did you mean 'factor'"
        with pytest.raises(FlowkitError, match=message):
            sample(lambda x, t: x, torch.zeros(2), [0.0, 1.0], self.damped, facto=0.5)

    def test_a_missing_option_is_named(self) -> None:
        def needy(x: Tensor, times: Sequence[float], *, path: object) -> Evaluations:
            yield x, times[0]
            return x

        with pytest.raises(FlowkitError, match="solver 'needy' needs the option 'path'"):
            sample(lambda x, t: x, torch.zeros(2), [0.0, 1.0], needy)

    def test_a_plain_function_is_refused(self) -> None:
        with pytest.raises(FlowkitError, match="generator function"):
            sample(lambda x, t: x, torch.zeros(2), [0.0, 1.0], lambda x, times: x)  # type: ignore


class TestAdaptive:
    def test_a_dry_run_is_refused(self) -> None:
        with pytest.raises(FlowkitError, match="'dopri5' chooses its times as it goes"):
            evaluation_times("dopri5", [0.0, 1.0])

    def test_a_callback_is_refused(self) -> None:
        with pytest.raises(FlowkitError, match="no step for a callback"):
            sample(Gaussian(), torch.zeros(2), [0.0, 1.0], "dopri5", callback=lambda step: None)


class TestBadInput:
    @pytest.mark.parametrize(
        "times, message",
        [
            ([1.0, 0.5, 0.0], r"got 1 -> 0 in 2 steps; to go from data to noise, use invert\(\)"),
            ([0.0, 0.5, 0.5, 1.0], "must increase"),
            ([-0.1, 1.0], "must increase from noise"),
            ([0.0, 1.01], "must increase from noise"),
            ([0.0, float("nan"), 1.0], "must increase"),
            ([float("nan"), 1.0], "must increase"),
            ([0.0], "at least a start and an end"),
        ],
    )
    def test_times(self, times: list[float], message: str) -> None:
        with pytest.raises(FlowkitError, match=message):
            sample(Gaussian(), torch.zeros(2), times)

    def test_inversion_takes_increasing_times_too(self) -> None:
        with pytest.raises(FlowkitError, match="runs them backwards itself"):
            invert(Gaussian(), torch.zeros(2), [1.0, 0.0])

    @pytest.mark.parametrize("times", [10, None, "uniform"])
    def test_times_that_are_none(self, times: Any) -> None:
        with pytest.raises(FlowkitError, match="times must be numbers in"):
            sample(Gaussian(), torch.zeros(2), times)

    def test_a_dry_run_on_times_that_turn(self) -> None:
        with pytest.raises(FlowkitError, match="or fall all the way, to invert"):
            evaluation_times("euler", [0.0, 0.5, 0.5, 1.0])

    @pytest.mark.parametrize("noise", [torch.zeros(2, dtype=torch.long), [0.0, 1.0]])
    def test_noise_that_is_no_floating_point_tensor(self, noise: Any) -> None:
        with pytest.raises(FlowkitError, match="must be a tensor of floating-point numbers, got"):
            sample(Gaussian(), noise, [0.0, 1.0])

    def test_a_velocity_that_is_no_tensor(self) -> None:
        with pytest.raises(FlowkitError, match="velocity must return a tensor, got tuple"):
            sample(lambda x, t: (x,), torch.zeros(2), [0.0, 1.0])

    @pytest.mark.parametrize(
        "solver, options, message",
        [
            ("bdia", {"gamma": "1"}, "'bdia' takes float as gamma, got '1'"),
            ("abm", {"order": 3.0}, "'abm' takes int as order, got 3.0"),
            ("ab4", {"midpoint_first": 1}, "takes bool as midpoint_first, got 1"),
            ("abm", {"order": True}, "takes int as order, got True"),
            ("deis", {"method": None}, "takes str as method, got None"),
        ],
    )
    def test_options_of_another_type(self, solver: str, options: Any, message: str) -> None:
        with pytest.raises(FlowkitError, match=message):
            sample(Gaussian(), torch.zeros(2), [0.0, 1.0], solver, **options)

    def test_unknown_solver(self) -> None:
        with pytest.raises(FlowkitError, match="unknown solver 'mid_point', did you mean 'mid"):
            sample(Gaussian(), torch.zeros(2), [0.0, 1.0], solver="mid_point")

    def test_unknown_option(self) -> None:
        message = "solver 'euler' has no option 'gamma'; it takes none"
        with pytest.raises(FlowkitError, match=message):
            sample(Gaussian(), torch.zeros(2), [0.0, 1.0], "euler", gamma=1.0)

    def test_a_velocity_that_would_broadcast(self) -> None:
        with pytest.raises(FlowkitError, match=r"state's shape \(2, 3\), got \(3,\)"):
            sample(lambda x, t: x[0], torch.zeros(2, 3), [0.0, 1.0])


def test_progress_counts_steps(capsys: pytest.CaptureFixture[str]) -> None:
    for solver in SOLVERS:
        sample(lambda x, t: -x, torch.ones(2), **on(solver, 6), progress=True)
        assert "6/6" in capsys.readouterr().err
    invert(lambda x, t: -x, torch.ones(2), grids.uniform(6), solver="heun", progress=True)
    assert "6/6" in capsys.readouterr().err
    sample(lambda x, t: -x, torch.ones(2), grids.uniform(6))
    assert capsys.readouterr().err == ""
