"""Solvers: orders on flows with known solutions, costs, inversion, and what the driver promises."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.noise import keyed_noise
from flowkit.samplers import evaluation_times, grids, invert, sample
from flowkit.samplers.evaluations import Evaluations
from flowkit.samplers.solve import SOLVERS, Step

COST = {"euler": 1, "midpoint": 2, "rf_solver": 2, "heun": 2, "rk4": 4, "ab2": 1, "rfpp": 1}
INVERTIBLE = [name for name in SOLVERS if name != "rfpp"]
MIXTURES = {
    "A": ((0.4, 0.6), (-0.9, 0.7), (0.3, 0.2)),
    "C": ((0.2, 0.5, 0.3), (-1.2, 0.1, 1.1), (0.2, 0.3, 0.15)),
}


def mixture(name: str) -> Callable[[Tensor, float], Tensor]:
    """The velocity of a mixture of Gaussians: that of each, weighted by its responsibility."""
    w, mu, s = (torch.tensor(row, dtype=torch.float64) for row in MIXTURES[name])

    def velocity(x: Tensor, t: float) -> Tensor:
        x, g = x[..., None], t * t * s**2 + (1 - t) ** 2
        r = (w.log() - 0.5 * g.log() - (x - t * mu) ** 2 / (2 * g)).softmax(-1)
        return (r * (mu + (t * s**2 - (1 - t)) / g * (x - t * mu))).sum(-1)

    return velocity


class Gaussian:
    """Data N(mu, s^2): velocity and flow in closed form."""

    mu, s = 0.7, 0.4

    def g(self, t: float) -> float:
        return t * t * self.s**2 + (1 - t) ** 2

    def __call__(self, x: Tensor, t: float) -> Tensor:
        return self.mu + (t * self.s**2 - (1 - t)) * (x - t * self.mu) / self.g(t)

    def flow(self, x: Tensor, a: float, b: float) -> Tensor:
        return b * self.mu + math.sqrt(self.g(b) / self.g(a)) * (x - a * self.mu)


def interval(n: int, a: float, b: float) -> list[float]:
    return [a + (b - a) * i / n for i in range(n + 1)]


def orders(errors: Sequence[float]) -> list[float]:
    """Measured between runs that double the number of steps."""
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


@pytest.fixture(scope="module")
def start() -> Tensor:
    """The 64 standard-normal quantiles (i + 1/2) / 64."""
    u = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    return torch.special.ndtri(u).reshape(1, 4, 4, 4)


@pytest.fixture(scope="module")
def solutions(start: Tensor) -> dict[str, Tensor]:
    return {m: sample(mixture(m), start, grids.uniform(4000), solver="rk4").x for m in MIXTURES}


@pytest.mark.parametrize(
    "solver, low, high",
    [
        ("euler", 0.95, 1.05),
        ("heun", 1.9, 2.1),
        ("ab2", 1.9, 2.1),
        ("rk4", 3.8, 4.2),
        # On Gaussian data the midpoint rule's leading error vanishes.
        ("midpoint", 2.8, 3.2),
    ],
)
def test_order_on_gaussian_data(solver: str, low: float, high: float, start: Tensor) -> None:
    field = Gaussian()
    exact = field.flow(start, 0.1, 0.8)
    errors = [
        (sample(field, start, interval(n, 0.1, 0.8), solver=solver).x - exact).abs().max().item()
        for n in (20, 40, 80, 160)
    ]
    assert all(low <= order <= high for order in orders(errors)), orders(errors)


@pytest.mark.parametrize("solver", ["midpoint", "rf_solver", "heun", "ab2"])
def test_order_two_on_a_mixture(solver: str, start: Tensor) -> None:
    field = mixture("A")
    exact = sample(field, start, interval(4000, 0.1, 0.9), solver="rk4").x
    errors = [
        (sample(field, start, interval(n, 0.1, 0.9), solver=solver).x - exact).abs().max().item()
        for n in (80, 160, 320)
    ]
    assert all(1.8 <= order <= 2.3 for order in orders(errors)), orders(errors)


def test_ab2_keeps_its_order_on_an_uneven_grid(start: Tensor) -> None:
    field = Gaussian()
    errors = []
    for n in (20, 40, 80, 160):
        times = [0.1 + 0.7 * (i / n) ** 2.5 for i in range(n + 1)]
        found = sample(field, start, times, solver="ab2").x
        errors.append((found - field.flow(start, 0.1, 0.8)).abs().max().item())
    assert all(1.85 <= order <= 2.15 for order in orders(errors)[1:]), orders(errors)


# Root mean square errors on [0, 1] against 4000 steps of RK4; evaluations (steps) -> error.
CALIBRATED = {
    ("A", "ab2"): {5: 0.0580, 10: 0.0125, 20: 0.0032},
    ("A", "midpoint"): {4: 0.1504, 10: 0.0126, 20: 0.0029},
    ("A", "heun"): {4: 0.1948, 10: 0.0182, 20: 0.0059},
    ("C", "ab2"): {5: 0.0545, 10: 0.0160, 20: 0.0037},
    ("C", "midpoint"): {4: 0.1185, 10: 0.0150, 20: 0.0032},
    ("C", "heun"): {4: 0.1358, 10: 0.0299, 20: 0.0075},
}


@pytest.mark.parametrize("name, solver", CALIBRATED)
def test_errors_on_mixtures(
    name: str, solver: str, start: Tensor, solutions: dict[str, Tensor]
) -> None:
    for nfe, expected in CALIBRATED[name, solver].items():
        times = grids.uniform(nfe // COST[solver])
        result = sample(mixture(name), start, times, solver=solver)
        error = (result.x - solutions[name]).square().mean().sqrt().item()
        assert result.nfe == nfe
        assert error == pytest.approx(expected, abs=5.1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_nfe_is_the_dry_run_s_and_the_velocity_s(solver: str) -> None:
    seen: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        assert type(t) is float
        seen.append(t)
        return -x * x

    times = grids.shifted(7, 3.0)
    result = sample(velocity, torch.ones(2, 3), times, solver=solver)
    assert seen == evaluation_times(solver, times)
    assert result.nfe == len(seen) == 7 * COST[solver]
    assert result.state is None


@pytest.mark.parametrize(
    "solver, low, high", [("midpoint", 2.8, 3.2), ("euler", 0.9, 1.1), ("ab2", 1.8, 2.2)]
)
def test_round_trip(solver: str, low: float, high: float, start: Tensor) -> None:
    field = mixture("A")
    errors = []
    for n in (80, 160, 320):
        times = interval(n, 0.1, 0.9)
        data = sample(field, start, times, solver=solver).x
        errors.append((invert(field, data, times, solver=solver).x - start).abs().max().item())
    assert all(low <= order <= high for order in orders(errors)), orders(errors)


@pytest.mark.parametrize("solver", INVERTIBLE)
def test_inversion_converges_to_the_noise(solver: str, start: Tensor) -> None:
    field = Gaussian()
    back = invert(field, field.flow(start, 0.0, 1.0), grids.uniform(400), solver=solver)
    assert back.nfe == 400 * COST[solver]
    assert (back.x - start).abs().max() < 2e-2


@pytest.mark.parametrize(
    "solver, power",
    [("euler", 0), ("midpoint", 1), ("heun", 1), ("ab2", 1), ("rk4", 3)],
)
def test_exact_for_velocities_polynomial_in_t(solver: str, power: int) -> None:
    x, times = torch.zeros(3, dtype=torch.float64), [0.0, 0.1, 0.45, 0.5, 1.0]
    found = sample(lambda x, t: torch.full_like(x, t**power), x, times, solver=solver).x
    first = times[1] if solver == "ab2" else 0.0  # the first step has no history: Euler
    missed = 0.5 * first**2
    torch.testing.assert_close(found, torch.full_like(x, 1 / (power + 1) - missed))


class TestRfpp:
    @pytest.mark.parametrize("n", [1, 2])
    def test_is_euler_for_one_and_two_steps(self, n: int, start: Tensor) -> None:
        ours = sample(mixture("A"), start, grids.uniform(n), solver="rfpp").x
        euler = sample(mixture("A"), start, grids.uniform(n), solver="euler").x
        torch.testing.assert_close(ours, euler, rtol=0, atol=1e-13)

    def test_differs_from_euler_for_three_steps(self, start: Tensor) -> None:
        ours = sample(mixture("A"), start, grids.uniform(3), solver="rfpp").x
        euler = sample(mixture("A"), start, grids.uniform(3), solver="euler").x
        assert (ours - euler).abs().max() > 1e-2

    @pytest.mark.parametrize("first", [0.0, 1 / 81])
    def test_is_euler_on_a_straight_flow(self, first: float, start: Tensor) -> None:
        noise, data = start, 0.3 * start.flip(-1) + 1
        times = grids.from_start(first, 5)
        begin = (1 - first) * noise + first * data

        def straight(x: Tensor, t: float) -> Tensor:
            return data - noise

        euler = sample(straight, begin, times, solver="euler").x
        torch.testing.assert_close(euler, data)
        if first == 0:
            torch.testing.assert_close(sample(straight, begin, times, solver="rfpp").x, euler)

    def test_ends_on_the_predicted_data_from_any_start(self, start: Tensor) -> None:
        """With a perfect prediction of one picture it lands there, from (1 - t) * noise too."""
        picture = torch.full_like(start, 0.25)
        times = grids.from_start(1 / 81, 4)
        found = sample(
            lambda x, t: (picture - x) / (1 - t), (1 - times[0]) * start, times, solver="rfpp"
        )
        torch.testing.assert_close(found.x, picture)

    def test_refuses_to_invert(self, start: Tensor) -> None:
        with pytest.raises(FlowkitError, match="'rfpp' cannot invert"):
            invert(Gaussian(), start, grids.uniform(4), solver="rfpp")


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

        result = sample(velocity, torch.ones(2, 2, dtype=given), grids.uniform(3), solver=solver)
        assert result.x.dtype == kept
        assert seen == {kept}

    def test_a_double_velocity_leaves_a_float_state(self) -> None:
        result = sample(lambda x, t: -x.double(), torch.ones(2), grids.uniform(3), solver="heun")
        assert result.x.dtype == torch.float32

    def test_float32_follows_float64(self, start: Tensor) -> None:
        for solver in SOLVERS:
            exact = sample(Gaussian(), start, grids.uniform(50), solver=solver).x
            found = sample(Gaussian(), start.float(), grids.uniform(50), solver=solver).x
            assert (found - exact).abs().max() < 5e-6

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
        whole = sample(mixture("C"), noise, grids.uniform(5), solver="ab2").x
        torch.testing.assert_close(
            sample(mixture("C"), alone, grids.uniform(5), solver="ab2").x, whole[4:5]
        )


class TestCallback:
    @pytest.mark.parametrize("solver", SOLVERS)
    def test_sees_every_step_boundary(self, solver: str) -> None:
        steps: list[Step] = []
        times = grids.shifted(5, 2.0)
        result = sample(lambda x, t: -x, torch.ones(3), times, solver=solver, callback=steps.append)
        assert [step.t for step in steps] == times
        assert [step.index for step in steps] == list(range(6))
        assert {step.num_steps for step in steps} == {5}
        assert torch.equal(steps[0].x, torch.ones(3))
        assert torch.equal(steps[-1].x, result.x)
        # The state at a boundary is what a run that ends there gives.
        shorter = sample(lambda x, t: -x, torch.ones(3), times[:4], solver=solver)
        assert torch.equal(steps[3].x, shorter.x)

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_edits_are_kept(self, solver: str) -> None:
        """A mask that holds half of the state on a known line, as in-painting does."""
        known_noise, known_data = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.25])
        held = torch.tensor([True, False])
        seen = []

        def hold(step: Step) -> Tensor:
            known = (1 - step.t) * known_noise + step.t * known_data
            return torch.where(held, known, step.x)

        def velocity(x: Tensor, t: float) -> Tensor:
            seen.append((t, x[0].item()))
            return -x

        times = grids.uniform(4)
        x = sample(velocity, torch.ones(2), times, solver=solver, callback=hold).x
        free = sample(lambda x, t: -x, torch.ones(2), times, solver=solver).x
        assert x[0] == known_data[0]
        torch.testing.assert_close(x[1], free[1])
        assert (0.0, 2.0) in seen  # the velocity is that of the edited state
        assert (0.5, 1.25) in seen

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

    def test_unknown_solver(self) -> None:
        with pytest.raises(FlowkitError, match="unknown solver 'mid_point', did you mean 'mid"):
            sample(Gaussian(), torch.zeros(2), [0.0, 1.0], solver="mid_point")

    def test_unknown_option(self) -> None:
        message = "solver 'euler' has no option 'gamma'; it takes none"
        with pytest.raises(FlowkitError, match=message):
            sample(Gaussian(), torch.zeros(2), [0.0, 1.0], gamma=1.0)

    def test_a_velocity_that_would_broadcast(self) -> None:
        with pytest.raises(FlowkitError, match=r"state's shape \(2, 3\), got \(3,\)"):
            sample(lambda x, t: x[0], torch.zeros(2, 3), [0.0, 1.0])


def test_progress_counts_steps(capsys: pytest.CaptureFixture[str]) -> None:
    for solver in SOLVERS:
        sample(lambda x, t: -x, torch.ones(2), grids.uniform(6), solver=solver, progress=True)
        assert "6/6" in capsys.readouterr().err
    invert(lambda x, t: -x, torch.ones(2), grids.uniform(6), solver="heun", progress=True)
    assert "6/6" in capsys.readouterr().err
    sample(lambda x, t: -x, torch.ones(2), grids.uniform(6))
    assert capsys.readouterr().err == ""


class TestGrids:
    def test_uniform(self) -> None:
        assert grids.uniform(4) == [0.0, 0.25, 0.5, 0.75, 1.0]
        assert grids.uniform(1) == [0.0, 1.0]

    def test_from_start(self) -> None:
        times = grids.from_start(0.2, 4)
        assert times == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert times[0] == 0.2 and times[-1] == 1.0

    def test_shift_is_diffusers_shift_of_sigma(self) -> None:
        for t, u in zip(grids.shifted(9, 3.0), grids.uniform(9), strict=True):
            sigma = 3 * (1 - u) / (1 + 2 * (1 - u))
            assert 1 - t == pytest.approx(sigma, abs=1e-15)
        assert grids.shifted(5, 1.0) == grids.uniform(5)

    def test_edm(self) -> None:
        times = grids.edm(18)
        assert len(times) == 19
        assert times[0] == pytest.approx(1 / 81)
        assert times[-2] == pytest.approx(0.9980040, abs=1e-7)
        assert times[-1] == 1.0
        roots = [(1 / t - 1) ** (1 / 7) for t in times[:-1]]
        gaps = [a - b for a, b in pairwise(roots)]
        assert max(gaps) - min(gaps) < 1e-12
        assert grids.edm(1) == [pytest.approx(1 / 81), 1.0]

    @pytest.mark.parametrize("n", [1, 2, 7, 100])
    def test_every_grid_can_be_sampled_on(self, n: int) -> None:
        made = (grids.uniform(n), grids.shifted(n, 0.3), grids.edm(n), grids.from_start(0.99, n))
        for times in made:
            assert all(type(t) is float for t in times)
            assert sample(lambda x, t: -x, torch.ones(1), times).nfe == n

    @pytest.mark.parametrize(
        "make, message",
        [
            (lambda: grids.uniform(0), "at least one step, got num_steps=0"),
            (lambda: grids.from_start(1.0, 3), r"\[0, 1\), got 1.0"),
            (lambda: grids.shifted(3, 0.0), "shift must be positive"),
            (lambda: grids.edm(3, sigma_min=1.0, sigma_max=0.5), "sigma_min < sigma_max"),
        ],
    )
    def test_bad_input(self, make: Callable[[], list[float]], message: str) -> None:
        with pytest.raises(FlowkitError, match=message):
            make()
