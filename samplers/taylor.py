"""TaylorSeer and reuse: most steps of a sampler forecast a network's features, or repeat them.

    with taylorseer(model, interval=4) as cache:
        x = sample(velocity, noise, times).x        # every 4th step is computed in full
    cache = enable_taylorseer(pipe, interval=5)     # until cache.disable()

TaylorSeer: Liu et al., 2025, arXiv:2503.06923.  Order 0 is FORA: Selvaraju et al., 2024,
arXiv:2407.01425.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ParamSpec

import torch

from flowkit.samplers.cache_hooks import FeatureCache
from flowkit.samplers.forecast import Rule, Schedule

__all__ = ["enable_step_rehash", "enable_taylorseer", "scoped", "step_rehash", "taylorseer"]

P = ParamSpec("P")


def scoped(
    enable: Callable[P, FeatureCache], name: str
) -> Callable[P, AbstractContextManager[FeatureCache]]:
    """`enable` as a context, at whose end the cache is disabled."""

    @functools.wraps(enable)
    @contextmanager
    def scope(*args: P.args, **kwargs: P.kwargs) -> Iterator[FeatureCache]:
        cache = enable(*args, **kwargs)
        try:
            yield cache
        finally:
            cache.disable()

    scope.__name__ = scope.__qualname__ = name
    return scope


def enable_taylorseer(
    model: Any,
    *,
    interval: int = 4,
    order: int = 2,
    warmup: int = 2,
    mode: str = "newton",
    level: str | None = None,
    residual: bool = True,
    steps: Collection[int] | None = None,
    last: bool = False,
    blocks: Sequence[str] | None = None,
    modules: Sequence[str] | None = None,
    num_steps: int | None = None,
    device: torch.device | str | None = None,
) -> FeatureCache:
    """Compute the first `warmup` steps and every `interval`-th after; forecast in the others.

    model: a network with its blocks in ModuleLists, in an adapter, compiled or neither, or a
    pipeline around one.  A pipeline tells its cache more: where a run begins and ends.
    order: of the forecast, 0 (reuse) to 4; above 2 it seldom pays.  mode: "newton", exact for
    features that are polynomials in t of that degree, or "official", the paper's rule in steps.
    steps: the full steps one by one, 0 among them, in the place of interval and warmup.
    last: compute the last step too, where it is known: in a pipeline, in sample() and invert(), or
    by num_steps.

    level   "block"    all blocks are skipped and what they add together is forecast: the cheapest,
                       with order + 1 features kept for the whole network
            "each"     every block's output is forecast: for networks that read several of them
            "module"   the outputs of attention and MLP, before their live gates, as in the paper
            None       "block", and where the output proves to need more, "each"
    residual: at level "block", forecast what the blocks add to their live input, else their output.
    blocks, modules: names of ModuleLists, and at module level regular expressions for parts of
    blocks, where what is found by itself will not do.
    device: where features are kept, None for where they are computed.

    Raises FlowkitError when nothing would be hooked, when the output reads blocks that are not
    forecast, and when a pass runs whose step is not to be known.
    """
    return FeatureCache(
        model,
        Rule(order, mode, warmup),
        Schedule(interval, warmup, _as_set(steps), last),
        level=level,
        residual=residual,
        blocks=blocks,
        modules=modules,
        num_steps=num_steps,
        device=device,
    )


def enable_step_rehash(
    model: Any,
    *,
    steps: Collection[int],
    level: str | None = None,
    residual: bool = True,
    blocks: Sequence[str] | None = None,
    modules: Sequence[str] | None = None,
    device: torch.device | str | None = None,
) -> FeatureCache:
    """Compute `steps`, and take the features of the latest of them in all others.

    After the Step Rehash of Zhan et al., 2024, arXiv:2411.01171, whose own choice of steps is not
    published: flowkit.samplers.optimal_sharing chooses them by similarity.  steps must hold 0.
    The other arguments are those of enable_taylorseer.
    """
    return FeatureCache(
        model,
        Rule(order=0),
        Schedule(steps=_as_set(steps)),
        level=level,
        residual=residual,
        blocks=blocks,
        modules=modules,
        device=device,
    )


taylorseer = scoped(enable_taylorseer, "taylorseer")
step_rehash = scoped(enable_step_rehash, "step_rehash")


def _as_set(steps: Collection[int] | None) -> frozenset[int] | None:
    return None if steps is None else frozenset(int(j) for j in steps)
