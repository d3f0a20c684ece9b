"""Diffusion networks as velocities, against the closed form for Gaussian data.

Each fake network is the exact predictor in the foreign convention, with that convention's
coefficients written out here, so the conversion is the only thing under test.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flowkit.adapters import from_description
from flowkit.diffusion_adapters import (
    EDMVelocity,
    PreconditionedVelocity,
    VPLinearVelocity,
    VPVelocity,
)
from flowkit.errors import FlowkitError
from flowkit.velocity import to_data, to_noise

MU, S = 0.7, 0.4  # data N(MU, S^2)
TABLE = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0)


def gaussian_velocity(x, t):
    t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1)
    return MU + (t * S**2 - (1 - t)) * (x - t * MU) / (t**2 * S**2 + (1 - t) ** 2)


def ve(time):
    return torch.ones_like(time), time


def vp_linear(time):
    s = time / 999
    log_alpha = -0.25 * s**2 * 19.9 - 0.5 * s * 0.1
    return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()


def vp_table(time):
    low = time.floor().long().clamp(max=998)
    log_snr = torch.log(TABLE / (1 - TABLE))
    between = log_snr[low] + (time - low) * (log_snr[low + 1] - log_snr[low])
    return between.sigmoid().sqrt(), (-between).sigmoid().sqrt()


def vp_between(time):
    """The smooth schedule that a table with one entry per 1/1000 of the linear SDE comes from."""
    return vp_linear((time + 1) / 1000 * 999)


class Exact(nn.Module):
    """E[prediction | y] for Gaussian data on the path whose (a, b) `coefficients(time)` gives."""

    def __init__(self, coefficients, prediction, dtype=torch.float64):
        super().__init__()
        self.coefficients, self.prediction = coefficients, prediction
        self.gain = nn.Parameter(torch.ones((), dtype=dtype))
        self.times, self.cond = [], {}

    def forward(self, y, time, **cond):
        self.times.append(time)
        self.cond = cond
        a, b = (c.reshape(-1, 1).to(y.dtype) for c in self.coefficients(time.double()))
        data = MU + a * S**2 / (a**2 * S**2 + b**2) * (y - a * MU)
        noise = (y - a * data) / b
        outputs = {"sample": data, "epsilon": noise, "v_prediction": a * noise - b * data}
        return self.gain * outputs[self.prediction]


class ExactRaw(nn.Module):
    """The raw network F that makes D exact under one row of EDM's Table 1."""

    def __init__(self, kind, dtype=torch.float64):
        super().__init__()
        self.kind = kind
        self.gain = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, scaled, c_noise):
        sigma = {
            "edm": lambda c: (4 * c).exp(),
            "ve": lambda c: 2 * c.exp(),
            "vp": lambda c: torch.expm1(9.95 * (c / 999) ** 2 + 0.1 * c / 999).sqrt(),
        }[self.kind](c_noise.double()).reshape(-1, 1)
        c_in = {"edm": (sigma**2 + 0.25) ** -0.5, "ve": 1, "vp": (1 + sigma**2) ** -0.5}[self.kind]
        y = scaled.double() / c_in
        data = MU + S**2 / (S**2 + sigma**2) * (y - MU)
        if self.kind == "edm":
            skip, out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / (sigma**2 + 0.25).sqrt()
        else:
            skip, out = 1, sigma if self.kind == "ve" else -sigma
        return (self.gain * (data - skip * y) / out).to(scaled.dtype)


def vp(prediction, coefficients=vp_table, **options):
    net = Exact(coefficients, prediction, options.pop("dtype", torch.float64))
    return VPVelocity(net, alphas_cumprod=TABLE.tolist(), prediction=prediction, **options)


