"""Multistep solvers: their weights, their orders in both directions, their start, their cost."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from flowkit.analytic import Gaussian, Mixture, normal_quantiles
from flowkit.errors import FlowkitError
from flowkit.samplers import evaluation_times, grids, invert, sample
from flowkit.samplers.multistep import (
    ab2,
    ab3,
    ab4,
    abm,
    adams_bashforth_weights,
    fireflow,
)
from flowkit.samplers.solve import Step

FIELDS = {
    "Gaussian": Gaussian(),
    "A": Mixture((0.4, 0.6), (-0.9, 0.7), (0.3, 0.2)),
    "C": Mixture((0.2, 0.5, 0.3), (-1.2, 0.1, 1.1), (0.2, 0.3, 0.15)),
}
SOLVERS = [(ab3, {}), (ab4, {}), (ab4, {"midpoint_first": True}), (fireflow, {})]
UNEVEN = [0.0, 0.05, 0.2, 0.25, 0.45, 0.7, 0.75, 1.0]


def interval(n, a, b, power=1.0):
    return [a + (b - a) * (i / n) ** power for i in range(n + 1)]


def solution(field, x: Tensor, a: float, b: float) -> Tensor:
    def slope(t, y):
        return field(torch.from_numpy(y), float(t)).numpy()

    end = solve_ivp(slope, (a, b), x.flatten().numpy(), "DOP853", rtol=1e-13, atol=1e-13)
    return torch.from_numpy(end.y[:, -1]).reshape(x.shape)


@pytest.fixture(scope="module")
def start() -> Tensor:
    return normal_quantiles()


@pytest.fixture(scope="module")
def ends(start) -> dict[str, Tensor]:
    """Where the flows lead from t = 0.1 to 0.9."""
    return {name: solution(field, start, 0.1, 0.9) for name, field in FIELDS.items()}


class TestWeights:
    NODES = [0.1, 0.37, 0.4, 0.85]

    @pytest.mark.parametrize("count", [1, 2, 3, 4])
    @pytest.mark.parametrize("t, s", [(0.85, 1.0), (0.0, 0.4), (1.0, 0.2)])
    def test_integrate_polynomials(self, count, t, s):
        nodes = self.NODES[-count:]
        weights = adams_bashforth_weights(nodes, t, s)
        for power in range(count):
            found = sum(w * node**power for w, node in zip(weights, nodes, strict=True))
            exact = (s ** (power + 1) - t ** (power + 1)) / (power + 1)
            assert found == pytest.approx(exact, abs=3e-15 * sum(map(abs, weights)))

    def test_are_the_classical_ones_on_an_even_grid(self):
        table = {1: [1], 2: [-1, 3], 3: [5, -16, 23], 4: [-9, 37, -59, 55]}
        for count, row in table.items():
            nodes = [0.125 * i for i in range(count)]
            t = nodes[-1]
            expected = [0.125 * w / sum(row) for w in row]
            found = adams_bashforth_weights(nodes, t, t + 0.125)
            assert found == pytest.approx(expected, rel=1e-14)

    def test_agree_with_exact_arithmetic(self):
        """The Lagrange polynomials of four nodes, multiplied out and integrated in fractions."""
        nodes, t, s = self.NODES, 0.85, 0.99
        at = [Fraction(node) for node in nodes]
        for a, weight in zip(at, adams_bashforth_weights(nodes, t, s), strict=True):
            coefficients = [Fraction(1)]
            for b in (b for b in at if b != a):
                up = [Fraction(0), *coefficients]
                down = [*(c * b for c in coefficients), Fraction(0)]
                coefficients = [(u - d) / (a - b) for u, d in zip(up, down, strict=True)]
            exact = sum(
                c * (Fraction(s) ** (k + 1) - Fraction(t) ** (k + 1)) / (k + 1)
                for k, c in enumerate(coefficients)
            )
            assert weight == pytest.approx(float(exact), rel=1e-13)

    def test_follow_the_order_of_the_nodes_and_the_direction(self):
        weights = adams_bashforth_weights(self.NODES, 0.85, 1.0)
        turned = adams_bashforth_weights(self.NODES[::-1], 0.85, 1.0)
        assert turned[::-1] == pytest.approx(weights, rel=1e-13)
        back = adams_bashforth_weights(self.NODES, 1.0, 0.85)
        assert [-w for w in back] == pytest.approx(weights, rel=1e-13)
        assert adams_bashforth_weights(self.NODES, 0.85, 0.85) == [0, 0, 0, 0]

    @pytest.mark.parametrize("nodes", [[], [0.1, 0.2, 0.1]])
    def test_refuse_nodes_that_are_alike(self, nodes):
        with pytest.raises(FlowkitError, match="one or more different times, got"):
            adams_bashforth_weights(nodes, 0.0, 1.0)


class TestOrder:
    @pytest.mark.parametrize(
        "solver, options, order",
        [(ab3, {}, 3), (ab4, {"midpoint_first": True}, 4), (fireflow, {}, 2)],
    )
    @pytest.mark.parametrize("name, power", [("Gaussian", 1), ("A", 1), ("C", 1), ("C", 1.5)])
    @pytest.mark.parametrize("forwards", [True, False])
    def test_on_even_and_uneven_grids(
        self, solver, options, order, name, power, forwards, start, ends
    ):
        errors = []
        for n in (160, 320):
            times = interval(n, 0.1, 0.9, power)
            if forwards:
                found, expected = (
                    sample(FIELDS[name], start, times, solver, **options).x,
                    ends[name],
                )
            else:
                found, expected = (
                    invert(FIELDS[name], ends[name], times, solver, **options).x,
                    start,
                )
            errors.append((found - expected).square().mean().sqrt().item())
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)

    @pytest.mark.parametrize("name", FIELDS)
    def test_ab4_hardly_feels_its_first_step(self, name, start, ends):
        """Up to a hundred steps Euler's first one costs less than a third of the error."""
        for n in (10, 20, 40):
            plain, mended = (
                sample(FIELDS[name], start, interval(n, 0.1, 0.9), ab4, midpoint_first=first).x
                for first in (False, True)
            )
            errors = [(x - ends[name]).square().mean().sqrt() for x in (plain, mended)]
            assert errors[0] < 1.34 * errors[1]

    def test_more_velocities_pay_on_a_fine_grid(self, start, ends):
        for name in FIELDS:
            errors = [
                (sample(FIELDS[name], start, interval(80, 0.1, 0.9), solver).x - ends[name])
                .square()
                .mean()
                for solver in (ab2, ab3, ab4)
            ]
            assert errors[0] > 20 * errors[1] > 20 * errors[2]

    @pytest.mark.parametrize(
        "solver, steps, power", [(ab3, 3, 2), (ab4, 4, 3), (fireflow, 1, 1), (fireflow, 5, 1)]
    )
    def test_exact_for_velocities_polynomial_in_t(self, solver, steps, power):
        """As soon as there are enough of them, whatever the first steps have missed."""
        x, times = torch.zeros(3, dtype=torch.float64), UNEVEN[: steps + 1]
        found = sample(lambda x, t: torch.full_like(x, t**power), x, times, solver).x
        torch.testing.assert_close(
            found, torch.full_like(x, times[-1] ** (power + 1) / (power + 1))
        )


