"""The Fréchet distance against closed forms, a slow reference, and itself in other orders."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.eval import FrechetMoments, frechet_distance, frechet_parts


def _moments(features: Tensor, batch: int = 64) -> FrechetMoments:
    moments = FrechetMoments()
    for part in features.split(batch):
        moments.update(part)
    return moments


def _slow(a: Tensor, b: Tensor) -> float:
    """The definition, through scipy's matrix square root."""
    x, y = a.double().numpy(), b.double().numpy()
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2)
    gap = x.mean(0) - y.mean(0)
    return float(gap @ gap + np.trace(s1) + np.trace(s2) - 2 * np.trace(root).real)


def _correlated(n: int, d: int, seed: int, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + offset


def test_it_equals_the_definition() -> None:
    a, b = _correlated(400, 20, 0), _correlated(300, 20, 1, offset=0.5)
    assert frechet_distance(a, b) == pytest.approx(_slow(a, b), rel=1e-8)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


def test_diagonal_gaussians_have_a_closed_form() -> None:
    """sum (m1 - m2)^2 + (s1 - s2)^2, with the sample moments made exact by whitening."""
    x = _correlated(500, 4, 2)
    white = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov()).T)
    s1, s2 = torch.tensor([1.0, 2, 3, 4.0]).double(), torch.tensor([2.0, 2, 0.5, 7.0]).double()
    a, b = white * s1 + 3, white.flip(0) * s2 + 1
    expected = float(4 * 4 + (s1 - s2).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_a_set_is_at_no_distance_from_itself() -> None:
    a = _correlated(400, 30, 3)
    parts = frechet_parts(a, a.flip(0))
    assert abs(parts.value) <= 1e-6 * (parts.trace_1 + parts.trace_2)


def test_the_parts_add_up() -> None:
    p = frechet_parts(_correlated(400, 10, 0), _correlated(300, 10, 1))
    assert p.value == pytest.approx(p.mean_term + p.trace_1 + p.trace_2 - 2 * p.cross, rel=1e-12)
    assert (p.n_1, p.n_2, p.d, p.rank_deficient) == (400, 300, 10, False)


def test_fewer_samples_than_dimensions() -> None:
    a, b = _correlated(40, 100, 0), _correlated(50, 100, 1)
    direct = frechet_parts(a, b)
    assert direct.rank_deficient
    assert direct.value == pytest.approx(frechet_distance(_moments(a), _moments(b)), rel=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_streamed_and_merged_moments_equal_numpys(offset: float) -> None:
    x = _correlated(1000, 8, 4, offset)
    streamed, merged = _moments(x, batch=7), FrechetMoments()
    for part in (x[:13], x[13:600], x[600:]):
        merged.merge(_moments(part, batch=50))
    covariance = torch.from_numpy(np.cov((x - offset).numpy(), rowvar=False))
    for moments in (streamed, merged):
        assert moments.n == 1000
        torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-12, atol=0)
        tolerance = 1e-12 if offset == 0 else 1e-8  # the offset costs x itself six digits
        torch.testing.assert_close(moments.cov, covariance, rtol=tolerance, atol=tolerance)


def test_order_does_not_matter() -> None:
    a, b = _correlated(500, 12, 5), _correlated(400, 12, 6, offset=1.0)
    shuffled = a[torch.randperm(500, generator=torch.Generator().manual_seed(0))]
    expected = frechet_distance(a, b)
    assert frechet_distance(_moments(shuffled, 17), _moments(b)) == pytest.approx(expected, 1e-10)


def test_an_offset_does_not_cost_the_distance_its_digits() -> None:
    """A shift of both sets changes nothing; sums about zero would lose twelve digits here."""
    a, b = _correlated(500, 12, 5), _correlated(400, 12, 6)
    moved = frechet_distance(_moments(a + 1e6), _moments(b + 1e6))
    assert moved == pytest.approx(frechet_distance(a, b), rel=1e-7)


def test_arrays_and_other_dtypes() -> None:
    a, b = _correlated(50, 4, 0), _correlated(60, 4, 1)
    expected = frechet_distance(a, b)
    assert frechet_distance(a.numpy(), b.numpy()) == expected
    assert frechet_distance(a.numpy(), _moments(b)) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(a.float(), b.float()) == pytest.approx(expected, rel=1e-5)


def test_only_one_set_is_smaller_than_the_dimension() -> None:
    a, b = _correlated(40, 100, 0), _correlated(300, 100, 1)
    x, y = (a - a.mean(0)) / 39**0.5, (b - b.mean(0)) / 299**0.5
    nuclear = float(torch.linalg.svdvals(x @ y.T).sum())
    for parts in (frechet_parts(a, b), frechet_parts(b, a)):
        assert parts.cross == pytest.approx(nuclear, rel=1e-6) and parts.rank_deficient


def test_merging_leaves_the_other_alone() -> None:
    a, b = _moments(_correlated(50, 3, 0)), _moments(_correlated(60, 3, 1))
    before = b.cov.clone()
    a.merge(b)
    a.update(_correlated(10, 3, 2))
    empty = FrechetMoments()
    empty.merge(b)
    empty.update(_correlated(10, 3, 2))
    assert torch.equal(b.cov, before) and b.n == 60


@pytest.mark.parametrize(
    "a, b, message",
    [
        (torch.randn(5, 3), torch.randn(5, 4), "3 and 4 dimensions"),
        (torch.randn(1, 3), torch.randn(9, 3), "samples"),
        (torch.randn(9), torch.randn(9), r"\(N, d\)"),
        (torch.full((9, 3), float("nan")), torch.randn(9, 3), "not finite"),
        (torch.randn(3, 9), torch.full((3, 9), float("inf")), "not finite"),
        (torch.randn(3, 9), torch.randn(3, 8), "9 and 8 dimensions"),
        (torch.zeros(0, 9), torch.zeros(0, 9), "two or more"),
        (torch.tensor(1.0), torch.randn(9, 3), r"\(N, d\)"),
    ],
)
def test_what_it_refuses(a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(FlowkitError, match=message):
        frechet_distance(a, b)
