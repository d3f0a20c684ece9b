"""Caches that decide by the network's first block, which is always computed.

    cg_taylor           skips the other blocks while the first one's output was forecast well
    first_block_cache   skips them while what the first one adds has changed little

The decision is one for the whole batch, so what a sample becomes depends on its company;
per_sample=True lets the sample that fits worst decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flowkit.samplers.cache_gate import FirstBlock
from flowkit.samplers.cache_hooks import FeatureCache
from flowkit.samplers.forecast import Rule, Schedule
from flowkit.samplers.taylor import scoped

__all__ = ["cg_taylor", "enable_cg_taylor", "enable_first_block_cache", "first_block_cache"]


def enable_cg_taylor(
    model: Any,
    *,
    threshold: float = 0.01,
    order: int = 2,
    first_order: int = 1,
    warmup: int = 3,
    last: bool = True,
    per_sample: bool = False,
    mode: str = "newton",
    residual: bool = True,
    blocks: Sequence[str] | None = None,
    num_steps: int | None = None,
    device: torch.device | str | None = None,
) -> FeatureCache:
    """Forecast the last block where the first one's forecast errs by less than `threshold`.

        e = mean |y_forecast - y| / mean |y|        y: output of the first block, always computed
        e < threshold     the last block's output is forecast, the blocks between are skipped
        else              all is computed, and both forecasts learn from it

    Confidence-gated Taylor (Guan et al., 2025, arXiv:2508.02240); the paper forecasts outputs
    (residual=False) by the official rule.  order, first_order: of the last and the first block's
    forecast.  warmup: steps that are computed first.  last: the last one too, where it is known.
    per_sample: e is the largest of the batch.  Everything else is as in enable_taylorseer.
    """
    gate = FirstBlock(threshold, Rule(first_order, mode, warmup), per_sample=per_sample)
    return FeatureCache(
        model,
        Rule(order, mode, warmup),
        Schedule(None, warmup, last=last),
        level="block",
        residual=residual,
        blocks=blocks,
        gate=gate,
        num_steps=num_steps,
        device=device,
    )


def enable_first_block_cache(
    model: Any,
    *,
    threshold: float = 0.05,
    order: int = 0,
    warmup: int = 1,
    last: bool = False,
    per_sample: bool = False,
    mode: str = "newton",
    blocks: Sequence[str] | None = None,
    num_steps: int | None = None,
    device: torch.device | str | None = None,
) -> FeatureCache:
    """Keep what the other blocks add while what the first one adds moves by at most `threshold`.

        e = mean |r - r_full| / mean |r_full|       r: what the first block adds to its input,
        e <= threshold    the others add what       r_full in the last pass that was computed
                          they added then

    The first-block cache of ParaAttention (chengzeyi, 2024), at order 0; higher orders forecast
    what the others add.  Arguments as in enable_cg_taylor.
    """
    gate = FirstBlock(threshold, Rule(0), per_sample=per_sample, change=True)
    return FeatureCache(
        model,
        Rule(order, mode, warmup),
        Schedule(None, warmup, last=last),
        level="block",
        blocks=blocks,
        gate=gate,
        num_steps=num_steps,
        device=device,
    )


cg_taylor = scoped(enable_cg_taylor, "cg_taylor")
first_block_cache = scoped(enable_first_block_cache, "first_block_cache")
