"""Few-step sampling: the rule of rfpp in both directions, consistency sampling, flow maps."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchLCMScheduler
from torch import Tensor

from flowkit.analytic import Gaussian, Mixture, normal_quantiles
from flowkit.errors import FlowkitError
from flowkit.noise import keyed_noise
from flowkit.samplers import evaluation_times, grids, invert, sample
from flowkit.samplers.evaluations import per_sample
from flowkit.samplers.few_step import consistency, jump_to, jumps, rfpp

FIELD = Mixture((0.4, 0.6), (-0.9, 0.7), (0.3, 0.2))
UNEVEN = [0.0, 0.05, 0.2, 0.45, 0.7, 1.0]


@pytest.fixture(scope="module")
def start() -> Tensor:
    return normal_quantiles()


class GaussianMap:
    """The exact flow map of Gaussian data; it keeps where it was asked."""

    def __init__(self, mean=0.7, std=0.4) -> None:
        self.velocity, self.asked = Gaussian(mean, std), []

    def __call__(self, x_t, t, s):
        self.asked.append((t, s))
        if t == s:
            return self.velocity(x_t, t)
        return (self.velocity.flow(x_t, t, s) - x_t) / (s - t)


class TestRfppBackwards:
    @pytest.mark.parametrize("times", [UNEVEN, grids.from_start(0.2, 4), UNEVEN[:4]])
    def test_time_reversal(self, times, start):
        """Backwards is the same rule, forwards on the mirrored flow."""
        back = invert(FIELD, start, times, rfpp).x
        mirrored = [1 - t for t in reversed(times)]
        forth = sample(lambda x, t: -FIELD(x, 1 - t), start, mirrored, rfpp).x
        torch.testing.assert_close(back, forth)

    @pytest.mark.parametrize("n", [1, 2])
    def test_is_euler_for_one_and_two_steps(self, n, start):
        ours = invert(FIELD, start, grids.uniform(n), rfpp).x
        euler = invert(FIELD, start, grids.uniform(n), "euler").x
        torch.testing.assert_close(ours, euler, rtol=0, atol=1e-13)

    def test_differs_from_euler_for_three_steps(self, start):
        ours = invert(FIELD, start, grids.uniform(3), rfpp).x
        euler = invert(FIELD, start, grids.uniform(3), "euler").x
        assert (ours - euler).abs().max() > 1e-2

    def test_comes_back_on_a_straight_flow(self, start):
        data = 0.3 * start.flip(-1) + 1
        there = sample(lambda x, t: data - start, start, UNEVEN, rfpp).x
        torch.testing.assert_close(there, data)
        back = invert(lambda x, t: data - start, there, UNEVEN, rfpp).x
        torch.testing.assert_close(back, start)

    def test_ends_on_the_predicted_noise(self, start):
        """With a perfect prediction of one noise it lands there, from t * data too."""
        noise, times = torch.full_like(start, 0.25), grids.uniform(5)[:-1]
        found = invert(lambda x, t: (x - noise) / t, times[-1] * start, times, rfpp)
        torch.testing.assert_close(found.x, noise)

    def test_costs_one_evaluation_per_step(self):
        assert evaluation_times(rfpp, UNEVEN[::-1]) == UNEVEN[:0:-1]

    @pytest.mark.parametrize("run", [sample, invert])
    def test_float32_follows_float64(self, run, start):
        exact, found = (run(FIELD, x, UNEVEN, rfpp).x for x in (start, start.float()))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("run", [sample, invert])
    def test_an_edit_of_the_first_state_counts(self, run, start):
        def replace(step):
            return start.flip(-1) if step.index == 0 else None

        edited = run(FIELD, start, UNEVEN, rfpp, callback=replace).x
        torch.testing.assert_close(edited, run(FIELD, start.flip(-1), UNEVEN, rfpp).x)


class TestConsistency:
    def test_is_its_recursion(self, start):
        drawn = []

        def draw(x, k):
            drawn.append(k)
            return torch.full_like(x, 0.1 * (k + 1))

        times = [0.1, 0.3, 0.6, 1.0]
        found = sample(FIELD, start, times, consistency, draw=draw).x
        x = start
        for k, (t, s) in enumerate(pairwise(times)):
            x = (1 - s) * 0.1 * (k + 1) + s * (x + (1 - t) * FIELD(x, t))
        torch.testing.assert_close(found, x)
        assert drawn == [0, 1]

    def test_one_step_is_the_jump(self, start):
        found = sample(jump_to(GaussianMap()), start, [0, 1], consistency).x
        torch.testing.assert_close(found, Gaussian().flow(start, 0, 1))

    def test_ends_where_the_grid_ends(self, start):
        """At t < 1 the state is a noisy one, of the noise that draw gives."""
        found = sample(
            jump_to(GaussianMap()), start, [0, 0.75], consistency, draw=lambda x, k: 2 + 0 * x
        ).x
        torch.testing.assert_close(found, 0.25 * 2 + 0.75 * Gaussian().flow(start, 0, 1))

    @pytest.mark.parametrize("times", [[0.0, 0.5, 1.0], UNEVEN])
    def test_keeps_the_distribution_of_the_data(self, times):
        """Exact jumps from exact noisy states: N(0.7, 0.4^2) whatever the number of steps."""
        noise = keyed_noise(0, range(64), (256,)).double()
        x = sample(jump_to(GaussianMap()), noise, times, consistency).x
        assert x.mean().item() == pytest.approx(0.7, abs=4 * 0.4 / 128)
        assert x.std().item() == pytest.approx(0.4, abs=4 * 0.4 / 128 / 2**0.5)
        # Only the last noise is left in the result.
        last = per_sample()(noise, len(times) - 3)
        together = torch.corrcoef(torch.stack([x.flatten(), last.flatten()]))[0, 1]
        assert 0.1 < together < 0.99

    def test_equals_the_lcm_scheduler_of_diffusers(self, start):
        x = start.float()
        scheduler = FlowMatchLCMScheduler(shift=3.0)
        scheduler.set_timesteps(4, device="cpu")
        times = [1 - sigma.item() for sigma in scheduler.sigmas]
        generator = torch.Generator().manual_seed(0)
        theirs = x
        for t, timestep in zip(times, scheduler.timesteps, strict=False):
            output = -FIELD(theirs, t)
            theirs = scheduler.step(output, timestep, theirs, generator=generator).prev_sample
        again = torch.Generator().manual_seed(0)
        ours = sample(
            FIELD, x, times, consistency, draw=lambda x, k: torch.randn(x.shape, generator=again)
        ).x
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    def test_a_sample_does_not_depend_on_its_batch(self):
        noise = keyed_noise(3, range(6), (1, 2, 2))
        whole = sample(FIELD, noise, UNEVEN, consistency, draw=per_sample(7)).x
        alone = sample(FIELD, noise[4:5], UNEVEN, consistency, draw=per_sample(7, [4])).x
        torch.testing.assert_close(alone, whole[4:5])
        other = sample(FIELD, noise, UNEVEN, consistency, draw=per_sample(8)).x
        assert (other - whole).abs().min() > 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_keeps_the_dtype_and_costs_one_evaluation_per_step(self, dtype, start):
        result = sample(FIELD, start.to(dtype), UNEVEN, consistency)
        assert result.x.dtype == dtype and result.x.isfinite().all()
        assert result.nfe == len(UNEVEN) - 1
        assert evaluation_times(consistency, UNEVEN) == UNEVEN[:-1]

    def test_refuses_to_invert(self, start):
        with pytest.raises(FlowkitError, match="'consistency' cannot invert"):
            invert(FIELD, start, UNEVEN, consistency)


class TestJumps:
    @pytest.mark.parametrize("times", [[0.0, 1.0], [0.0, 0.3, 1.0], UNEVEN, grids.edm(7)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_an_exact_flow_map_is_exact_in_any_number_of_steps(self, times, dtype, start):
        flow_map, first, last = GaussianMap(), times[0], times[-1]
        data = Gaussian().flow(start, first, last)
        there = sample(jumps(flow_map, times), start.to(dtype), times, "euler")
        assert there.nfe == len(times) - 1 == len(flow_map.asked)
        assert flow_map.asked == list(pairwise(times))
        back = invert(jumps(flow_map, times[::-1]), data.to(dtype), times, "euler")
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        for found, exact in ((there.x, data), (back.x, start)):
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)

    def test_every_state_on_the_way_is_exact(self, start):
        states = {}

        def keep(step):
            states[step.t] = step.x

        sample(jumps(GaussianMap(), UNEVEN), start, UNEVEN, "euler", callback=keep)
        for t in UNEVEN:
            torch.testing.assert_close(states[t], Gaussian().flow(start, 0, t))

    def test_passes_the_times_of_its_grid(self, start):
        """Times that came as tensors, through float32 too, are those of the grid to the map."""
        flow_map = GaussianMap()
        velocity = jumps(flow_map, torch.tensor(UNEVEN, dtype=torch.float64))
        velocity(start, torch.tensor(0.2))
        velocity(start, 0.7 + 1e-7)
        assert flow_map.asked == [(0.2, 0.45), (0.7, 1.0)]

    @pytest.mark.parametrize("times, asked", [(UNEVEN, 1.0), (UNEVEN, 0.3), (UNEVEN[::-1], 0.0)])
    def test_a_time_without_a_step_is_refused(self, times, asked, start):
        message = rf"no step from t={asked:g}, its 5 steps lead from {times[0]:g} to {times[-1]:g}"
        with pytest.raises(FlowkitError, match=message):
            jumps(GaussianMap(), times)(start, asked)

    def test_other_solvers_and_directions_are_refused(self, start):
        with pytest.raises(FlowkitError, match="use solver 'euler'"):
            sample(jumps(GaussianMap(), UNEVEN), start, UNEVEN, "midpoint")
        with pytest.raises(FlowkitError, match=r"decreasing for invert\(\)"):
            invert(jumps(GaussianMap(), UNEVEN), start, UNEVEN, "euler")

    def test_one_time_is_no_grid(self):
        with pytest.raises(FlowkitError, match="at least a start and an end"):
            jumps(GaussianMap(), [0.5])


def test_jump_to_aims_at_one_time(start):
    velocity = jump_to(GaussianMap(), 0.6)
    for t in (0.0, 0.2, 0.9):
        torch.testing.assert_close(
            start + (0.6 - t) * velocity(start, t), Gaussian().flow(start, t, 0.6)
        )
    torch.testing.assert_close(velocity(start, 0.6), Gaussian()(start, 0.6))
    torch.testing.assert_close(
        start + 0.8 * jump_to(GaussianMap())(start, 0.2), Gaussian().flow(start, 0.2, 1)
    )
