"""Flow matching, and with it reflow: a coupling x a density of t x a premetric."""

from __future__ import annotations

from typing import Any

from flowkit.coupling import Batch
from flowkit.losses import Premetric
from flowkit.samplers.timesteps import Curriculum, TimeDensity
from flowkit.trainers.loop import Loss, Phase
from flowkit.velocity import interpolate

__all__ = ["FlowMatching"]


class FlowMatching:
    """Fit v to the straight lines between coupled noise and data (Liu et al., 2022,
    arXiv:2209.03003, eq. 1; Lee et al., 2024, arXiv:2405.20320).

    Everything is in the three parts: independent coupling gives a 1-rectified flow, pairs of an
    ODE the next one; a time density at t = 0 distils to one step; a curriculum is a density with
    phases.
    """

    def __init__(self, model: Any, times: TimeDensity, premetric: Premetric) -> None:
        self.model, self.times, self.premetric = model, times, premetric
        self.phase: Phase | None = times if isinstance(times, Curriculum) else None

    def loss(self, batch: Batch) -> Loss:
        """batch: noise and data (B, *)."""
        t = self.times.sample(len(batch), device=batch.data.device)
        x_t = interpolate(batch.noise, batch.data, t)
        v = self.model(x_t, t, **batch.cond)
        return Loss(self.premetric(v, x_t, t, batch).mean(), {"t": t.mean()})
