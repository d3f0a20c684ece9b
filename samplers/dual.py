"""DualFast: an older, noisier prediction corrects the error that the network itself makes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.samplers.adaptive import ADAPTIVE
from flowkit.samplers.evaluations import Evaluations, Solver

__all__ = ["dual_fast"]

ANCHORS = ("first", "previous")


def dual_fast(
    x: Tensor,
    times: Sequence[float],
    *,
    base: str | Solver = "ab2",
    base_options: Mapping[str, Any] | None = None,
    strength: float = 0.3,
    power: float = 1.0,
    anchor: str = "first",
) -> Evaluations:
    """Any solver `base`, with the noise n_t = x - t v of its first-order term replaced by
    (1 + c) n_t - c n_anchor, c = strength t^power (Yu et al., 2025, arXiv:2506.13058); no NFE more.

    That term moves x by (s - t) v: the rule adds -(s - t) (c / t) (n_t - n_anchor) to the step.
    anchor: the noise predicted at the "first" time of the run, or at the "previous" one.
    strength, power: searched on a digits flow (benchmarks/dual_fast.py), the paper's c being not to
    be had.  There the defaults take a third off the Fréchet distance at 5 to 20 NFE, and 0.6 takes
    half: the rule spreads what networks make too alike.  To an exact velocity it is an error.
    Raises FlowkitError for decreasing times, an adaptive base and wrong options.
    """
    _check(times, strength, power, anchor)
    solver, visits = _base(base, times, options := dict(base_options or {}))
    evaluations, ends = solver(x, times, **options), dict(pairwise(times))
    reply = n_anchor = offset = None
    while True:
        try:
            x, t = evaluations.send(reply)  # type: ignore[arg-type]  # None starts it
        except StopIteration as end:
            x = end.value[0] if isinstance(end.value, tuple) else end.value
            return x if offset is None else x + offset
        visits[t] -= 1
        boundary = t in ends and not visits[t]
        x, v = yield (x + offset if boundary and offset is not None else x), t
        if boundary:
            n = x - t * v
            if n_anchor is not None:
                offset = (t - ends[t]) * strength * t ** (power - 1) * (n - n_anchor)
            if n_anchor is None or anchor == "previous":
                n_anchor = n
        reply = x, v


def _check(times: Sequence[float], strength: float, power: float, anchor: str) -> None:
    if times[-1] < times[0]:
        raise FlowkitError(
            "solver 'dual_fast' cannot invert: its rule needs the noise that inversion looks for; "
            "use its base on the same times"
        )
    if not (math.isfinite(strength) and 0 <= power < math.inf):
        raise FlowkitError(
            "strength must be finite and power finite and >= 0, "
            f"got {strength} and {power}; strength=0 is the base itself"
        )
    if anchor not in ANCHORS:
        raise FlowkitError(f"anchor must be one of {', '.join(ANCHORS)}, got {anchor!r}")


def _base(
    base: str | Solver, times: Sequence[float], options: dict[str, Any]
) -> tuple[Solver, Counter[float]]:
    """The solver, and how often it evaluates at each time: its last one there is the boundary."""
    from flowkit.samplers.solve import SOLVERS, evaluation_times  # it imports this module

    if base in ADAPTIVE or base in SOLVERS and SOLVERS[base] in ADAPTIVE:
        raise FlowkitError(f"dual_fast needs a base that keeps to the times given, got {base!r}")
    visits = Counter(evaluation_times(base, times, **options))  # refuses what is no solver
    return SOLVERS[base] if isinstance(base, str) else base, visits
