"""Paths: coefficients, the inverse through the ratio, and the change of path in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from flowkit.errors import FlowkitError
from flowkit.paths import (
    VE,
    Straight,
    VPLinear,
    VPTable,
    data_and_noise,
    denoiser_velocity,
    from_path,
    to_path,
)

MU, S = 0.7, 0.4  # data N(MU, S^2)
TABLE = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0).tolist()
PATHS = {"straight": Straight(), "ve": VE(), "linear": VPLinear(), "table": VPTable(TABLE)}


def gaussian_velocity(x, t):
    return MU + (t * S**2 - (1 - t)) * (x - t * MU) / (t**2 * S**2 + (1 - t) ** 2)


def inner_times(path, n=97):
    """Times of the path from the data end to the noise end, without the ends."""
    noise_end, data_end = path.ends
    return torch.linspace(data_end, noise_end, n + 2, dtype=torch.float64)[1:-1]


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_time_is_the_inverse_of_ratio(path):
    s = inner_times(path)
    torch.testing.assert_close(path.time(path.ratio(s)), s, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_ratio_grows_towards_the_noise_end(path):
    noise_end, data_end = path.ends
    assert path.ratio(noise_end) > path.ratio(data_end)
    assert bool((path.ratio(inner_times(path)).diff() > 0).all())


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_alpha_and_sigma_have_the_path_s_ratio_and_float_means_float64(path):
    s = inner_times(path)
    torch.testing.assert_close(path.sigma(s) / path.alpha(s), path.ratio(s), rtol=1e-12, atol=0)
    middle = float(s[len(s) // 2])
    assert path.alpha(middle).dtype == torch.float64
    assert float(path.alpha(middle)) == pytest.approx(float(path.alpha(s)[len(s) // 2]), rel=1e-14)


def test_straight_path_reaches_both_ends():
    path = Straight()
    assert (float(path.alpha(0.0)), float(path.sigma(0.0))) == (0.0, 1.0)
    assert (float(path.alpha(1.0)), float(path.sigma(1.0))) == (1.0, 0.0)


@pytest.mark.parametrize("s", [1e-5, 1e-3, 0.5, 1.0])
def test_linear_vp_against_its_closed_form(s):
    log_alpha = -0.25 * s**2 * 19.9 - 0.5 * s * 0.1
    path = VPLinear()
    assert float(path.alpha(s)) == pytest.approx(math.exp(log_alpha), rel=1e-12)
    assert float(path.sigma(s)) == pytest.approx(math.sqrt(-math.expm1(2 * log_alpha)), rel=1e-12)


def test_published_ends():
    assert 1 / (1 + float(VPLinear().ratio(1.0))) == pytest.approx(0.006529, abs=5e-7)
    assert [1 / (1 + s) for s in VE().ends] == pytest.approx([1 / 81, 0.9980040], abs=5e-8)


def test_table_is_exact_at_its_indices_and_monotone_between():
    path = VPTable(TABLE)
    index = torch.arange(1000, dtype=torch.float64)
    table = torch.tensor(TABLE, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(index).square(), table, rtol=1e-12, atol=0)
    torch.testing.assert_close(path.sigma(index).square(), 1 - table, rtol=1e-12, atol=0)
    torch.testing.assert_close(path.time(path.ratio(index)), index, rtol=0, atol=1e-9)
    fine = path.ratio(torch.linspace(0, 999, 20_000, dtype=torch.float64))
    assert bool((fine.diff() > 0).all())


def test_table_keeps_the_time_inside_and_passes_gradients():
    path = VPTable(TABLE)
    assert [float(path.time(r)) for r in (1e-9, 1e9)] == [0.0, 999.0]
    ratio = torch.tensor([0.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(path.time, ratio)


def test_zero_terminal_snr_is_held_at_diffusers_floor():
    path = VPTable([0.9, 0.5, 0.0])
    assert float(path.alpha(2.0)) == pytest.approx(2**-12)


@pytest.mark.parametrize(
    "table", [[0.5], [0.5, 0.9], [1.0, 0.5], [0.5, 0.5], [[0.5, 0.4]], [0.5, float("nan")]]
)
def test_table_refuses_what_is_no_table(table):
    with pytest.raises(FlowkitError, match="alphas_cumprod"):
        VPTable(table)


def test_ranges_are_checked():
    with pytest.raises(FlowkitError, match="sigma_min"):
        VE(80.0, 0.002)
    with pytest.raises(FlowkitError, match="beta_min"):
        VPLinear(20.0, 0.1)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_point_goes_to_the_path_and_back(path):
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator)
    t = torch.tensor([0.1, 0.3, 0.6, 0.95], dtype=torch.float64)
    x_t = (1 - t[:, None]) * noise + t[:, None] * data
    y, s = to_path(path, x_t, t)
    on_path = path.alpha(s)[:, None] * data + path.sigma(s)[:, None] * noise
    torch.testing.assert_close(y, on_path, rtol=1e-10, atol=1e-10)
    back, times = from_path(path, y, s)
    torch.testing.assert_close(back, x_t, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(times, t, rtol=1e-10, atol=0)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("t", [0.1, 0.5, 0.98])
def test_denoiser_of_any_path_is_the_exact_velocity(path, t):
    def denoiser(y, s):
        a, b = path.alpha(s)[:, None], path.sigma(s)[:, None]
        return MU + a * S**2 / (a**2 * S**2 + b**2) * (y - a * MU)

    x = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3)
    v = denoiser_velocity(denoiser, path)(x, t)
    torch.testing.assert_close(v, gaussian_velocity(x, t), rtol=0, atol=1e-10)


@pytest.mark.parametrize("alpha, sigma", [(0.6, 0.8), (1.0, 7.0)])
def test_predictions_are_the_same_data_and_noise(alpha, sigma):
    data, noise = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a, b = (torch.tensor(c, dtype=torch.float64) for c in (alpha, sigma))
    outputs = {"epsilon": noise, "sample": data, "v_prediction": a * noise - b * data}
    for prediction, output in outputs.items():
        got = data_and_noise(prediction, a * data + b * noise, output, a, b)
        torch.testing.assert_close(got, (data, noise), rtol=1e-12, atol=1e-12)


def test_unknown_prediction_is_named():
    one = torch.ones(())
    with pytest.raises(FlowkitError, match="'score'"):
        data_and_noise("score", one, one, one, one)
