"""Annealing reflow: a small net, which no teacher can initialise, is led from independent noise to
the teacher's pairs (Zhu et al., 2024, arXiv:2407.12718).

    noise_beta = sqrt(1 - beta^2) noise + beta fresh        beta(0) = 1  ->  0
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from flowkit.coupling import Annealed, Batch
from flowkit.errors import FlowkitError
from flowkit.losses import Premetric
from flowkit.registry import look_up
from flowkit.samplers.timesteps import Curriculum, TimeDensity
from flowkit.trainers.loop import Loss
from flowkit.trainers.matching import FlowMatching

__all__ = ["AnnealedReflow", "Annealing", "beta_at", "steady"]

_SCHEDULES: dict[str, Callable[[float, float], float]] = {  # of k / K, as in SlimFlow's code
    "linear": lambda share, beta: 1 - min(1.0, share),
    "exponential": lambda share, beta: math.exp(-share),
    "cosine": lambda share, beta: 0.5 * (1 + math.cos(math.pi * min(1.0, share))),
    "fixed": lambda share, beta: beta,
}


def beta_at(schedule: str, step: int, steps: int, *, beta: float = 0.0) -> float:
    """The beta, in [0, 1], of training step `step` (from 0) of a schedule that takes `steps`.

    "linear", "cosine": 0 from `steps` on.  "exponential": e^(-step / steps), which never is 0.
    "fixed": `beta`.  Raises FlowkitError for an unknown schedule, and for steps < 1.
    """
    rule = look_up("schedule of beta", schedule, _SCHEDULES)
    if steps < 1:
        raise FlowkitError(f"annealing takes at least 1 step, got {steps}")
    return rule(step / steps, beta)


class Annealing:
    """The phase of a run: sets the coupling's beta after every step, and is kept in checkpoints.

    coupling: what is annealed; it gets beta(0) at once.
    schedule, steps, beta: as for `beta_at`.
    stage: 0 while fresh noise is mixed in, 1 on the bare pairs.
    """

    def __init__(
        self, coupling: Annealed, schedule: str = "linear", steps: int = 1, *, beta: float = 0.0
    ) -> None:
        self.coupling, self.schedule, self.steps, self.fixed = coupling, schedule, steps, beta
        self.step = 0
        self._set()

    def update(self, loss: float) -> bool:
        """One step was made; returns whether the stage changed by it."""
        before = self.stage
        self.step += 1
        self._set()
        return self.stage != before

    def _set(self) -> None:
        self.coupling.beta = beta_at(self.schedule, self.step, self.steps, beta=self.fixed)
        self.stage = int(self.coupling.beta == 0)

    def _rule(self) -> dict[str, Any]:
        return {"schedule": self.schedule, "steps": self.steps, "beta": self.fixed}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: the step, and the schedule it belongs to."""
        return {"step": self.step, **self._rule()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; FlowkitError when that was another schedule."""
        theirs = {name: (state or {}).get(name) for name in self._rule()}
        if theirs != self._rule():
            raise FlowkitError(
                f"the checkpoint was annealed by {theirs}, this run by {self._rule()}; "
                "give the same annealing to resume it, or another output_dir"
            )
        self.step = state["step"]
        self._set()


def steady(times: TimeDensity) -> TimeDensity:
    """The density itself; FlowkitError for a curriculum, which nothing here would move on."""
    if isinstance(times, Curriculum):
        raise FlowkitError(
            "SlimFlow's stages have no use for a curriculum of times beside their own; "
            "choose another density, such as times={name: uniform}"
        )
    return times


class AnnealedReflow(FlowMatching):
    """Flow matching on an annealed coupling (Zhu et al., 2024, arXiv:2407.12718).

    model, times, premetric: as for FlowMatching; a curriculum is refused, having phases of its own.
    """

    def __init__(
        self, model: Any, times: TimeDensity, premetric: Premetric, *, annealing: Annealing
    ) -> None:
        super().__init__(model, steady(times), premetric)
        self.phase = self.annealing = annealing

    def loss(self, batch: Batch) -> Loss:
        """batch: noise and data (B, *), coupled with the present beta."""
        loss = super().loss(batch)
        loss.logs["beta"] = loss.value.new_tensor(self.annealing.coupling.beta)
        return loss
