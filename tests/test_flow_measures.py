"""Straightness against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.eval import straightness

MU, S = 0.7, 0.4


def _gaussian(x_t: Tensor, t: float | Tensor) -> Tensor:
    """The velocity of data N(MU, S^2) and independent noise."""
    g = t * t * S * S + (1 - t) ** 2
    return MU + (t * S * S - (1 - t)) * (x_t - t * MU) / g


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
