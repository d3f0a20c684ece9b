"""The unified step: what a step does is a choice, made anew for each of them.

For a prediction q (velocity, noise or data), y = x / c(t) follows dy = q dm(t), and q is taken for
its Taylor series in a time tau of its own:

    velocity   c = 1       m = t             tau = t
    noise      c = t       m = 1 / t         tau = lambda(t) = log(t / (1 - t))
    data       c = 1 - t   m = 1 / (1 - t)   tau = lambda(t)

    x_s = x_t + (s - t) v_t + sum_{1 <= i < order} M_i D_i,   M_i = c(s) int (tau - tau_t)^i / i! dm

D_i are the derivatives at t of the polynomial through the predictions of the stencil.  In lambda,
M_i is h^{i+1} phi_{i+1} of the exponential integrators.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.samplers.dpm import log_snr
from flowkit.samplers.evaluations import Evaluations
from flowkit.samplers.exponential import change, gauss, to_data, to_noise, to_velocity
from flowkit.samplers.schedule_file import Schedule, Step

__all__ = ["derivative_weights", "unified"]


def unified(
    x: Tensor,
    times: Sequence[float],
    *,
    schedule: Schedule | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    mean: Tensor | None = None,
) -> Evaluations:
    """The step of USF (Liu et al., 2023, arXiv:2312.07243), 1 NFE each, as a schedule says.

    schedule: a Schedule, its dict or its file; None makes every step as "abm" does.  `times` are
    commonly its own; on others, or backwards, a step is taken as the schedule's step in which its
    middle lies.
    mean: of the data, for a schedule whose first step is analytic, in place of its own.  Where
    nothing is known of a sample but noise, its prediction is the data's mean: that step is free.
    A step that starts or ends where its tau is infinite is Euler's.  The pseudo corrector takes the
    step once more with one order and the prediction at its end added; that prediction is kept, at
    the corrected state.  The last step is not corrected.
    Euler, Adams-Bashforth, "abm", "dpmpp_2m" and "unipc" are points in this space.
    Raises FlowkitError for what is no schedule, and for an analytic step without a mean.
    """
    plan = _read(schedule)
    points: list[_Point] = []
    step, moved = Step(), x
    for t, s in pairwise(times):
        if plan.analytic and t <= plan.times[0] < s:
            v = (_mean_of(plan, mean, x) - x) / (1 - t)
        else:
            x, v = yield x, t
        here, start = _Point(t, x, v), points[:1]
        if start and step.corrector == "pseudo":
            more = Step(step.quantity, min(step.order + 1, 4), min(step.stencil + 1, 3))
            stencil = [*start, here, *points[1:]]
            corrected = _beyond_euler(stencil, t, more, step.corrector_relaxation)
            x = x + (corrected - moved)
        points = [here, *points][:4]
        step = plan.step_at(0.5 * (t + s))
        moved = _beyond_euler(points, s, step, step.relaxation)
        x = x + (s - t) * here.slope(step.quantity, x) + moved
    return x


def _mean_of(plan: Schedule, mean: Tensor | None, x: Tensor) -> Tensor:
    """The mean that was given, or the schedule's, like x."""
    if mean is None and plan.mean is None:
        raise FlowkitError(
            "the schedule's first step is analytic and it has no mean of the data; pass mean=..."
        )
    found = torch.as_tensor(plan.mean if mean is None else mean, dtype=x.dtype, device=x.device)
    pairs = zip(reversed(found.shape), reversed(x.shape), strict=False)
    if x.ndim > 1 and (found.ndim >= x.ndim or any(m not in (1, n) for m, n in pairs)):
        raise FlowkitError(
            f"the data's mean has shape {tuple(found.shape)}, samples have {tuple(x.shape[1:])}; "
            "search a schedule for this size, or one with analytic=false"
        )
    return found


@dataclass(frozen=True)
class _Point:
    """A state x at time t where the velocity v was found."""

    t: float
    x: Tensor
    v: Tensor

    def prediction(self, quantity: str) -> Tensor:
        """What the velocity says of the quantity."""
        return _PREDICTIONS[quantity](self.x, self.v, self.t)

    def slope(self, quantity: str, x: Tensor) -> Tensor:
        """The velocity at another state x that makes the same prediction there."""
        if x is self.x or quantity == "velocity":
            return self.v
        return self.v + (x - self.x) / (self.t if quantity == "noise" else self.t - 1)


_PREDICTIONS = {"velocity": to_velocity, "noise": to_noise, "data": to_data}


def _beyond_euler(points: list[_Point], s: float, step: Step, relaxation: str | float) -> Tensor:
    """sum M_i D_i of a step to s from points[0], through the points of its stencil."""
    quantity = step.quantity
    usable = [p for p in points if quantity == "velocity" or 0 < p.t < 1][: step.stencil + 1]
    weights: list[float] = []
    if usable[:1] == points[:1] and (quantity == "velocity" or 0 < s < 1):
        nodes = [p.t for p in usable]
        weights = [0.0, *derivative_weights(quantity, nodes, s, step.order, relaxation)]
    return change([p.prediction(quantity) for p in usable or points], weights)


def derivative_weights(
    quantity: str, nodes: Sequence[float], s: float, order: int, relaxation: str | float = 0.0
) -> list[float]:
    """The weight of q_j - q_0 for each node but the first in a step from nodes[0] to s.

    The polynomial through all nodes is cut after the term of degree order - 1.
    """
    tau = (lambda t: t) if quantity == "velocity" else log_snr
    origin, end = tau(nodes[0]), tau(s)
    h = end - origin
    # In units of h, so that the equations stay well scaled.
    offsets = np.array([(tau(node) - origin) / h for node in nodes[1:]])
    points, masses = gauss(origin, end)
    if quantity == "data":
        masses = masses * s * np.exp(points - end)
    elif quantity == "noise":
        masses = masses * (s - 1) * np.exp(end - points)
    powers = np.arange(1, len(nodes))
    moments = ((points - origin) / h) ** powers[:, None] @ masses
    moments[order - 1 :] = 0.0
    moments[:1] *= _relaxed(relaxation, -h if quantity == "data" else h)
    return np.linalg.solve(offsets ** powers[:, None], moments).tolist()


def _relaxed(relaxation: str | float, h: float) -> float:
    """What the first derivative is multiplied by in a step of length h."""
    if not isinstance(relaxation, str):
        return 1 + relaxation * abs(h)
    d = math.expm1(h)
    if relaxation == "bh1":
        return 0.5 * h * h / (d - h)
    if relaxation == "bh2":
        return 0.5 * h * d / (d - h)
    return 1 + {"exp+": 0.5, "exp-": -0.5}[relaxation] * d


_ABM = Schedule((0.0, 1.0), (Step(order=2, stencil=1, corrector="pseudo"),))


def _read(schedule: Schedule | Mapping[str, Any] | str | os.PathLike[str] | None) -> Schedule:
    if schedule is None:
        return _ABM
    if isinstance(schedule, str | os.PathLike):
        return Schedule.load(schedule)
    return Schedule.from_dict(schedule)
