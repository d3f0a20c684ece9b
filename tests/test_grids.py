"""Time grids: what each is by definition, what diffusers makes of it, and that it can be used."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy import stats

from flowkit.errors import FlowkitError
from flowkit.samplers import grids, sample
from flowkit.samplers.timesteps import Constant, CosMap, LogitNormal, Shifted, Uniform, UShaped

GRIDS: dict[str, tuple[Callable[[int], list[float]], float]] = {  # with the first time
    "uniform": (grids.uniform, 0),
    "power": (grids.power, 0),
    "from_start": (lambda n: grids.from_start(0.99, n), 0.99),
    "shifted": (lambda n: grids.shifted(n, 0.3), 0),
    "dynamic": (lambda n: grids.dynamic(n, 1.15), 0),
    "edm": (grids.edm, 1 / 81),
    "karras": (grids.karras, 0),
    "log_snr": (grids.log_snr, 0),
    "log_snr, from low": (lambda n: grids.log_snr(n, from_zero=False), 1 / (1 + math.exp(3))),
    "cosine": (grids.cosine, 0),
    "beta": (grids.beta, 0),
    "quantiles": (lambda n: grids.quantiles(n, UShaped()), 0),
}


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 1000])
@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_can_be_sampled_on(name: str, n: int) -> None:
    make, first = GRIDS[name]
    times = make(n)
    assert len(times) == n + 1
    assert all(type(t) is float for t in times)
    assert all(t < s for t, s in pairwise(times))
    assert times[0] == pytest.approx(first, abs=1e-15) and times[-1] == 1
    assert sample(lambda x, t: -x, torch.ones(1), times).nfe == n


def test_uniform() -> None:
    assert grids.uniform(4) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert grids.uniform(1) == [0.0, 1.0]


def test_power_is_uniform_in_a_root_of_the_noise() -> None:
    roots = [(1 - t) ** (1 / 1.5) for t in grids.power(8)]
    assert roots == pytest.approx([1 - u for u in grids.uniform(8)])
    assert grids.power(5, 1.0) == pytest.approx(grids.uniform(5))


def test_from_start() -> None:
    times = grids.from_start(0.2, 4)
    assert times == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert times[0] == 0.2 and times[-1] == 1.0


class TestShift:
    def test_is_diffusers_shift_of_sigma(self) -> None:
        for t, u in zip(grids.shifted(9, 3.0), grids.uniform(9), strict=True):
            sigma = 3 * (1 - u) / (1 + 2 * (1 - u))
            assert 1 - t == pytest.approx(sigma, abs=1e-15)
        assert grids.shifted(5, 1.0) == grids.uniform(5)

    def test_dynamic_is_the_exponential_form_in_sigma(self) -> None:
        mu = 0.83
        for t, u in zip(grids.dynamic(9, mu)[:-1], grids.uniform(9)[:-1], strict=True):
            sigma = math.exp(mu) / (math.exp(mu) + (1 / (1 - u) - 1))
            assert 1 - t == pytest.approx(sigma, abs=1e-15)

    def test_mu_is_flux_s_line(self) -> None:
        assert grids.mu_of_tokens(256) == 0.5
        assert grids.mu_of_tokens(4096) == pytest.approx(1.15)
        assert grids.mu_of_tokens(1024) == pytest.approx(0.63)
        assert grids.mu_of_tokens(30, low=(10, 0.0), high=(20, 1.0)) == 2

    def test_of_the_dimension(self) -> None:
        assert grids.shift_of_dimension(16 * 16 * 768) == pytest.approx(6.928203230275509)
        assert grids.shift_of_dimension(32 * 32 * 768) == pytest.approx(13.856406460551018)
        assert grids.shift_of_dimension(32 * 32 * 4) == 1
        published = {0.1: 0.0157844, 0.25: 0.0459040, 0.5: 0.1261320, 0.75: 0.3021695}
        density = Shifted(Uniform(), grids.shift_of_dimension(196608))
        for t, shifted in published.items():
            assert float(density.quantile(torch.tensor(t))) == pytest.approx(shifted, abs=1e-7)
        assert grids.shifted(4, 6.928203230275509)[2] == pytest.approx(0.1261319836, abs=1e-10)

    def test_shifts_compose_and_keep_the_ends(self) -> None:
        twice = grids.unshifted(grids.unshifted(grids.shifted(7, 6.0), 2.0), 3.0)
        assert twice == pytest.approx(grids.uniform(7), abs=1e-15)
        assert grids.unshifted([0.0, 1.0], 5.0) == [0, 1]

    @pytest.mark.parametrize("shift", [0.2, 1.0, 3.0, 14.0])
    def test_unshifted_undoes_it(self, shift: float) -> None:
        assert grids.unshifted(grids.shifted(9, shift), shift) == pytest.approx(
            grids.uniform(9), abs=1e-15
        )


class TestDiffusers:
    """What FlowMatchEulerDiscreteScheduler does with sigmas."""

    @pytest.mark.parametrize("name", [name for name in GRIDS if name != "from_start"])
    @pytest.mark.parametrize("shift", [1.0, 3.0])
    def test_a_grid_survives_a_static_shift(self, name: str, shift: float) -> None:
        times = GRIDS[name][0](20)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=[1 - t for t in grids.unshifted(times, shift)[:-1]])
        np.testing.assert_allclose(1 - scheduler.sigmas.numpy(), times, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("kind, shift", [("exponential", math.exp(0.9)), ("linear", 0.9)])
    def test_a_grid_survives_a_dynamic_shift(self, kind: str, shift: float) -> None:
        times = grids.beta(20)
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
        sigmas = [1 - t for t in grids.unshifted(times, shift)[:-1]]
        scheduler.set_timesteps(sigmas=sigmas, mu=0.9)
        np.testing.assert_allclose(1 - scheduler.sigmas.numpy(), times, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("tokens", [256, 1024, 4096])
    def test_dynamic_grids_are_flux_s(self, tokens: int) -> None:
        mu = grids.mu_of_tokens(tokens)
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 28, 28), mu=mu)
        np.testing.assert_allclose(
            1 - scheduler.sigmas.numpy(), grids.dynamic(28, mu), rtol=0, atol=1e-6
        )

    def test_beta(self) -> None:
        scheduler = FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True)
        scheduler.set_timesteps(sigmas=np.linspace(1, 0, 13))  # they keep the ends, then append 0
        np.testing.assert_allclose(
            1 - scheduler.sigmas.numpy()[:-1], grids.beta(12), rtol=0, atol=1e-6
        )

    def test_karras(self) -> None:
        scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
        scheduler.set_timesteps(sigmas=np.linspace(0.98, 0.01, 12))
        ours = grids.karras(12, sigma_min=0.01, sigma_max=0.98)
        np.testing.assert_allclose(1 - scheduler.sigmas.numpy(), ours, rtol=0, atol=1e-6)

    def test_log_snr_without_zero_is_uniform_in_log_sigma(self) -> None:
        times = grids.log_snr(12, low=-math.log(80), high=-math.log(0.002), from_zero=False)
        sigmas = [1 / t - 1 for t in times[:-1]]
        np.testing.assert_allclose(sigmas, np.geomspace(80, 0.002, 12), rtol=1e-9)
        limit = grids.edm(12, rho=1e6)  # where the powers of EDM's rule end
        assert times == pytest.approx(limit, abs=1e-5)


def test_edm() -> None:
    times = grids.edm(18)
    assert len(times) == 19
    assert times[0] == pytest.approx(1 / 81)
    assert times[-2] == pytest.approx(0.9980040, abs=1e-7)
    assert times[-1] == 1.0
    roots = [(1 / t - 1) ** (1 / 7) for t in times[:-1]]
    gaps = [a - b for a, b in pairwise(roots)]
    assert max(gaps) - min(gaps) < 1e-12
    assert grids.edm(1) == [pytest.approx(1 / 81), 1.0]


def test_log_snr_steps_are_alike_in_the_logarithm() -> None:
    times = grids.log_snr(10, low=-5.0, high=3.0)
    assert times[0] == 0 and times[-1] == 1
    levels = [math.log(t / (1 - t)) for t in times[1:-1]]
    assert levels == pytest.approx(np.linspace(-5, 3, 9))
    assert grids.log_snr(2, low=-1.0, high=1.0) == [0, 0.5, 1]


def test_cosine_is_chebyshev_s_and_the_arcsine_law_s() -> None:
    times = np.array(grids.cosine(12))
    np.testing.assert_allclose(1 - 2 * times, np.cos(np.pi * np.arange(13) / 12), atol=1e-15)
    np.testing.assert_allclose(times, grids.beta(12, alpha=0.5, beta=0.5), atol=1e-15)


def test_beta_is_scipy_s() -> None:
    expected = stats.beta.ppf(np.linspace(0, 1, 8), 0.7, 1.3)
    np.testing.assert_allclose(grids.beta(7, alpha=0.7, beta=1.3), expected, rtol=1e-12)
    assert grids.beta(5, alpha=1.0, beta=1.0) == pytest.approx(grids.uniform(5))


def test_quantiles_carry_equal_mass() -> None:
    assert grids.quantiles(6, Uniform()) == pytest.approx(grids.uniform(6))
    assert grids.quantiles(6, Shifted(shift=2.5)) == pytest.approx(grids.shifted(6, 2.5))
    for density in (LogitNormal(0.3), CosMap()):
        shares = density.cdf(torch.tensor(grids.quantiles(9, density), dtype=torch.float64))
        torch.testing.assert_close(shares, torch.linspace(0, 1, 10).double())


def test_a_grid_of_the_cosine_schedule() -> None:
    s = np.arange(1, 9) / 9  # the schedule's time, from noise: alpha = sin, sigma = cos
    alpha, sigma = np.sin(np.pi / 2 * s), np.cos(np.pi / 2 * s)
    np.testing.assert_allclose(grids.quantiles(9, CosMap())[1:-1], alpha / (alpha + sigma))


class TestFromList:
    def test_completes_with_one(self) -> None:
        assert grids.from_list([0, 0.25, 0.5]) == [0.0, 0.25, 0.5, 1.0]
        assert grids.from_list([0.1, 1]) == [0.1, 1.0]
        assert grids.from_list([0.1]) == [0.1, 1.0]

    def test_takes_arrays(self) -> None:
        for array in (np.array([0.0, 0.5]), torch.tensor([0.0, 0.5])):
            times = grids.from_list(array)  # type: ignore[arg-type]
            assert times == [0, 0.5, 1] and all(type(t) is float for t in times)

    @pytest.mark.parametrize(
        "times, message",
        [
            ([], r"one or more times in \[0, 1\) and 1, got \[\]"),
            ([1.0], r"got \[1.0\]"),
            ([-0.1, 0.5], "one or more times"),
            ([0.5, 1.2], "one or more times"),
            ([math.nan], "one or more times"),
            ([0.0, 0.5, 0.5], "must increase, got 0.5 then 0.5 at places 1 and 2"),
            ([0.0, 0.7, 0.5, 1.0], "must increase, got 0.7 then 0.5 at places 1 and 2"),
            ([0.0, math.nan, 0.5], "must increase, got 0 then nan"),
            ([1.0, 0.5, 0.0], "these fall like sigmas: give 1 - sigma"),
        ],
    )
    def test_refuses(self, times: list[float], message: str) -> None:
        with pytest.raises(FlowkitError, match=message):
            grids.from_list(times)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: grids.uniform(0), "whole number of steps, at least one, got num_steps=0"),
        (lambda: grids.edm(0), "a whole number of steps"),
        (lambda: grids.power(3, 0.0), "exponent must be positive, got 0.0"),
        (lambda: grids.power(3, 60.0), "too close"),
        (lambda: grids.log_snr(0), "a whole number of steps"),
        (lambda: grids.from_start(1.0, 3), r"\[0, 1\), got 1.0"),
        (lambda: grids.shifted(3, 0.0), "shift must be positive"),
        (lambda: grids.shifted(3, math.nan), "shift must be positive"),
        (lambda: grids.unshifted([0.5], -1.0), "shift must be positive"),
        (lambda: grids.unshifted([0.5, 1.5], 3.0), r"must lie in \[0, 1\], got \[0.5, 1.5\]"),
        (lambda: grids.shift_of_dimension(0), "must be positive, got 0 and 4096"),
        (lambda: grids.edm(3, sigma_min=1.0, sigma_max=0.5), "sigma_min < sigma_max"),
        (lambda: grids.edm(3, rho=0.0), "rho must be positive"),
        (lambda: grids.karras(3, sigma_max=80.0), r"at most 1, got sigma_max=80.0; or use edm\(\)"),
        (lambda: grids.log_snr(3, low=2.0, high=1.0), "needs low < high"),
        (lambda: grids.log_snr(3, low=-math.inf), "both finite"),
        (lambda: grids.beta(3, alpha=0.0), "alpha and beta must be positive"),
        (lambda: grids.log_snr(50, high=60.0), "50 steps of this grid lie too close"),
        (lambda: grids.beta(10, alpha=1e-3, beta=1e-3), "too close"),
        (lambda: grids.shifted(10, 1e-30), "too close"),
        (lambda: grids.quantiles(9, Constant(0.5)), "too close"),
    ],
)
def test_bad_input(make: Callable[[], list[float]], message: str) -> None:
    with pytest.raises(FlowkitError, match=message):
        make()
