"""Full steps of caches that forecast: the error known beforehand, and where it is least."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

from flowkit.analytic import Mixture, normal_quantiles
from flowkit.errors import FlowkitError
from flowkit.samplers import grids, invert, optimal_sharing, sample, taylorseer
from flowkit.samplers.placement import ForecastErrors, forecast_errors
from flowkit.samplers.sharing import sharing_cost

MIXTURE = Mixture((0.4, 0.6), (-0.9, 0.7), (0.3, 0.2))


class Block(nn.Module):
    """Adds a flow's velocity to what it is given."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity

    def forward(self, h, x, t):
        return h + self.velocity(x, t)


class Network(nn.Module):
    """A velocity in one block, which a cache can skip."""

    def __init__(self, velocity):
        super().__init__()
        self.blocks = nn.ModuleList([Block(velocity)])

    def forward(self, x, t):
        return self.blocks[0](torch.zeros_like(x), x, t)


def moving(x, t):
    """A velocity of the time alone, which turns."""
    t = torch.as_tensor(t, dtype=x.dtype)
    turns = torch.arange(1, x[0].numel() + 1).view(x.shape[1:]) * 0.7
    return torch.sin(turns * t + turns).expand_as(x)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_errors(n, order, *, seed=0, width=3):
    """Of a smooth curve in space, on an uneven grid."""
    rng = np.random.default_rng(seed)
    places = np.sort(rng.random(n)) + 0.05 * np.arange(n)
    curve = np.sin(places[:, None] * (1 + 2 * rng.random(width)) + 6 * rng.random(width))
    return ForecastErrors(curve, rng.random((n, 1)) + 0.2, places, order)


def every(n, count):
    return ([0, *rest] for rest in combinations(range(1, n), count - 1))


def even(n, count):
    """Two at the start, then evenly spaced."""
    return [0, *np.linspace(1, n, count, dtype=int)[:-1].tolist()]


# What a choice costs.


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize("steps", [[0], [0, 1, 4, 9, 11], [0, 3, 5, 6, 13]])
def test_cost_is_the_error_of_a_run_whose_velocity_depends_on_time_alone(order, steps):
    x, times, net = noise(2, 3), grids.power(16), Network(moving)
    errors = forecast_errors(net, x, times, order=order)
    with taylorseer(net, steps=steps, order=order):
        cached = sample(net, x, times, "euler").x
    full = sample(net, x, times).x
    want = (cached - sample(net, x, times, "euler").x).norm() / full.norm()
    assert sharing_cost(errors, steps) == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize("order", range(1, 4))
def test_polynomials_of_the_order_cost_nothing_after_as_many_full_steps(order):
    def velocity(x, t):
        return (1 + 2 * t - 3 * t**order) * torch.ones_like(x)

    errors = forecast_errors(velocity, noise(2, 3), grids.power(12), order=order)
    first = list(range(order + 1))
    assert optimal_sharing(errors, order + 1) == first
    assert sharing_cost(errors, first) < 1e-6 < sharing_cost(errors, first[:-1])


@pytest.mark.parametrize("rate", [-2.0, 0.5, 3.0])
def test_errors_count_by_how_much_they_grow_to_the_end(rate):
    times = grids.power(40)
    errors = forecast_errors(lambda x, t: rate * x, noise(2, 3), times)
    growth = np.exp(rate * (1 - np.array(times[:-1])))
    want = np.broadcast_to((np.diff(times) * growth)[:, None], errors.weights.shape)
    np.testing.assert_allclose(errors.weights, want, rtol=5e-3)


def test_velocity_that_stands_still_costs_nothing():
    errors = forecast_errors(lambda x, t: torch.ones_like(x), noise(2, 3), grids.uniform(6))
    assert sharing_cost(errors, [0]) < 1e-7
    assert optimal_sharing(errors, 1) == [0]


def test_one_step_is_computed():
    assert optimal_sharing(forecast_errors(moving, noise(2, 3), [0.0, 1.0]), 1) == [0]