class TestStart:
    @pytest.mark.parametrize("solver", [ab3, ab4])
    def test_one_step_is_euler_and_two_steps_integrate_anew(self, solver, start):
        field, (a, b, c) = FIELDS["A"], (0.1, 0.3, 0.4)
        one = sample(field, start, [a, b], solver).x
        torch.testing.assert_close(one, start + (b - a) * field(start, a))
        (w, w_one) = adams_bashforth_weights([a, b], a, c)
        two = start + w * field(start, a) + w_one * field(one, b)
        torch.testing.assert_close(sample(field, start, [a, b, c], solver).x, two)

    @pytest.mark.parametrize("solver, options", [(ab4, {"midpoint_first": True}), (fireflow, {})])
    def test_one_step_is_the_midpoint_rule(self, solver, options, start):
        found = sample(FIELDS["A"], start, [0.1, 0.4], solver, **options).x
        torch.testing.assert_close(found, sample(FIELDS["A"], start, [0.1, 0.4], "midpoint").x)

    def test_fireflow_is_its_recursion(self, start):
        field, x = FIELDS["C"], start
        slope = field(x, UNEVEN[0])
        for t, s in pairwise(UNEVEN):
            slope = field(x + (s - t) / 2 * slope, (t + s) / 2)
            x = x + (s - t) * slope
        torch.testing.assert_close(sample(field, start, UNEVEN, fireflow).x, x)

    def test_ab2_has_the_weights_of_two_nodes(self, start):
        field, x, before = FIELDS["C"], start, []
        for t, s in pairwise(UNEVEN):
            before = [*before, (t, field(x, t))][-2:]
            nodes, slopes = zip(*before, strict=True)
            weights = adams_bashforth_weights(nodes, t, s)
            x = x + sum(w * v for w, v in zip(weights, slopes, strict=True))
        found = sample(field, start, UNEVEN, ab2).x
        torch.testing.assert_close(found, x, rtol=0, atol=1e-13)


class TestCost:
    @pytest.mark.parametrize("times", [UNEVEN, UNEVEN[::-1]])
    def test_adams_bashforth_evaluates_at_the_steps_begin(self, times):
        assert evaluation_times(ab3, times) == evaluation_times(ab4, times) == times[:-1]
        middle = 0.5 * (times[0] + times[1])
        mended = evaluation_times(ab4, times, midpoint_first=True)
        assert mended == [times[0], middle, *times[1:-1]]

    @pytest.mark.parametrize("times", [UNEVEN, UNEVEN[::-1]])
    def test_fireflow_evaluates_at_the_first_time_and_at_the_middles(self, times):
        middles = [0.5 * (t + s) for t, s in pairwise(times)]
        assert evaluation_times(fireflow, times) == [times[0], *middles]


