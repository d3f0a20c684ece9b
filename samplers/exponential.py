"""DEIS: what is known of the flow is solved exactly, what the network predicts by a polynomial.

For the velocity, the noise or the data prediction q, y = x / c(t) follows dy = q dm(t):

    velocity   c = 1       m = t             q = v
    noise      c = t       m = 1 / t         q = x - t v
    data       c = 1 - t   m = 1 / (1 - t)   q = x + (1 - t) v

A step from t to s puts the polynomial through the newest predictions q_0, q_1, ... in q's place.
The weight of q_j is an integral over the step of its Lagrange polynomial, w_j = c(s) int L_j dm,
and with q_0 alone the step is Euler's, whatever q is.  As the L_j add up to 1,

    x_s = x_t + (s - t) v_t + sum_{j >= 1} w_j (q_j - q_0)

which is finite at t = 0 and t = 1 too.  A step that ends where m is infinite uses q_0 alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.registry import look_up
from flowkit.samplers.evaluations import Evaluations

__all__ = [
    "TABLEAUS",
    "Weights",
    "adams",
    "change",
    "checked_order",
    "deis",
    "gauss",
    "lagrange_weights",
    "to_data",
]

Array = NDArray[np.float64]

Weights = Callable[[Sequence[float], float], list[float]]
"""weights(times, s): the w_j of a step from times[0] to s, where q_j was predicted at times[j].

A list shorter than `times` leaves the oldest predictions out.
"""

_POINTS, _MASSES = np.polynomial.legendre.leggauss(32)


def deis(
    x: Tensor,
    times: Sequence[float],
    *,
    method: str = "tab",
    order: int | str = 2,
    quantity: str | None = None,
) -> Evaluations:
    """The solvers of DEIS (Zhang & Chen, 2023, arXiv:2204.13902), on the straight path.

    method: "tab", a polynomial in t (for the velocity Adams-Bashforth on any grid); "rhoab", a
    polynomial in rho = (1 - t) / t; "ipndm", Adams-Bashforth's weights for even steps on whatever
    grid (Liu et al., 2022, arXiv:2202.09778); "rhork", Runge-Kutta in rho.
    order: 1 to 4 at 1 NFE per step; the polynomial has one degree less, lower still in the first
    steps, of which Euler's in the end leaves order 2 to the whole run.  "rhork" takes 1 to 4 NFE
    per step, but 1 (Euler's) for a step from or to t = 0, where rho is infinite; for it order 3
    is Kutta's rule, and a name in TABLEAUS any rule.
    quantity: what "tab" interpolates: "velocity" (if left out), "noise" or "data".  "ipndm" takes
    the velocity, "rhoab" and "rhork" the noise.
    Raises FlowkitError for an unknown method, order or quantity.
    """
    rules = look_up("DEIS method", method, _METHODS)
    rule = look_up(f"quantity of {method!r}", quantity or next(iter(rules)), rules)
    return (yield from rule(x, times, order))


def adams(
    x: Tensor,
    times: Sequence[float],
    order: int | str,
    *,
    quantity: Callable[[Tensor, Tensor, float], Tensor],
    weights: Weights,
) -> Evaluations:
    """x_s = x_t + (s - t) v_t + sum_{j >= 1} w_j (q_j - q_0), over the newest `order` predictions.

    quantity(x_t, v_t, t): the prediction q.  Raises FlowkitError unless order is 1, 2, 3 or 4.
    """
    count = checked_order(order)
    known: list[float] = []
    predictions: list[Tensor] = []
    for t, s in pairwise(times):
        x, v = yield x, t
        known = [t, *known][:count]
        predictions = [quantity(x, v, t), *predictions][:count]
        x = x + (s - t) * v
        if len(known) > 1:
            x = x + change(predictions, weights(known, s))
    return x


def rho_runge_kutta(x: Tensor, times: Sequence[float], order: int | str) -> Evaluations:
    """A Runge-Kutta rule for dy / drho = noise, where y = x / t and rho = 1 / t - 1."""
    rows, last = look_up("order of 'rhork'", str(_BY_ORDER.get(order, order)), TABLEAUS)
    for t, s in pairwise(times):
        x, v = yield x, t
        euler = x + (s - t) * v
        if t == 0 or s == 0:
            x = euler
            continue
        step, noises = 1 / s - 1 / t, [x - t * v]
        for row in rows:
            u = s if sum(row) == 1 else 1 / (1 / t + sum(row) * step)
            stage = x + (u - t) * v + change(noises, [u * step * a for a in row])
            _, v_u = yield stage, u
            noises.append(stage - u * v_u)
        x = euler + change(noises, [s * step * b for b in last])
    return x


def change(predictions: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_{j >= 1} w_j (q_j - q_0): what the other predictions add to Euler's step with q_0."""
    first, *others = predictions
    pairs = zip(weights[1:], others, strict=False)  # a prediction without a weight is left out
    return sum((w * (q - first) for w, q in pairs), start=torch.zeros_like(first))


def gauss(start: float, end: float) -> tuple[Array, Array]:
    """Points and masses of the Gauss-Legendre rule for integrals from start to end."""
    half = 0.5 * (end - start)
    return start + half * (1 + _POINTS), half * _MASSES


def lagrange_weights(nodes: Sequence[float], points: Array, masses: Array) -> list[float]:
    """sum_i masses_i L_j(points_i) for the Lagrange polynomial L_j of each node."""
    weights = []
    for node in nodes:
        terms = masses
        for other in nodes:
            if other != node:
                terms = terms * (points - other) / (node - other)
        weights.append(float(terms.sum()))
    return weights


def checked_order(order: object) -> int:
    """order, or FlowkitError unless it is 1, 2, 3 or 4."""
    if not isinstance(order, int) or not 1 <= order <= 4:
        raise FlowkitError(f"order must be 1, 2, 3 or 4, got {order!r}")
    return order


def to_velocity(x: Tensor, v: Tensor, t: float) -> Tensor:
    """The velocity itself."""
    return v


def to_noise(x: Tensor, v: Tensor, t: float) -> Tensor:
    """The noise prediction."""
    return x - t * v


def to_data(x: Tensor, v: Tensor, t: float) -> Tensor:
    """The data prediction."""
    return x + (1 - t) * v


def t_velocity(times: Sequence[float], s: float) -> list[float]:
    """int L_j(t) dt."""
    return lagrange_weights(times, *gauss(times[0], s))


def t_noise(times: Sequence[float], s: float) -> list[float]:
    """s int L_j(t) d(1/t), by way of z = log t, in which the integrand has no pole."""
    if s == 0:
        return [1.0]
    z, dz = gauss(math.log(times[0]), math.log(s))
    return lagrange_weights(times, np.exp(z), -s * np.exp(-z) * dz)


def t_data(times: Sequence[float], s: float) -> list[float]:
    """(1 - s) int L_j(t) d(1/(1 - t)): that of the noise, seen from the other end."""
    return t_noise([1 - t for t in times], 1 - s)


def rho_noise(times: Sequence[float], s: float) -> list[float]:
    """s int L_j(rho) d(rho), without what was predicted where rho is infinite."""
    if s == 0:
        return [1.0]
    nodes = [(1 - t) / t for t in times if t > 0]
    rho, mass = gauss(nodes[0], (1 - s) / s)
    return lagrange_weights(nodes, rho, s * mass)


def even_velocity(times: Sequence[float], s: float) -> list[float]:
    """int L_j(t) dt as if all steps were as long as this one."""
    return [(s - times[0]) * w for w in _ADAMS_BASHFORTH[len(times)]]


_ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}

