"""Inversion and the normality of its noise, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowkit.analytic import Gaussian, normal_quantiles
from flowkit.errors import FlowkitError
from flowkit.eval.inversion import inversion_error, normality
from flowkit.samplers import invert
from flowkit.samplers.grids import uniform

MU, S = 0.7, 0.4
_gaussian = Gaussian(MU, S)


def _pictures(side: int = 12) -> Tensor:
    noise = normal_quantiles(4 * side * side, (4, 1, side, side))
    shuffled = noise.flatten()[torch.randperm(noise.numel(), generator=torch.Generator())]
    return _gaussian.flow(shuffled.reshape(noise.shape).float(), 0, 1).clamp(-1, 1)


def test_an_exact_solver_brings_pictures_back() -> None:
    data, times = _pictures(), uniform(12)
    exact = inversion_error(_gaussian, data, times, "bdia")
    assert exact.rmse < 1e-5 and exact.psnr > 100
    assert exact.ssim == pytest.approx(1, abs=1e-6)
    forgetful = inversion_error(_gaussian, data, times, "bdia", keep_state=False)
    assert forgetful.rmse > 10 * exact.rmse


def test_the_inversion_of_euler_by_hand() -> None:
    """Backwards x - dt v(x, t') with the velocity at the end, forwards with that at the start."""
    data, times = _pictures().double(), [0.0, 0.4, 1.0]
    middle = data - 0.6 * _gaussian(data, 1.0)
    noise = middle - 0.4 * _gaussian(middle, 0.4)
    forth = noise + 0.4 * _gaussian(noise, 0.0)
    forth = forth + 0.6 * _gaussian(forth, 0.4)
    found = inversion_error(_gaussian, data, times, "euler", reference_steps=200)
    assert found.rmse == pytest.approx(float((forth - data).square().mean().sqrt()), rel=1e-12)
    mse = (forth.clamp(-1, 1) - data).square().mean((1, 2, 3))
    assert found.psnr == pytest.approx(float((10 * torch.log10(4 / mse)).mean()), rel=1e-12)
    exact = _gaussian.flow(data, 1, 0)
    assert found.latent_rmse == pytest.approx(float((noise - exact).square().mean().sqrt()), 1e-6)
    assert (found.nfe_inversion, found.nfe_sampling) == (2, 2)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_inversion_error_falls_by_the_order_of_the_solver(solver: str, order: int) -> None:
    data = _pictures().double()
    coarse, fine = (inversion_error(_gaussian, data, uniform(n), solver) for n in (40, 80))
    assert math.log2(coarse.rmse / fine.rmse) > order - 0.2
    assert coarse.psnr < fine.psnr and coarse.latent_rmse is None


def test_inversion_of_small_pictures_and_of_latents() -> None:
    found = inversion_error(_gaussian, _pictures(4), uniform(8), "heun")
    assert found.ssim is None and found.perceptual is None
    found = inversion_error(
        _gaussian, _pictures(4), uniform(8), "heun",
        decode=lambda x: x.repeat_interleave(4, 2).repeat_interleave(4, 3),
        perceptual=lambda a, b: (a - b).abs().mean((1, 2, 3)),
    )  # fmt: skip
    assert found.ssim is not None and 0 < found.perceptual < 1  # type: ignore[operator]


def test_a_gaussian_flow_inverts_to_normal_noise() -> None:
    data = MU + S * torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    noise = invert(_gaussian, data, uniform(64), "rk4").x
    found, root = normality(noise), math.sqrt(noise.numel())
    assert abs(found.mean) < 4 / root and abs(found.std - 1) < 4 * 0.7 / root
    assert abs(found.kurtosis - 3) < 4 * 5 / root and abs(found.correlation) < 4 / root


def test_normality_of_known_numbers() -> None:
    """+-1 in columns: kurtosis 1, each its neighbour's opposite across and its equal down."""
    board = torch.tensor([1.0, -1.0]).repeat(2, 1, 4, 3)
    found = normality(board)
    assert (found.mean, found.std, found.kurtosis) == (0, 1, 1)
    across, down = 4 * 5, 3 * 6
    assert found.correlation == pytest.approx((down - across) / (down + across))
    ramp = normality(torch.arange(5.0)[None])
    assert ramp.correlation == pytest.approx(0.5)  # (2 + 0 + 0 + 2) / 4 over a variance of 2
    with pytest.raises(FlowkitError, match="two numbers"):
        normality(torch.zeros(1, 1))
