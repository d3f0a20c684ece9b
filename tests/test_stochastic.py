"""Stochastic solvers: Heun in EDM's variables, the SDE's marginals, and whose noise is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from torch import Tensor

from flowkit.analytic import Gaussian, Mixture, normal_quantiles
from flowkit.errors import FlowkitError
from flowkit.noise import keyed_noise
from flowkit.samplers import evaluation_times, grids, invert, sample
from flowkit.samplers.evaluations import per_sample
from flowkit.samplers.exact import ddim
from flowkit.samplers.solve import Step
from flowkit.samplers.stochastic import edm_heun, sde
from flowkit.velocity import to_score

A = Mixture((0.4, 0.6), (-0.9, 0.7), (0.3, 0.2))
DRAWING = [
    pytest.param(sde, {}, id="sde"),
    pytest.param(edm_heun, {"s_churn": 5.0}, id="edm_heun"),
    pytest.param(ddim, {"eta": 1.0}, id="ddim"),
]


def interval(n: int, a: float, b: float) -> list[float]:
    return [a + (b - a) * i / n for i in range(n + 1)]


def orders(errors: Sequence[float]) -> list[float]:
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


def gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def moments(solver: Any, times: Sequence[float], **options: Any) -> tuple[float, float]:
    """The exact mean and variance of what a solver makes of Gaussian data N(0.7, 0.4^2).

    The velocity is affine, so the end is affine in the start and in every draw: sample 0 has none
    of them, sample 1 one standard deviation of the start, sample 2 + k one of draw k.
    """
    field, t = Gaussian(0.7, 0.4), times[0]
    x = torch.full((len(times) + 1, 1), 0.7 * t, dtype=torch.float64)
    x[1] += math.hypot(0.4 * t, 1 - t)

    def draw(x: Tensor, k: int) -> Tensor:
        return torch.eye(len(x), dtype=torch.float64)[2 + k, :, None]

    mean, *ends = sample(field, x, times, solver, draw=draw, **options).x[:, 0].tolist()
    return mean, sum((end - mean) ** 2 for end in ends)


@pytest.fixture(scope="module")
def start() -> Tensor:
    return normal_quantiles()


def in_edm_s_variables(
    x: Tensor, times: Sequence[float], s_churn: float, s_min: float, s_max: float, s_noise: float
) -> Tensor:
    """Algorithm 2 of Karras et al. on mixture A, with the draws of seed 0."""
    sigmas, draw = [(1 - t) / t for t in times], per_sample(0)

    def slope(z: Tensor, sigma: float) -> Tensor:
        t = 1 / (1 + sigma)
        denoised = z * t + (1 - t) * A(z * t, t)
        return (z - denoised) / sigma

    z = x / times[0]
    for k, (sigma, after) in enumerate(pairwise(sigmas)):
        if s_min <= sigma <= s_max:
            hat = sigma * (1 + min(s_churn / (len(times) - 1), 2**0.5 - 1))
            z = z + (hat**2 - sigma**2) ** 0.5 * s_noise * draw(z, k)
            sigma = hat
        d = slope(z, sigma)
        z_after = z + (after - sigma) * d
        if after > 0:
            z_after = z + (after - sigma) * 0.5 * (d + slope(z_after, after))
        z = z_after
    return z


class TestEdmHeun:
    @pytest.mark.parametrize(
        "options",
        [
            {"s_churn": 0.0, "s_min": 0.0, "s_max": math.inf, "s_noise": 1.0},
            {"s_churn": 4.0, "s_min": 0.0, "s_max": math.inf, "s_noise": 1.003},
            {"s_churn": 40.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003},
        ],
    )
    def test_is_the_paper_s_algorithm(self, options: Any, start: Tensor) -> None:
        times = grids.edm(18)
        noise = (1 - times[0]) * start
        found = sample(A, noise, times, edm_heun, **options)
        direct = in_edm_s_variables(noise, times, **options)
        torch.testing.assert_close(found.x, direct, rtol=0, atol=1e-11)
        assert found.nfe == 35

    @pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
    def test_is_diffusers_heun_in_sigma(self, start: Tensor) -> None:
        scheduler = HeunDiscreteScheduler(use_karras_sigmas=True, timestep_spacing="trailing")
        scheduler.set_timesteps(10)
        # Each inner sigma stands there twice, for the two stages.
        sigmas = [scheduler.sigmas[0].item(), *scheduler.sigmas[1:-1:2].tolist(), 0.0]
        times = [1 / (1 + sigma) for sigma in sigmas]
        z = start / times[0]
        for step, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
            t = 1 / (1 + sigma.item())
            epsilon = z * t - t * A(z * t, t)
            z = scheduler.step(epsilon, step, z).prev_sample
        found = sample(A, start, times, edm_heun)
        assert found.nfe == len(scheduler.timesteps) == 19
        torch.testing.assert_close(found.x, z, rtol=0, atol=5e-5)

    def test_order_two(self, start: Tensor) -> None:
        for field in (Gaussian(), A):
            exact = sample(field, start, interval(200, 0.1, 0.9), "rk4").x
            for run, first, last in ((sample, start, exact), (invert, exact, start)):
                errors = [
                    gap(run(field, first, interval(n, 0.1, 0.9), edm_heun).x, last)
                    for n in (20, 40, 80)
                ]
                assert all(1.9 <= order <= 2.15 for order in orders(errors)), orders(errors)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_from_end_to_end(self, dtype: torch.dtype, start: Tensor) -> None:
        """The steps that touch 0 and 1 are Euler's: one evaluation each."""
        field, times = Gaussian(), grids.uniform(50)
        data = sample(field, start.to(dtype), times, edm_heun)
        assert (data.nfe, data.x.dtype) == (2 * 50 - 2, dtype)
        assert gap(data.x, field.flow(start, 0.0, 1.0)) < 2e-3
        back = invert(field, data.x, times, edm_heun)
        assert (back.nfe, back.x.dtype) == (2 * 50 - 2, dtype)
        assert gap(back.x, start) < 1e-2

    def test_one_and_two_steps_from_zero_are_euler_s(self, start: Tensor) -> None:
        for n in (1, 2):
            euler = sample(A, start, grids.uniform(n), "euler").x
            assert torch.equal(sample(A, start, grids.uniform(n), edm_heun).x, euler)

    def test_churn_keeps_the_distribution(self) -> None:
        """The variance is right in the limit; too much of it shows as too much noise."""
        for churn in (2.0, 20.0):
            errors = []
            for n in (40, 80, 160):
                mean, variance = moments(edm_heun, grids.edm(n), s_churn=churn, s_noise=1.0)
                assert mean == pytest.approx(0.7, abs=1e-12)
                errors.append(abs(variance - 0.16))
            assert errors[2] < errors[1] < errors[0] < 0.02
            assert errors[2] < 0.002
        _, louder = moments(edm_heun, grids.edm(160), s_churn=20.0, s_noise=1.1)
        assert louder > 0.16 + 0.005

    def test_evaluates_where_churn_has_raised_sigma(self) -> None:
        times = [0.2, 0.5, 0.8, 1.0]  # sigma 4, 1, 0.25, 0
        seen = evaluation_times(edm_heun, times, s_churn=0.75, s_min=0.5, s_max=2.0)
        raised = 1 / (1 + 1.25 * 1.0)
        assert seen == pytest.approx([0.2, 0.5, raised, 0.8, 0.8])
        assert seen[0] == 0.2 and seen[3] == seen[4] == 0.8
        # The most that a step may raise it is a factor sqrt(2).
        most = evaluation_times(edm_heun, times, s_churn=1e9, s_min=0.5, s_max=2.0)
        assert most[2] == pytest.approx(1 / (1 + 2**0.5))
        assert evaluation_times(edm_heun, times) == [0.2, 0.5, 0.5, 0.8, 0.8]
        # At t = 0 there is nothing to raise.
        assert evaluation_times(edm_heun, [0.0, 0.5, 1.0], s_churn=9.0, s_min=2.0)[0] == 0.0

    def test_a_callback_sees_boundaries_and_no_stages(self) -> None:
        times = grids.edm(6)
        for options, boundaries in (
            ({}, times),
            ({"s_churn": 3.0}, times[-1:]),
            ({"s_churn": 3.0, "s_max": 1.0}, [*times[:3], times[-1]]),  # sigma above 1
        ):
            steps: list[Step] = []
            start = torch.ones(2)
            end = sample(A, start, times, edm_heun, callback=steps.append, **options).x
            assert [step.t for step in steps] == boundaries
            assert torch.equal(steps[-1].x, end)
            if len(steps) > 1:
                assert torch.equal(steps[2].x, sample(A, start, times[:3], edm_heun).x)

    def test_an_edit_at_a_boundary_is_kept(self) -> None:
        def hold(step: Step) -> Tensor:
            return torch.stack([torch.tensor(0.25 * step.t), step.x[1]])

        times = grids.edm(6)
        x = sample(A, torch.ones(2), times, edm_heun, callback=hold).x
        assert x[0] == 0.25
        torch.testing.assert_close(x[1], sample(A, torch.ones(2), times, edm_heun).x[1])

    @pytest.mark.parametrize(
        "options",
        [
            {"s_churn": -1.0},
            {"s_churn": math.inf},
            {"s_min": 2.0, "s_max": 1.0},
            {"s_noise": -0.1},
            {"s_churn": math.nan},
        ],
    )
    def test_bad_options(self, options: Any) -> None:
        with pytest.raises(FlowkitError, match="edm_heun needs s_churn >= 0, .* got s_churn="):
            sample(A, torch.zeros(2), grids.edm(3), edm_heun, **options)

    def test_churn_is_not_inverted(self) -> None:
        with pytest.raises(FlowkitError, match="cannot invert with s_churn=5.0: .* set s_churn=0"):
            invert(A, torch.zeros(2), grids.edm(3), edm_heun, s_churn=5.0)


