"""Which run of the plain loop is under way, for those whom a velocity does not tell: the caches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from flowkit.samplers.evaluations import Solver

__all__ = ["Run", "current_run", "under_way"]


@dataclass(frozen=True, eq=False)
class Run:
    """One call of sample() or invert(): its solver, its times in the order of the run, options."""

    solver: Solver
    times: Sequence[float]
    options: Mapping[str, Any]


_RUN: ContextVar[Run | None] = ContextVar("flowkit_run", default=None)


def current_run() -> Run | None:
    """The innermost run under way in this thread, None outside of all."""
    return _RUN.get()


@contextmanager
def under_way(run: Run) -> Iterator[None]:
    """Inside, `run` is the current one."""
    token = _RUN.set(run)
    try:
        yield
    finally:
        _RUN.reset(token)