Tableau = tuple[Sequence[Sequence[float]], Sequence[float]]

# Butcher's tableaus: the rows of a after the first, each of which adds up to its c, and b.
TABLEAUS: dict[str, Tableau] = {
    "euler": ([], [1.0]),
    "heun": ([[1.0]], [1 / 2, 1 / 2]),
    "kutta": ([[1 / 2], [-1.0, 2.0]], [1 / 6, 2 / 3, 1 / 6]),
    "ralston": ([[1 / 2], [0.0, 3 / 4]], [2 / 9, 1 / 3, 4 / 9]),
    "heun3": ([[1 / 3], [0.0, 2 / 3]], [1 / 4, 0.0, 3 / 4]),
    "houwen": ([[8 / 15], [1 / 4, 5 / 12]], [1 / 4, 0.0, 3 / 4]),
    "ssprk3": ([[1.0], [1 / 4, 1 / 4]], [1 / 6, 1 / 6, 2 / 3]),
    "rk4": ([[1 / 2], [0.0, 1 / 2], [0.0, 0.0, 1.0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
}
_BY_ORDER: dict[int | str, str] = {1: "euler", 2: "heun", 3: "kutta", 4: "rk4"}

_METHODS: dict[str, dict[str, Callable[[Tensor, Sequence[float], int | str], Evaluations]]] = {
    "tab": {
        "velocity": partial(adams, quantity=to_velocity, weights=t_velocity),
        "noise": partial(adams, quantity=to_noise, weights=t_noise),
        "data": partial(adams, quantity=to_data, weights=t_data),
    },
    "rhoab": {"noise": partial(adams, quantity=to_noise, weights=rho_noise)},
    "ipndm": {"velocity": partial(adams, quantity=to_velocity, weights=even_velocity)},
    "rhork": {"noise": rho_runge_kutta},
}
