"""KID and CMMD against the double sums that define them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.eval.kernel import cmmd, kernel_distance, kernel_parts


def _sets(n: int = 300, m: int = 260, d: int = 12, offset: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, d, generator=generator).double() for size in (n, m))
    return a, b + offset


def _slow(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate, by its definition."""
    d = x.shape[1]
    xx, yy, xy = ((p @ q.T / d + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    m, n = len(x), len(y)
    same = (xx.sum() - xx.trace()) / (m * (m - 1)) + (yy.sum() - yy.trace()) / (n * (n - 1))
    return float(same - 2 * xy.mean())


def test_one_block_is_the_definition() -> None:
    a, b = _sets(1100, 1500)  # more than one tile
    assert kernel_distance(a, b) == pytest.approx(_slow(a, b), rel=1e-11)
    assert kernel_distance(a, b) == pytest.approx(kernel_distance(b, a), rel=1e-11)
    assert kernel_distance(a.numpy(), b) == kernel_distance(a, b)
    assert kernel_distance(a, b, block_size=1500) == kernel_distance(a, b)


def test_blocks_are_consecutive_and_cover_both_sets() -> None:
    a, b = _sets(300, 260)
    parts = kernel_parts(a, b, block_size=100)
    bounds = [(0, 100, 0, 86), (100, 200, 86, 173), (200, 300, 173, 260)]
    values = [_slow(a[i:j], b[k:m]) for i, j, k, m in bounds]
    assert parts.value == pytest.approx(np.mean(values), rel=1e-11)
    assert parts.std == pytest.approx(np.std(values), rel=1e-9)
    assert (parts.form, parts.count, parts.n_1, parts.n_2, parts.seed) == (
        "blocks",
        3,
        300,
        260,
        None,
    )


def test_subsets_follow_the_seed() -> None:
    a, b = _sets()
    random = np.random.RandomState(7)
    values = []
    for _ in range(5):
        i, j = random.choice(300, 50, replace=False), random.choice(260, 50, replace=False)
        values.append(_slow(a[i], b[j]))
    parts = kernel_parts(a, b, subsets=5, subset_size=50, seed=7)
    assert parts.value == pytest.approx(np.mean(values), rel=1e-10)
    assert parts.std == pytest.approx(np.std(values), rel=1e-10)
    assert (parts.form, parts.count, parts.size, parts.seed) == ("subsets", 5, 50, 7)
    again = kernel_distance(a, b, subsets=5, subset_size=50, seed=7)
    other = kernel_distance(a, b, subsets=5, subset_size=50, seed=8)
    assert again == parts.value != other


def test_it_has_no_bias() -> None:
    """Over many draws from one distribution the mean is 0 within its error, and goes below 0."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 50, 4, generator=generator)
    values = np.array([kernel_distance(rows[:25], rows[25:]) for rows in x])
    assert abs(values.mean()) < 3 * values.std() / 20 and values.min() < 0


def test_moments_of_gaussians_give_the_kernel_mean() -> None:
    """E (x.y / d + 1)^3 = 1 + 3 E(x.y)^2 / d^2 about 0; offset c adds closed terms (d = 1)."""
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(10_000, 1, generator=generator).double() for _ in range(2))
    c = 1.0
    # k = 1 + 3 xy + 3 (xy)^2 + (xy)^3 in moments m_i = E x^i: 1 + 3 m1^2 + 3 m2^2 + m3^2.
    first, second = np.array([0, 1, 0]), np.array([c, 1 + c**2, 3 * c + c**3])
    expected = float((np.array([3, 3, 1]) * (first - second) ** 2).sum())
    assert kernel_distance(x, y + c) == pytest.approx(expected, rel=0.05)


def test_float32_features_are_summed_in_float64() -> None:
    a, b = (part.float() for part in _sets())
    assert kernel_distance(a, b) == kernel_distance(a.double(), b.double())


def test_cmmd_is_its_definition() -> None:
    a, b = _sets(1100, 1040, d=8)
    x, y = (part / part.norm(dim=1, keepdim=True) for part in (a, b))
    xx, yy, xy = (
        torch.exp(
            -(torch.cdist(p, q, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / 200
        ).mean()
        for p, q in ((x, x), (y, y), (x, y))
    )
    expected = 1000 * float(xx + yy - 2 * xy)
    assert cmmd(a, b) == pytest.approx(expected, rel=1e-9)
    assert cmmd(5 * a, b) == pytest.approx(cmmd(x, y, normalize=False), rel=1e-9)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-12)
    assert cmmd(a, b, sigma=1.0) > 20 * cmmd(a, b)


def test_cmmd_of_two_points() -> None:
    """Unit vectors at a right angle: 2000 (1 - exp(-2 / 200))."""
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    assert cmmd(a, b) == pytest.approx(2000 * (1 - np.exp(-0.01)), rel=1e-12)


@pytest.mark.parametrize(
    "a, b, options, message",
    [
        (torch.randn(9, 3), torch.randn(9, 4), {}, "3 and 4 dimensions"),
        (torch.randn(1, 3), torch.randn(9, 3), {}, "needs 2 or more"),
        (torch.randn(9), torch.randn(9), {}, r"\(N, d\)"),
        (torch.full((9, 3), float("nan")), torch.randn(9, 3), {}, "not finite"),
        (torch.randn(9, 3), torch.randn(9, 3), {"subsets": 3}, "cannot draw 3 subsets of 1000"),
        (torch.randn(9, 3), torch.randn(9, 3), {"subsets": 0, "subset_size": 5}, "cannot draw 0"),
        (torch.randn(9, 3), torch.randn(9, 3), {"block_size": 1}, "two samples or more"),
        (torch.randn(99, 3), torch.randn(5, 3), {"block_size": 10}, "raise block_size"),
    ],
)
def test_what_it_refuses(a: Tensor, b: Tensor, options: dict[str, int], message: str) -> None:
    with pytest.raises(FlowkitError, match=message) as caught:
        kernel_distance(a, b, **options)
    assert "\n" not in str(caught.value)


def test_what_cmmd_refuses() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(FlowkitError, match="row 2 of the features is zero"):
        cmmd(x, x * torch.tensor([[1.0], [1.0], [0.0], [1.0]]))
    with pytest.raises(FlowkitError, match="sigma must be positive"):
        cmmd(x, x, sigma=0)
