"""DDIM and BDIA: what they equal, how exactly they run back, what they refuse and warn of."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from flowkit.analytic import Gaussian, Mixture, normal_quantiles
from flowkit.errors import FlowkitError
from flowkit.noise import keyed_noise
from flowkit.paths import VE, Path, Straight, VPLinear, VPTable
from flowkit.samplers import evaluation_times, grids, invert, sample
from flowkit.samplers.evaluations import per_sample
from flowkit.samplers.exact import bdia, bdia_ddim, bdia_edm, ddim
from flowkit.samplers.solve import Step
from flowkit.samplers.stochastic import edm_heun

MIXTURES = {
    "A": Mixture((0.4, 0.6), (-0.9, 0.7), (0.3, 0.2)),
    "C": Mixture((0.2, 0.5, 0.3), (-1.2, 0.1, 1.1), (0.2, 0.3, 0.15)),
}
A = MIXTURES["A"]
VP = VPLinear()
DDPM_TABLE = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
# Every solver that inverts exactly, with the options it cannot do without.
EXACT = [
    pytest.param(bdia, {}, id="bdia"),
    pytest.param(bdia_ddim, {"path": VP}, id="bdia_ddim-VP"),
    pytest.param(bdia_ddim, {"path": VE()}, id="bdia_ddim-VE"),
    pytest.param(bdia_edm, {}, id="bdia_edm"),
]
INFINITE_AT_0 = [EXACT[2], EXACT[3]]


def interval(n: int, a: float = 0.0, b: float = 1.0) -> list[float]:
    return [a + (b - a) * i / n for i in range(n + 1)]


def uneven(n: int, start: float) -> list[float]:
    inner = random.Random(3)
    return [start, *sorted(inner.uniform(start, 1) for _ in range(n - 1)), 1.0]


def orders(errors: Sequence[float]) -> list[float]:
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


def gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.fixture(scope="module")
def start() -> Tensor:
    return normal_quantiles()


class TestRoundTrip:
    @pytest.mark.parametrize("solver, options", EXACT)
    @pytest.mark.parametrize(
        "gamma, n", [(0.9, 10), (0.9, 50), (0.96, 50), (1.0, 7), (1.0, 50), (0.5, 10), (1.0, 1)]
    )
    @pytest.mark.parametrize("grid", ["even", "edm", "uneven"])
    def test_is_exact_both_ways(
        self, solver: Any, options: Any, gamma: float, n: int, grid: str, start: Tensor
    ) -> None:
        times = {
            "even": grids.from_start(0.02, n),
            "edm": grids.edm(n),
            "uneven": uneven(n, 0.02),
        }[grid]
        noise = (1 - times[0]) * start
        options = {"gamma": gamma, **options}
        sampled = sample(A, noise, times, solver, **options)
        back = invert(A, sampled.x, times, solver, state=sampled.state, **options)
        assert gap(back.x, noise) < 1e-10
        again = sample(A, back.x, times, solver, state=back.state, **options)
        assert gap(again.x, sampled.x) < 1e-10

    @pytest.mark.parametrize("solver, options", EXACT[:2])
    @pytest.mark.parametrize("gamma", [0.9, 1.0])
    def test_is_exact_from_end_to_end(
        self, solver: Any, options: Any, gamma: float, start: Tensor
    ) -> None:
        for times in (grids.uniform(50), grids.shifted(50, 3.0), uneven(50, 0.0)):
            options = {"gamma": gamma, **options}
            sampled = sample(MIXTURES["C"], start, times, solver, **options)
            back = invert(MIXTURES["C"], sampled.x, times, solver, state=sampled.state, **options)
            assert gap(back.x, start) < 1e-10

    @pytest.mark.parametrize("solver, options", EXACT)
    def test_in_float32(self, solver: Any, options: Any, start: Tensor) -> None:
        times = grids.edm(50)
        noise = (1 - times[0]) * start.float()
        for field in MIXTURES.values():
            sampled = sample(field, noise, times, solver, gamma=1.0, **options)
            back = invert(
                field, sampled.x, times, solver, gamma=1.0, **options, state=sampled.state
            )
            assert back.x.dtype == torch.float32
            assert gap(back.x, noise) < 1e-5

    @pytest.mark.parametrize("solver, options", EXACT)
    def test_of_a_picture_that_was_not_sampled(
        self, solver: Any, options: Any, start: Tensor
    ) -> None:
        """Inverting first, without a state, and sampling from there gives the picture back."""
        times, picture = grids.edm(20), 0.7 * start.flip(-1)
        noise = invert(A, picture, times, solver, gamma=1.0, **options)
        found = sample(A, noise.x, times, solver, gamma=1.0, state=noise.state, **options)
        assert gap(found.x, picture) < 1e-10

    @pytest.mark.parametrize("solver, options", EXACT[:2])
    def test_without_the_state_errs_as_a_solver_does(
        self, solver: Any, options: Any, start: Tensor
    ) -> None:
        """And more the smaller gamma is: the first step's error grows by gamma^-steps."""
        field, times = Gaussian(), grids.uniform(50)
        data = field.flow(start, 0.0, 1.0)
        errors = {
            gamma: gap(invert(field, data, times, solver, gamma=gamma, **options).x, start)
            for gamma in (1.0, 0.96, 0.9)
        }
        assert errors[1.0] < 0.005
        assert errors[1.0] < errors[0.96] < 0.05
        assert errors[0.9] > 10 * errors[0.96]

    @pytest.mark.parametrize("solver, options", EXACT)
    def test_the_state_saves_the_first_evaluation(
        self, solver: Any, options: Any, start: Tensor
    ) -> None:
        times = grids.edm(9)
        sampled = sample(A, start, times, solver, gamma=1.0, **options)
        back = invert(A, sampled.x, times, solver, gamma=1.0, state=sampled.state, **options)
        again = sample(A, back.x, times, solver, gamma=1.0, state=back.state, **options)
        if solver is bdia_edm:  # two in a step, one where it touches t = 1
            assert (sampled.nfe, back.nfe, again.nfe) == (17, 15, 15)
        else:
            assert (sampled.nfe, back.nfe, again.nfe) == (9, 8, 8)

    @pytest.mark.parametrize("solver, options", EXACT)
    def test_the_state_is_the_last_two(self, solver: Any, options: Any, start: Tensor) -> None:
        times, seen = grids.edm(6), []

        def keep(step: Step) -> None:
            seen.append(step.x)

        result = sample(A, start, times, solver, callback=keep, gamma=1.0, **options)
        assert torch.equal(result.state[0], seen[-2])
        assert torch.equal(result.state[1], result.x)

    @pytest.mark.parametrize("solver, options", EXACT)
    def test_another_condition_gives_another_picture(
        self, solver: Any, options: Any, start: Tensor
    ) -> None:
        """Editing: invert under one velocity, sample under another."""
        times = grids.edm(20)
        sampled = sample(A, start, times, solver, gamma=1.0, **options)
        noise = invert(A, sampled.x, times, solver, gamma=1.0, state=sampled.state, **options)
        edited = sample(
            MIXTURES["C"], noise.x, times, solver, gamma=1.0, state=noise.state, **options
        )
        assert gap(edited.x, sampled.x) > 0.1
        assert edited.x.isfinite().all()

    def test_the_caller_s_x_counts_not_the_state_s(self, start: Tensor) -> None:
        times = grids.uniform(5)
        sampled = sample(A, start, times, bdia)
        moved = invert(A, sampled.x + 0.1, times, bdia, state=sampled.state)
        assert gap(moved.x, start) > 1e-3


