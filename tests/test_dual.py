"""DualFast: the paper's replacement written out, what stays as it was, and any solver under it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from flowkit.analytic import Gaussian, Mixture, normal_quantiles
from flowkit.errors import FlowkitError
from flowkit.samplers import Step, evaluation_times, grids, invert, sample
from flowkit.samplers.adaptive import dopri5
from flowkit.samplers.dual import dual_fast
from flowkit.samplers.evaluations import Evaluations
from flowkit.samplers.runge_kutta import midpoint
from flowkit.velocity import to_data, to_noise, velocity_from_data, velocity_from_noise

BASES = ["euler", "heun", "rk4", "ab2", "abm", "deis", "dpmpp_2m", "unipc", midpoint]
MIXTURE = Mixture((0.4, 0.6), (-0.9, 0.7), (0.3, 0.2))
TIMES = [0.0, 0.07, 0.2, 0.45, 0.6, 0.9, 1.0]
OPTIONS = [
    {"strength": strength, "power": power, "anchor": anchor}
    for strength in (0.3, -0.2)
    for power in (0.0, 1.0, 2.5)
    for anchor in ("first", "previous")
]
START = normal_quantiles()

bases = pytest.mark.parametrize("base", BASES, ids=lambda b: getattr(b, "__name__", b))
options = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))


class Replaced:
    """The paper's prediction at each step: (1 + c) n_t - c n_anchor, as a velocity."""

    def __init__(self, strength: float, power: float, anchor: str) -> None:
        self.strength, self.power, self.anchor = strength, power, anchor
        self.n_anchor: Tensor | None = None

    def __call__(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """(v, v') at the beginning of a step."""
        v = MIXTURE(x, t)
        n, c = to_noise(x, v, t), self.strength * t**self.power
        first = self.n_anchor is None
        replaced = n if self.n_anchor is None else (1 + c) * n - c * self.n_anchor
        if first or self.anchor == "previous":
            self.n_anchor = n
        return v, v if t == 0 else velocity_from_noise(x, replaced, t)


@options
def test_is_the_paper_s_rule_for_ddim(options: dict) -> None:
    replaced, x = Replaced(**options), START
    for t, s in pairwise(TIMES):
        x = x + (s - t) * replaced(x, t)[1]
    found = sample(MIXTURE, START, TIMES, dual_fast, base="euler", **options).x
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


@options
def test_replaces_the_first_order_data_of_dpm_solver(options: dict) -> None:
    replaced, x, before = Replaced(**options), START, None
    log_snr = [-math.inf, *(math.log(t / (1 - t)) for t in TIMES[1:-1]), math.inf]
    for i, (t, s) in enumerate(pairwise(TIMES)):
        v, v_new = replaced(x, t)
        data, data_new = to_data(x, v, t), to_data(x, v_new, t)
        gain = (s - t) / (1 - t)  # alpha_s (1 - e^-h)
        x = (1 - s) / (1 - t) * x + gain * data_new
        if before is not None and 1 < i < len(TIMES) - 2:
            r = (log_snr[i] - log_snr[i - 1]) / (log_snr[i + 1] - log_snr[i])
            x = x + gain * (data - before) / (2 * r)
        before = data
    found = sample(MIXTURE, START, TIMES, dual_fast, base="dpmpp_2m", **options).x
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


@options
def test_leaves_differences_and_stages_raw(options: dict) -> None:
    replaced, x, before = Replaced(**options), START, None
    for i, (t, s) in enumerate(pairwise(TIMES)):
        v, v_new = replaced(x, t)
        x = x + (s - t) * v_new
        if before is not None:
            x = x + 0.5 * (s - t) ** 2 / (t - TIMES[i - 1]) * (v - before)
        before = v
    found = sample(MIXTURE, START, TIMES, dual_fast, base="ab2", **options).x
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)

    replaced, x = Replaced(**options), START
    for t, s in pairwise(TIMES):
        v, v_new = replaced(x, t)
        v_s = MIXTURE(x + (s - t) * v, s)
        x = x + (s - t) * (v_new + 0.5 * (v_s - v))
    found = sample(MIXTURE, START, TIMES, dual_fast, base="heun", **options).x
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", [0.05, 0.3, 0.9])
def test_noise_and_velocity_go_there_and_back(t: float) -> None:
    v = MIXTURE(START, t)
    back = velocity_from_noise(START, to_noise(START, v, t), t)
    torch.testing.assert_close(back, v, rtol=0, atol=1e-12)
    back = velocity_from_data(START, to_data(START, v, t), t)
    torch.testing.assert_close(back, v, rtol=0, atol=1e-12)


@bases
@pytest.mark.parametrize("anchor", ["first", "previous"])
def test_strength_zero_is_the_base(base: object, anchor: str) -> None:
    found = sample(MIXTURE, START, TIMES, dual_fast, base=base, strength=0.0, anchor=anchor)
    assert torch.equal(found.x, sample(MIXTURE, START, TIMES, base).x)


@bases
@options
def test_a_single_picture_is_reached_as_without(base: object, options: dict) -> None:
    """On the straight way to one picture the noise is the same all along."""
    picture, times = START.flip(-1) + 0.3, TIMES[:-1]

    def velocity(x: Tensor, t: float) -> Tensor:
        return (picture - x) / (1 - t)

    found = sample(velocity, START, times, dual_fast, base=base, **options).x
    expected = (1 - times[-1]) * START + times[-1] * picture
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@bases
def test_a_step_is_affine_in_the_strength(base: object) -> None:
    none, once, thrice = (
        sample(MIXTURE, START, [0.1, 0.4, 0.7], dual_fast, base=base, strength=c).x
        for c in (0.0, 0.2, 0.6)
    )
    assert (once - none).abs().max() > 1e-3
    torch.testing.assert_close(thrice - none, 3 * (once - none), rtol=0, atol=1e-13)