class TestSde:
    def test_a_step_has_the_drift_and_the_noise_of_the_equation(self, start: Tensor) -> None:
        t, h = 0.4, 1e-3
        v = A(start, t)
        for options, w in (
            ({}, 0.6),
            ({"diffusion_norm": 3.0}, 1.8),
            ({"diffusion": lambda t: (1 - t) / t}, 1.5),
            ({"diffusion": lambda t: 1.0, "diffusion_norm": 0.5}, 0.5),
        ):
            mean, one = (
                sample(A, start, [t, t + h], sde, draw=lambda x, k, c=c: c + 0 * x, **options).x
                for c in (0.0, 1.0)
            )
            torch.testing.assert_close((mean - start) / h, v + w * to_score(start, v, t))
            torch.testing.assert_close((one - mean) ** 2 / h, torch.full_like(v, 2 * w))

    @pytest.mark.parametrize(
        "options, first",
        [
            ({}, 0.0),
            ({"diffusion_norm": 0.3}, 0.0),
            ({"diffusion_norm": 4.0}, 0.0),
            ({"diffusion": lambda t: (1 - t) / t}, 0.5),
            ({"diffusion": lambda t: math.sin(math.pi * t) ** 2}, 0.0),
        ],
    )
    def test_keeps_mean_and_variance_to_order_one(self, options: Any, first: float) -> None:
        errors = []
        for n in (80, 160, 320):
            mean, variance = moments(sde, grids.from_start(first, n), **options)
            assert mean == pytest.approx(0.7, abs=1e-12)
            errors.append(abs(variance - 0.16))
        assert errors[-1] < 0.002
        assert all(0.85 <= order <= 1.2 for order in orders(errors)), orders(errors)

    def test_samples_a_mixture(self) -> None:
        noise = keyed_noise(0, range(400), (10,)).double()
        x = sample(A, noise, grids.uniform(60), sde).x
        assert x.mean().item() == pytest.approx(0.06, abs=0.045)  # 3.5 standard errors
        assert (x > 0).double().mean().item() == pytest.approx(0.6, abs=0.03)
        assert x[x > 0].std().item() == pytest.approx(0.2, abs=0.015)
        assert x[x < 0].std().item() == pytest.approx(0.3, abs=0.02)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_without_diffusion_is_euler(self, dtype: torch.dtype, start: Tensor) -> None:
        for times in (grids.uniform(9), grids.edm(9)):
            euler = sample(A, start.to(dtype), times, "euler").x
            assert torch.equal(sample(A, start.to(dtype), times, sde, diffusion_norm=0.0).x, euler)

    def test_forgets_the_start(self) -> None:
        """With the same draws, two starts end nearer to each other than the flow takes them."""
        field, times = Gaussian(), grids.uniform(100)
        starts = torch.tensor([[-1.0], [1.0]])
        apart = [
            sample(field, starts, times, sde, diffusion_norm=norm, draw=per_sample(0, [0, 0])).x
            for norm in (0.0, 1.0, 4.0)
        ]
        spread = [(x[1] - x[0]).item() for x in apart]
        assert spread[0] > 0.75
        assert 0 < spread[1] < 0.5 * spread[0]
        assert 0 < spread[2] < 0.5 * spread[1]

    @pytest.mark.parametrize("make", [grids.uniform, grids.edm])
    @pytest.mark.parametrize("n", [1, 2, 5, 20])
    def test_ends_on_the_data(self, make: Any, n: int, start: Tensor) -> None:
        """With a perfect prediction of one picture: no noise is left over from the last steps."""
        picture = torch.full_like(start, 0.25)
        times = make(n)
        found = sample(lambda x, t: (picture - x) / (1 - t), start, times, sde).x
        torch.testing.assert_close(found, picture)

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"diffusion_norm": -1.0}, "finite and >= 0, got -1.0 at t=0"),
            ({"diffusion_norm": math.nan}, "finite and >= 0, got nan"),
            ({"diffusion": lambda t: 0.25 - t}, r"finite and >= 0, got -0.25 at t=0.5"),
            ({"diffusion": lambda t: math.inf}, "got inf at t=0"),
        ],
    )
    def test_bad_diffusion(self, options: Any, message: str) -> None:
        with pytest.raises(FlowkitError, match=message):
            sample(A, torch.zeros(2), grids.uniform(2), sde, **options)

    def test_refuses_to_invert(self) -> None:
        with pytest.raises(FlowkitError, match="'sde' cannot invert: it draws noise"):
            invert(A, torch.zeros(2), grids.uniform(2), sde)


