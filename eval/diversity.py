"""Diversity of one set: the Vendi score, an effective number of different samples.

exp of the entropy of the eigenvalues of K / N, where K is the kernel matrix of the samples with
ones on its diagonal: 1 when all are alike, N when none resembles another
(Friedman and Dieng, 2022, arXiv:2210.02410, eq. 2; orders: Pasarkar and Dieng, 2023,
arXiv:2310.12952, eq. 3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.eval.frechet import Rows, feature_rows
from flowkit.eval.kernel import unit_rows
from flowkit.registry import look_up

__all__ = ["vendi_score"]


def vendi_score(features: Rows, order: float = 1, *, kernel: str = "linear") -> float:
    """The Vendi score of features (N, d), whose rows are scaled to length 1: in [1, N].

    order: of the Renyi entropy, positive; 1 is Shannon's, 2 and inf weigh the common kinds more.
    kernel: "linear", x.y, of which the smaller of N x N and d x d is decomposed; "cubic",
    ((x.y / d + 1) / (1 / d + 1))^3, which takes N^2 numbers.
    FlowkitError: no samples, a row of zeros, values not finite, another order or kernel.
    """
    matrix_of = look_up("kernel", kernel, {"linear": _linear, "cubic": _cubic})
    if not order > 0:
        raise FlowkitError(f"order must be positive (1, 2, inf, ...), got {order}")
    rows = feature_rows(features)
    if not rows.numel():
        raise FlowkitError(f"got features of shape {tuple(rows.shape)}; give one sample or more")
    values = torch.linalg.eigvalsh(matrix_of(unit_rows(rows)).cpu())
    p = values.clamp(min=0)
    return _effective_number(p / p.sum(), order)


def _linear(x: Tensor) -> Tensor:
    """K / N or, with the same spectrum but for zeros, its d x d form."""
    return (x @ x.T if len(x) <= x.shape[1] else x.T @ x) / len(x)


def _cubic(x: Tensor) -> Tensor:
    d = x.shape[1]
    root = (x @ x.T).div_(d).add_(1).div_(1 / d + 1)
    return root.pow_(3).div_(len(x))


def _effective_number(p: Tensor, order: float) -> float:
    """exp of the Renyi entropy of the distribution p."""
    if order == 1:
        return float(torch.special.entr(p).sum().exp())
    if math.isinf(order):
        return 1 / float(p.max())
    return float(p.pow(order).sum().pow(1 / (1 - order)))
