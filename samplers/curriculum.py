"""The curriculum of denoising tasks: a density of t that grows from the noise towards the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.samplers.time_density import TimeDensity, Uniform

__all__ = ["Curriculum"]


class Curriculum(TimeDensity):
    """Easy times first (Kim et al., 2024, arXiv:2403.10348): stage n of N draws from the noisiest
    n/N of `base`, and stage N from all of it.

    base: the density of t that the last stage is.
    clusters: "mass" cuts base into num_stages parts of equal mass from t = 0 on, quantiles of the
    signal-to-noise ratio (the paper's EDM); "time" cuts [0, 1] into equal lengths (its DiT).  For
    a uniform base they are the same.
    patience: a stage ends when the smoothed loss has not beaten its best in more updates in a row
    than this; the first loss of a stage sets the mark.
    smoothing: the weight of a loss falls by this factor with every update; 0 takes losses raw.  The
    records of mini-batch losses are chance: on 1/2 (1 + e^(-k/1000)) + 0.05 N(0, 1) the default
    patience ends the stage at k = 930 with raw losses, at 3,400 with the default smoothing.

    Give update() the loss of every step, averaged over processes, with a weight that does not
    depend on t, and keep state_dict() in the checkpoint.
    """

    def __init__(
        self,
        base: TimeDensity | None = None,
        *,
        num_stages: int = 20,
        patience: int = 200,
        clusters: str = "mass",
        smoothing: float = 0.99,
    ) -> None:
        if num_stages < 1 or patience < 0 or not 0 <= smoothing < 1:
            raise FlowkitError(
                "expected num_stages >= 1, patience >= 0 and 0 <= smoothing < 1, "
                f"got {num_stages}, {patience} and {smoothing}"
            )
        if clusters not in ("mass", "time"):
            raise FlowkitError(f"clusters must be 'mass' or 'time', got {clusters!r}")
        self.base, self.num_stages, self.patience = base or Uniform(), num_stages, patience
        self.clusters, self.smoothing = clusters, smoothing
        self._begin(1)

    def _begin(self, stage: int) -> None:
        self.stage, self.stalled, self.updates = stage, 0, 0
        self.mean = self.best = math.inf

    @property
    def share(self) -> float:
        """How much of the base's mass the stage draws from."""
        done = self.stage / self.num_stages
        return done if self.clusters == "mass" or done == 1 else float(self.base.cdf(done))

    def update(self, loss: float | Tensor) -> bool:
        """Tell the loss of a step; returns whether the next stage begins."""
        if self.stage == self.num_stages:
            return False
        weight = 1 - self.smoothing
        if math.isfinite(loss := float(loss)):
            self.updates += 1
            weight = max(weight, 1 / self.updates)  # the plain mean at first
            self.mean = loss if weight == 1 else self.mean + weight * (loss - self.mean)
        self.stalled = 0 if self.mean < self.best else self.stalled + 1
        # Until there is enough to average, the mark follows: a lucky first batch must not set it.
        settling = weight > 1 - self.smoothing
        self.best = self.mean if settling else min(self.mean, self.best)
        advance = self.stalled > self.patience
        if advance:
            self._begin(self.stage + 1)
        return advance

    def state_dict(self) -> dict[str, Any]:
        """JSON-able position in the curriculum."""
        state = {name: getattr(self, name) for name in ("stage", "stalled", "updates")}
        return state | {name: _or_none(getattr(self, name)) for name in ("mean", "best")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the position of state_dict()."""
        if not 1 <= state["stage"] <= self.num_stages:
            raise FlowkitError(
                f"the state is of stage {state['stage']}, this curriculum has {self.num_stages}; "
                "use the num_stages it was saved with"
            )
        self._begin(state["stage"])
        for name in self.state_dict().keys() & state.keys():
            if state[name] is not None:
                setattr(self, name, state[name])

    def quantile(self, u: Tensor) -> Tensor:
        return self.base.quantile(u * self.share)

    def _pdf(self, t: Tensor) -> Tensor:
        inside = self.base.cdf(t) <= self.share
        return torch.where(inside, self.base.pdf(t) / self.share, torch.zeros_like(t))

    def _cdf(self, t: Tensor) -> Tensor:
        return (self.base.cdf(t) / self.share).clamp(max=1)


def _or_none(value: float) -> float | None:
    return None if value == math.inf else value
