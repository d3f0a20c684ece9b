"""Guidance: what it combines, when it calls, and that the prediction's kind does not matter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowkit.analytic import Gaussian
from flowkit.errors import FlowkitError
from flowkit.samplers import evaluation_times, grids, sample
from flowkit.velocity import (
    bind,
    guided,
    sigma_interval,
    to_data,
    to_noise,
    to_score,
    velocity_from_data,
    velocity_from_noise,
    velocity_from_score,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Counted:
    """A velocity that remembers the times it was called at."""

    def __init__(self, scale: float, shift: float) -> None:
        self.scale, self.shift = scale, shift
        self.times: list[float] = []

    @property
    def calls(self) -> int:
        return len(self.times)

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        self.times.append(t)  # type: ignore[arg-type]
        return self.scale * x_t + self.shift


def pair() -> tuple[Counted, Counted]:
    return Counted(1.0, 1.0), Counted(-0.7, 0.2)


class TestScale:
    def test_the_formula(self) -> None:
        x, (conditional, unconditional) = draw(4, 3), pair()
        expected = unconditional(x, 0.5) + 3.0 * (conditional(x, 0.5) - unconditional(x, 0.5))
        torch.testing.assert_close(guided(conditional, unconditional, 3.0)(x, 0.5), expected)

    def test_the_original_form_counts_from_the_conditional(self) -> None:
        x, (conditional, unconditional) = draw(4, 3), pair()
        v_c, v_u = conditional(x, 0.5), unconditional(x, 0.5)
        v = guided(conditional, unconditional, 4.0)(x, 0.5)
        torch.testing.assert_close(v, v_c + 3.0 * (v_c - v_u))

    @pytest.mark.parametrize("t", [0.5, torch.tensor(0.5), torch.tensor([0.1, 0.5, 0.9, 1.0])])
    def test_one_is_the_conditional_and_never_calls_the_other(self, t: float | Tensor) -> None:
        x, (conditional, unconditional) = draw(4, 3), pair()
        for options in ({}, {"interval": (0.2, 0.8)}, {"rescale": 1.0}):
            v = guided(conditional, unconditional, 1.0, **options)(x, t)
            assert torch.equal(v, x + 1)
        assert unconditional.calls == 0

    def test_zero_is_the_unconditional(self) -> None:
        x, (conditional, unconditional) = draw(4, 3), pair()
        torch.testing.assert_close(guided(conditional, unconditional, 0.0)(x, 0.5), -0.7 * x + 0.2)

    @pytest.mark.parametrize(
        "convert, back",
        [
            (to_data, velocity_from_data),
            (to_noise, velocity_from_noise),
            (to_score, velocity_from_score),
        ],
        ids=["data", "noise", "score"],
    )
    @pytest.mark.parametrize("t", [0.05, 0.4, 0.95])
    def test_guiding_another_prediction_is_guiding_the_velocity(self, convert, back, t) -> None:
        x, v_c, v_u, scale = draw(4, 3), draw(4, 3, seed=1), draw(4, 3, seed=2), 3.0
        v = guided(lambda *_: v_c, lambda *_: v_u, scale)(x, t)
        c, u = convert(x, v_c, t), convert(x, v_u, t)
        torch.testing.assert_close(back(x, u + scale * (c - u), t), v, rtol=1e-12, atol=1e-12)

    def test_a_weaker_model_makes_it_autoguidance(self) -> None:
        """Extrapolated away from a model of too wide data, samples come closer than the model's."""
        x = draw(64, 1)

        def network(x_t: Tensor, t: float, *, std: float) -> Tensor:
            return Gaussian(0.7, std)(x_t, t)

        strong, weak = bind(network, std=0.5), bind(network, std=0.7)
        times, exact = grids.uniform(50), Gaussian(0.7, 0.4).flow(x, 0.0, 1.0)

        def error(velocity) -> float:
            return (sample(velocity, x, times, "rk4").x - exact).abs().max().item()

        assert error(guided(strong, weak, 1.5)) < 0.5 * error(strong)


