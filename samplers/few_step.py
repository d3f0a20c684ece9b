"""Solvers for flows that are nearly straight, which a few steps solve."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.samplers.evaluations import Evaluations

__all__ = ["rfpp"]


def rfpp(x: Tensor, times: Sequence[float]) -> Evaluations:
    """Predict the data, go back to the line from the initial noise (Lee et al., 2024,
    arXiv:2405.20320), 1 NFE per step.

    data = x_t + (1 - t) v,  x_s = (1 - s) noise + s data.  Equal to Euler for 1 and 2 steps from 0
    to 1, and for any number on a straight flow.  The noise is x / (1 - t) at the first time.
    Raises FlowkitError for decreasing times: the rule needs the noise that inversion looks for.
    """
    if times[-1] < times[0]:
        raise FlowkitError(
            "solver 'rfpp' cannot invert: its rule needs the initial noise; "
            "use 'euler' or 'midpoint' on the same times"
        )
    noise = x / (1 - times[0])
    for t, s in pairwise(times):
        x, v = yield x, t
        x = (1 - s) * noise + s * (x + (1 - t) * v)
    return x
