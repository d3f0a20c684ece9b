"""The adaptive solver: against scipy's, its order, its step control, and its refusals."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from flowkit.analytic import Gaussian, Mixture, normal_quantiles
from flowkit.errors import FlowkitError
from flowkit.samplers import grids, invert, sample
from flowkit.samplers.adaptive import ADAPTIVE, dopri5

FIELDS = {
    "Gaussian": Gaussian(),
    "A": Mixture((0.4, 0.6), (-0.9, 0.7), (0.3, 0.2)),
    "C": Mixture((0.2, 0.5, 0.3), (-1.2, 0.1, 1.1), (0.2, 0.3, 0.15)),
}


def scipy_solution(field, x: Tensor, a: float, b: float, method: str, tolerance: float):
    """(the state at b, the number of evaluations)"""

    def slope(t, y):
        return field(torch.from_numpy(y), float(t)).numpy()

    y = x.double().flatten().numpy()
    end = solve_ivp(slope, (a, b), y, method, rtol=tolerance, atol=tolerance)
    return torch.from_numpy(end.y[:, -1]).reshape(x.shape), end.nfev


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).square().mean().sqrt().item()


class Recorded:
    """A velocity that keeps the times at which it is asked."""

    def __init__(self, velocity) -> None:
        self.velocity, self.times = velocity, []

    def __call__(self, x, t):
        assert type(t) is float
        self.times.append(t)
        return self.velocity(x, t)


@pytest.fixture(scope="module")
def start() -> Tensor:
    return normal_quantiles()


@pytest.fixture(scope="module")
def ends(start) -> dict[str, Tensor]:
    return {
        name: scipy_solution(field, start, 0.0, 1.0, "DOP853", 1e-13)[0]
        for name, field in FIELDS.items()
    }


@pytest.mark.parametrize("name", FIELDS)
class TestAccuracy:
    @pytest.mark.parametrize("forwards", [True, False])
    def test_follows_the_tolerance(self, name, forwards, start, ends):
        errors = []
        for tolerance in (1e-3, 1e-5, 1e-7, 1e-9, 1e-11):
            tolerances = {"rtol": tolerance, "atol": tolerance}
            if forwards:
                found, expected = (
                    sample(FIELDS[name], start, [0, 1], dopri5, **tolerances),
                    ends[name],
                )
            else:
                found, expected = (
                    invert(FIELDS[name], ends[name], [0, 1], dopri5, **tolerances),
                    start,
                )
            errors.append(distance(found.x, expected))
            assert errors[-1] < 10 * tolerance
        assert all(fine < coarse / 3 for coarse, fine in pairwise(errors))

    @pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-8])
    def test_costs_no_more_than_scipy_s_rk45(self, name, tolerance, start, ends):
        theirs, num_evaluations = scipy_solution(FIELDS[name], start, 0, 1, "RK45", tolerance)
        ours = sample(FIELDS[name], start, [0, 1], dopri5, rtol=tolerance, atol=tolerance)
        assert ours.nfe <= 1.2 * num_evaluations
        # scipy's norm is that of the whole state, which here is one sample.
        assert distance(ours.x, ends[name]) < 3 * distance(theirs, ends[name])

    def test_default_tolerance(self, name, start, ends):
        for run, begin, expected in ((sample, start, ends[name]), (invert, ends[name], start)):
            result = run(FIELDS[name], begin, [0, 1], dopri5)
            assert distance(result.x, expected) < 1e-4
            assert result.nfe < 90

    def test_float32(self, name, start, ends):
        result = sample(FIELDS[name], start.float(), [0, 1], dopri5)
        assert result.x.dtype == torch.float32
        assert distance(result.x, ends[name]) < 1e-4


class TestSteps:
    def test_order_five_with_one_step_to_an_interval(self, start):
        """A tolerance that lets everything pass leaves the steps of the grid."""
        field, errors = FIELDS["A"], []
        exact, _ = scipy_solution(field, start, 0.1, 0.9, "DOP853", 1e-13)
        for n in (40, 80, 160):
            times = [0.1 + 0.8 * i / n for i in range(n + 1)]
            result = sample(field, start, times, dopri5, rtol=1e3, atol=1e3)
            assert result.nfe == 2 + 6 * n
            errors.append(distance(result.x, exact))
        orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
        assert all(4.7 <= order <= 5.6 for order in orders), orders

    @pytest.mark.parametrize("power", range(5))
    def test_exact_for_velocities_polynomial_in_t(self, power):
        x = torch.full((2,), 2.0, dtype=torch.float64)

        def velocity(x, t):
            return torch.full_like(x, 1 + t**power)

        result = sample(velocity, x, [0, 1], dopri5, rtol=1e3, atol=1e3)
        assert result.nfe == 8
        torch.testing.assert_close(result.x, x + 1 + 1 / (power + 1))

    def test_the_error_estimate_is_of_order_five(self, start):
        """The number of steps grows like the fifth root of 1 / tolerance: 2.5 for two digits."""
        counts = [
            sample(FIELDS["C"], start, [0.1, 0.9], dopri5, rtol=tolerance, atol=tolerance).nfe
            for tolerance in (1e-10, 1e-12)
        ]
        assert 2.1 < counts[1] / counts[0] < 2.7

    @pytest.mark.parametrize("run", [sample, invert])
    def test_lands_on_every_time_and_stays_inside(self, run, start):
        times = [0.0, 0.01, 0.3, 0.3 + 1e-9, 0.77, 1.0]
        velocity = Recorded(FIELDS["A"])
        run(velocity, start, times, dopri5)
        assert set(times) <= set(velocity.times)
        assert min(velocity.times) == 0 and max(velocity.times) == 1

    def test_a_step_cut_short_by_the_grid_costs_that_step_only(self, start):
        free = sample(FIELDS["A"], start, [0, 1], dopri5, rtol=1e-8, atol=1e-8)
        cut = sample(FIELDS["A"], start, [0, 0.5, 0.5 + 1e-9, 1], dopri5, rtol=1e-8, atol=1e-8)
        assert cut.nfe <= free.nfe + 3 * 6
        torch.testing.assert_close(cut.x, free.x, rtol=1e-6, atol=1e-6)

    def test_steps_are_short_where_the_flow_is_fast(self):
        def kink(x, t):
            return -x * 200 * math.exp(-(((t - 0.5) / 0.05) ** 2))

        velocity = Recorded(kink)
        sample(velocity, torch.ones(1, 2, dtype=torch.float64), [0, 1], dopri5)
        near = sum(0.35 <= t <= 0.65 for t in velocity.times)
        assert near / 0.3 > 3 * (len(velocity.times) - near) / 0.7

    def test_time_reversal(self, start):
        """Backwards is the same rule, forwards on the mirrored flow."""
        field = FIELDS["C"]
        back = invert(field, start, [0, 0.25, 1], dopri5)
        forth = sample(lambda x, t: -field(x, 1 - t), start, [0, 0.75, 1], dopri5)
        assert back.nfe == forth.nfe
        torch.testing.assert_close(back.x, forth.x)

    def test_gets_over_a_jump_in_time(self):
        """As guidance makes one where its interval begins and ends: the steps are refined there,
        though the estimate, which expects a smooth flow, is some hundred times too low."""
        x = torch.zeros(1, 4, dtype=torch.float64)

        def velocity(x, t):
            return torch.full_like(x, 1 + 5 * (0.3 < t < 0.6))

        result = sample(velocity, x, [0, 1], dopri5)
        assert (result.x - 2.5).abs().max() < 1e-2
        assert result.nfe < 600

    def test_a_state_at_rest_is_quick(self):
        result = sample(lambda x, t: torch.zeros_like(x), torch.zeros(2, 3), [0, 1], dopri5)
        assert result.nfe < 50
        assert torch.equal(result.x, torch.zeros(2, 3))


class TestBatch:
    def test_the_steps_are_those_of_the_worst_sample(self):
        hard, easy = torch.ones(1, 8), torch.zeros(3, 8)

        def times(x):
            velocity = Recorded(lambda x, t: -20 * x)
            sample(velocity, x, [0, 1], dopri5)
            return velocity.times

        assert times(torch.cat([easy, hard])) == times(hard)
        assert len(times(easy)) < len(times(hard))

    def test_the_size_of_a_sample_does_not_matter(self):
        counts = {
            sample(FIELDS["A"], torch.full((1, size), 0.3), [0, 1], dopri5).nfe
            for size in (1, 100, 10_000)
        }
        assert len(counts) == 1


class TestErrors:
    @pytest.mark.parametrize("options", [{"rtol": 0.0}, {"atol": -1.0}, {"rtol": float("nan")}])
    def test_tolerances(self, options):
        with pytest.raises(FlowkitError, match="rtol and atol must be positive, got"):
            sample(lambda x, t: -x, torch.ones(2), [0, 1], dopri5, **options)

    def test_the_budget_is_never_exceeded(self):
        velocity = Recorded(lambda x, t: -100 * x)
        with pytest.raises(FlowkitError, match=r"got to t=0\.\d+ with max_evaluations=50; allow"):
            sample(velocity, torch.ones(2), [0, 1], dopri5, max_evaluations=50)
        assert 44 < len(velocity.times) <= 50
        needed = sample(velocity, torch.ones(2), [0, 1], dopri5).nfe
        sample(velocity, torch.ones(2), [0, 1], dopri5, max_evaluations=needed)
        with pytest.raises(FlowkitError, match="max_evaluations"):
            sample(velocity, torch.ones(2), [0, 1], dopri5, max_evaluations=needed - 1)

    def test_a_velocity_that_is_not_finite_from_the_start(self):
        with pytest.raises(FlowkitError, match="must be finite, at t=0 they are not"):
            sample(lambda x, t: x / 0, torch.ones(2), [0, 1], dopri5)

    def test_a_velocity_that_is_not_finite_later(self):
        with pytest.raises(FlowkitError, match=r"to nothing at t=0\.5: the velocity is not finite"):
            sample(lambda x, t: x * (1 if t < 0.5 else np.nan), torch.ones(2), [0, 1], dopri5)

    def test_a_state_that_leaves_for_infinity(self):
        """x' = 4 x^2 from 1 is 1 / (1 - 4 t)."""
        with pytest.raises(FlowkitError, match=r"to nothing at t=0\.25"):
            sample(lambda x, t: 4 * x * x, torch.ones(2), [0, 1], dopri5)


def test_is_known_to_be_adaptive():
    assert dopri5 in ADAPTIVE
    times = {}
    for scale in (1.0, 50.0):
        velocity = Recorded(lambda x, t, scale=scale: -scale * x)
        sample(velocity, torch.ones(2), grids.uniform(2), dopri5)
        times[scale] = velocity.times
    assert times[1.0] != times[50.0]
