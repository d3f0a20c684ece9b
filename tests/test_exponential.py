"""DEIS: exactness, orders, weights in closed form, and both ends of the time axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from flowkit.analytic import Gaussian, Mixture, normal_quantiles
from flowkit.errors import FlowkitError
from flowkit.samplers import Step, evaluation_times, grids, invert, sample
from flowkit.samplers.exponential import (
    TABLEAUS,
    deis,
    even_velocity,
    rho_noise,
    t_data,
    t_noise,
    t_velocity,
)
from flowkit.samplers.multistep import adams_bashforth_weights

MIXTURE = Mixture((0.4, 0.6), (-0.9, 0.7), (0.3, 0.2))
UNEVEN = [0.05, 0.1, 0.25, 0.3, 0.55, 0.6, 0.9]
MULTISTEP = [
    {"method": "tab", "quantity": "velocity"},
    {"method": "tab", "quantity": "noise"},
    {"method": "tab", "quantity": "data"},
    {"method": "rhoab"},
    {"method": "ipndm"},
]
ALL = [*MULTISTEP, {"method": "rhork"}]


def named(options: dict[str, str]) -> str:
    return " ".join(options.values())


def interval(n: int, a: float = 0.1, b: float = 0.8) -> list[float]:
    return [a + (b - a) * i / n for i in range(n)] + [b]


def orders(errors: Sequence[float]) -> list[float]:
    """Measured between runs that double the number of steps."""
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


def put(states: Sequence[Tensor]) -> Callable[[Step], Tensor | None]:
    """A callback that replaces the first states, those that a multistep solver begins with."""
    return lambda step: states[step.index] if step.index < len(states) else None


@pytest.fixture(scope="module")
def start() -> Tensor:
    return normal_quantiles()


@pytest.fixture(scope="module")
def solution(start: Tensor) -> Tensor:
    """The mixture's flow from `start` at 0.1 to 0.8, to 1e-10."""
    return flow(start, [0.1, 0.8], steps=600)[-1]


def flow(x: Tensor, times: Sequence[float], steps: int = 4) -> list[Tensor]:
    """The states at `times` of the mixture's flow through x at times[0]."""
    states = [x]
    for t, s in pairwise(times):
        states.append(sample(MIXTURE, states[-1], interval(steps, t, s), solver="rk4").x)
    return states


class TestWeights:
    """Against closed forms, for a step from t to s with older predictions at b and c."""

    t, s, b, c = 0.4, 0.55, 0.33, 0.1

    @pytest.mark.parametrize("order", [1, 2, 3, 4])
    @pytest.mark.parametrize(
        "weights, whole",
        [
            (t_velocity, lambda t, s: s - t),
            (t_noise, lambda t, s: 1 - s / t),
            (t_data, lambda t, s: (s - t) / (1 - t)),
            (rho_noise, lambda t, s: 1 - s / t),
        ],
    )
    def test_they_add_up_to_the_weight_of_euler_s_step(self, weights, whole, order) -> None:
        for times in (UNEVEN, UNEVEN[::-1]):
            past, s = times[order - 1 :: -1], times[order]
            total = sum(weights(past, s))
            assert total == pytest.approx(whole(past[0], s), rel=1e-12)

    def test_of_the_velocity_are_adams_bashforth_s(self) -> None:
        h, r = self.s - self.t, (self.s - self.t) / (self.t - self.b)
        expected = [h * (1 + r / 2), -h * r / 2]
        assert t_velocity([self.t, self.b], self.s) == pytest.approx(expected, rel=1e-12)
        for order in (2, 3, 4):
            past = [0.5 - 0.1 * j for j in range(order)]
            expected = even_velocity(past, 0.6)
            assert t_velocity(past, 0.6) == pytest.approx(expected, rel=1e-12)
            past, s = UNEVEN[order - 1 :: -1], UNEVEN[order]
            expected = adams_bashforth_weights(past, past[0], s)
            assert t_velocity(past, s) == pytest.approx(expected, rel=1e-11)

    def test_of_the_noise(self) -> None:
        t, s, b = self.t, self.s, self.b
        older = -s * (math.log(s / t) + t / s - 1) / (b - t)
        expected = [1 - s / t - older, older]
        assert t_noise([t, b], s) == pytest.approx(expected, rel=1e-12)
        assert t_data([1 - t, 1 - b], 1 - s) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("t, s", [(1e-4, 0.3), (0.002, 0.9), (0.9, 1e-5)])
    def test_hold_over_steps_to_and_from_the_singular_end(self, t: float, s: float) -> None:
        b = 0.8 * t
        older = -s * (math.log(s / t) + t / s - 1) / (b - t)
        assert t_noise([t, b], s)[1] == pytest.approx(older, rel=1e-12)

    def test_of_the_noise_in_rho(self) -> None:
        rho = [(1 - t) / t for t in (self.t, self.b, self.c)]
        end = (1 - self.s) / self.s
        for j, found in enumerate(rho_noise([self.t, self.b, self.c], self.s)):
            others = [r for k, r in enumerate(rho) if k != j]
            basis = np.poly1d(others, r=True) / np.prod([rho[j] - r for r in others])
            integral = basis.integ()(end) - basis.integ()(rho[0])
            assert found == pytest.approx(self.s * integral, rel=1e-12)


