"""Multistep solvers: a step also looks at the velocities of the steps before it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.samplers.evaluations import Evaluations

__all__ = ["ab2", "ab3", "ab4", "abm", "adams_bashforth_weights", "fireflow"]


def ab2(x: Tensor, times: Sequence[float]) -> Evaluations:
    """Adams-Bashforth, order 2 on any grid, 1 NFE per step; the first step is Euler's.

    x_s = x_t + h [(1 + r/2) v_t - (r/2) v_before],  r = h / h_before.
    """
    v_before, h_before = None, 0.0
    for t, s in pairwise(times):
        x, v = yield x, t
        h = s - t
        if v_before is None:
            x = x + h * v
        else:
            r = h / h_before
            x = x + h * ((1 + 0.5 * r) * v - 0.5 * r * v_before)
        v_before, h_before = v, h
    return x


def ab3(x: Tensor, times: Sequence[float]) -> Evaluations:
    """Adams-Bashforth, order 3 on any grid, 1 NFE per step.

    x_s = x_t + integral from t to s of the parabola through the last three velocities.  The first
    three steps integrate anew from the first time, through all velocities so far, which mends what
    the lower orders of the start have missed, so they do not hold the order down.
    """
    return (yield from _adams_bashforth(x, times, 3))


def ab4(x: Tensor, times: Sequence[float], *, midpoint_first: bool = False) -> Evaluations:
    """Adams-Bashforth with four velocities on any grid, 1 NFE per step; it starts like ab3.

    Below some 20 steps, and where steps grow fast, it extrapolates too far: ab3 does better.
    midpoint_first: order 4 throughout for 1 NFE more, the first step by the midpoint rule; else
    Euler's leaves an error of order 3, seen beyond some 100 steps forwards and 20 backwards.
    """
    return (yield from _adams_bashforth(x, times, 4, midpoint_first))


def abm(x: Tensor, times: Sequence[float], *, order: int = 3) -> Evaluations:
    """Adams-Bashforth-Moulton, 1 NFE per step: predict a step, correct it with its end's velocity.

    predictor   x_s = x_t + integral from t to s through the last order - 1 velocities
    corrector   the same through one velocity more, the one found at the predicted x_s

    The velocity at the predicted state serves the corrector and the next step, as in UniPC (Zhao et
    al., 2023, arXiv:2302.04867), here in t, where a flow has no singular end.  The last step is
    only predicted.  order: of the whole, 2 to 4; it starts with lower ones.
    Best on grids.power, whose steps shorten towards the data.
    """
    if order not in (2, 3, 4):
        raise FlowkitError(f"abm has orders 2, 3 and 4, got order={order!r}")
    nodes: list[float] = []
    slopes: list[Tensor] = []
    moved: Tensor | float = 0.0  # by the last prediction, to be corrected
    for t, s in pairwise(times):
        x, v = yield x, t
        nodes, slopes = [*nodes, t][-order:], [*slopes, v][-order:]
        if len(nodes) > 1:  # on top of what a caller may have made of the predicted state
            x = x + (_integral(nodes, slopes, nodes[-2], t) - moved)
        moved = _integral(nodes[1 - order :], slopes[1 - order :], t, s)
        x = x + moved
    return x


def fireflow(x: Tensor, times: Sequence[float]) -> Evaluations:
    """Order 2, 1 NFE per step and 1 more: the midpoint rule, led to the middle of a step by the
    slope of the middle before (FireFlow, Deng et al., 2024, arXiv:2412.07517).

    x_s = x_t + h m,  m = v(x_t + h/2 m_before, t + h/2);  the first m_before is v_t.
    After the first time it evaluates between the grid times alone, so a callback sees the state at
    the first and at the last time only.
    """
    x, slope = yield x, times[0]
    for t, s in pairwise(times):
        _, slope = yield x + 0.5 * (s - t) * slope, 0.5 * (t + s)
        x = x + (s - t) * slope
    return x


def adams_bashforth_weights(nodes: Sequence[float], t: float, s: float) -> list[float]:
    """Weights w such that sum_j w_j p(nodes_j) = integral of p from t to s, for every polynomial p
    of a degree below len(nodes); the weights add up to s - t.

    nodes: at least one time, no two alike, in any order and anywhere.
    Raises FlowkitError for nodes that are alike.
    """
    if not nodes or len(set(nodes)) < len(nodes):
        raise FlowkitError(f"nodes must be one or more different times, got {list(nodes)}")
    half = 0.5 * (s - t)
    offsets = [node - t - half for node in nodes]  # from the middle, where odd powers drop out
    weights = []
    for a in offsets:
        basis = [1.0]  # the polynomial that is 1 at a and 0 at the others, constant term first
        for b in offsets:
            if b != a:
                shifted = zip([0.0, *basis], [*basis, 0.0], strict=True)
                basis = [(lower - b * same) / (a - b) for lower, same in shifted]
        even = enumerate(basis[::2])
        weights.append(2 * sum(c * half ** (2 * k + 1) / (2 * k + 1) for k, c in even))
    return weights


def _adams_bashforth(
    x: Tensor, times: Sequence[float], order: int, midpoint_first: bool = False
) -> Evaluations:
    nodes: list[float] = []
    slopes: list[Tensor] = []
    moved: Tensor | float = 0.0  # what the first steps have added, to be replaced as a whole
    for i, (t, s) in enumerate(pairwise(times)):
        x, v = yield x, t
        nodes, slopes = [*nodes, t][-order:], [*slopes, v][-order:]
        if i >= order:
            x = x + _integral(nodes, slopes, t, s)
            continue
        if i == 0 and midpoint_first:
            _, v = yield x + 0.5 * (s - t) * v, 0.5 * (t + s)
            whole = (s - t) * v
        else:
            whole = _integral(nodes, slopes, times[0], s)
        x, moved = x + (whole - moved), whole
    return x


def _integral(nodes: Sequence[float], slopes: Sequence[Tensor], t: float, s: float) -> Tensor:
    """The integral from t to s of the polynomial through the slopes at the nodes."""
    first, *rest = (
        w * v for w, v in zip(adams_bashforth_weights(nodes, t, s), slopes, strict=True)
    )
    return sum(rest, first)
