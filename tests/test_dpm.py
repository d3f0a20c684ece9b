"""DPM-Solver++ and UniPC: orders, exactness, diffusers' own runs, both ends of the time axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from flowkit.analytic import Gaussian, Mixture, normal_quantiles
from flowkit.errors import FlowkitError
from flowkit.samplers import Step, evaluation_times, grids, invert, sample
from flowkit.samplers.dpm import dpmpp_2m, dpmpp_3m, exact_weights, unipc
from flowkit.samplers.evaluations import Solver

MIXTURE = Mixture((0.4, 0.6), (-0.9, 0.7), (0.3, 0.2))
UNEVEN = [0.05, 0.1, 0.25, 0.3, 0.55, 0.6, 0.9]
SOLVERS: dict[str, tuple[Solver, dict]] = {
    "2M": (dpmpp_2m, {}),
    "2M taylor": (dpmpp_2m, {"variant": "taylor"}),
    "3M": (dpmpp_3m, {}),
    **{
        f"UniPC-{order} {variant}": (unipc, {"order": order, "variant": variant})
        for order in (1, 2, 3)
        for variant in ("bh1", "bh2")
    },
}
every_solver = pytest.mark.parametrize("solver, options", SOLVERS.values(), ids=SOLVERS.keys())


def interval(n: int, a: float = 0.1, b: float = 0.8) -> list[float]:
    return [a + (b - a) * i / n for i in range(n)] + [b]


def orders(errors: Sequence[float]) -> list[float]:
    """Measured between runs that double the number of steps."""
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


@pytest.fixture(scope="module")
def start() -> Tensor:
    return normal_quantiles()


@pytest.fixture(scope="module")
def solution(start: Tensor) -> Tensor:
    """The mixture's flow from `start` at 0.1 to 0.8, to 1e-10."""
    return sample(MIXTURE, start, interval(600), solver="rk4").x


class TestOrders:
    def found(self, start: Tensor, solution: Tensor, solver: Solver, **options) -> list[float]:
        def error(n: int) -> float:
            found = sample(MIXTURE, start, interval(n), solver, **options).x
            return (found - solution).abs().max().item()

        return orders([error(n) for n in (80, 160, 320)])

    @pytest.mark.parametrize("variant", ["midpoint", "taylor"])
    def test_2m(self, variant: str, start: Tensor, solution: Tensor) -> None:
        found = self.found(start, solution, dpmpp_2m, variant=variant)
        assert all(1.8 <= p <= 2.3 for p in found), found

    def test_3m_from_exact_first_states(self, start: Tensor, solution: Tensor) -> None:
        errors = []
        for n in (80, 160, 320):
            times = interval(n)
            states = [start]
            for t, s in pairwise(times[:3]):
                states.append(sample(MIXTURE, states[-1], interval(4, t, s), solver="rk4").x)

            def begin(step: Step, states: list[Tensor] = states) -> Tensor | None:
                return states[step.index] if step.index < 3 else None

            found = sample(MIXTURE, start, times, dpmpp_3m, callback=begin).x
            errors.append((found - solution).abs().max().item())
        assert all(2.7 <= p <= 3.4 for p in orders(errors)), orders(errors)

    @pytest.mark.parametrize("variant", ["bh1", "bh2"])
    @pytest.mark.parametrize("order", [1, 2, 3])
    def test_unipc_gains_one_by_correcting(
        self, order: int, variant: str, start: Tensor, solution: Tensor
    ) -> None:
        found = self.found(start, solution, unipc, order=order, variant=variant)
        assert all(order + 0.6 <= p <= order + 1.4 for p in found), found


