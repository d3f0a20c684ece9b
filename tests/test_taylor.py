"""Forecasts and schedules of the feature caches, as mathematics."""

from __future__ import annotations

import math

import pytest
import torch

from flowkit.errors import FlowkitError
from flowkit.samplers.forecast import (
    History,
    Rule,
    Schedule,
    combine,
    newton_weights,
    official_weights,
)


def polynomial(degree, seed=0):
    """A random feature (2, 3) of t, of a degree."""
    generator = torch.Generator().manual_seed(seed)
    terms = torch.randn(degree + 1, 2, 3, dtype=torch.float64, generator=generator)
    return lambda t: sum(c * t**k for k, c in enumerate(terms))


def kept(rule, feature, nodes):
    history = History(rule)
    for t in nodes:
        history.add(t, feature(t))
    return history


# Which steps are computed.


@pytest.mark.parametrize(
    "interval, warmup, expected",
    [
        (6, 3, [0, 1, *range(2, 50, 6)]),  # Flux, the paper's 4.99 times
        (5, 1, list(range(0, 50, 5))),  # HunyuanVideo and Wan, 5.00
        (4, 2, [0, *range(1, 50, 4)]),  # DiT, 3.57
    ],
)
def test_full_steps_are_the_papers(interval, warmup, expected):
    full = Schedule(interval, warmup).full_steps(50)
    assert full == expected
    assert len(full) == {6: 10, 5: 10, 4: 14}[interval]


def test_the_last_step_and_chosen_steps():
    assert Schedule(4, 2, last=True).full_steps(12) == [0, 1, 5, 9, 11]
    assert Schedule(4, 2, steps={0, 3, 7}).full_steps(12) == [0, 3, 7]
    assert Schedule(None, 2).full_steps(12) == [0, 1]
    assert Schedule(1, 1).full_steps(5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"interval": 0}, "interval must be a whole number from 1 on, got 0"),
        ({"warmup": 0}, "warmup must be"),
        ({"interval": 2.5}, "interval must be"),
        ({"steps": {1, 2}}, r"steps must hold 0.*\[1, 2\]"),
    ],
)
def test_schedules_that_make_no_sense(options, message):
    with pytest.raises(FlowkitError, match=message):
        Schedule(**options)


# The forecasts.


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("nodes", [[0, 1, 2, 3, 4, 5], [0.0, 0.05, 0.3, 0.35, 0.6, 0.62]])
def test_newton_is_exact_up_to_its_order_on_any_grid(order, nodes):
    feature = polynomial(order)
    history = kept(Rule(order), feature, nodes)
    at = nodes[-1] + 0.3
    torch.testing.assert_close(history.forecast(at), feature(at), rtol=1e-10, atol=1e-10)
    beyond = polynomial(order + 1)
    error = kept(Rule(order), beyond, nodes).forecast(at) - beyond(at)
    assert error.abs().max() > 1e-4


@pytest.mark.parametrize("mode", ["newton", "official"])
def test_order_1_is_exact_on_linear_features_after_two_full_steps(mode):
    feature = polynomial(1)
    history = kept(Rule(1, mode), feature, [0, 5])
    for k in range(1, 5):
        torch.testing.assert_close(history.forecast(5 + k), feature(5 + k))


def test_newton_is_the_sum_of_divided_differences():
    nodes, values, at = (0.7, 0.4, 0.1), [3.0, -1.0, 2.0], 0.95
    first = [(values[0] - values[1]) / 0.3, (values[1] - values[2]) / 0.3]
    second = (first[0] - first[1]) / 0.6
    expected = values[0] + first[0] * 0.25 + second * 0.25 * 0.55
    got = sum(w * f for w, f in zip(newton_weights(nodes, at), values, strict=True))
    assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_official_rule_errs_by_k_q_on_a_square(order, k):
    gap, square = 5, lambda j: torch.tensor([float(j * j)], dtype=torch.float64)
    history = kept(Rule(order, "official"), square, range(0, 21, gap))
    error = history.forecast(20 + k).item() - (20 + k) ** 2
    assert error == pytest.approx(-k * gap)


def official_ladder(features, full, order, warmup, at):
    """The papers' recursion, on tensors, as they state it."""
    factors = {}
    for n, j in enumerate(full):
        new = {0: features(j)}
        for i in range(order):
            if i in factors and j > warmup - 2:
                new[i + 1] = (new[i] - factors[i]) / (j - full[n - 1])
        factors = new
    k = at - full[-1]
    return sum(b * k**i / math.factorial(i) for i, b in factors.items())


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("interval, warmup", [(6, 3), (5, 1), (4, 2), (3, 5)])
def test_the_official_rule_is_the_papers_recursion(order, interval, warmup):
    feature, full = polynomial(3), []
    history = History(Rule(order, "official", warmup))
    for j in range(30):
        if Schedule(interval, warmup).is_full(j):
            history.add(float(j), feature(j))
            full.append(j)
        else:
            expected = official_ladder(feature, full, order, warmup, j)
            torch.testing.assert_close(history.forecast(float(j)), expected)


@pytest.mark.parametrize("weights", [newton_weights, official_weights])
def test_weights_add_up_to_one(weights):
    for count in range(1, 6):
        nodes = tuple(float(-j * j - j) for j in range(count))
        assert math.fsum(weights(nodes, 3.0)) == pytest.approx(1, rel=1e-12)


def test_order_0_gives_back_the_last_value_as_a_tensor_of_its_own():
    history = kept(Rule(0), polynomial(2), [0.0, 0.2])
    forecast = history.forecast(0.9)
    assert torch.equal(forecast, polynomial(2)(0.2))
    forecast.zero_()
    assert history.values[0].abs().sum() > 0


@pytest.mark.parametrize("count", [2, 3, 5])
def test_bf16_features_are_combined_in_float32(count):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(1000, generator=generator).bfloat16() for _ in range(count)]
    weights = newton_weights(tuple(float(-j) for j in range(count)), 4.0)
    exact = sum(w * v.double() for w, v in zip(weights, values, strict=True))
    forecast = combine(weights, values)
    assert forecast.dtype == torch.bfloat16
    # One rounding of the result; rounded differences would err by a multiple of it.
    assert ((forecast.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()


# What is kept.


def test_a_history_keeps_as_many_values_as_its_order_needs():
    history = kept(Rule(2), polynomial(1), [0.0, 0.1, 0.2, 0.3])
    assert history.nodes == (0.3, 0.2, 0.1)
    assert history.nbytes == 3 * 6 * 8
    history.add(0.3, polynomial(1)(0.5))  # the same place once more: no division by zero
    assert history.nodes == (0.3, 0.2, 0.1)
    assert torch.equal(history.forecast(0.3), polynomial(1)(0.5))


def test_a_value_of_another_shape_starts_anew():
    history = kept(Rule(1), polynomial(1), [0.0, 0.1])
    history.add(0.2, torch.ones(4))
    assert history.nodes == (0.2,)
    assert torch.equal(history.forecast(0.5), torch.ones(4))


def test_values_may_be_kept_on_another_device():
    feature = polynomial(1)
    history = History(Rule(1), device="cpu")
    for t in (0.0, 0.5):
        history.add(t, feature(t))
    torch.testing.assert_close(history.forecast(1.0, torch.device("cpu")), feature(1.0))


@pytest.mark.parametrize(
    "options, message",
    [({"order": 5}, "order must be 0"), ({"order": -1}, "order must"), ({"mode": "x"}, "newton")],
)
def test_rules_that_do_not_exist(options, message):
    with pytest.raises(FlowkitError, match=message):
        Rule(**options)