@bases
def test_no_evaluation_is_added_or_moved(base: object) -> None:
    seen: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        seen.append(t)
        return -x * x

    result = sample(velocity, torch.ones(2, 3), TIMES, dual_fast, base=base)
    assert seen == evaluation_times(dual_fast, TIMES, base=base) == evaluation_times(base, TIMES)
    assert result.nfe == len(seen) and result.state is None


@bases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_finite_from_end_to_end(base: object, dtype: torch.dtype) -> None:
    for options in OPTIONS:
        for times in (grids.uniform(1), grids.uniform(9), grids.edm(5), [0.0, 1e-4, 0.5, 1.0]):
            x = sample(MIXTURE, START.to(dtype), times, dual_fast, base=base, **options).x
            assert x.isfinite().all() and x.dtype == dtype


def test_the_first_step_is_the_base_s() -> None:
    for times in ([0.0, 0.4], [0.2, 0.9]):
        found = sample(MIXTURE, START, times, dual_fast, base="heun", strength=0.5).x
        assert torch.equal(found, sample(MIXTURE, START, times, "heun").x)


def test_half_of_the_previous_noise_gives_euler_a_second_order() -> None:
    errors = []
    for n in (40, 80, 160):
        times = [0.2 + 0.7 * i / n for i in range(n + 1)]
        start = Gaussian().flow(START, 0.0, 0.2)
        found = sample(
            Gaussian(), start, times, dual_fast,
            base="euler", strength=0.5, power=0.0, anchor="previous",
        ).x  # fmt: skip
        errors.append((found - Gaussian().flow(start, 0.2, 0.9)).abs().max().item())
    assert all(math.log2(a / b) > 1.8 for a, b in pairwise(errors))


def test_widens_what_a_timid_network_makes() -> None:
    """A network that shrinks its data by a tenth: with the exact solver all error is its own."""
    field, exact = Gaussian(0.0, 0.5), 0.5 * START

    def timid(x: Tensor, t: float) -> Tensor:
        return velocity_from_data(x, 0.9 * to_data(x, field(x, t), t), t) if t < 1 else 0 * x

    times = grids.uniform(20)
    plain = sample(timid, START, times, "ab2").x
    ours = sample(timid, START, times, dual_fast, base="ab2").x
    assert (ours - exact).abs().max() < 0.8 * (plain - exact).abs().max()


class TestCallback:
    @bases
    def test_sees_and_edits_the_corrected_state(self, base: object) -> None:
        steps: list[Step] = []
        run = {"solver": dual_fast, "base": base}
        whole = sample(MIXTURE, START, TIMES, **run, callback=steps.append).x  # type: ignore
        assert [step.t for step in steps] == TIMES
        assert torch.equal(steps[-1].x, whole)
        shorter = sample(MIXTURE, START, TIMES[:4], **run).x  # type: ignore[arg-type]
        torch.testing.assert_close(steps[3].x, shorter, rtol=0, atol=1e-14)

    def test_an_edit_is_kept(self) -> None:
        def reset(step: Step) -> Tensor | None:
            return torch.full_like(step.x, 0.2) if step.index == 4 else None

        seen: dict[float, float] = {}

        def velocity(x: Tensor, t: float) -> Tensor:
            seen[t] = x.max().item()
            return -x

        sample(velocity, torch.ones(2), TIMES, dual_fast, base="heun", callback=reset)
        assert seen[TIMES[4]] == pytest.approx(0.2)


def stateful(x: Tensor, times: Sequence[float], *, factor: float) -> Evaluations:
    for t, s in pairwise(times):
        x, v = yield x, t
        x = x + factor * (s - t) * v
    return x, {"factor": factor}


def test_a_base_with_options_and_a_state_of_its_own() -> None:
    found = sample(
        lambda x, t: torch.ones_like(x), torch.zeros(2), TIMES, dual_fast,
        base=stateful, base_options={"factor": 0.5}, strength=0.0,
    )  # fmt: skip
    torch.testing.assert_close(found.x, torch.full((2,), 0.5))
    assert found.state is None


def bad() -> Iterator[tuple[dict, str]]:
    yield {"strength": math.nan}, "strength must be finite and power finite and >= 0, got nan"
    yield {"power": -1.0}, "got 0.* and -1.0"
    yield {"anchor": "last"}, "anchor must be one of first, previous, got 'last'"
    yield {"base": "eular"}, "unknown solver 'eular', did you mean 'euler'"
    yield {"base": stateful}, "solver 'stateful' needs the option 'factor'"
    yield {"base": "euler", "base_options": {"eta": 1}}, "'euler' has no option 'eta'"
    yield {"base": dopri5}, "a base that keeps to the times given"
    yield {"base": "dopri5"}, "a base that keeps to the times given, got 'dopri5'"
    yield {"base": 3}, "a name or a generator function"


@pytest.mark.parametrize("options, message", list(bad()))
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(FlowkitError, match=message):
        sample(MIXTURE, START, TIMES, dual_fast, **options)


def test_refuses_to_invert() -> None:
    with pytest.raises(FlowkitError, match="'dual_fast' cannot invert"):
        invert(MIXTURE, START, TIMES, dual_fast)


def test_the_last_evaluation_at_a_time_is_the_boundary() -> None:
    def looks_twice(x: Tensor, times: Sequence[float]) -> Evaluations:
        for t, s in pairwise(times):
            yield x, t
            x, v = yield x, t
            x = x + (s - t) * v
        return x

    found, euler = (
        sample(MIXTURE, START, TIMES, dual_fast, base=base, strength=0.3).x
        for base in (looks_twice, "euler")
    )
    assert torch.equal(found, euler)
