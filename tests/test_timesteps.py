"""Densities of t: draws, pdf, cdf and quantile agree with each other and with published values."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from scipy import integrate, stats

from flowkit.errors import FlowkitError
from flowkit.samplers.timesteps import (
    EDM,
    Constant,
    CosMap,
    Curriculum,
    LogitNormal,
    Mode,
    Shifted,
    TimeDensity,
    Uniform,
    UShaped,
    density,
)


def _curriculum(stage: int, clusters: str = "mass") -> Curriculum:
    curriculum = Curriculum(LogitNormal(0.3, 0.8), num_stages=5, clusters=clusters)
    curriculum.load_state_dict({**curriculum.state_dict(), "stage": stage})
    return curriculum


SPREAD = [
    Uniform(),
    LogitNormal(),
    LogitNormal(0.5, 1.4),
    UShaped(),
    UShaped(0.0),
    UShaped(1e-3),
    UShaped(30.0),
    UShaped(60.0),
    EDM(),
    EDM(-0.4, 1.0),
    Shifted(shift=3.0),
    Shifted(LogitNormal(), 0.5),
    Shifted(UShaped(2.0), 1.7),
    Mode(),
    Mode(0.0),
    Mode(1.7),
    Mode(-0.9),
    CosMap(),
    _curriculum(2),
    _curriculum(5),
    _curriculum(2, "time"),
]
ids = [str(i) + type(d).__name__ for i, d in enumerate(SPREAD)]
every = pytest.mark.parametrize("times", SPREAD, ids=ids)


@every
def test_draws_follow_the_cdf(times: TimeDensity) -> None:
    draws = times.sample(100_000, generator=torch.Generator().manual_seed(1))
    assert draws.shape == (100_000,) and draws.dtype == torch.float32
    assert 0 <= draws.min() and draws.max() <= 1
    test = stats.kstest(draws.double().numpy(), lambda t: times.cdf(torch.as_tensor(t)).numpy())
    assert test.pvalue > 1e-3


@every
def test_pdf_integrates_to_one(times: TimeDensity) -> None:
    ends = np.unique([0.0, *times.quantile(torch.linspace(0, 1, 33).double()).tolist(), 1.0])
    ends = ends.clip(0, 1)
    mass = sum(
        integrate.fixed_quad(lambda t: times.pdf(torch.from_numpy(t)).numpy(), a, b, n=80)[0]
        for a, b in zip(ends[:-1], ends[1:], strict=True)
    )
    assert mass == pytest.approx(1.0, abs=1e-9)


@every
def test_pdf_is_the_slope_of_the_cdf(times: TimeDensity) -> None:
    t = times.quantile(torch.linspace(0.05, 0.9, 18).double())
    h = 1e-6
    slope = (times.cdf(t + h) - times.cdf(t - h)) / (2 * h)
    torch.testing.assert_close(slope, times.pdf(t), rtol=1e-6, atol=1e-8)


@every
def test_quantile_inverts_the_cdf(times: TimeDensity) -> None:
    u = torch.linspace(0.001, 0.999, 99).double()
    # UShaped keeps its draws 1e-5 from the ends.
    margin = 1e-5 * float(times.pdf(times.quantile(u)).max()) if "UShaped" in repr(times) else 0
    torch.testing.assert_close(times.cdf(times.quantile(u)), u, rtol=0, atol=2 * margin + 1e-12)


@every
def test_outside_the_interval(times: TimeDensity) -> None:
    assert times.pdf(torch.tensor([-0.1, 1.1])).tolist() == [0, 0]
    torch.testing.assert_close(
        times.cdf(torch.tensor([-0.1, 0.0, 1.0, 1.1]).double()),
        torch.tensor([0, 0, 1, 1.0]).double(),
    )


@every
def test_a_generator_repeats_the_draws(times: TimeDensity) -> None:
    first, second = (times.sample(9, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(times.sample(9, device="cpu"), first)


def test_u_shaped_values() -> None:
    times = UShaped(4.0)
    assert float(times.pdf(0.0)) == pytest.approx(2.07463, abs=5e-6)
    assert float(times.pdf(1.0)) == pytest.approx(2.07463, abs=5e-6)
    assert float(times.pdf(0.5)) == pytest.approx(0.551441, abs=5e-7)
    assert float(times.pdf(0.0) / times.pdf(0.5)) == pytest.approx(math.cosh(2), rel=1e-12)
    published = {0.01: 0.0203518, 0.05: 0.0943910, 0.1: 0.1725035, 0.25: 0.3379864, 0.5: 0.5}
    for t, value in published.items():
        assert float(times.cdf(t)) == pytest.approx(value, abs=1e-6)
    t = torch.linspace(0, 1, 100_001).double()
    variance = torch.trapezoid(times.pdf(t) * (t - 0.5) ** 2, t)
    assert float(variance) == pytest.approx(0.1156713, abs=1e-6)


def test_u_shaped_is_the_mirrored_exponential() -> None:
    t = torch.linspace(0, 1, 101).double()
    mirrored = (torch.exp(4 * t) + torch.exp(4 * (1 - t))) * 4 / (2 * (math.exp(4) - 1))
    torch.testing.assert_close(UShaped(4.0).pdf(t), mirrored, rtol=1e-13, atol=0)


@pytest.mark.parametrize("a", [0.0, 0.5, 4.0, 39.0, 41.0, 1000.0])
def test_u_shaped_is_symmetric(a: float) -> None:
    times, t = UShaped(a), torch.linspace(0, 1, 65).double()
    torch.testing.assert_close(times.pdf(t), times.pdf(1 - t), rtol=1e-12, atol=0)
    torch.testing.assert_close(times.cdf(t), 1 - times.cdf(1 - t), rtol=0, atol=1e-14)
    u = torch.linspace(0, 1, 65)
    torch.testing.assert_close(times.quantile(u), 1 - times.quantile(1 - u), rtol=0, atol=3e-7)


@pytest.mark.parametrize("a", [0.0, 1e-12, 1e-6, 1e-4, 1e-2])
def test_u_shaped_becomes_uniform(a: float) -> None:
    times, t = UShaped(a), torch.linspace(0, 1, 65).double()
    torch.testing.assert_close(times.pdf(t), torch.ones_like(t), rtol=0, atol=1e-4)
    torch.testing.assert_close(times.cdf(t), t, rtol=0, atol=1e-5)
    torch.testing.assert_close(times.quantile(t.float()), t.float(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("a", [50.0, 200.0, 2000.0, 1e6])
def test_u_shaped_with_a_large_a_is_two_exponentials(a: float) -> None:
    times = UShaped(a)
    u = torch.tensor([0.05, 0.25, 0.45])
    expected = -torch.log1p(-2 * u) / a
    torch.testing.assert_close(times.quantile(u), 1e-5 + expected, rtol=1e-3, atol=2e-7)
    assert float(times.quantile(torch.tensor(0.5))) == pytest.approx(0.5, abs=1e-6)
    draws = times.sample(10_000)
    assert draws.isfinite().all() and draws.min() >= 0 and draws.max() <= 1


def test_draws_stay_clear_of_the_ends_as_in_rfpp() -> None:
    ends = UShaped(4.0).quantile(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, torch.tensor([1e-5, 1 - 1e-5]), rtol=0, atol=1.2e-7)


def test_logit_normal_values() -> None:
    u = torch.tensor([0.1, 0.25]).double()
    found = LogitNormal().quantile(u)
    torch.testing.assert_close(
        found, torch.tensor([0.2172862, 0.3374922]).double(), rtol=0, atol=1e-7
    )
    assert LogitNormal(1.0).sample(1000).mean() > 0.6  # leans to data


@pytest.mark.parametrize("mean, std, median", [(-1.2, 1.2, 0.7685), (-0.4, 1.0, 0.5987)])
def test_edm_is_log_normal_in_sigma(mean: float, std: float, median: float) -> None:
    times = EDM(mean, std)
    assert float(times.quantile(torch.tensor(0.5))) == pytest.approx(median, abs=5e-5)
    sigma = torch.tensor([0.01, 0.3, 4.0]).double()
    theirs = stats.lognorm(s=std, scale=math.exp(mean)).sf(sigma.numpy())
    torch.testing.assert_close(times.cdf(1 / (1 + sigma)), torch.from_numpy(theirs))


def test_shifts_compose() -> None:
    t = torch.linspace(0, 1, 33).double()
    twice = Shifted(Shifted(LogitNormal(), 2.0), 1.5)
    torch.testing.assert_close(twice.pdf(t), Shifted(LogitNormal(), 3.0).pdf(t))
    assert float(Shifted(shift=3.0).quantile(torch.tensor(0.5))) == pytest.approx(0.25)


class TestMode:
    def test_published_value_and_symmetry(self) -> None:
        """In the noise's time f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u), f(0.25) = 0.6164."""
        u = torch.linspace(0, 1, 41).double()
        f = 1 - u - 1.29 * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        assert float(f[10]) == pytest.approx(0.6164161, abs=1e-7)
        torch.testing.assert_close(Mode(1.29).quantile(u), 1 - f, rtol=0, atol=1e-15)
        torch.testing.assert_close(Mode(1.29).quantile(1 - u), f, rtol=0, atol=1e-15)

    @pytest.mark.parametrize("scale", [-1.0, -0.3, 1.29, 2 / (math.pi - 2)])
    def test_is_monotone_up_to_the_limits(self, scale: float) -> None:
        times = Mode(scale).quantile(torch.linspace(0, 1, 100_001).double())
        assert (times.diff() > 0).all()
        assert times[0] == 0 and times[-1] == 1

    @pytest.mark.parametrize("scale", [-1.001, 1.752, math.nan])
    def test_is_refused_beyond(self, scale: float) -> None:
        with pytest.raises(FlowkitError, match=r"scale must lie in \[-1, 2 / \(pi - 2\)"):
            Mode(scale)

    def test_is_diffusers(self) -> None:
        """Their u indexes falling timesteps: it runs as our t does."""
        theirs = compute_density_for_timestep_sampling(
            "mode", 20_000, mode_scale=1.29, generator=torch.Generator().manual_seed(0)
        )
        ours = Mode(1.29).sample(20_000, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(ours, 1 - theirs, rtol=0, atol=1e-6)

    def test_leans_as_its_sign_says(self) -> None:
        assert Mode(1.0).pdf(0.5) > 1 > Mode(1.0).pdf(0.01)
        assert Mode(-0.5).pdf(0.5) < 1 < Mode(-0.5).pdf(0.01)


def test_cosmap_values() -> None:
    assert float(CosMap().quantile(torch.tensor(0.25).double())) == pytest.approx(
        0.2928932, abs=1e-7
    )
    u = torch.linspace(0.01, 0.99, 50).double()
    expected = 1 - 1 / (torch.tan(math.pi * u / 2) + 1)
    torch.testing.assert_close(CosMap().quantile(u), expected, rtol=0, atol=1e-14)
    assert float(CosMap().pdf(0.5)) == pytest.approx(4 / math.pi)
    for dtype in (torch.float32, torch.float64):
        assert CosMap().quantile(torch.tensor([0, 1], dtype=dtype)).tolist() == [0, 1]


def test_constant() -> None:
    times = Constant(0.0)
    assert times.sample(5).tolist() == [0.0] * 5
    assert times.cdf(torch.tensor([0.0, 0.3])).tolist() == [1, 1]
    assert Constant(0.4).cdf(torch.tensor([0.3, 0.5])).tolist() == [0, 1]
    assert Constant(0.4).pdf(torch.tensor([0.3, 0.5])).tolist() == [0, 0]


class TestCurriculum:
    @pytest.mark.parametrize("clusters", ["mass", "time"])
    def test_the_last_stage_is_the_base(self, clusters: str) -> None:
        for base in (Uniform(), LogitNormal(0.2, 1.1), UShaped(), Mode()):
            curriculum = Curriculum(base, num_stages=3, patience=0, clusters=clusters)
            while curriculum.stage < 3:
                curriculum.update(1.0)
            ours, theirs = (
                times.sample(1000, generator=torch.Generator().manual_seed(0))
                for times in (curriculum, base)
            )
            assert torch.equal(ours, theirs)

    def test_the_support_grows_from_the_noise(self) -> None:
        curriculum = Curriculum(num_stages=4, patience=0)
        for stage in range(1, 5):
            assert curriculum.stage == stage
            draws = curriculum.sample(20_000, generator=torch.Generator().manual_seed(0))
            assert draws.min() < 1e-3
            assert stage / 4 - 1e-3 < draws.max() <= stage / 4
            curriculum.update(1.0), curriculum.update(1.0)

    def test_clusters_are_quantiles_of_the_noise_level_or_lengths_of_time(self) -> None:
        base = LogitNormal(0.4)
        for clusters, last in (("mass", float(base.quantile(torch.tensor(0.3)))), ("time", 0.3)):
            curriculum = Curriculum(base, num_stages=10, clusters=clusters)
            curriculum.load_state_dict({**curriculum.state_dict(), "stage": 3})
            draws = curriculum.sample(20_000, generator=torch.Generator().manual_seed(0))
            assert draws.max() == pytest.approx(last, abs=1e-4)
            levels = torch.logit(draws.double())  # half of log SNR: its order is that of t
            assert levels.max() <= math.log(last / (1 - last)) + 1e-6

    @pytest.mark.parametrize("smoothing", [0.0, 0.9, 0.99])
    def test_a_constant_loss_advances(self, smoothing: float) -> None:
        curriculum = Curriculum(num_stages=3, patience=4, smoothing=smoothing)
        curriculum.update(1.0)  # sets the mark
        advanced = [curriculum.update(1.0) for _ in range(5)]
        assert advanced == [False] * 4 + [True]
        assert curriculum.stage == 2
        # A stage forgets the marks of the one before it.
        assert not any(curriculum.update(2.0) for _ in range(5))
        assert curriculum.update(2.0) and curriculum.stage == 3

    @pytest.mark.parametrize("smoothing", [0.0, 0.9, 0.99])
    def test_a_falling_loss_never_advances(self, smoothing: float) -> None:
        curriculum = Curriculum(num_stages=3, patience=0, smoothing=smoothing)
        assert not any(curriculum.update(1 / k) for k in range(1, 500))
        assert curriculum.stage == 1

    def test_a_gain_resets_the_patience(self) -> None:
        curriculum = Curriculum(num_stages=2, patience=2)
        losses = [1.0, 1.0, 1.0, 0.5, 1.0, 1.0]
        assert not any(curriculum.update(loss) for loss in losses)
        assert curriculum.update(torch.tensor(1.0))

    def test_patience_outlasts_the_noise_of_mini_batches(self) -> None:
        """On (1 + e^(-k/1000)) / 2, which at k = 2,000 is within 14 % of its end."""
        ends: dict[float, list[int]] = {0.0: [], 0.99: []}
        for smoothing, found in ends.items():
            for seed in range(9):
                noise = 0.05 * torch.randn(9_000, generator=torch.Generator().manual_seed(seed))
                curriculum = Curriculum(num_stages=2, smoothing=smoothing)
                losses = ((1 + math.exp(-k / 1000)) / 2 + e for k, e in enumerate(noise.tolist()))
                found.append(next(k for k, loss in enumerate(losses) if curriculum.update(loss)))
        assert np.median(ends[0.0]) < 1_500 < 2_000 < min(ends[0.99])
        assert max(ends[0.99]) < 5_000

    def test_a_lucky_first_loss_does_not_set_the_mark(self) -> None:
        curriculum = Curriculum(num_stages=2, patience=200)
        losses = [0.5, *(1 - 1e-4 * k for k in range(2_000))]
        assert not any(curriculum.update(loss) for loss in losses)

    def test_a_loss_that_is_not_a_number_is_no_gain(self) -> None:
        curriculum = Curriculum(num_stages=2, patience=1)
        assert [curriculum.update(math.nan) for _ in range(2)] == [False, True]

    def test_the_last_stage_stays(self) -> None:
        curriculum = Curriculum(num_stages=1, patience=0)
        assert not any(curriculum.update(1.0) for _ in range(9))
        assert curriculum.stage == 1

    def test_state_goes_through_json(self) -> None:
        losses = torch.rand(60, generator=torch.Generator().manual_seed(2)).tolist()
        whole = Curriculum(num_stages=9, patience=3)
        for loss in losses:
            whole.update(loss)
        assert 1 < whole.stage < 9
        for cut in (0, 1, 17, 40):
            first, second = (Curriculum(num_stages=9, patience=3) for _ in range(2))
            for loss in losses[:cut]:
                first.update(loss)
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
            for loss in losses[cut:]:
                second.update(loss)
            assert second.state_dict() == whole.state_dict()

    def test_a_state_of_another_curriculum(self) -> None:
        with pytest.raises(FlowkitError, match="of stage 7, this curriculum has 3"):
            Curriculum(num_stages=3).load_state_dict({"stage": 7, "best": None, "stalled": 0})

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"num_stages": 0}, "got 0, 200 and 0.99"),
            ({"patience": -1}, "patience >= 0"),
            ({"smoothing": 1.0}, "0 <= smoothing < 1"),
            ({"clusters": "snr"}, "clusters must be 'mass' or 'time', got 'snr'"),
        ],
    )
    def test_bad_options(self, options: dict, message: str) -> None:
        with pytest.raises(FlowkitError, match=message):
            Curriculum(**options)


