"""Caches of a model's inner values by name, for commands: cache={name: taylorseer, interval: 4}."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.registry import check_options, look_up
from flowkit.samplers import (
    cg_taylor,
    first_block_cache,
    shared_encoder,
    taylorseer,
)
from flowkit.samplers.cache_hooks import FeatureCache
from flowkit.samplers.evaluations import Solver
from flowkit.velocity import Velocity

__all__ = ["CACHES", "CachedRun", "cached"]


@dataclass(frozen=True)
class CachedRun:
    """The run that a cache is to make cheaper.

    velocity: conditioned, guided.  noise: (B, *), a state at times[0].  options: the solver's.
    """

    velocity: Velocity
    noise: Tensor
    times: Sequence[float]
    solver: str | Solver
    options: Mapping[str, Any]


def cached(
    run: CachedRun, cache: Mapping[str, Any] | None = None
) -> AbstractContextManager[Velocity]:
    """A context whose velocity does the run with a cache; it can be run again and again.

    cache: {"name": one of CACHES, **its options}; None for none.
    FlowkitError: an unknown name or option, a network that the cache does not fit.
    """
    options = dict(cache or {"name": "none"})
    if "name" not in options:
        raise FlowkitError(f"a cache is {{name: ..., options}}, got {options}")
    name = options.pop("name")
    build = look_up("cache", str(name), CACHES)
    check_options(f"cache {name!r}", build, options, skip=1)
    return build(run, **options)


def _none(run: CachedRun) -> AbstractContextManager[Velocity]:
    return nullcontext(run.velocity)


def _encoder(
    run: CachedRun,
    *,
    steps: int | Sequence[int],
    refresh_time: bool = False,
    order: int = 0,
) -> AbstractContextManager[Velocity]:
    """flowkit.samplers.shared_encoder; a number of steps is placed by a run from the noise."""
    return shared_encoder(
        run.velocity,
        run.times,
        run.solver,
        steps=steps,
        probe=run.noise if isinstance(steps, int) else None,
        refresh_time=refresh_time,
        order=order,
        **run.options,
    )


def _features(
    scope: Callable[..., AbstractContextManager[FeatureCache]],
) -> Callable[..., AbstractContextManager[Velocity]]:
    """A cache of features, with the options that its function in flowkit.samplers has."""

    @functools.wraps(scope)
    @contextmanager
    def build(run: CachedRun, **options: Any) -> Iterator[Velocity]:
        with scope(run.velocity, **options):
            yield run.velocity

    return build


# What is between the velocity and its runs: (run, *, options) -> a context that gives a velocity.
CACHES: dict[str, Callable[..., AbstractContextManager[Velocity]]] = {
    "none": _none,
    "encoder": _encoder,
    "taylorseer": _features(taylorseer),
    "cg_taylor": _features(cg_taylor),
    "first_block_cache": _features(first_block_cache),
}