@pytest.mark.parametrize("solver, options", SOLVERS)
class TestBothWays:
    def test_time_reversal(self, solver, options, start):
        """Backwards is the same rule, forwards on the mirrored flow."""
        field = FIELDS["A"]
        mirrored = [1 - t for t in reversed(UNEVEN)]
        back = invert(field, start, UNEVEN, solver, **options).x
        forth = sample(lambda x, t: -field(x, 1 - t), start, mirrored, solver, **options).x
        torch.testing.assert_close(back, forth)

    @pytest.mark.parametrize("name", FIELDS)
    @pytest.mark.parametrize(
        "times, tolerance",
        [
            (grids.uniform(1), 1e-5),
            (grids.uniform(12), 1e-5),
            (grids.shifted(12, 3.0), 1e-5),
            (grids.edm(12), 2e-3),  # the steps shrink sixfold at the end: large weights
        ],
    )
    def test_float32_follows_float64_to_both_ends(
        self, solver, options, name, times, tolerance, start
    ):
        for run in (sample, invert):
            exact = run(FIELDS[name], start, times, solver, **options).x
            found = run(FIELDS[name], start.float(), times, solver, **options).x
            assert found.dtype == torch.float32 and exact.dtype == torch.float64
            assert exact.isfinite().all()
            torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


class TestCallback:
    @pytest.mark.parametrize("solver, options", SOLVERS[:3])
    @pytest.mark.parametrize("index", range(6))
    def test_an_edit_stays_through_the_start(self, solver, options, index):
        """In a flow that is the same everywhere an edit moves the end by as much."""
        times = UNEVEN

        def velocity(x, t):
            return torch.full_like(x, math.cos(3 * t))

        def push(step: Step):
            return step.x + 0.5 if step.index == index else None

        x = torch.zeros(2, dtype=torch.float64)
        free = sample(velocity, x, times, solver, **options).x
        pushed = sample(velocity, x, times, solver, callback=push, **options).x
        torch.testing.assert_close(pushed, free + 0.5)

    def test_fireflow_shows_the_first_and_the_last_state(self, start):
        seen = []
        sample(FIELDS["A"], start, UNEVEN, fireflow, callback=lambda step: seen.append(step.t))
        assert seen == [UNEVEN[0], UNEVEN[-1]]


class TestAbm:
    @pytest.mark.parametrize("order", [2, 3, 4])
    @pytest.mark.parametrize("way", [sample, invert])
    def test_order(self, order, way) -> None:
        field, start = Gaussian(), normal_quantiles()
        errors = []
        for n in (80, 160, 320):
            times = [0.1 + 0.7 * (i / n) ** 1.3 for i in range(n + 1)]
            a, b = (times[0], times[-1]) if way is sample else (times[-1], times[0])
            found = way(field, start, times, abm, order=order)
            assert found.nfe == n
            errors.append((found.x - field.flow(start, a, b)).abs().max().item())
        measured = [math.log2(e / f) for e, f in pairwise(errors)]
        # The low orders of the start hold order 4 down when the first steps are the stiff ones.
        least = 3.0 if order == 4 else order - 0.25
        assert all(least <= m <= order + 0.7 for m in measured), measured

    def test_is_ab2_at_order_two_on_an_even_grid(self) -> None:
        field, start, times = FIELDS["A"], normal_quantiles(), grids.uniform(7)
        found = sample(field, start, times, abm, order=2).x
        torch.testing.assert_close(found, sample(field, start, times, ab2).x, rtol=0, atol=1e-13)

    def test_an_edit_moves_the_corrected_state_by_itself(self) -> None:
        """Where the velocity does not depend on x, an edit is simply added."""
        times, shift = grids.power(6), torch.tensor(0.75, dtype=torch.float64)

        def move(step: Step) -> torch.Tensor | None:
            return step.x + shift if step.index == 3 else None

        def field(x: torch.Tensor, t: float) -> torch.Tensor:
            return torch.full_like(x, t**2)

        plain = sample(field, torch.zeros(2, dtype=torch.float64), times, abm).x
        edited = sample(field, torch.zeros(2, dtype=torch.float64), times, abm, callback=move).x
        torch.testing.assert_close(edited, plain + shift)

    @pytest.mark.parametrize("order", [1, 5])
    def test_other_orders_are_refused(self, order: int) -> None:
        with pytest.raises(FlowkitError, match="orders 2, 3 and 4, got order="):
            sample(Gaussian(), torch.zeros(2), [0.0, 1.0], abm, order=order)