ROWS = {
    "edm sample": lambda: EDMVelocity(Exact(ve, "sample")),
    "ve epsilon": lambda: EDMVelocity(Exact(ve, "epsilon"), prediction="epsilon"),
    "preconditioned edm": lambda: PreconditionedVelocity(ExactRaw("edm")),
    "preconditioned vp": lambda: PreconditionedVelocity(ExactRaw("vp"), kind="vp"),
    "preconditioned ve": lambda: PreconditionedVelocity(ExactRaw("ve"), kind="ve"),
    "vp linear epsilon": lambda: VPLinearVelocity(Exact(vp_linear, "epsilon")),
    "vp linear v": lambda: VPLinearVelocity(
        Exact(vp_linear, "v_prediction"), prediction="v_prediction"
    ),
    "vp table epsilon": lambda: vp("epsilon"),
    "vp table v": lambda: vp("v_prediction"),
    "vp table sample": lambda: vp("sample"),
}
X = torch.linspace(-2, 2, 18, dtype=torch.float64).reshape(6, 3)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_equals_the_closed_form_over_the_trained_range(row):
    model = row()
    for fraction in (0.0, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0):
        t = model.t_min + fraction * (model.t_max - model.t_min)
        expected = gaussian_velocity(X, t)
        torch.testing.assert_close(model(X, t), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_one_time_per_sample_equals_one_time_for_all(row):
    model = row()
    t = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 0.97], dtype=torch.float64)
    together = model(X, t)
    for i, t_i in enumerate(t):
        alone = model(X[i : i + 1], float(t_i))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(alone, model(X[i : i + 1], t_i), rtol=0, atol=0)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_outside_the_trained_range_one_step_ends_on_the_held_estimate(row):
    model = row()
    for t, edge, convert in ((0.0, model.t_min, to_data), (1.0, model.t_max, to_noise)):
        x_held = max(edge, 1 - edge) * X
        held = convert(x_held, model(x_held, edge), edge)
        torch.testing.assert_close(convert(X, model(X, t), t), held, rtol=0, atol=1e-9)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_continuous_and_finite_at_the_edges_of_the_range(row):
    model = row()
    for edge in (model.t_min, model.t_max):
        below, above = model(X, edge * (1 - 1e-9)), model(X, edge * (1 + 1e-9))
        torch.testing.assert_close(below, above, rtol=0, atol=1e-5)
    assert torch.isfinite(model(X, 0.0)).all() and torch.isfinite(model(X, 1.0)).all()


def test_ranges_are_the_published_ones():
    assert EDMVelocity(nn.Identity()).t_min == pytest.approx(1 / 81, abs=1e-12)
    assert EDMVelocity(nn.Identity()).t_max == pytest.approx(0.9980040, abs=5e-8)
    assert VPLinearVelocity(nn.Identity()).t_min == pytest.approx(0.006529, abs=5e-7)
    wide = EDMVelocity(nn.Identity(), sigma_min=1e-9, sigma_max=1e9)
    assert (wide.t_min, wide.t_max) == (1e-5, 1 - 1e-5)


def rk4(model, x, times):
    for t, s in zip(times, times[1:], strict=False):
        dt = s - t
        a = model(x, t)
        b = model(x + dt / 2 * a, t + dt / 2)
        c = model(x + dt / 2 * b, t + dt / 2)
        x = x + dt / 6 * (a + 2 * b + 2 * c + model(x + dt * c, s))
    return x