class TestIdentities:
    @pytest.mark.parametrize("options", ALL, ids=named)
    def test_order_one_is_euler(self, options, start: Tensor) -> None:
        for run, times in ((sample, grids.shifted(6, 0.5)), (invert, UNEVEN)):
            euler = run(MIXTURE, start, times, "euler").x
            found = run(MIXTURE, start, times, solver=deis, order=1, **options).x
            torch.testing.assert_close(found, euler, rtol=0, atol=1e-12)

    def test_the_default_is_ab2(self, start: Tensor) -> None:
        for times in (grids.uniform(7), [0.0, *UNEVEN, 1.0]):
            ab2 = sample(MIXTURE, start, times, solver="ab2").x
            found = sample(MIXTURE, start, times, solver=deis).x
            torch.testing.assert_close(found, ab2, rtol=0, atol=1e-13)

    def test_ipndm_is_tab_on_even_steps_only(self, start: Tensor) -> None:
        for times, same in ((grids.uniform(8), True), (grids.shifted(8, 2.0), False)):
            tab = sample(MIXTURE, start, times, solver=deis, order=3).x
            found = sample(MIXTURE, start, times, solver=deis, order=3, method="ipndm").x
            assert ((found - tab).abs().max() < 1e-13) == same

    @pytest.mark.parametrize("options", ALL, ids=named)
    def test_straight_flows_are_solved(self, options, start: Tensor) -> None:
        noise, data = start, 0.3 * start.flip(-1) + 1
        for order in (2, 3, 4):
            run = partial(sample, solver=deis, order=order, **options)
            found = run(lambda x, t: data - noise, noise, [0.0, 0.1, 0.5, 0.6, 0.7, 1.0])
            torch.testing.assert_close(found.x, data, rtol=0, atol=1e-13)


def moved(u: float, powers: Sequence[float]) -> float:
    """A solution of u x' = x - q for the polynomial q = sum_k powers[k] u^k."""
    terms = [1.0, -u * math.log(u), *(-(u**k) / (k - 1) for k in range(2, len(powers)))]
    return sum(a * term for a, term in zip(powers, terms, strict=True))


class TestExactness:
    """For predictions that are polynomials, from exact states where the history begins."""

    coefficients = (0.3, -1.0, 0.7, 0.4)

    def check(self, order: int, field, exact: Callable[[float], float], **options) -> None:
        for times in (UNEVEN, UNEVEN[::-1]):
            states = [torch.full((2,), exact(t), dtype=torch.float64) for t in times]
            run = sample if times is UNEVEN else invert
            found = run(
                field, states[0], UNEVEN, deis, order=order, callback=put(states[:order]), **options
            )
            torch.testing.assert_close(found.x, states[-1], rtol=0, atol=1e-12)

    @pytest.mark.parametrize("order", [1, 2, 3, 4])
    def test_velocities_polynomial_in_t(self, order: int) -> None:
        p = np.polynomial.Polynomial(self.coefficients[:order])
        self.check(order, lambda x, t: torch.full_like(x, p(t)), p.integ())

    @pytest.mark.parametrize("order", [2, 3, 4])
    def test_noises_polynomial_in_t(self, order: int) -> None:
        p = self.coefficients[:order]
        noise = np.polynomial.Polynomial(p)
        self.check(order, lambda x, t: (x - noise(t)) / t, lambda t: moved(t, p), quantity="noise")

    @pytest.mark.parametrize("order", [2, 3, 4])
    def test_data_polynomial_in_t(self, order: int) -> None:
        p = self.coefficients[:order]
        data = np.polynomial.Polynomial(p)
        self.check(
            order,
            lambda x, t: (data(1 - t) - x) / (1 - t),
            lambda t: moved(1 - t, p),
            quantity="data",
        )

    @pytest.mark.parametrize("method", ["rhoab", "rhork"])
    @pytest.mark.parametrize("order", [1, 2, 3, 4])
    def test_noises_polynomial_in_rho(self, method: str, order: int) -> None:
        p = np.polynomial.Polynomial(self.coefficients[:order])
        self.check(
            order,
            lambda x, t: (x - p((1 - t) / t)) / t,
            lambda t: t * p.integ()((1 - t) / t),
            method=method,
        )