class TestInterval:
    @pytest.mark.parametrize("solver", ["euler", "heun", "midpoint", "rk4", "ab2"])
    @pytest.mark.parametrize("shift", [1.0, 3.0])
    @pytest.mark.parametrize("n", [10, 25])
    def test_calls_are_those_inside_whatever_the_grid(self, solver, shift, n) -> None:
        """Limits are times: they do not move with the number of steps or their shift."""
        low, high = 0.3, 0.8
        conditional, unconditional = pair()
        velocity = guided(conditional, unconditional, 2.0, interval=(low, high))
        times = grids.shifted(n, shift)
        sample(velocity, draw(2, 3), times, solver)
        stages = evaluation_times(solver, times)
        assert conditional.times == stages
        assert unconditional.times == [t for t in stages if low < t < high]
        assert 0 < unconditional.calls < conditional.calls

    def test_sigma_limits_do_not_move_either(self) -> None:
        for n in (10, 40):
            for shift in (1.0, 3.0):
                conditional, unconditional = pair()
                limits = sigma_interval(0.28, 5.42)
                times = grids.shifted(n, shift)
                sample(guided(conditional, unconditional, 2.0, interval=limits), draw(2), times)
                inside = [t for t in times[:-1] if t > 0 and 0.28 < (1 - t) / t < 5.42]
                assert unconditional.times == inside

    def test_values_inside_and_outside(self) -> None:
        x, (conditional, unconditional) = draw(4, 3), pair()
        velocity = guided(conditional, unconditional, 2.0, interval=(0.3, 0.8))
        inside = 2 * (x + 1) - (-0.7 * x + 0.2)
        for kind in (float, torch.tensor):
            torch.testing.assert_close(velocity(x, kind(0.5)), inside)
            assert torch.equal(velocity(x, kind(0.9)), x + 1)

    @pytest.mark.parametrize("t", [0.25, 0.5, torch.tensor(0.25), torch.tensor([0.25, 0.5])])
    def test_is_open_at_both_ends(self, t: float | Tensor) -> None:
        conditional, unconditional = pair()
        guided(conditional, unconditional, 2.0, interval=(0.25, 0.5))(draw(2, 3), t)
        assert unconditional.calls == 0

    def test_times_of_a_batch_are_inside_one_by_one(self) -> None:
        x, t = draw(3, 2, 2), torch.tensor([0.1, 0.5, 0.9])
        velocity = guided(*pair(), 2.0, interval=(0.3, 0.8))
        v = velocity(x, t)
        torch.testing.assert_close(v[1], 2 * (x[1] + 1) - (-0.7 * x[1] + 0.2))
        assert torch.equal(v[[0, 2]], x[[0, 2]] + 1)

    def test_no_interval_covers_both_ends(self) -> None:
        conditional, unconditional = pair()
        velocity = guided(conditional, unconditional, 2.0)
        for t in (0.0, 1.0, torch.tensor(0.0), torch.tensor([0.0, 1.0])):
            velocity(draw(2, 3), t)
        assert unconditional.calls == 4

    def test_a_float_t_is_decided_without_the_device(self) -> None:
        """On the meta device nothing can be read back: a sync would raise."""
        x = torch.empty(2, 3, device="meta")
        velocity = guided(*pair(), 2.0, interval=(0.3, 0.8), rescale=0.5)
        for t in (0.5, 0.9):
            assert velocity(x, t).device.type == "meta"
        everywhere = guided(*pair(), 2.0, rescale=0.5)
        assert everywhere(x, torch.tensor(0.5, device="meta")).shape == x.shape

    def test_works_under_a_host_s_time_and_a_device_s_state(self) -> None:
        v = guided(*pair(), 2.0, interval=(0.3, 0.8))(
            torch.empty(2, 3, device="meta"), torch.tensor([0.5, 0.9])
        )
        assert v.device.type == "meta"


