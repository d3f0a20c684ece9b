"""Flow-guided distillation: one step of a student, taught by pairs and by two steps of a flow.

    D(v(noise, 0), data - noise)  +  D(v(fresh, 0), t v + (1 - t) v_flow(fresh + t v, t))

The second term needs no ODE: fresh noise at every draw keeps the student from learning the pairs by
heart (Zhu et al., 2024, arXiv:2407.12718).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from flowkit.coupling import Batch
from flowkit.errors import FlowkitError
from flowkit.losses import Premetric
from flowkit.samplers.timesteps import TimeDensity
from flowkit.trainers.annealing import steady
from flowkit.trainers.loop import Loss, Phase
from flowkit.velocity import VelocityModel, expand_to, interpolate

__all__ = ["GuidedDistillation"]


class GuidedDistillation:
    """The direct term on pairs, and `weight` times the two-step term on fresh noise.

    model, premetric: as for FlowMatching.  times: of the direct term; Constant(0) distils, a
    curriculum is refused.
    flow: the frozen flow that made the pairs, from which the student starts.
    first: whose velocity at noise the first of the two steps takes: the "student"'s (published code
    and results; one evaluation of the flow less) or the "teacher"'s, i.e. the flow's (published
    formula).  No gradient flows into the target in either.
    between: the range of the time, uniform, at which the two steps meet.
    precision: opened around the flow's evaluations, e.g. accelerator.autocast.
    """

    phase: Phase | None = None

    def __init__(
        self,
        model: Any,
        times: TimeDensity,
        premetric: Premetric,
        *,
        flow: VelocityModel,
        first: Literal["student", "teacher"] = "student",
        weight: float = 1.0,
        between: tuple[float, float] = (0.2, 0.8),
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if first not in ("student", "teacher"):
            raise FlowkitError(f"first must be 'student' or 'teacher', got {first!r}")
        if not 0 <= between[0] <= between[1] <= 1:
            raise FlowkitError(f"between must be (low, high) within [0, 1], got {between}")
        self.model, self.times, self.premetric = model, steady(times), premetric
        self.flow, self.first, self.weight = flow, first, weight
        self.frozen = {"flow": flow}
        self.between, self.precision = between, precision

    def loss(self, batch: Batch) -> Loss:
        """batch: the flow's own pairs, noise and data (B, *)."""
        t = self.times.sample(len(batch), device=batch.data.device)
        x_t = interpolate(batch.noise, batch.data, t)
        fresh, start = torch.randn_like(batch.noise), torch.zeros_like(t)
        # one pass for both terms: a distributed wrapper wants one forward a backward
        twice = {name: torch.cat([value, value]) for name, value in batch.cond.items()}
        v = self.model(torch.cat([x_t, fresh]), torch.cat([t, start]), **twice)
        v_t, v_0 = v.chunk(2)
        target = self.two_steps(fresh, v_0.detach(), batch.cond)
        guide = Batch(fresh, fresh + target, batch.cond)
        direct = self.premetric(v_t, x_t, t, batch).mean()
        two_step = self.premetric(v_0, fresh, start, guide).mean()
        return Loss(direct + self.weight * two_step, {"direct": direct, "two_step": two_step})

    @torch.no_grad()
    def two_steps(self, noise: Tensor, v_0: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """The mean velocity of two Euler steps from `noise` to data, (B, *), without a gradient.

        v_0: the student's velocity there, (B, *).
        """
        low, high = self.between
        t = low + (high - low) * torch.rand(len(noise), device=noise.device)
        with self.precision():
            first = (
                v_0 if self.first == "student" else self.flow(noise, torch.zeros_like(t), **cond)
            )
            wide = expand_to(t, noise)
            second = self.flow(noise + wide * first, t, **cond)
        return wide * first + (1 - wide) * second