class TestIdentities:
    @every_solver
    def test_one_step_is_euler(self, solver: Solver, options, start: Tensor) -> None:
        for times in ([0.2, 0.6], [0.0, 0.7], [0.3, 1.0], [0.0, 1.0]):
            for run in (sample, invert):
                euler = run(MIXTURE, start, times, "euler").x
                found = run(MIXTURE, start, times, solver, **options).x
                torch.testing.assert_close(found, euler, rtol=0, atol=1e-14)

    def test_which_is_the_first_order_formula(self, start: Tensor) -> None:
        t, s = 0.2, 0.6
        h = math.log(s / (1 - s)) - math.log(t / (1 - t))
        data = start + (1 - t) * MIXTURE(start, t)
        expected = (1 - s) / (1 - t) * start + s * (1 - math.exp(-h)) * data
        torch.testing.assert_close(sample(MIXTURE, start, [t, s]).x, expected, rtol=0, atol=1e-14)

    def test_2m_is_the_paper_s_formula(self, start: Tensor) -> None:
        r, t, s = 0.2, 0.5, 0.6
        first, second, third = (math.log(u / (1 - u)) for u in (r, t, s))
        h, r_0 = third - second, (second - first) / (third - second)
        x = start + (t - r) * MIXTURE(start, r)
        old, new = start + (1 - r) * MIXTURE(start, r), x + (1 - t) * MIXTURE(x, t)
        decay = math.exp(-h)
        for variant, factor in (("midpoint", (1 - decay) / 2), ("taylor", (h - 1 + decay) / h)):
            expected = (
                (1 - s) / (1 - t) * x + s * (1 - decay) * new + s * factor * (new - old) / r_0
            )
            found = sample(MIXTURE, start, [r, t, s], dpmpp_2m, variant=variant).x
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)

    @pytest.mark.parametrize("count", [1, 2, 3, 4])
    def test_weights_add_up_to_that_of_euler_s_step(self, count: int) -> None:
        for times in (UNEVEN, UNEVEN[::-1]):
            past, s = times[count - 1 :: -1], times[count]
            total = (s - past[0]) / (1 - past[0])
            assert sum(exact_weights(past, s)) == pytest.approx(total, rel=1e-12)

    @pytest.mark.parametrize("t", [1e-12, 1e-6, 0.4])
    def test_weights_hold_over_any_step(self, t: float) -> None:
        """Where lambda takes a step h of up to 28, int u e^u du in closed form."""
        s, b = 0.6, 0.5 * t
        now, end, before = (math.log(u / (1 - u)) for u in (t, s, b))
        h = end - now
        older = s * (h - 1 + math.exp(-h)) / (before - now)
        assert exact_weights([t, b], s)[1] == pytest.approx(older, rel=1e-12)

    @every_solver
    def test_straight_flows_are_solved(self, solver: Solver, options, start: Tensor) -> None:
        noise, data = start, 0.3 * start.flip(-1) + 1
        times = [0.0, 0.1, 0.5, 0.6, 0.7, 1.0]
        forth = sample(lambda x, t: data - noise, noise, times, solver, **options).x
        torch.testing.assert_close(forth, data, rtol=0, atol=1e-13)
        back = invert(lambda x, t: data - noise, data, times, solver, **options).x
        torch.testing.assert_close(back, noise, rtol=0, atol=1e-13)

    @pytest.mark.parametrize(
        "solver, options, degree",
        [
            (dpmpp_2m, {"variant": "taylor"}, 1),
            (dpmpp_3m, {}, 2),
            (unipc, {"order": 3}, 2),
            (unipc, {"order": 3, "variant": "bh1"}, 2),
            (unipc, {"order": 4}, 3),
        ],
    )
    def test_data_polynomial_in_lambda_are_solved(self, solver, options, degree: int) -> None:
        """Once there are enough predictions, the error of x / (1 - t) stays what it is."""
        data = np.polynomial.Polynomial([0.3, -1.0, 0.5, 0.2][: degree + 1])

        def velocity(x: Tensor, t: float) -> Tensor:
            return (data(math.log(t / (1 - t))) - x) / (1 - t)

        def exact(t: float) -> float:
            lam = math.log(t / (1 - t))
            derivatives = [(-1) ** k * data.deriv(k)(lam) for k in range(1, degree + 1)]
            return t * (data(lam) + sum(derivatives))

        for run, times in ((sample, UNEVEN), (invert, UNEVEN[::-1])):
            errors: list[float] = []

            def note(step: Step, errors: list[float] = errors) -> None:
                errors.append((step.x.item() - exact(step.t)) / (1 - step.t))

            x = torch.full((1,), exact(times[0]), dtype=torch.float64)
            run(velocity, x, UNEVEN, solver, callback=note, **options)
            # UniPC's boundaries are predictions; the one before was corrected after it was shown.
            settled = errors[degree + 1 + (solver is unipc) :]
            assert len(settled) >= 2
            assert settled == pytest.approx([settled[0]] * len(settled), abs=1e-12)