class TestOrders:
    """On the mixture; a history begins with exact states, which its Euler step would spoil."""

    def errors(self, grid, order: int, start: Tensor, solution: Tensor, **options) -> list[float]:
        errors = []
        for n in (100, 200):
            times = grid(n)
            begin = put(flow(start, times[:order]))
            found = sample(MIXTURE, start, times, deis, order=order, callback=begin, **options).x
            errors.append((found - solution).abs().max().item())
        return errors

    @pytest.mark.parametrize("order", [2, 3, 4])
    @pytest.mark.parametrize("options", MULTISTEP, ids=named)
    def test_multistep(self, options, order: int, start: Tensor, solution: Tensor) -> None:
        found = orders(self.errors(interval, order, start, solution, **options))
        assert all(order - 0.3 <= p <= order + 0.4 for p in found), found

    @pytest.mark.parametrize("quantity", ["velocity", "noise", "data"])
    def test_is_kept_on_uneven_grids(self, quantity, start: Tensor, solution: Tensor) -> None:
        def uneven(n: int) -> list[float]:
            return [0.1 + 0.7 * (i / n) ** 1.5 for i in range(n)] + [0.8]

        found = orders(self.errors(uneven, 3, start, solution, quantity=quantity))
        assert all(2.7 <= p <= 3.4 for p in found), found

    def test_ipndm_s_is_not(self, start: Tensor, solution: Tensor) -> None:
        """On steps that alternate in length, weights for even steps leave order 1."""

        def alternating(n: int) -> list[float]:
            return [0.1 + 0.7 * (i + 0.3 * (i % 2)) / n for i in range(n)] + [0.8]

        found = orders(self.errors(alternating, 3, start, solution, method="ipndm"))
        assert all(p < 1.5 for p in found), found

    @pytest.mark.parametrize("rule", TABLEAUS)
    def test_runge_kutta(self, rule: str, start: Tensor, solution: Tensor) -> None:
        order, errors = len(TABLEAUS[rule][1]), []
        for n in (20, 40, 80):
            found = sample(MIXTURE, start, interval(n), deis, method="rhork", order=rule).x
            errors.append((found - solution).abs().max().item())
        assert all(order - 0.2 <= p <= order + 0.3 for p in orders(errors)), orders(errors)