class TestWarning:
    def test_when_rounding_grows_too_far(self, start: Tensor) -> None:
        times = grids.uniform(50)
        sampled = sample(A, start, times, bdia, gamma=0.5)
        message = r"inverting 50 steps at gamma=0.5 multiplies errors by 1e15; use gamma >= 0.56"
        with pytest.warns(UserWarning, match=message):
            back = invert(A, sampled.x, times, bdia, gamma=0.5, state=sampled.state)
        assert gap(back.x, start) > 1e-3
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # and at the gamma it names there is none
            sampled = sample(A, start, times, bdia, gamma=0.56)
            back = invert(A, sampled.x, times, bdia, gamma=0.56, state=sampled.state)
        assert gap(back.x, start) < 1e-3

    @pytest.mark.parametrize(
        "gamma, n, dtype, warned",
        [
            (0.5, 10, torch.float32, False),
            (0.5, 15, torch.float32, True),
            (0.83, 50, torch.float32, True),
            (0.84, 50, torch.float32, False),
            (0.5, 15, torch.float64, False),
            (1.0, 500, torch.float32, False),
            (0.9, 10, torch.bfloat16, True),
        ],
    )
    def test_knows_the_dtype_of_the_state(
        self, gamma: float, n: int, dtype: torch.dtype, warned: bool
    ) -> None:
        state = (torch.zeros(2, dtype=dtype), torch.zeros(2, dtype=dtype))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            invert(
                lambda x, t: -x, torch.zeros(2), grids.uniform(n), bdia, gamma=gamma, state=state
            )
        assert bool(caught) == warned

    def test_without_a_state_comes_earlier(self) -> None:
        picture = torch.zeros(2, dtype=torch.float64)
        with pytest.warns(UserWarning, match="use gamma >= 0.71"):
            invert(lambda x, t: -x, picture, grids.uniform(20), bdia, gamma=0.5)

    def test_knows_how_the_scale_of_the_path_falls(self, start: Tensor) -> None:
        """In x / t an error counts for less at the noise end, where x is small beside it."""
        times = grids.edm(18)
        noise = (1 - times[0]) * start.float()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sampled = sample(A, noise, times, bdia_edm)
            back = invert(A, sampled.x, times, bdia_edm, state=sampled.state)
        assert gap(back.x, noise) < 1e-4
        sampled = sample(A, noise, times, bdia, gamma=0.5)
        with pytest.warns(UserWarning):
            back = invert(A, sampled.x, times, bdia, gamma=0.5, state=sampled.state)
        assert gap(back.x, noise) > 1e-3

    def test_not_for_sampling(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sample(lambda x, t: -x, torch.zeros(2), grids.uniform(100), bdia, gamma=0.1)


class TestBdia:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_gamma_zero_is_euler(self, dtype: torch.dtype, start: Tensor) -> None:
        for times in (grids.uniform(11), grids.shifted(11, 3.0)):
            euler = sample(A, start.to(dtype), times, "euler").x
            assert torch.equal(sample(A, start.to(dtype), times, bdia, gamma=0.0).x, euler)
            ours = sample(A, start.to(dtype), times, bdia_ddim, gamma=0.0, path=VP).x
            assert torch.equal(ours, euler)

    def test_gamma_one_is_leapfrog(self, start: Tensor) -> None:
        n, h = 16, 1 / 16
        before, x = start, start + h * A(start, 0.0)
        for i in range(1, n):
            before, x = x, before + 2 * h * A(x, i * h)
        torch.testing.assert_close(sample(A, start, grids.uniform(n), bdia).x, x)

    def test_order_two_at_gamma_one(self, start: Tensor) -> None:
        for field in (Gaussian(), A):
            exact = sample(field, start, grids.uniform(300), "rk4").x
            errors = [
                gap(sample(field, start, grids.uniform(n), bdia).x, exact) for n in (80, 160, 320)
            ]
            assert all(1.9 <= order <= 2.1 for order in orders(errors)), orders(errors)

    @pytest.mark.parametrize("gamma", [0.2, 0.5, 0.8])
    def test_error_constant_below_one(self, gamma: float, start: Tensor) -> None:
        field = Gaussian()
        exact = field.flow(start, 0.0, 1.0)
        euler, ours = (
            gap(sample(field, start, grids.uniform(160), solver, **options).x, exact)
            for solver, options in (("euler", {}), (bdia, {"gamma": gamma}))
        )
        assert ours / euler == pytest.approx((1 - gamma) / (1 + gamma), rel=0.1)

    @pytest.mark.parametrize("name", MIXTURES)
    def test_default_beats_ab2_from_ten_steps_on(self, name: str, start: Tensor) -> None:
        field = MIXTURES[name]
        exact = sample(field, start, grids.uniform(300), "rk4").x
        for n in (10, 20, 40):
            ours, ab2 = (
                (sample(field, start, grids.uniform(n), solver).x - exact).square().mean().sqrt()
                for solver in (bdia, "ab2")
            )
            assert ours < ab2


def in_its_own_variables(
    path: Path, field: Callable[..., Tensor], x: Tensor, times: Sequence[float], gamma: float
) -> Tensor:
    """BDIA-DDIM as its paper writes it: alpha, sigma, epsilon; the state is that of `path`."""
    ratios = [(1 - t) / t if t else 1e12 for t in times]
    alpha = [float(path.scale(ratio)) for ratio in ratios]
    sigma = [ratio * a for ratio, a in zip(ratios, alpha, strict=True)]
    y = x * (alpha[0] + sigma[0])
    before = None
    for i in range(len(times) - 1):
        x_t = y / (alpha[i] + sigma[i])
        v = field(x_t, times[i])
        data, epsilon = x_t + (1 - times[i]) * v, x_t - times[i] * v

        def f(j: int, data: Tensor = data, epsilon: Tensor = epsilon) -> Tensor:
            return alpha[j] * data + sigma[j] * epsilon

        after = f(i + 1) if before is None else gamma * before - gamma * f(i - 1) + f(i + 1)
        before, y = y, after
    return y / (alpha[-1] + sigma[-1])


class TestBdiaDdim:
    @pytest.mark.parametrize(
        "path, first",
        [
            (VP, 0.0),
            (VP, 0.0065),
            (VPTable(DDPM_TABLE.tolist()), 0.0),
            (VPTable(DDPM_TABLE.tolist()), 0.0063),
            (VE(), 1 / 81),
            (Straight(), 0.0),
        ],
    )
    @pytest.mark.parametrize("gamma", [0.5, 1.0])
    def test_is_the_rule_in_the_path_s_variables(
        self, path: Path, first: float, gamma: float, start: Tensor
    ) -> None:
        times = [first + (1 - first) * t for t in grids.shifted(12, 2.0)]
        found = sample(A, start, times, bdia_ddim, path=path, gamma=gamma).x
        direct = in_its_own_variables(path, A, start, times, gamma)
        torch.testing.assert_close(found, direct, rtol=0, atol=1e-12 if first else 1e-10)

    def test_the_straight_path_is_the_flow(self, start: Tensor) -> None:
        for gamma in (0.5, 1.0):
            flow = sample(A, start, grids.uniform(9), bdia, gamma=gamma).x
            ours = sample(A, start, grids.uniform(9), bdia_ddim, gamma=gamma, path=Straight()).x
            torch.testing.assert_close(ours, flow, rtol=0, atol=1e-13)

    def test_paths_differ_where_gamma_is_positive(self, start: Tensor) -> None:
        times = grids.uniform(9)
        flow, vp = (sample(A, start, times, bdia_ddim, path=p).x for p in (Straight(), VP))
        assert gap(flow, vp) > 1e-3

    def test_starts_at_zero_as_the_limit_of_later_starts(self, start: Tensor) -> None:
        at_zero = sample(A, start, [0.0, 0.1, 0.4, 1.0], bdia_ddim, path=VP).x
        just_after = sample(A, start, [1e-9, 0.1, 0.4, 1.0], bdia_ddim, path=VP).x
        assert at_zero.isfinite().all()
        assert gap(at_zero, just_after) < 1e-7

    def test_order_two_at_gamma_one(self, start: Tensor) -> None:
        field = Gaussian()
        errors = [
            gap(
                sample(field, start, grids.uniform(n), bdia_ddim, path=VP, gamma=1.0).x,
                field.flow(start, 0.0, 1.0),
            )
            for n in (80, 160, 320)
        ]
        assert all(1.8 <= order <= 2.2 for order in orders(errors)), orders(errors)

    def test_default_beats_ddim_and_gamma_one_on_ddim_s_grid(self, start: Tensor) -> None:
        path = VPTable(DDPM_TABLE.tolist())
        for n in (10, 20, 40):
            ratios = [path.ratio(float(1000 // n * i)) for i in range(n)][::-1]
            times = [float(1 / (1 + ratio)) for ratio in ratios] + [1.0]
            noise = (1 - times[0]) * start
            exact = sample(A, noise, interval(200, times[0]), "rk4").x
            default, one, plain = (
                (sample(A, noise, times, solver, **options).x - exact).square().mean().sqrt()
                for solver, options in (
                    (bdia_ddim, {"path": path}),
                    (bdia_ddim, {"path": path, "gamma": 1.0}),
                    (ddim, {}),
                )
            )
            assert default < one
            assert default < plain


class TestBdiaEdm:
    def test_is_the_rule_in_edm_s_variables(self, start: Tensor) -> None:
        times, gamma = grids.edm(12), 0.5
        sigma = [(1 - t) / t for t in times]

        def slope(z: Tensor, i: int) -> Tensor:
            t = times[i]
            return (z - (z * t + (1 - t) * A(z * t, t))) / sigma[i]  # (z - D) / sigma

        z = start / times[0]
        before = None
        for i in range(12):
            d, step = slope(z, i), sigma[i + 1] - sigma[i]
            bend = (slope(z + step * d, i + 1) - d) / step if i < 11 else 0.0
            ahead = z + step * d + 0.5 * step**2 * bend
            if before is not None:
                step = sigma[i - 1] - sigma[i]
                ahead = ahead + gamma * (before - (z + step * d + 0.5 * step**2 * bend))
            before, z = z, ahead
        found = sample(A, start, times, bdia_edm, gamma=gamma)
        torch.testing.assert_close(found.x, z, rtol=1e-10, atol=1e-10)
        assert found.nfe == 2 * 12 - 1

    def test_gamma_zero_is_edm_heun(self, start: Tensor) -> None:
        times = grids.edm(18)
        heun = sample(A, start, times, edm_heun).x
        torch.testing.assert_close(sample(A, start, times, bdia_edm, gamma=0.0).x, heun)

    @pytest.mark.parametrize("gamma", [0.2, 0.5])
    def test_order_two(self, gamma: float, start: Tensor) -> None:
        exact = sample(A, start, interval(200, 0.1, 0.9), "rk4").x
        errors = [
            gap(sample(A, start, interval(n, 0.1, 0.9), bdia_edm, gamma=gamma).x, exact)
            for n in (80, 160, 320)
        ]
        assert all(1.8 <= order <= 2.3 for order in orders(errors)), orders(errors)

    def test_an_inversion_converges_to_the_noise(self, start: Tensor) -> None:
        field = Gaussian()
        errors = []
        for n in (100, 200):
            times = interval(n, 0.1, 1.0)
            back = invert(field, field.flow(start, 0.1, 1.0), times, bdia_edm, gamma=1.0)
            errors.append(gap(back.x, start))
        assert errors[1] < errors[0] / 3 < 1e-2


class TestDdim:
    def test_is_euler_on_the_flow(self, start: Tensor) -> None:
        for times in (grids.uniform(7), grids.edm(7)):
            for path in (None, VP):
                assert torch.equal(
                    sample(A, start, times, ddim, path=path).x, sample(A, start, times, "euler").x
                )
            assert torch.equal(invert(A, start, times, ddim).x, invert(A, start, times, "euler").x)

    @pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("n", [5, 20])
    def test_is_diffusers_ddim(self, eta: float, n: int) -> None:
        """On the grid of a VP model; eta = 1 is the ancestral step of DDPM."""
        scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
        scheduler.alphas_cumprod = DDPM_TABLE
        scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
        scheduler.set_timesteps(n)
        abar = [DDPM_TABLE[int(s)].item() for s in scheduler.timesteps]
        times = [a**0.5 / (a**0.5 + (1 - a) ** 0.5) for a in abar] + [1.0]
        draw = per_sample(7)
        y = keyed_noise(0, range(6), (2,)).double()
        x_first = y * (times[0] / abar[0] ** 0.5)
        for k, (step, t, a) in enumerate(zip(scheduler.timesteps, times, abar, strict=False)):
            x = y * (t / a**0.5)
            epsilon = x - t * A(x, t)
            y = scheduler.step(epsilon, step, y, eta=eta, variance_noise=draw(y, k)).prev_sample
        found = sample(A, x_first, times, ddim, eta=eta, draw=draw).x
        torch.testing.assert_close(found, y, rtol=0, atol=1e-10)

    def test_draws_per_sample(self) -> None:
        noise = keyed_noise(0, range(4), (3,))
        options = {"solver": ddim, "eta": 1.0}
        whole = sample(A, noise, grids.uniform(6), **options).x
        alone = sample(A, noise[2:3], grids.uniform(6), **options, draw=per_sample(0, [2])).x
        torch.testing.assert_close(alone, whole[2:3])
        other = sample(A, noise, grids.uniform(6), **options, draw=per_sample(1)).x
        assert gap(other, whole) > 1e-2

    def test_starts_at_zero(self, start: Tensor) -> None:
        """Where eta = 1 draws all of the noise anew."""
        times = [0.0, 0.5, 1.0]
        found = sample(A, start, times, ddim, eta=1.0).x
        data, fresh = start + A(start, 0.0), per_sample()(start, 0)
        torch.testing.assert_close(found, sample(A, 0.5 * (data + fresh), [0.5, 1.0]).x)


class TestDriver:
    @pytest.mark.parametrize("solver, options", EXACT)
    @pytest.mark.parametrize("direction", [sample, invert])
    def test_a_callback_sees_and_edits_every_boundary(
        self, solver: Any, options: Any, direction: Any
    ) -> None:
        times = grids.edm(5)
        steps: list[Step] = []
        held = torch.tensor([True, False])

        def hold(step: Step) -> Tensor:
            steps.append(step)
            return torch.where(held, torch.full_like(step.x, 0.25 * step.t), step.x)

        options = {"gamma": 1.0, **options}
        found = direction(A, torch.ones(2), times, solver, callback=hold, **options)
        ahead = times if direction is sample else times[::-1]
        assert [step.t for step in steps] == ahead
        assert found.x[0] == 0.25 * ahead[-1]
        free = direction(A, torch.ones(2), times, solver, **options)
        torch.testing.assert_close(found.x[1], free.x[1])
        if direction is sample:
            assert torch.equal(
                steps[3].x[1], sample(A, torch.ones(2), times[:4], solver, **options).x[1]
            )

    @pytest.mark.parametrize("solver, options", [*EXACT, pytest.param(ddim, {}, id="ddim")])
    def test_the_dry_run_knows_the_evaluations(self, solver: Any, options: Any) -> None:
        seen: list[float] = []

        def velocity(x: Tensor, t: float) -> Tensor:
            seen.append(t)
            return -x

        for direction, times in ((sample, grids.edm(5)), (invert, grids.edm(5)[::-1])):
            seen.clear()
            found = direction(velocity, torch.ones(2), grids.edm(5), solver, **options)
            assert seen == evaluation_times(solver, times, **options)
            assert found.nfe == len(seen)

    @pytest.mark.parametrize("solver, options", EXACT[:2])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_from_end_to_end(
        self, solver: Any, options: Any, dtype: torch.dtype, start: Tensor
    ) -> None:
        field = Gaussian()
        times = grids.uniform(100)
        options = {**options, "gamma": 1.0}
        data = sample(field, start.to(dtype), times, solver, **options).x
        assert data.dtype == dtype
        assert gap(data, field.flow(start, 0.0, 1.0)) < 1e-3
        back = invert(field, data, times, solver, **options).x
        assert back.dtype == dtype
        assert gap(back, start) < 1e-2


class TestBadInput:
    @pytest.mark.parametrize("solver, options", EXACT)
    @pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
    def test_gamma(self, solver: Any, options: Any, gamma: float) -> None:
        with pytest.raises(FlowkitError, match=r"gamma must lie in \[0, 1\], got"):
            sample(A, torch.zeros(2), grids.edm(3), solver, gamma=gamma, **options)

    @pytest.mark.parametrize("solver, options", EXACT)
    def test_gamma_zero_is_not_inverted(self, solver: Any, options: Any) -> None:
        with pytest.raises(FlowkitError, match="gamma=0 has no exact inverse; use gamma=1"):
            invert(A, torch.zeros(2), grids.edm(3), solver, gamma=0.0, **options)

    @pytest.mark.parametrize("solver, options", EXACT)
    @pytest.mark.parametrize(
        "state",
        [
            (torch.zeros(2), torch.zeros(3)),
            (torch.zeros(1), torch.zeros(1)),
            (torch.zeros(2),),
            torch.zeros(2),
            (None, None),
        ],
    )
    def test_state(self, solver: Any, options: Any, state: Any) -> None:
        with pytest.raises(FlowkitError, match=r"state must be the pair .* two of \(2,\)"):
            invert(A, torch.zeros(2), grids.edm(3), solver, state=state, **options)

    @pytest.mark.parametrize("solver, options", INFINITE_AT_0)
    @pytest.mark.parametrize("direction", [sample, invert])
    def test_infinite_at_zero(self, solver: Any, options: Any, direction: Any) -> None:
        with pytest.raises(FlowkitError, match=r"infinite at t=0: start later, .*grids.edm"):
            direction(A, torch.zeros(2), grids.uniform(3), solver, gamma=1.0, **options)

    def test_path(self) -> None:
        with pytest.raises(FlowkitError, match="needs the option 'path'"):
            sample(A, torch.zeros(2), grids.uniform(3), bdia_ddim)
        with pytest.raises(FlowkitError, match=r"one of flowkit.paths, .* got 'vp'"):
            sample(A, torch.zeros(2), grids.uniform(3), bdia_ddim, path="vp")

    def test_eta(self) -> None:
        with pytest.raises(FlowkitError, match=r"eta must lie in \[0, 1\], got 1.5"):
            sample(A, torch.zeros(2), grids.uniform(3), ddim, eta=1.5)
        with pytest.raises(FlowkitError, match=r"cannot invert with eta=0.5: .* set eta=0"):
            invert(A, torch.zeros(2), grids.uniform(3), ddim, eta=0.5)
