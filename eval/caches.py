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
from flowkit.samplers.cache_state import Stats
from flowkit.samplers.evaluations import Solver
from flowkit.velocity import Velocity

__all__ = ["CACHES", "Cached", "CachedRun", "cached"]


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


@dataclass(frozen=True)
class Cached:
    """What does the run with a cache.

    velocity: in the place of the run's.  features: the handle of a cache that skips passes.
    """

    velocity: Velocity
    features: FeatureCache | None = None

    def computed(self, count: int) -> float:
        """Of `count` evaluations or calls of the last run, how many were computed in full.

        A forecast counts as none, though what the cache leaves alone and a gate's first block ran.
        """
        stats = Stats() if self.features is None else self.features.stats
        passes = stats.computed + stats.forecast
        return count * stats.computed / passes if passes else count


def cached(
    run: CachedRun, cache: Mapping[str, Any] | None = None
) -> AbstractContextManager[Cached]:
    """A context that does the run with a cache; it can be run again and again.

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


def _none(run: CachedRun) -> AbstractContextManager[Cached]:
    return nullcontext(Cached(run.velocity))


@contextmanager
def _encoder(
    run: CachedRun,
    *,
    steps: int | Sequence[int],
    refresh_time: bool = False,
    order: int = 0,
) -> Iterator[Cached]:
    """flowkit.samplers.shared_encoder; a number of steps is placed by a run from the noise."""
    with shared_encoder(
        run.velocity,
        run.times,
        run.solver,
        steps=steps,
        probe=run.noise if isinstance(steps, int) else None,
        refresh_time=refresh_time,
        order=order,
        **run.options,
    ) as shared:
        yield Cached(shared)


def _features(
    scope: Callable[..., AbstractContextManager[FeatureCache]],
) -> Callable[..., AbstractContextManager[Cached]]:
    """A cache of features, with the options that its function in flowkit.samplers has."""

    @functools.wraps(scope)
    @contextmanager
    def build(run: CachedRun, **options: Any) -> Iterator[Cached]:
        with scope(run.velocity, **options) as features:
            yield Cached(run.velocity, features)

    return build


# What is between the velocity and its runs: (run, *, options) -> a context of a Cached.
CACHES: dict[str, Callable[..., AbstractContextManager[Cached]]] = {
    "none": _none,
    "encoder": _encoder,
    "taylorseer": _features(taylorseer),
    "cg_taylor": _features(cg_taylor),
    "first_block_cache": _features(first_block_cache),
}
