"""The velocity interface: conversions are affine equivalents, guidance calls only what it needs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowkit.errors import FlowkitError
from flowkit.velocity import (
    Velocity,
    VelocityModel,
    batch_times,
    bind,
    expand_to,
    guided,
    interpolate,
    to_data,
    to_noise,
    to_score,
    velocity_from_data,
    velocity_from_noise,
    velocity_from_score,
)

MU, S = 0.7, 0.4  # data N(MU, S^2)


def gaussian_velocity(x, t):
    return MU + (t * S**2 - (1 - t)) * (x - t * MU) / (t**2 * S**2 + (1 - t) ** 2)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Counted:
    """scale * x + shift, counting its calls."""

    def __init__(self, scale, shift):
        self.scale, self.shift, self.calls = scale, shift, 0

    def __call__(self, x_t, t):
        self.calls += 1
        return self.scale * x_t + self.shift


TIMES = [0.3, torch.tensor(0.3), torch.full((4,), 0.3), torch.tensor([0.1, 0.3, 0.5, 0.9])]


@pytest.mark.parametrize("t", TIMES, ids=["float", "()", "(B,)", "mixed"])
def test_conversions_recover_data_noise_and_velocity(t):
    noise, data = draw(4, 2, 3), draw(4, 2, 3, seed=1)
    t = t.double() if isinstance(t, torch.Tensor) else t
    x_t, v = interpolate(noise, data, t), data - noise
    torch.testing.assert_close(to_data(x_t, v, t), data)
    torch.testing.assert_close(to_noise(x_t, v, t), noise)
    torch.testing.assert_close(velocity_from_data(x_t, data, t), v)
    torch.testing.assert_close(velocity_from_noise(x_t, noise, t), v)
    torch.testing.assert_close(velocity_from_score(x_t, to_score(x_t, v, t), t), v)


def test_score_is_the_gradient_of_the_log_density():
    x, t = draw(6).requires_grad_(), 0.6
    variance = t**2 * S**2 + (1 - t) ** 2
    log_density = -0.5 * (x - t * MU).square() / variance
    (gradient,) = torch.autograd.grad(log_density.sum(), x)
    torch.testing.assert_close(to_score(x, gaussian_velocity(x, t), t), gradient)


def test_ends_of_the_path_are_finite():
    x = draw(4, 3)
    assert torch.isfinite(velocity_from_data(x, x + 1, 1.0)).all()
    assert torch.isfinite(velocity_from_noise(x, x + 1, 0.0)).all()
    assert torch.isfinite(velocity_from_score(x, x + 1, 0.0)).all()


def test_times_take_the_shape_and_precision_of_the_sample():
    x = torch.zeros(4, 2, 3)
    assert expand_to(0.5, x).shape == (1, 1, 1)
    assert expand_to(torch.rand(4), x).shape == (4, 1, 1)
    assert batch_times(0.5, x).shape == (4,)
    assert batch_times(0.5, x.bfloat16()).dtype == torch.float32
    assert batch_times(0.5, x.double()).dtype == torch.float64


def test_functions_and_bound_models_are_velocities():
    class Shifted(VelocityModel):
        adapter = "shifted"

        def forward(self, x_t, t, *, shift):
            return self.net(x_t) + shift

    model = Shifted(nn.Identity())
    v = bind(model, shift=2.0)
    assert isinstance(v, Velocity) and isinstance(model, Velocity)
    torch.testing.assert_close(v(torch.ones(1, 1), 0.5), torch.full((1, 1), 3.0))
    assert model.description() == {"adapter": "shifted"}


def test_dtype_is_the_network_s():
    assert VelocityModel(nn.Linear(1, 1).bfloat16()).dtype == torch.bfloat16
    assert VelocityModel(nn.Identity()).dtype == torch.float32


def test_scale_one_never_calls_the_unconditional():
    conditional, unconditional = Counted(1, 1.0), Counted(2, 0.0)
    x = draw(4, 3)
    torch.testing.assert_close(guided(conditional, unconditional, 1.0)(x, 0.5), x + 1)
    assert (conditional.calls, unconditional.calls) == (1, 0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("n", [10, 25])
def test_interval_saves_the_unconditional_call_outside(n, shift):
    low, high = 0.3, 0.8
    conditional, unconditional = Counted(1, 1.0), Counted(2, 0.0)
    velocity = guided(conditional, unconditional, 2.0, interval=(low, high))
    times = [i / n / (i / n + shift * (1 - i / n)) for i in range(n)]
    x = draw(4, 3)
    for t in times:
        expected = 2 * (x + 1) - 2 * x if low < t < high else x + 1
        torch.testing.assert_close(velocity(x, t), expected)
    assert conditional.calls == n
    assert unconditional.calls == sum(low < t < high for t in times)


def test_interval_is_open_at_both_ends():
    unconditional = Counted(2, 0.0)
    velocity = guided(Counted(1, 1.0), unconditional, 2.0, interval=(0.25, 0.5))
    for t in (0.25, 0.5, torch.tensor(0.5)):
        velocity(draw(2, 3), t)
    assert unconditional.calls == 0


def test_full_rescale_has_the_conditional_s_deviation():
    conditional, unconditional = Counted(1.0, 0.5), Counted(-0.7, 0.0)
    x = draw(4, 2, 3)
    v = guided(conditional, unconditional, 7.5, rescale=1.0)(x, 0.5)
    torch.testing.assert_close(v.std((1, 2)), (x + 0.5).std((1, 2)))
    plain = guided(conditional, unconditional, 7.5)(x, 0.5)
    half = guided(conditional, unconditional, 7.5, rescale=0.5)(x, 0.5)
    torch.testing.assert_close(half, 0.5 * (plain + v))


def test_guidance_is_the_same_in_data_noise_and_velocity():
    x, t, scale = draw(4, 3), 0.4, 3.0
    v_c, v_u = draw(4, 3, seed=1), draw(4, 3, seed=2)
    v = guided(lambda *_: v_c, lambda *_: v_u, scale)(x, t)
    for convert in (to_data, to_noise, to_score):
        c, u = convert(x, v_c, t), convert(x, v_u, t)
        torch.testing.assert_close(convert(x, v, t), u + scale * (c - u), rtol=1e-12, atol=1e-12)


def test_bad_guidance_is_refused():
    velocity = Counted(1, 0)
    with pytest.raises(FlowkitError, match="rescale"):
        guided(velocity, velocity, 2.0, rescale=1.5)
    with pytest.raises(FlowkitError, match="interval"):
        guided(velocity, velocity, 2.0, interval=(0.7, 0.3))