class TestDiffusers:
    """Whose UniPC divides by infinity in the last step unless it is bh2 and lowers its order."""

    CASES = {
        "2M": (DPMSolverMultistepScheduler, {"solver_type": "midpoint"}, dpmpp_2m, {}),
        "2M taylor": (
            DPMSolverMultistepScheduler,
            {"solver_type": "heun"},
            dpmpp_2m,
            {"variant": "taylor"},
        ),
        **{
            f"UniPC-{order} {variant}": (
                UniPCMultistepScheduler,
                {"solver_type": variant, "solver_order": order, "lower_order_final": order < 3},
                unipc,
                {"order": order, "variant": variant},
            )
            for order in (1, 2, 3)
            for variant in ("bh1", "bh2")
        },
    }
    WHOLE = ("2M", "2M taylor", "UniPC-1 bh2", "UniPC-2 bh2")

    def check(self, case: str, start: Tensor, velocity: Callable, *, flow: bool, **config) -> None:
        """Compare the states; velocity(x, t, timestep) is told diffusers' timestep too."""
        family, own_config, solver, options = self.CASES[case]
        scheduler = family(**own_config, **config)
        scheduler.set_timesteps(12)
        scheduler.sigmas = scheduler.sigmas.double()
        sigmas, timesteps = scheduler.sigmas.tolist(), scheduler.timesteps.tolist()
        times = [1 - sigma if flow else 1 / (1 + sigma) for sigma in sigmas]
        # Its states are alpha data + sigma noise with another alpha than t on the VP path.
        scale = [1.0 if flow else (1 + sigma) / math.hypot(1, sigma) for sigma in sigmas]
        steps = len(timesteps) - (case not in self.WHOLE)

        states = [start]
        for i in range(steps):
            v = velocity(states[-1], times[i], timesteps[i])
            output = -v if flow else states[-1] - times[i] * v
            y = scheduler.step(output, timesteps[i], scale[i] * states[-1]).prev_sample
            states.append(y / scale[i + 1])

        shown: list[Tensor] = []
        told = dict(zip(times, timesteps, strict=False))
        sample(
            lambda x, t: velocity(x, t, told[t]),
            start,
            times,
            solver,
            callback=lambda step: shown.append(step.x),
            **options,
        )
        tolerance = 1e-10 if family is UniPCMultistepScheduler else 5e-6  # the other is in float32
        for mine, theirs in zip(shown[: steps + 1], states, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)

    @pytest.mark.parametrize("case", CASES)
    def test_runs_the_same_on_flows(self, case: str, start: Tensor) -> None:
        """Both see the velocity where diffusers does, at its timestep cut to an integer."""
        config = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}

        def velocity(x: Tensor, t: float, timestep: int) -> Tensor:
            return MIXTURE(x, 1 - timestep / 1000)

        self.check(case, start, velocity, flow=True, **config)

    @pytest.mark.parametrize("case", CASES)
    def test_runs_the_same_on_the_vp_path(self, case: str, start: Tensor) -> None:
        self.check(case, start, lambda x, t, timestep: MIXTURE(x, t), flow=False)


