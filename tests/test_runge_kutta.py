"""Runge-Kutta solvers: orders on flows with known solutions, errors, round trips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from flowkit.analytic import Gaussian, Mixture, normal_quantiles
from flowkit.samplers import grids, invert, sample

MIXTURES = {
    "A": Mixture((0.4, 0.6), (-0.9, 0.7), (0.3, 0.2)),
    "C": Mixture((0.2, 0.5, 0.3), (-1.2, 0.1, 1.1), (0.2, 0.3, 0.15)),
}


def interval(n: int, a: float, b: float) -> list[float]:
    return [a + (b - a) * i / n for i in range(n + 1)]


def orders(errors: Sequence[float]) -> list[float]:
    """Measured between runs that double the number of steps."""
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


@pytest.fixture(scope="module")
def start() -> Tensor:
    return normal_quantiles()


@pytest.fixture(scope="module")
def solutions(start: Tensor) -> dict[str, Tensor]:
    return {m: sample(MIXTURES[m], start, grids.uniform(1000), solver="rk4").x for m in MIXTURES}


@pytest.mark.parametrize(
    "solver, low, high",
    [
        ("euler", 0.95, 1.05),
        ("heun", 1.9, 2.1),
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


@pytest.mark.parametrize("solver", ["midpoint", "rf_solver", "heun"])
def test_order_two_on_a_mixture(solver: str, start: Tensor) -> None:
    field = MIXTURES["A"]
    exact = sample(field, start, interval(1000, 0.1, 0.9), solver="rk4").x
    errors = [
        (sample(field, start, interval(n, 0.1, 0.9), solver=solver).x - exact).abs().max().item()
        for n in (80, 160, 320)
    ]
    assert all(1.8 <= order <= 2.3 for order in orders(errors)), orders(errors)


def test_rf_solver_s_taylor_step_is_the_midpoint_rule(start: Tensor) -> None:
    """x + h v + h^2/2 v', with v' from the difference of two velocities half a step apart."""
    field, x, times = MIXTURES["A"], start, grids.uniform(8)
    for t, s in pairwise(times):
        h, v = s - t, field(x, t)
        slope = (field(x + h / 2 * v, t + h / 2) - v) / (h / 2)
        x = x + h * v + h * h / 2 * slope
    found = sample(field, start, times, solver="rf_solver")
    assert found.nfe == 16
    torch.testing.assert_close(found.x, x, rtol=0, atol=1e-12)


# Root mean square errors on [0, 1] against 1000 steps of RK4; evaluations -> error.
CALIBRATED = {
    ("A", "midpoint"): {4: 0.1504, 10: 0.0126, 20: 0.0029},
    ("A", "heun"): {4: 0.1948, 10: 0.0182, 20: 0.0059},
    ("C", "midpoint"): {4: 0.1185, 10: 0.0150, 20: 0.0032},
    ("C", "heun"): {4: 0.1358, 10: 0.0299, 20: 0.0075},
}


@pytest.mark.parametrize("name, solver", CALIBRATED)
def test_errors_on_mixtures(
    name: str, solver: str, start: Tensor, solutions: dict[str, Tensor]
) -> None:
    for nfe, expected in CALIBRATED[name, solver].items():
        result = sample(MIXTURES[name], start, grids.uniform(nfe // 2), solver=solver)
        error = (result.x - solutions[name]).square().mean().sqrt().item()
        assert result.nfe == nfe
        assert error == pytest.approx(expected, abs=5.1e-5)


@pytest.mark.parametrize("solver, low, high", [("midpoint", 2.8, 3.2), ("euler", 0.9, 1.1)])
def test_round_trip(solver: str, low: float, high: float, start: Tensor) -> None:
    field = MIXTURES["A"]
    errors = []
    for n in (80, 160, 320):
        times = interval(n, 0.1, 0.9)
        data = sample(field, start, times, solver=solver).x
        errors.append((invert(field, data, times, solver=solver).x - start).abs().max().item())
    assert all(low <= order <= high for order in orders(errors)), orders(errors)


@pytest.mark.parametrize("solver, power", [("euler", 0), ("midpoint", 1), ("heun", 1), ("rk4", 3)])
def test_exact_for_velocities_polynomial_in_t(solver: str, power: int) -> None:
    x, times = torch.zeros(3, dtype=torch.float64), [0.0, 0.1, 0.45, 0.5, 1.0]
    found = sample(lambda x, t: torch.full_like(x, t**power), x, times, solver=solver)
    torch.testing.assert_close(found.x, torch.full_like(x, 1 / (power + 1)))
    assert found.nfe == {"euler": 4, "midpoint": 8, "heun": 8, "rk4": 16}[solver]
