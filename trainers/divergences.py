"""f-distill: the weights that make distribution matching descend another divergence.

    D_f(p || q) = E_q f(r),  r = p / q        gradient = that of the reverse KL, weighted by
    h(r) = f''(r) r^2                         (Xu et al., 2025, arXiv:2502.15681, theorem 1)

p is the teacher's distribution at a noise level, q the student's.  Weights are normalised to mean
1, so a constant in h does not matter; the table keeps it all the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowkit.registry import look_up
from flowkit.samplers.timesteps import TimeDensity

__all__ = ["DIVERGENCES", "density_ratio", "divergence_weights", "equal_mass_bins", "per_bin"]

# f(r) in the comment, h(r) = f''(r) r^2 in the table.
DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "rkl": torch.ones_like,  # -ln r: reverse KL, plain distribution matching
    "kl": lambda r: r,  # r ln r: forward KL
    "js": lambda r: r / (1 + r),  # r ln r - (r + 1) ln((r + 1) / 2): Jensen-Shannon
    "sf": lambda r: 1 / (1 + r),  # (r + 1) ln(1/2 + 1/(2r)): softened reverse KL
    "sh": lambda r: r.sqrt() / 4,  # 1 - sqrt r: squared Hellinger
    "jf": lambda r: 1 + r,  # (r - 1) ln r: Jeffreys
    "neyman": lambda r: 2 / r,  # 1/r - 1: Neyman's chi squared
}

LOGIT_BOUND = 10.0  # of the published code, with the bounds of the ratio
RATIO_BOUNDS = (0.1, 20.0)
_SMALL = 1e-6


def density_ratio(logits: Tensor) -> Tensor:
    """p / q that a discriminator's logits tell, e^logit, held in [0.1, 20]; no gradient.

    logits: (B, K), of K heads that are averaged, large for p.  Returns (B,) float32.
    """
    mean = logits.detach().float().flatten(1).mean(1)
    return mean.clamp(-LOGIT_BOUND, LOGIT_BOUND).exp().clamp(*RATIO_BOUNDS)


def equal_mass_bins(times: TimeDensity, t: Tensor, num_bins: int) -> Tensor:
    """The bin of each time, when bins are cut so that each gets the same share of the draws.

    Bins of one width in sigma would put nearly all draws of an EDM schedule into the first.
    t: (B,) in [0, 1].  Returns (B,) int64 in [0, num_bins).
    """
    return (times.cdf(t) * num_bins).long().clamp(0, num_bins - 1)


def per_bin(values: Tensor, bins: Tensor, num_bins: int) -> Tensor:
    """Mean of the values of each sample's own bin.  values, bins: (B,).  Returns (B,)."""
    sums = values.new_zeros(num_bins).index_add_(0, bins, values)
    counts = values.new_zeros(num_bins).index_add_(0, bins, torch.ones_like(values))
    return (sums / counts.clamp(min=1))[bins]


def divergence_weights(name: str, ratio: Tensor, bins: Tensor, num_bins: int) -> Tensor:
    """h(r) of each sample, with mean 1 over the batch.

    ratio: (B,), first divided by its mean over the sample's bin, because a discriminator's scale
    drifts with the noise level.  bins: (B,) in [0, num_bins); num_bins 0 leaves ratios as they are.
    Raises FlowkitError for an unknown divergence.
    """
    h = look_up("divergence", name, DIVERGENCES)
    if num_bins:
        ratio = ratio / (per_bin(ratio, bins, num_bins) + _SMALL)
    weights = h(ratio)
    return weights / (weights.mean() + _SMALL)