@torch.no_grad()
@pytest.mark.parametrize("row", ["edm sample", "preconditioned edm", "vp linear epsilon"])
def test_ode_end_point_is_the_gaussian_flow(row):
    model = ROWS[row]()
    t_0 = model.t_min
    y = (1 - t_0) / t_0 * X  # a diffusion sampler's start, sigma_max * noise
    end = rk4(model, t_0 * y, [t_0 + i / 200 * (1 - t_0) for i in range(201)])
    exact = MU + S * (y - MU) / math.hypot(S, (1 - t_0) / t_0)
    torch.testing.assert_close(end, exact, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "low, high, tolerance", [(0.0, 0.5, 2e-6), (0.5, 0.9, 1e-4), (0.9, 0.98, 2e-3), (0.98, 1, 5e-3)]
)
def test_table_interpolation_is_close_to_the_smooth_schedule(prediction, low, high, tolerance):
    # The exact network of the continuous linear SDE, known only through a table of 1000 entries.
    # Between two of them log-SNR is taken as linear, which is off by its curvature: largest at
    # the data end, where log-SNR is the logarithm of the index.
    s = torch.arange(1, 1001, dtype=torch.float64) / 1000
    table = torch.exp(-0.5 * s**2 * 19.9 - s * 0.1)
    net = Exact(vp_between, prediction)
    model = VPVelocity(net, alphas_cumprod=table.tolist(), prediction=prediction)
    t = torch.linspace(max(low, model.t_min), min(high, model.t_max), 999, dtype=torch.float64)
    deviation = (t**2 * S**2 + (1 - t) ** 2).sqrt()[:, None]
    z = torch.randn(999, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t = t[:, None] * MU + deviation * z
    torch.testing.assert_close(model(x_t, t), gaussian_velocity(x_t, t), rtol=0, atol=tolerance)


def test_integer_times_are_exact_at_the_table_s_entries():
    index = torch.tensor([0, 1, 250, 500, 998, 999])
    lam = ((1 - TABLE[index]) / TABLE[index]).sqrt()
    for integer in (False, True):
        model = vp("epsilon", integer_times=integer)
        torch.testing.assert_close(
            model(X, 1 / (1 + lam)), gaussian_velocity(X, 1 / (1 + lam)), rtol=0, atol=1e-9
        )
        assert model.net.times[-1].dtype == (torch.int64 if integer else torch.float64)
        torch.testing.assert_close(model.net.times[-1].double(), index.double(), rtol=0, atol=1e-9)


FLOAT32 = {
    "edm sample": (lambda: EDMVelocity(Exact(ve, "sample", torch.float32)), 1e-4),
    "vp table epsilon": (lambda: vp("epsilon", dtype=torch.float32), 5e-5),
    "vp table v": (lambda: vp("v_prediction", dtype=torch.float32), 5e-5),
}


@pytest.mark.parametrize("row, tolerance", FLOAT32.values(), ids=FLOAT32)
@pytest.mark.parametrize("t", [0.05, 0.5, 0.95, 0.98])
def test_float32(row, tolerance, t):
    # A denoiser's (D - x) / (1 - t) cancels near the data, where the two are nearly equal.
    v = row()(X.float(), t)
    assert v.dtype == torch.float32
    torch.testing.assert_close(v.double(), gaussian_velocity(X, t), rtol=0, atol=tolerance)


@torch.no_grad()
def test_preconditioning_does_not_cancel_near_the_data():
    class Smooth(nn.Module):
        def __init__(self, dtype, denoises):
            super().__init__()
            self.gain = nn.Parameter(torch.ones((), dtype=dtype))
            self.denoises = denoises

        def forward(self, y, time):
            if not self.denoises:
                return self.gain * torch.sin(3 * y + time[:, None])
            sigma = time[:, None]
            c_in = (sigma**2 + 0.25).rsqrt()
            raw = self.gain * torch.sin(3 * c_in * y + sigma.log() / 4)
            return 0.25 * c_in**2 * y + 0.5 * sigma * c_in * raw

    errors = {}
    for adapter, denoises in ((EDMVelocity, True), (PreconditionedVelocity, False)):
        exact = adapter(Smooth(torch.float64, denoises))(X, 0.9975)
        single = adapter(Smooth(torch.float32, denoises))(X.float(), 0.9975)
        errors[adapter] = float((single - exact).abs().max())
    assert errors[PreconditionedVelocity] < 2e-6 < 10 * errors[EDMVelocity]


@pytest.mark.parametrize("kind", ["edm", "vp", "ve"])
def test_denoise_is_the_posterior_mean(kind):
    model = PreconditionedVelocity(ExactRaw(kind), kind=kind)
    for sigma in (0.01, 1.0, 40.0):
        expected = MU + S**2 / (S**2 + sigma**2) * (X - MU)
        torch.testing.assert_close(model.denoise(X, sigma), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_gradients_reach_the_network_and_the_sample(row):
    model = row()
    x = X.clone().requires_grad_()
    model(x, torch.tensor([0.0, 0.001, 0.3, 0.7, 0.999, 1.0])).square().mean().backward()
    for tensor in (x, model.net.gain):
        assert torch.isfinite(tensor.grad).all() and tensor.grad.abs().sum() > 0


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_description_rebuilds_the_adapter(row):
    model = row()
    again = from_description(model.net, model.description())
    assert type(again) is type(model) and again.description() == model.description()
    torch.testing.assert_close(again(X, 0.3), model(X, 0.3), rtol=0, atol=0)


def test_half_precision_network_keeps_the_state_in_float32():
    class Half(nn.Linear):
        def forward(self, y, time):
            assert y.dtype == torch.bfloat16 and time.dtype == torch.float32
            return super().forward(y)

    model = VPLinearVelocity(Half(3, 3).bfloat16())
    assert model(X.float(), 0.4).dtype == torch.float32
    assert model(X.bfloat16(), 0.4).dtype == torch.bfloat16


def test_learned_variance_is_dropped_and_the_null_class_filled_in():
    class Doubled(Exact):
        def forward(self, y, time, **cond):
            flat = y.flatten(1)
            return torch.cat([super().forward(flat, time, **cond).reshape(y.shape), y * 9], 1)

    net = Doubled(vp_table, "epsilon")
    model = VPVelocity(net, alphas_cumprod=TABLE.tolist(), null_class=10)
    x = X[:, :, None, None]
    v = model(x, 0.3)
    torch.testing.assert_close(v.flatten(1), gaussian_velocity(X, 0.3), rtol=0, atol=1e-10)
    assert net.cond["class_labels"].tolist() == [10] * 6
    model(x, 0.3, class_labels=torch.arange(6))
    assert net.cond["class_labels"].tolist() == list(range(6))


def test_bad_options_are_named():
    with pytest.raises(FlowkitError, match="prediction must be"):
        EDMVelocity(nn.Identity(), prediction="score")
    with pytest.raises(FlowkitError, match="kind must be one of"):
        PreconditionedVelocity(nn.Identity(), kind="iddpm")
