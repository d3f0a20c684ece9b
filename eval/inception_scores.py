"""The Inception Score: exp of the mean KL divergence of p(class | picture) from p(class).

Salimans et al., 2016, arXiv:1606.03498, section 4.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.eval.frechet import Rows, feature_rows

__all__ = ["InceptionScore", "inception_score"]


class InceptionScore(NamedTuple):
    """Mean and standard deviation of the score over the splits; between 1 and the classes."""

    mean: float
    std: float


def inception_score(
    scores: Rows, splits: int = 10, *, seed: int | None = 2020, chunk: int | None = None
) -> InceptionScore:
    """The Inception Score of pictures from a classifier's outputs (N, classes).

    scores: logits, or probabilities, which are known by rows in [0, 1] that sum to 1.
    splits: parts of nearly N / splits pictures, scored apart.  seed: of the shuffle by numpy's
    RandomState before splitting, None for no shuffle.  chunk: parts of that many pictures instead,
    the last perhaps shorter (guided-diffusion: chunk=5000, seed=None).
    torch-fidelity's numbers come from logits without the last layer's bias.
    FlowkitError: fewer pictures than splits, values not finite, another shape.
    """
    rows = feature_rows(scores)
    n = len(rows)
    parts, asked = (splits, "splits") if chunk is None else (chunk, "pictures a chunk")
    if not rows.numel() or parts < 1 or (chunk is None and splits > n):
        raise FlowkitError(
            f"cannot score outputs of shape {tuple(rows.shape)} with {parts} {asked}; "
            "give more pictures"
        )
    if seed is not None:
        order = np.random.RandomState(seed).permutation(n)
        rows = rows[torch.from_numpy(order).to(rows.device)]
    bounds = [i * n // parts for i in range(parts + 1)]
    if chunk is not None:
        bounds = [*range(0, n, chunk), n]
    log_rows = rows.log() if _are_probabilities(rows) else rows
    found = [_score(log_rows[start:stop]) for start, stop in zip(bounds, bounds[1:], strict=False)]
    return InceptionScore(float(np.mean(found)), float(np.std(found)))


def _score(logits: Tensor) -> float:
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    log_q = p.mean(0).log()
    gain = torch.where(p > 0, p * (log_p - log_q), 0.0)  # 0 log 0 = 0
    return float(gain.sum(1).mean().exp())


def _are_probabilities(rows: Tensor) -> bool:
    """Whether every row is a distribution, to float16's digits."""
    return bool((rows >= 0).all() and ((rows.sum(1) - 1).abs() < 1e-2).all())
