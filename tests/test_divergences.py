"""f-distill's weights: the table of h(r), the ratio off a discriminator, bins of equal mass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flowkit.errors import FlowkitError
from flowkit.samplers.time_density import TimeDensity
from flowkit.samplers.timesteps import density
from flowkit.trainers.divergences import (
    DIVERGENCES,
    density_ratio,
    divergence_weights,
    equal_mass_bins,
    per_bin,
)
from flowkit.trainers.noise_levels import Karras, Middle, noise_levels

F = {  # the divergences themselves, from their definitions
    "rkl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "sf": lambda r: (r + 1) * (0.5 + 0.5 / r).log(),
    "sh": lambda r: 1 - r.sqrt(),
    "jf": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: 1 / r - 1,
}
# h at r = 1/2, 1, 4, worked out by hand
TABLE = {
    "rkl": (1, 1, 1),
    "kl": (0.5, 1, 4),
    "js": (1 / 3, 0.5, 0.8),
    "sf": (2 / 3, 0.5, 0.2),
    "sh": (math.sqrt(0.5) / 4, 0.25, 0.5),
    "jf": (1.5, 2, 5),
    "neyman": (4, 2, 0.5),
}


def test_there_are_seven() -> None:
    assert DIVERGENCES.keys() == F.keys() == TABLE.keys()


@pytest.mark.parametrize("name", TABLE)
def test_h_is_the_second_derivative_times_r_squared(name: str) -> None:
    r = torch.linspace(0.1, 20, 200, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F[name](r).sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r)
    torch.testing.assert_close(DIVERGENCES[name](r), curvature * r.square(), rtol=1e-9, atol=1e-9)
    found = DIVERGENCES[name](torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64))
    expected = torch.tensor(TABLE[name], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("num_bins", [0, 1, 10])
def test_weights_have_mean_one_and_no_constant_matters(
    name: str, num_bins: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    ratio = torch.rand(256, generator=generator) * 19.9 + 0.1
    bins = torch.randint(max(num_bins, 1), (256,), generator=generator)
    weights = divergence_weights(name, ratio, bins, num_bins)
    assert weights.shape == (256,) and bool((weights > 0).all())
    assert weights.mean().item() == pytest.approx(1, abs=1e-4)
    h = DIVERGENCES[name]
    monkeypatch.setitem(DIVERGENCES, name, lambda r: 7 * h(r))
    torch.testing.assert_close(
        divergence_weights(name, ratio, bins, num_bins), weights, rtol=1e-4, atol=0
    )


def test_a_scale_of_the_ratio_that_drifts_with_the_bin_is_taken_out() -> None:
    ratio = torch.tensor([1.0, 3.0, 10.0, 30.0])
    weights = divergence_weights("kl", ratio, torch.tensor([0, 0, 1, 1]), 2)
    torch.testing.assert_close(weights, torch.tensor([0.5, 1.5, 0.5, 1.5]), rtol=1e-5, atol=0)
    means = per_bin(ratio, torch.tensor([0, 0, 1, 1]), 3)
    assert means.tolist() == [2, 2, 20, 20]


def test_an_unknown_divergence_is_named() -> None:
    ratio = torch.ones(4)
    with pytest.raises(FlowkitError, match="unknown divergence 'jss', did you mean 'js'"):
        divergence_weights("jss", ratio, torch.zeros(4, dtype=torch.long), 1)


def test_the_ratio_is_held_and_has_no_gradient() -> None:
    logits = torch.tensor([[0.0], [math.log(2)], [50.0], [-50.0]], requires_grad=True)
    ratio = density_ratio(logits)
    assert not ratio.requires_grad
    torch.testing.assert_close(ratio, torch.tensor([1, 2, 20, 0.1]), rtol=1e-6, atol=0)
    torch.testing.assert_close(  # several heads: the mean of their logits
        density_ratio(torch.tensor([[0.0, math.log(4)]])), torch.tensor([2.0]), rtol=1e-6, atol=0
    )


def test_the_critics_loss_is_least_at_the_ratio_of_two_gaussians() -> None:
    """p = N(0.5, 1), q = N(-0.5, 1.2^2): the loss softplus(C(q)) + softplus(-C(p)), an integral
    here, has no slope in any direction where C = log p/q, and there e^C is the ratio."""
    x = torch.linspace(-14, 14, 20_001, dtype=torch.float64)
    p = torch.exp(-0.5 * (x - 0.5).square()) / math.sqrt(2 * math.pi)
    q = torch.exp(-0.5 * ((x + 0.5) / 1.2).square()) / (1.2 * math.sqrt(2 * math.pi))
    logit = (p / q).log().requires_grad_(True)
    loss = torch.trapezoid(
        q * nn.functional.softplus(logit) + p * nn.functional.softplus(-logit), x
    )
    (slope,) = torch.autograd.grad(loss, logit)
    assert slope.abs().max() < 1e-15
    (other,) = torch.autograd.grad(torch.trapezoid(q * nn.functional.softplus(2 * logit), x), logit)
    assert other.abs().max() > 1e-6  # as it would be elsewhere
    inside = ((p / q) > 0.1) & ((p / q) < 20)
    found = density_ratio(logit[inside, None])
    torch.testing.assert_close(found, (p / q)[inside].float(), rtol=1e-6, atol=0)


DENSITIES = {
    "uniform": density("uniform"),
    "u_shaped": density("u_shaped"),
    "edm": density("edm"),
    "karras": Karras(),
    "middle of karras": Middle(Karras()),
    "middle of uniform": Middle(density("uniform"), 0.1, 0.6),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_bins_hold_equal_mass(name: str) -> None:
    times = DENSITIES[name]
    draws = times.quantile((torch.arange(10_000) + 0.5) / 10_000)
    counts = torch.bincount(equal_mass_bins(times, draws, 10), minlength=10)
    assert len(counts) == 10 and counts.min() >= 990 and counts.max() <= 1010


def test_bins_of_one_width_in_sigma_would_not() -> None:
    sigma = 1 / Karras().quantile((torch.arange(10_000) + 0.5) / 10_000) - 1
    assert ((sigma / 8).long() == 0).float().mean() > 0.6


@pytest.mark.parametrize("name", ["karras", "middle of karras", "middle of uniform"])
def test_densities_agree_with_themselves(name: str) -> None:
    times: TimeDensity = DENSITIES[name]
    u = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    t = times.quantile(u)
    torch.testing.assert_close(times.cdf(t), u, rtol=0, atol=1e-10)
    step = 1e-7
    slope = (times.cdf(t + step) - times.cdf(t - step)) / (2 * step)
    torch.testing.assert_close(times.pdf(t), slope, rtol=1e-4, atol=1e-4)


def test_karras_levels_are_those_of_edms_sampler() -> None:
    grid = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    t = Karras().quantile(torch.arange(18, dtype=torch.float64) / 17)
    torch.testing.assert_close(1 / t - 1, torch.tensor(grid, dtype=torch.float64))


def test_noise_levels_by_name() -> None:
    assert noise_levels("karras", sigma_max=10.0) == Karras(sigma_max=10.0)
    assert noise_levels("uniform") == density("uniform")
    for options, message in [
        ({"name": "karas"}, "karas"),
        ({"name": "karras", "roh": 7.0}, "did you mean 'rho'"),
        ({"name": "karras", "sigma_min": 100.0}, "sigma_min < sigma_max"),
    ]:
        with pytest.raises(FlowkitError, match=message):
            noise_levels(**options)
    with pytest.raises(FlowkitError, match="low < high"):
        Middle(density("uniform"), 0.9, 0.1)