class TestEnds:
    @pytest.mark.parametrize("order", [2, 3, 4])
    @pytest.mark.parametrize("options", ALL, ids=named)
    def test_from_noise_to_data_and_back(self, options, order: int, start: Tensor) -> None:
        field, times = Gaussian(), grids.uniform(60)
        data = field.flow(start, 0.0, 1.0)
        for run, begin, end in ((sample, start, data), (invert, data, start)):
            found = run(field, begin, times, solver=deis, order=order, **options).x
            assert (found - end).abs().max() < 2e-2
            single = run(field, begin.float(), times, solver=deis, order=order, **options).x
            assert single.dtype == torch.float32
            assert (single - found).abs().max() < 2e-5

    @pytest.mark.parametrize("options", ALL, ids=named)
    def test_one_step_is_euler(self, options, start: Tensor) -> None:
        for run in (sample, invert):
            euler = run(MIXTURE, start, [0.0, 1.0], "euler").x
            assert torch.equal(run(MIXTURE, start, [0.0, 1.0], deis, order=3, **options).x, euler)

    @pytest.mark.parametrize(
        "run, times, options",
        [
            (sample, [0.2, 0.5, 0.7, 1.0], {"quantity": "data"}),
            (invert, [0.0, 0.2, 0.5, 0.7], {"quantity": "noise"}),
            (invert, [0.0, 0.2, 0.5, 0.7], {"method": "rhoab"}),
            (invert, [0.0, 0.2, 0.5, 0.7], {"method": "rhork"}),
        ],
    )
    def test_the_step_to_an_infinite_clock_is_euler_s(self, run, times, options, start) -> None:
        steps: list[Step] = []
        end = run(MIXTURE, start, times, deis, order=3, callback=steps.append, **options).x
        before = steps[-2].x
        ends = [times[0], times[1]] if run is invert else times[-2:]
        euler = run(MIXTURE, before, ends, "euler").x
        torch.testing.assert_close(end, euler)

    def test_what_was_predicted_at_infinite_rho_is_left_out(self, start: Tensor) -> None:
        times = [0.0, 0.3, 0.5, 0.7]
        whole = sample(MIXTURE, start, times, deis, method="rhoab", order=3).x
        first = sample(MIXTURE, start, times[:2]).x
        rest = sample(MIXTURE, first, times[1:], deis, method="rhoab", order=3).x
        torch.testing.assert_close(whole, rest)


class TestEvaluations:
    @pytest.mark.parametrize("options", MULTISTEP, ids=named)
    def test_multistep_takes_one_per_step(self, options) -> None:
        times = grids.shifted(6, 2.0)
        for order in (1, 2, 3, 4):
            assert evaluation_times(deis, times, order=order, **options) == times[:-1]
            assert evaluation_times(deis, times[::-1], order=order, **options) == times[:0:-1]

    @pytest.mark.parametrize("order, stages", [(1, 1), (2, 2), (3, 3), (4, 4), ("ssprk3", 3)])
    def test_runge_kutta_takes_its_stages(self, order: int | str, stages: int) -> None:
        count = partial(evaluation_times, deis, method="rhork", order=order)
        times = grids.uniform(5)
        assert len(count(times[1:])) == 4 * stages
        assert len(count(times)) == len(count(times[::-1])) == 4 * stages + 1
        assert all(0 < t <= 1 for t in count(times[1:]))

    def test_stages_lie_evenly_in_rho(self) -> None:
        t, stage, again, end = evaluation_times(deis, [0.2, 0.5], method="rhork", order="rk4")
        assert (t, end) == (0.2, 0.5)
        assert stage == again == pytest.approx(1 / (1 + 2.5))  # between rho = 4 and 1

    @pytest.mark.parametrize("options", ALL, ids=named)
    def test_an_edit_between_steps_is_kept(self, options) -> None:
        seen = []

        def velocity(x: Tensor, t: float) -> Tensor:
            seen.append((t, x.item()))
            return torch.ones_like(x)

        def lift(step: Step) -> Tensor | None:
            return step.x + 5 if step.index == 2 else None

        x = torch.zeros(1, dtype=torch.float64)
        times = [0.0, 0.25, 0.5, 0.75, 1.0]
        run = partial(sample, velocity, x, times, deis, order=1, callback=lift, **options)
        assert run().x.item() == pytest.approx(6)
        assert (0.5, pytest.approx(5.5)) in seen


class TestBadInput:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"method": "tabb"}, "unknown DEIS method 'tabb', did you mean 'tab'"),
            ({"quantity": "score"}, "unknown quantity of 'tab' 'score'; known: velocity, noise, d"),
            (
                {"method": "rhoab", "quantity": "data"},
                "unknown quantity of 'rhoab' 'data'; known: noise",
            ),
            ({"order": 5}, "order must be 1, 2, 3 or 4, got 5"),
            ({"order": 2.0}, "order must be 1, 2, 3 or 4, got 2.0"),
            ({"order": "kutta"}, "order must be 1, 2, 3 or 4, got 'kutta'"),
            ({"method": "rhork", "order": 5}, "unknown order of 'rhork' '5'; known: euler, heun"),
        ],
    )
    def test_is_named(self, options, message: str) -> None:
        with pytest.raises(FlowkitError, match=message):
            sample(MIXTURE, torch.zeros(2), [0.0, 1.0], deis, **options)
