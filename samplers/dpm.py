"""DPM-Solver++ and UniPC: polynomials in lambda(t) = log(t / (1 - t)) for the data prediction D.

    x_s = x_t + (s - t) v_t + sum_{j >= 1} w_j (D_j - D_0),   w_j = (1 - s) int L_j d(e^lambda)

which flowkit/samplers/exponential.py derives.  lambda is infinite at t = 0 and t = 1: a step that
starts or ends there is Euler's, and no polynomial goes through what was predicted there.  The
orders hold inside (0, 1); from 0 to 1 some steps in lambda stay long, and in the end 2 is the most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from flowkit.registry import look_up
from flowkit.samplers.evaluations import Evaluations
from flowkit.samplers.exponential import (
    adams,
    change,
    checked_order,
    gauss,
    lagrange_weights,
    to_data,
)

__all__ = ["dpmpp_2m", "dpmpp_3m", "unipc"]


def dpmpp_2m(x: Tensor, times: Sequence[float], *, variant: str = "midpoint") -> Evaluations:
    """DPM-Solver++(2M) (Lu et al., 2022, arXiv:2211.01095, algorithm 2): order 2, 1 NFE per step.

    variant: "midpoint", the paper's weight; "taylor", the exact one.
    Raises FlowkitError for an unknown variant.
    """
    weights = look_up("variant", variant, {"midpoint": midpoint_weights, "taylor": exact_weights})
    return (yield from adams(x, times, 2, quantity=to_data, weights=weights))


def dpmpp_3m(x: Tensor, times: Sequence[float]) -> Evaluations:
    """DPM-Solver++(3M) with the exact weights, 1 NFE per step: order 3, which its Euler start and
    the singular ends of [0, 1] hold down to 2.

    It is UniPC's predictor of order 3.  The authors' code, and diffusers after it, takes half of
    the second derivative, which leaves order 2 anywhere.
    """
    return (yield from adams(x, times, 3, quantity=to_data, weights=exact_weights))


def unipc(
    x: Tensor, times: Sequence[float], *, order: int = 2, variant: str = "bh2"
) -> Evaluations:
    """UniPC (Zhao et al., 2023, arXiv:2302.04867): order `order` + 1, 1 NFE per step.

    A step is predicted from the newest `order` data predictions, and corrected with the one that
    the next step begins with, made at the predicted point; the last step is not corrected.
    A state that was edited between two steps stays so, with the correction added to it.
    order: 1 to 4, of the predictor.
    variant: "bh1" or "bh2", the paper's B(h), which scales the weights that are not exact: the
    second-order predictor's and the first-order corrector's.
    Raises FlowkitError for an unknown order or variant.
    """
    count = checked_order(order)
    weights = partial(uni_weights, scale=look_up("variant", variant, {"bh1": bh1, "bh2": bh2}))
    known: list[float] = []
    data: list[Tensor] = []
    predicted = torch.zeros_like(x)
    for t, s in pairwise(times):
        x, v = yield x, t
        new = to_data(x, v, t)
        if known:
            corrected = change([data[0], new, *data[1:]], weights([known[0], t, *known[1:]], t))
            correction = corrected - predicted
            x, v = x + correction, v - correction / (1 - t)  # towards the same data
        if 0 < t < 1:
            known, data = [t, *known][:count], [new, *data][:count]
        x = x + (s - t) * v
        if known and 0 < s < 1:
            predicted = change(data, weights(known, s))
            x = x + predicted
    return x


Scale = Callable[[float, float], float]


def bh1(t: float, s: float) -> float:
    """alpha(s) h, where h = lambda(s) - lambda(t)."""
    return s * (log_snr(s) - log_snr(t))


def bh2(t: float, s: float) -> float:
    """alpha(s) (1 - e^-h): the weight of D_0 in Euler's step."""
    return (s - t) / (1 - t)


def uni_weights(times: Sequence[float], s: float, scale: Scale) -> list[float]:
    """The weights of predictor and corrector alike: the corrector's times hold s itself."""
    return midpoint_weights(times, s, scale) if len(times) == 2 else exact_weights(times, s)


def midpoint_weights(times: Sequence[float], s: float, scale: Scale = bh2) -> list[float]:
    """The line through D_0 and D_1, at its value in the middle of the step."""
    t, other = times
    euler = bh2(t, s)
    if not 0 < s < 1 or not 0 < other < 1:
        return [euler]
    now = log_snr(t)
    w = scale(t, s) * 0.5 * (log_snr(s) - now) / (log_snr(other) - now)
    return [euler - w, w]


def exact_weights(times: Sequence[float], s: float) -> list[float]:
    """(1 - s) int L_j d(e^lambda) over the step."""
    if not 0 < s < 1:
        return [bh2(times[0], s)]
    nodes, end = [log_snr(t) for t in times if 0 < t < 1], log_snr(s)
    points, masses = gauss(nodes[0], end)
    return lagrange_weights(nodes, points, s * np.exp(points - end) * masses)


def log_snr(t: float) -> float:
    """lambda(t), for t in (0, 1)."""
    return math.log(t / (1 - t))
