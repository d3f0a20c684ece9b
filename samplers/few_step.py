"""Few-step sampling: flows that are nearly straight, and models trained to jump."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.samplers.evaluations import Draw, Evaluations, per_sample
from flowkit.velocity import FlowMap, Velocity

__all__ = ["consistency", "jump_to", "jumps", "rfpp"]


def rfpp(x: Tensor, times: Sequence[float]) -> Evaluations:
    """Predict the data, go back to the line from the initial noise (Lee et al., 2024,
    arXiv:2405.20320), 1 NFE per step.

    data = x_t + (1 - t) v,  x_s = (1 - s) noise + s data.  Equal to Euler for 1 and 2 steps from 0
    to 1, and for any number on a straight flow.  The noise is x / (1 - t) at the first time.
    Decreasing times run the mirror image: noise = x_t - t v,  x_s = (1 - s) noise + s data, with
    the data x / t at the first time.  On a curved flow more steps do not lead to its solution.
    """
    forwards = times[0] < times[-1]
    for t, s in pairwise(times):
        x, v = yield x, t
        if t == times[0]:
            kept = x / (1 - t) if forwards else x / t
        noise, data = (kept, x + (1 - t) * v) if forwards else (x - t * v, kept)
        x = (1 - s) * noise + s * data
    return x


def consistency(x: Tensor, times: Sequence[float], *, draw: Draw | None = None) -> Evaluations:
    """Multistep consistency sampling (Song et al., 2023, arXiv:2303.01469, algorithm 1), 1 NFE per
    step: jump to the data, go back with fresh noise.

    data = x_t + (1 - t) v,  x_s = (1 - s) noise_k + s data,  where x_t + (1 - t) v is the model's
    jump: a consistency model as a velocity, or jump_to(flow_map).
    draw: where the noise of step k comes from, per_sample(0) when left out; time 1 takes none.
    Raises FlowkitError for decreasing times.
    """
    if times[-1] < times[0]:
        raise FlowkitError(
            "solver 'consistency' cannot invert: it jumps to the data only; "
            "for a flow map use 'euler' on jumps(flow_map, times[::-1])"
        )
    draw = draw or per_sample()
    for k, (t, s) in enumerate(pairwise(times)):
        x, v = yield x, t
        x = x + (1 - t) * v
        if s < 1:
            x = (1 - s) * draw(x, k) + s * x
    return x


class jumps:  # noqa: N801 - reads as a function
    """A flow map as the velocity whose Euler steps are its jumps from each time to the next:
    sample(jumps(flow_map, times), noise, times, "euler") samples MeanFlow (Geng et al., 2025,
    arXiv:2505.13447), shortcut (Frans et al., 2024, arXiv:2410.12557) and consistency trajectory
    models (Kim et al., 2024, arXiv:2310.02279).

    times: those of the run, in its order: decreasing for an inversion.  t is one for the batch.
    Raises FlowkitError when called at a time from which no step starts.
    """

    def __init__(self, flow_map: FlowMap, times: Sequence[float]) -> None:
        self.flow_map, self.steps = flow_map, list(pairwise(float(t) for t in times))
        if not self.steps:
            raise FlowkitError(f"jumps needs at least a start and an end, got {list(times)}")

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        asked = float(t)
        start, s = min(self.steps, key=lambda step: abs(step[0] - asked))
        if abs(start - asked) > 1e-6:  # a time that went through float32 is still known
            raise FlowkitError(
                f"jumps() has no step from t={asked:.6g}, its {len(self.steps)} steps lead from "
                f"{self.steps[0][0]:.4g} to {self.steps[-1][1]:.4g}; give it the times of the run, "
                "decreasing for invert(), and use solver 'euler'"
            )
        return self.flow_map(x_t, start, s)


def jump_to(flow_map: FlowMap, s: float = 1.0) -> Velocity:
    """A flow map as the velocity of its jump to time s: x_t + (s - t) v lands there."""
    return lambda x_t, t: flow_map(x_t, t, s)
