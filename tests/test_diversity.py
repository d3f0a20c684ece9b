"""The Vendi score against closed forms and its two matrix forms against each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flowkit.errors import FlowkitError
from flowkit.eval.diversity import vendi_score

ORDERS = [0.5, 1, 2, math.inf]


@pytest.mark.parametrize("order", ORDERS)
def test_it_counts_kinds(order: float) -> None:
    """m groups of orthogonal, equal samples count m; equal samples of any length count 1."""
    groups = torch.eye(6).repeat(5, 1) * torch.arange(1, 31)[:, None]
    assert vendi_score(groups, order) == pytest.approx(6, rel=1e-12)
    assert vendi_score(torch.eye(6), order) == pytest.approx(6, rel=1e-12)
    assert vendi_score(torch.ones(7, 3), order) == pytest.approx(1, rel=1e-6)


def test_uneven_groups() -> None:
    """Shares 1/2, 1/4, 1/4: exp(1.5 ln 2), 1 / (3/8), 1 / (1/2)."""
    rows = torch.eye(3)[torch.tensor([0, 0, 1, 2])]
    assert vendi_score(rows) == pytest.approx(2**1.5, rel=1e-12)
    assert vendi_score(rows, 2) == pytest.approx(8 / 3, rel=1e-12)
    assert vendi_score(rows, math.inf) == pytest.approx(2, rel=1e-12)


@pytest.mark.parametrize("kernel", ["linear", "cubic"])
@pytest.mark.parametrize("shape", [(30, 8), (8, 30)])
@pytest.mark.parametrize("order", [1, 2])
def test_it_is_its_definition(kernel: str, shape: tuple[int, int], order: int) -> None:
    """From the N x N matrix of similarities, whichever the sizes."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    matrix = x @ x.T
    if kernel == "cubic":
        matrix = ((matrix / shape[1] + 1) / (1 / shape[1] + 1)) ** 3
    p = np.linalg.eigvalsh(matrix / len(x))
    p = p[p > 1e-13]
    expected = np.exp(-(p * np.log(p)).sum()) if order == 1 else 1 / (p**2).sum()
    assert vendi_score(x, order, kernel=kernel) == pytest.approx(expected, rel=1e-9)


def test_order_two_is_the_mean_square_of_similarities() -> None:
    x = torch.nn.functional.normalize(torch.randn(40, 5, dtype=torch.float64))
    expected = 1 / float((x @ x.T).square().mean())
    assert vendi_score(3 * x, 2) == pytest.approx(expected, rel=1e-12)


def test_what_it_refuses() -> None:
    x = torch.randn(5, 3)
    cases = [
        ((x, 0), {}, "order must be positive"),
        ((x, math.nan), {}, "order must be positive"),
        ((x,), {"kernel": "cubik"}, "did you mean 'cubic'"),
        ((torch.zeros(0, 3),), {}, "one sample or more"),
        ((torch.zeros(2, 3),), {}, "row 0 of the features is zero"),
        ((torch.randn(3),), {}, r"\(N, d\)"),
        ((x / 0,), {}, "not finite"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(FlowkitError, match=message):
            vendi_score(*arguments, **options)