def test_names() -> None:
    assert density("uniform") == Uniform()
    assert density("logit_normal", mean=1.0) == LogitNormal(1.0)
    assert density("u_shaped", a=2.0) == UShaped(2.0)
    assert density("edm") == EDM()
    assert density("constant", t=0.0) == Constant(0.0)
    assert density("mode", scale=0.5) == Mode(0.5)
    assert density("cosmap") == CosMap()
    nested = density("shifted", base={"name": "logit_normal", "std": 2.0}, shift=3.0)
    assert nested == Shifted(LogitNormal(0.0, 2.0), 3.0)
    curriculum = density("curriculum", base={"name": "logit_normal", "std": 2.0}, num_stages=7)
    assert isinstance(curriculum, Curriculum)
    assert curriculum.base == LogitNormal(0.0, 2.0) and curriculum.num_stages == 7


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "ushaped"}, "unknown density of t 'ushaped', did you mean 'u_shaped'"),
        ({"name": "u_shaped", "b": 1}, "'u_shaped' has no option 'b'; it takes a"),
        ({"name": "uniform", "a": 1}, "'uniform' has no option 'a'; it takes none"),
        ({"name": "u_shaped", "a": -1.0}, "a must be finite and >= 0, got -1.0"),
        ({"name": "u_shaped", "a": math.inf}, "a must be finite"),
        ({"name": "logit_normal", "std": 0.0}, "std must be positive"),
        ({"name": "edm", "std": -1.0}, "std must be positive"),
        ({"name": "shifted", "shift": 0.0}, "shift must be positive"),
        ({"name": "constant", "t": 1.5}, r"t must lie in \[0, 1\], got 1.5"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(FlowkitError, match=message):
        density(**options)


def test_draws_are_much_cheaper_than_generic_inversion() -> None:
    class Generic(stats.rv_continuous):
        def _pdf(self, t: float) -> float:
            return 4 * math.cosh(4 * (t - 0.5)) / (2 * math.sinh(2))

    def seconds(draw, repeats: int) -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            draw()
        return (time.perf_counter() - began) / repeats

    UShaped().sample(100)
    ratio = seconds(lambda: Generic(a=0, b=1).rvs(size=100), 1) / seconds(
        lambda: UShaped().sample(100), 50
    )
    assert ratio > 100