# Where they are placed.


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("count", range(1, 9))
def test_no_choice_is_cheaper_where_errors_point_one_way(order, count):
    """A curve bent upwards: what an order up to 1 forecasts is never too high."""
    places = np.linspace(0, 1, 10) ** 1.3
    curve = np.exp(3 * places)[:, None]
    errors = ForecastErrors(curve, np.diff([*places, 1.1])[:, None], places, order)
    steps = optimal_sharing(errors, count)
    least = min(errors.cost(other) for other in every(10, count))
    assert len(steps) == count and steps[0] == 0
    assert errors.cost(steps) == pytest.approx(least, abs=1e-12)


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize("seed", range(2))
def test_few_choices_are_cheaper_where_errors_may_cancel(order, seed):
    errors = random_errors(10, order, seed=seed)
    for count in (3, 5, 7):
        costs = sorted(errors.cost(other) for other in every(10, count))
        found = errors.cost(optimal_sharing(errors, count))
        assert costs[0] <= found + 1e-12
        assert np.searchsorted(costs, found - 1e-12) <= 0.1 * len(costs)


@pytest.mark.parametrize("order", range(4))
def test_more_steps_cost_less_and_all_nothing(order):
    errors = forecast_errors(MIXTURE, normal_quantiles(8, (8, 1)), grids.power(16), order=order)
    costs = [sharing_cost(errors, optimal_sharing(errors, k)) for k in range(1, 17)]
    assert all(less < more for more, less in zip(costs, costs[2:], strict=False))
    assert costs[-1] == 0 and optimal_sharing(errors, 16) == list(range(16))


def test_placed_steps_err_less_than_even_ones_and_than_fewer_uncached_steps():
    """On other noise than they were placed on."""
    net, times = Network(MIXTURE), grids.power(50)
    x = noise(64, 1, 1, 1, seed=1)
    errors = forecast_errors(net, normal_quantiles(32, (32, 1, 1, 1)), times, order=2)
    true = sample(net, x, grids.power(200), "rk4").x

    def off(steps):
        with taylorseer(net, steps=steps, order=2) as cache:
            found = sample(net, x, times).x
        assert cache.stats.full_steps == list(steps)
        return (found - true).norm() / true.norm()

    placed = off(optimal_sharing(errors, 10))
    uncached = (sample(net, x, grids.power(10)).x - true).norm() / true.norm()
    assert placed < 0.85 * min(off(even(50, 10)), uncached)


def test_steps_of_an_inversion():
    times = grids.power(30)
    data = sample(MIXTURE, normal_quantiles(16, (16, 1, 1, 1)), times).x
    net = Network(MIXTURE)
    errors = forecast_errors(net, data, times[::-1])
    whole = invert(net, data, times).x

    def off(steps):
        with taylorseer(net, steps=steps, order=2):
            return (invert(net, data, times).x - whole).norm()

    assert off(optimal_sharing(errors, 10)) < 0.8 * off(even(30, 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_velocities_of_any_dtype(dtype):
    def velocity(x, t):
        return moving(x.to(dtype), t)

    exact = forecast_errors(moving, noise(2, 3), grids.power(12))
    errors = forecast_errors(velocity, noise(2, 3).float(), grids.power(12))
    steps = optimal_sharing(exact, 5)
    close = 1e-4 if dtype == torch.float32 else 0.2
    assert errors.cost([0, 1]) == pytest.approx(exact.cost([0, 1]), rel=close)
    assert len(optimal_sharing(errors, 5)) == len(steps)


# Bad input.


@pytest.mark.parametrize("count", [0, 7, 2.0, True, None])
def test_count_of_steps_must_fit(count):
    with pytest.raises(FlowkitError, match="K must be a number of steps from 1 to 6"):
        optimal_sharing(random_errors(6, 2), count)


@pytest.mark.parametrize("steps", [[], [1, 2], [0, 6], [0, 3, 1]])
def test_steps_must_increase_from_the_first(steps):
    with pytest.raises(FlowkitError, match="increase from 0 and stay below 6"):
        sharing_cost(random_errors(6, 2), steps)


def test_velocities_must_be_finite():
    with pytest.raises(FlowkitError, match="not finite"):
        forecast_errors(lambda x, t: x / 0, noise(2, 3), grids.uniform(4))


def test_orders_are_the_caches():
    with pytest.raises(FlowkitError, match="order must be 0"):
        forecast_errors(moving, noise(2, 3), grids.uniform(4), order=5)