class TestSigmaInterval:
    def test_published_limits(self) -> None:
        assert sigma_interval(0.28, 5.42) == pytest.approx((0.15576, 0.78125), abs=1e-5)

    def test_the_ends(self) -> None:
        conditional, unconditional = pair()
        velocity = guided(conditional, unconditional, 2.0, interval=sigma_interval(0.0, math.inf))
        for t in (0.0, 0.5, 1.0):  # sigma is infinite, 1 and 0, which is not > 0
            velocity(draw(2, 3), t)
        assert unconditional.times == [0.0, 0.5]

    @pytest.mark.parametrize("low, high", [(-0.1, 1.0), (1.0, 1.0), (2.0, 1.0), (0.0, math.nan)])
    def test_bad_limits(self, low: float, high: float) -> None:
        with pytest.raises(FlowkitError, match="needs 0 <= low < high"):
            sigma_interval(low, high)


class TestRescale:
    def test_one_has_the_conditional_s_deviation_in_every_sample(self) -> None:
        x = draw(4, 2, 3)
        conditional, unconditional = pair()
        v = guided(conditional, unconditional, 7.5, rescale=1.0)(x, 0.5)
        torch.testing.assert_close(v.std((1, 2)), (x + 1).std((1, 2)))
        plain = guided(conditional, unconditional, 7.5)(x, 0.5)
        ratio = v / plain
        torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio))

    def test_is_diffusers(self) -> None:
        from diffusers.guiders.guider_utils import rescale_noise_cfg

        x, (conditional, unconditional) = draw(4, 2, 3), pair()
        plain = guided(conditional, unconditional, 7.5)(x, 0.5)
        ours = guided(conditional, unconditional, 7.5, rescale=0.7)(x, 0.5)
        torch.testing.assert_close(ours, rescale_noise_cfg(plain, x + 1, guidance_rescale=0.7))

    def test_a_part_of_it_mixes(self) -> None:
        x, velocities = draw(4, 2, 3), pair()
        none, half, full = (
            guided(*velocities, 7.5, rescale=rescale)(x, 0.5) for rescale in (0.0, 0.5, 1.0)
        )
        torch.testing.assert_close(half, 0.5 * (none + full))

    def test_is_not_the_same_in_the_space_of_the_data(self) -> None:
        x, t, (conditional, unconditional) = draw(4, 8), 0.5, pair()
        v = guided(conditional, unconditional, 7.5, rescale=1.0)(x, t)
        c, u = (to_data(x, velocity(x, t), t) for velocity in (conditional, unconditional))
        data = u + 7.5 * (c - u)
        data = data * c.std(1, keepdim=True) / data.std(1, keepdim=True)
        assert (to_data(x, v, t) - data).abs().max() > 0.1

    @pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1, 1)])
    def test_one_number_a_sample_has_no_deviation(self, shape: tuple[int, ...]) -> None:
        x, velocities = draw(*shape), pair()
        plain = guided(*velocities, 7.5)(x, 0.5)
        assert torch.equal(guided(*velocities, 7.5, rescale=1.0)(x, 0.5), plain)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("level", [0.0, 0.1, 300.0])
    def test_a_constant_v_stays(self, level: float, dtype: torch.dtype) -> None:
        x = draw(3, 1, 7, 9).to(dtype)
        v_c = x
        v_u = (2 * v_c - level).to(dtype)  # v_u + 2 (v_c - v_u) = level, up to rounding
        v = guided(lambda *_: v_c, lambda *_: v_u, 2.0, rescale=1.0)(x, 0.5)
        plain = guided(lambda *_: v_c, lambda *_: v_u, 2.0)(x, 0.5)
        assert v.isfinite().all()
        if level == 300.0:  # rounding alone is no deviation
            torch.testing.assert_close(v, plain)

    def test_a_constant_conditional_is_followed(self) -> None:
        x = draw(3, 4)
        v = guided(lambda x, t: torch.ones_like(x), lambda x, t: x, 3.0, rescale=1.0)(x, 0.5)
        assert torch.equal(v, torch.zeros_like(x))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rescale": 1.5}, r"rescale must lie in \[0, 1\], got 1.5"),
        ({"interval": (0.7, 0.3)}, r"low < high, got \(0.7, 0.3\)"),
        ({"interval": (0.7, math.nan)}, "low < high"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(FlowkitError, match=message):
        guided(*pair(), 2.0, **options)