class TestDraws:
    @pytest.mark.parametrize("solver, options", DRAWING)
    def test_depend_on_seed_and_sample_alone(self, solver: Any, options: Any) -> None:
        noise, times = keyed_noise(0, range(5), (2, 3)), grids.edm(8)
        whole = sample(A, noise, times, solver, **options).x
        assert torch.equal(sample(A, noise, times, solver, **options).x, whole)
        seeded = sample(A, noise, times, solver, draw=per_sample(0), **options).x
        assert torch.equal(seeded, whole)
        other = sample(A, noise, times, solver, draw=per_sample(1), **options).x
        assert gap(other, whole) > 1e-2
        pair = sample(A, noise[[3, 1]], times, solver, draw=per_sample(0, [3, 1]), **options).x
        torch.testing.assert_close(pair, whole[[3, 1]])

    @pytest.mark.parametrize("solver, options", DRAWING)
    def test_are_all_different(self, solver: Any, options: Any) -> None:
        drawn: list[int] = []

        def draw(x: Tensor, k: int) -> Tensor:
            drawn.append(k)
            return torch.zeros_like(x)

        result = sample(A, torch.ones(2, 1), grids.edm(8), solver, draw=draw, **options)
        assert len(set(drawn)) == len(drawn) == (8 if solver is edm_heun else 7)
        assert result.nfe == (15 if solver is edm_heun else 8)

    @pytest.mark.parametrize("solver, options", DRAWING)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_state_keeps_its_dtype(
        self, solver: Any, options: Any, dtype: torch.dtype, start: Tensor
    ) -> None:
        for times in (grids.uniform(8), grids.edm(8)):
            x = sample(A, start.to(dtype), times, solver, **options).x
            assert x.dtype == dtype
            assert x.isfinite().all()

    @pytest.mark.parametrize("solver, options", DRAWING)
    def test_evaluations_do_not_depend_on_them(self, solver: Any, options: Any) -> None:
        seen: list[float] = []

        def velocity(x: Tensor, t: float) -> Tensor:
            seen.append(t)
            return A(x, t)

        sample(velocity, torch.ones(3, 2), grids.edm(7), solver, **options)
        assert seen == evaluation_times(solver, grids.edm(7), **options)
