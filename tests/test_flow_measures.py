"""Measures of paths and of few steps against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowkit.analytic import Gaussian, normal_quantiles
from flowkit.errors import FlowkitError
from flowkit.eval.flow_measures import acceleration, few_step_gap, path_shape, straightness
from flowkit.samplers.grids import power, uniform

MU, S = 0.7, 0.4
_gaussian = Gaussian(MU, S)
ALONG, ACROSS = torch.tensor([[3.0, 0.0]]).double(), torch.tensor([[0.0, 2.0]]).double()


def test_straight_paths_have_none() -> None:
    target, noise = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    found = straightness(lambda x, t: target - noise, noise, num_steps=7)
    assert abs(found.total) < 1e-12  # although the state is in float32


def test_a_small_bend_survives_float32() -> None:
    """v = c + e cos(2 pi t) has S = e^2 / 2 on any uniform grid of 3 steps or more."""
    bend = 1e-3

    def velocity(x_t: Tensor, t: float | Tensor) -> Tensor:
        slope = 30 + bend * torch.cos(2 * math.pi * torch.as_tensor(t, dtype=torch.float64))
        return slope.to(x_t.dtype).expand_as(x_t)

    noise = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    found = straightness(velocity, noise, num_steps=100)
    assert found.per_dim == pytest.approx(bend**2 / 2, rel=1e-2)  # v itself has 4 digits of it


def test_the_definition_on_a_curved_field() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(50, 2, 4, dtype=torch.float64, generator=generator)
    times = [0.0, 0.1, 0.35, 0.6, 1.0]
    x, slopes = noise, []
    for t, s in zip(times, times[1:], strict=False):
        v = _gaussian(x, t)
        slopes.append((s - t, v))
        x = x + (s - t) * v
    by_hand = sum(dt * ((x - noise) - v).square().flatten(1).sum(1).mean() for dt, v in slopes)
    found = straightness(_gaussian, noise, times=times)
    assert found.total == pytest.approx(float(by_hand), rel=1e-10)
    assert found.per_dim == pytest.approx(found.total / 8, rel=1e-12)
    moved = float((x - noise).square().flatten(1).sum(1).mean())
    assert found.relative == pytest.approx(found.total / moved, rel=1e-10)


def test_a_gaussian_flow_has_a_closed_form() -> None:
    """x_t = t MU + sqrt(g) x_0, so S = int E (S x_0 + MU - x_0 - dx/dt)^2 dt, by quadrature."""
    steps = 4000
    mid = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    root = (mid**2 * S**2 + (1 - mid) ** 2).sqrt()
    slope = (mid * S**2 - (1 - mid)) / root
    exact = float((S - 1 - slope).square().mean())  # E x_0^2 = 1; MU cancels
    levels = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    noise = math.sqrt(2) * torch.erfinv(2 * levels - 1)
    noise = (noise / noise.square().mean().sqrt())[:, None]
    assert straightness(_gaussian, noise, num_steps=2000).total == pytest.approx(exact, rel=2e-3)


def test_the_transport_identity() -> None:
    """E|data - noise|^2 - E|Z_1 - Z_0|^2 = S(Z) + V, with exact v (Liu et al., 2022, eq. 13)."""
    steps = 4000
    mid = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    g = mid**2 * S**2 + (1 - mid) ** 2
    conditional = (
        S**2 + 1 - (mid * S**2 - (1 - mid)) ** 2 / g
    ).mean()  # V: var of data - noise | x_t
    noise = torch.randn(20000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = (noise - noise.mean()) / noise.std(correction=0)
    found = straightness(_gaussian, noise, num_steps=2000).total
    coupled = S**2 + 1 + MU**2
    transported = (S - 1) ** 2 + MU**2
    assert coupled - transported == pytest.approx(found + float(conditional), rel=2e-3)


def test_a_flow_that_stands_still() -> None:
    found = straightness(lambda x, t: 0 * x, torch.ones(4, 2))
    assert found.total == 0 and math.isnan(found.relative)


def test_a_velocity_that_is_not_finite() -> None:
    with pytest.raises(FlowkitError, match="not finite"):
        straightness(lambda x, t: x / t if t else x / 0, torch.ones(4, 2))


def test_times_must_increase() -> None:
    with pytest.raises(FlowkitError, match="times must increase"):
        straightness(_gaussian, torch.zeros(2, 1), times=[1.0, 0.0])


def _bent(bend: Tensor) -> tuple[Callable[[Tensor, float | Tensor], Tensor], Tensor]:
    """x_t = x_0 + t ALONG + t (1 - t) bend, and where it starts."""
    return lambda x, t: ALONG + (1 - 2 * t) * bend, torch.zeros(1, 2, dtype=torch.float64)


def test_the_shape_of_straight_paths() -> None:
    target, noise = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    shape = path_shape(lambda x, t: target - noise, noise, num_steps=7)
    assert shape.curvature.total == pytest.approx(0, abs=1e-12)
    assert shape.length_ratio == pytest.approx(1, abs=1e-12)
    assert shape.turning == 0
    assert shape.speed_ratio == pytest.approx(1, abs=1e-12)


def test_a_field_that_rotates() -> None:
    """Arcs of angle w and radius 1: turning w, L = w, |c| = 2 sin(w / 2), at one speed."""
    w = 1.5
    noise = torch.eye(2, dtype=torch.float64)
    turn = torch.tensor([[0.0, w], [-w, 0.0]], dtype=torch.float64)
    shape = path_shape(lambda x, t: x @ turn, noise, num_steps=4000)
    chord = 2 * math.sin(w / 2)
    assert shape.turning == pytest.approx(w, rel=1e-3)
    assert shape.length_ratio == pytest.approx(w / chord, rel=1e-3)
    assert shape.speed_ratio == pytest.approx(1, rel=1e-3)
    assert shape.straightness.total == pytest.approx(w**2 - chord**2, rel=5e-3)
    assert shape.curvature.total == pytest.approx(shape.straightness.total, rel=1e-4)


def test_a_parabola() -> None:
    """With bend b across c: S = |b|^2 / 3, turning 2 atan(|b| / |c|), L as of any parabola."""
    c, b = 3.0, 2.0
    length = (math.hypot(c, b) + c**2 / b * math.asinh(b / c)) / 2
    shape = path_shape(*_bent(ACROSS), num_steps=4000)
    assert shape.straightness.total == pytest.approx(b**2 / 3, rel=1e-5)
    assert shape.straightness.relative == pytest.approx(b**2 / 3 / c**2, rel=1e-3)
    assert shape.curvature.total == pytest.approx(length**2 - c**2, rel=1e-5)
    assert shape.curvature.per_dim == pytest.approx((length**2 - c**2) / 2, rel=1e-5)
    assert shape.length_ratio == pytest.approx(length / c, rel=1e-5)
    assert shape.turning == pytest.approx(2 * math.atan(b / c), rel=1e-3)
    assert shape.speed_ratio == pytest.approx(math.hypot(c, b) / length, rel=1e-3)


def test_a_change_of_speed_alone_is_not_curvature() -> None:
    shape = path_shape(*_bent(ALONG / 2), num_steps=1000)
    assert shape.straightness.total == pytest.approx(1.5**2 / 3, rel=1e-4)
    assert shape.curvature.total == pytest.approx(0, abs=1e-10)
    assert shape.turning == 0 and shape.length_ratio == pytest.approx(1)
    assert shape.speed_ratio == pytest.approx(1.5, rel=1e-2)


def test_the_shape_does_not_depend_on_the_grid() -> None:
    fine, uneven = (path_shape(*_bent(ACROSS), times=f(3000)) for f in (uniform, power))
    assert fine.straightness.total == pytest.approx(uneven.straightness.total, rel=2e-3)
    assert fine.curvature.total == pytest.approx(uneven.curvature.total, rel=2e-3)
    assert fine.turning == pytest.approx(uneven.turning, rel=2e-3)


def test_small_turns_in_float32() -> None:
    """An angle of 1e-5 is lost to acos, whose argument rounds to 1."""
    bend = ACROSS * 1e-5 * 0.75  # 2 atan(|b| / |c|) = 1e-5
    shape = path_shape(lambda x, t: (ALONG + (1 - 2 * t) * bend).float(), torch.zeros(1, 2))
    assert shape.turning == pytest.approx(1e-5, rel=0.02)


def test_a_path_that_returns() -> None:
    shape = path_shape(lambda x, t: x * 0 + (1.0 if t < 0.5 else -1.0), torch.zeros(1, 1), 10)
    assert shape.length_ratio == math.inf and shape.turning == pytest.approx(math.pi)
    assert math.isinf(shape.curvature.relative)


def test_acceleration_is_exact() -> None:
    velocity, noise = _bent(ACROSS)
    assert torch.equal(acceleration(velocity, noise, 0.3), -2 * ACROSS)
    x_0, t = normal_quantiles(), 0.3
    root = math.sqrt(t**2 * S**2 + (1 - t) ** 2)
    bend = ((1 + S**2) * root**2 - (t * S**2 - (1 - t)) ** 2) / root**3  # sqrt(g)''
    found = acceleration(_gaussian, _gaussian.flow(x_0, 0, t), t)
    torch.testing.assert_close(found, bend * x_0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("ab2", 2), ("rk4", 4)])
def test_the_gap_falls_by_the_order_of_the_solver(solver: str, order: int) -> None:
    noise = normal_quantiles()
    exact = _gaussian.flow(noise, 0, 1)
    gap = few_step_gap(_gaussian, noise, [80, 160, 320], solver=solver, reference=exact)
    assert gap.order == pytest.approx(order, abs=0.2)
    assert gap.nfe == tuple(n * {"heun": 2, "rk4": 4}.get(solver, 1) for n in gap.steps)


def test_the_gap_of_one_euler_step() -> None:
    """x_1 = x_0 + v(x_0, 0) = MU; the solution is MU + S x_0."""
    noise = normal_quantiles()
    gap = few_step_gap(_gaussian, noise, [1], solver="euler")
    assert gap.rmse[0] == pytest.approx(S * float(noise.square().mean().sqrt()), rel=1e-6)
    assert math.isnan(gap.order) and gap.perceptual is None


def test_the_reference_is_solved_if_not_given() -> None:
    noise = normal_quantiles().float()
    given = few_step_gap(_gaussian, noise, [8], reference=_gaussian.flow(noise.double(), 0, 1))
    assert few_step_gap(_gaussian, noise, [8]).rmse == pytest.approx(given.rmse, rel=1e-5)


def test_errors_of_rounding_have_no_order() -> None:
    """On straight paths one step is exact: what differs is float32."""
    target, noise = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    gap = few_step_gap(lambda x, t: target - noise, noise, [1, 2, 4, 8], solver="euler")
    assert max(gap.rmse) < 1e-6 and math.isnan(gap.order)


def test_the_perceptual_gap_is_of_pictures_in_range() -> None:
    gap = few_step_gap(
        _gaussian,
        normal_quantiles(),
        [1, 2],
        solver="euler",
        decode=lambda x: 10 * x,
        perceptual=lambda a, b: (a - b).abs().amax((1, 2, 3)),
    )
    assert gap.perceptual is not None and gap.perceptual[0] == pytest.approx(2)


def test_the_gap_needs_steps_and_finite_results() -> None:
    with pytest.raises(FlowkitError, match="numbers of steps"):
        few_step_gap(_gaussian, normal_quantiles(), [])
    with pytest.raises(FlowkitError, match="not finite"):
        few_step_gap(lambda x, t: x / 0, normal_quantiles(), [1])