class TestEnds:
    @every_solver
    def test_from_noise_to_data_and_back(self, solver: Solver, options, start: Tensor) -> None:
        field, times = Gaussian(), grids.uniform(100)
        data = field.flow(start, 0.0, 1.0)
        for run, begin, end in ((sample, start, data), (invert, data, start)):
            found = run(field, begin, times, solver, **options).x
            assert (found - end).abs().max() < 2e-2
            single = run(field, begin.float(), times, solver, **options).x
            assert single.dtype == torch.float32
            assert (single - found).abs().max() < 5e-5

    @every_solver
    def test_two_steps_between_the_ends_are_euler_s(self, solver, options, start: Tensor) -> None:
        field, times = MIXTURE, [0.0, 0.4, 1.0]
        for run in (sample, invert):
            euler, found = (
                run(field, start, times, "euler").x,
                run(field, start, times, solver, **options).x,
            )
            torch.testing.assert_close(found, euler, rtol=0, atol=1e-13)

    @every_solver
    def test_what_was_predicted_at_an_end_is_left_out(self, solver, options, start) -> None:
        whole = sample(MIXTURE, start, [0.0, *UNEVEN], solver, **options).x
        first = sample(MIXTURE, start, [0.0, UNEVEN[0]]).x
        rest = sample(MIXTURE, first, UNEVEN, solver, **options).x
        torch.testing.assert_close(whole, rest, rtol=0, atol=1e-13)

    @every_solver
    def test_ends_on_the_predicted_data(self, solver: Solver, options, start: Tensor) -> None:
        picture = torch.full_like(start, 0.25)
        found = sample(
            lambda x, t: (picture - x) / (1 - t), start, grids.uniform(5), solver, **options
        )
        torch.testing.assert_close(found.x, picture)


class TestEvaluations:
    @every_solver
    def test_one_per_step_and_none_at_the_end(self, solver: Solver, options) -> None:
        times = grids.shifted(6, 2.0)
        assert evaluation_times(solver, times, **options) == times[:-1]
        assert evaluation_times(solver, times[::-1], **options) == times[:0:-1]

    @every_solver
    def test_what_is_shown_between_steps_is_where_a_run_to_there_ends(
        self, solver: Solver, options, start: Tensor
    ) -> None:
        shown: list[Tensor] = []
        sample(MIXTURE, start, UNEVEN, solver, callback=lambda s: shown.append(s.x), **options)
        for count in range(2, len(UNEVEN)):
            shorter = sample(MIXTURE, start, UNEVEN[:count], solver, **options).x
            assert torch.equal(shown[count - 1], shorter)


class TestEdits:
    def test_the_velocity_is_that_of_the_edited_state(self) -> None:
        seen: list[float] = []

        def velocity(x: Tensor, t: float) -> Tensor:
            seen.append(x.item())
            return -x

        def lift(step: Step) -> Tensor | None:
            return torch.full_like(step.x, 3.25) if step.index == 3 else None

        sample(velocity, torch.ones(1), grids.uniform(6), unipc, callback=lift)
        assert seen[3] == 3.25

    @every_solver
    @pytest.mark.parametrize("run", [sample, invert])
    def test_an_edit_is_carried_on(self, solver: Solver, options, run: Callable) -> None:
        """Where the data prediction does not depend on the state, as exactly as x / (1 - t)."""

        def velocity(x: Tensor, t: float) -> Tensor:
            return (math.sin(3 * t) - x) / (1 - t)

        def lift(step: Step) -> Tensor | None:
            shown.append(step.t)
            return step.x + 0.5 if step.index == 3 else None

        shown: list[float] = []
        go = partial(run, velocity, torch.ones(1, dtype=torch.float64), UNEVEN, solver, **options)
        lifted = go(callback=lift).x - go().x
        assert lifted.item() == pytest.approx(0.5 * (1 - shown[-1]) / (1 - shown[3]), rel=1e-12)

    def test_a_callback_that_gives_back_what_it_sees_changes_nothing(self, start: Tensor) -> None:
        plain = sample(MIXTURE, start, grids.uniform(6), unipc).x
        seen = sample(MIXTURE, start, grids.uniform(6), unipc, callback=lambda step: step.x.clone())
        assert torch.equal(seen.x, plain)


@pytest.mark.parametrize(
    "solver, options, message",
    [
        (dpmpp_2m, {"variant": "heun"}, "unknown variant 'heun'; known: midpoint, taylor"),
        (dpmpp_3m, {"variant": "taylor"}, "has no option 'variant'; it takes none"),
        (unipc, {"variant": "bh3"}, "unknown variant 'bh3', did you mean 'bh"),
        (unipc, {"order": 0}, "order must be 1, 2, 3 or 4, got 0"),
        (unipc, {"order": "2"}, "takes int as order, got '2'"),
    ],
)
def test_bad_input_is_named(solver: Solver, options, message: str) -> None:
    with pytest.raises(FlowkitError, match=message):
        sample(MIXTURE, torch.zeros(2), [0.0, 1.0], solver, **options)
