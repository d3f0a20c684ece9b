"""Precision, recall and their kin against brute force on exact differences, ties included."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.eval.manifold import (
    authentic_percentage,
    density_coverage,
    precision_recall,
    realism,
)
from flowkit.eval.neighbours import kth_squares
from flowkit.eval.point_clouds import squares


def _apart(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances of all pairs, as sums of float64 differences."""
    return torch.cat([(p[:, None].double() - y.double()).square().sum(2) for p in x.split(50)])


def _own(x: Tensor, k: int) -> Tensor:
    return _apart(x, x).fill_diagonal_(torch.inf).kthvalue(k, 1).values


def _slow(x: Tensor, y: Tensor, k: int, strict: bool) -> tuple[float, float, float, float]:
    inside = torch.lt if strict else torch.le
    across = _apart(x, y)
    real = inside(across, _own(x, k)[:, None]).double()
    generated = inside(across, _own(y, k)).double()
    shares = (part.amax(axis).mean() for part, axis in ((real, 0), (generated, 1)))
    precision, recall = (float(share) for share in shares)
    density = float(real.sum()) / (k * len(y))
    return precision, recall, density, float(real.amax(1).mean())


def _sets(kind: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(n: int, d: int) -> Tensor:
        return torch.randn(n, d, generator=generator)

    def whole(high: int, n: int, d: int) -> Tensor:
        return torch.randint(0, high, (n, d), generator=generator).float()

    def two_far(n: int) -> Tensor:
        return 1e-3 * normal(n, 5) + 1e4 * whole(2, n, 1)

    return {
        "normal": lambda: (normal(1100, 20), 1.1 * normal(1040, 20) + 0.2),
        "float64": lambda: (normal(700, 6).double(), normal(1030, 6).double()),
        "lattice": lambda: (whole(4, 700, 3), whole(5, 600, 3)),
        "corners": lambda: (whole(2, 600, 40), whole(2, 500, 40)),
        "repeated": lambda: (normal(200, 4).repeat(3, 1), normal(250, 4).repeat(2, 1)),
        "all equal": lambda: (torch.ones(300, 5), torch.ones(200, 5)),
        "collapsed": lambda: (normal(300, 5), torch.zeros(200, 5)),
        "two far": lambda: (two_far(600), two_far(500)),
        "large offset": lambda: (normal(600, 8) + 3e3, normal(500, 8) + 3e3),
        "apart": lambda: (normal(400, 7), normal(300, 7) + 100),
        "few": lambda: (normal(6, 2), normal(5, 2)),
        "tiny": lambda: (1e-25 * normal(300, 4), 1e-25 * normal(300, 4)),
        "one dimension": lambda: (normal(300, 1), normal(400, 1)),
    }[kind]()


KINDS = [
    *("normal", "float64", "lattice", "corners", "repeated", "all equal", "collapsed"),
    *("two far", "large offset", "apart", "few", "tiny", "one dimension"),
]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_they_equal_brute_force(kind: str, strict: bool) -> None:
    x, y = _sets(kind)
    for k in (1, 3):
        found = *precision_recall(x, y, k, strict), *density_coverage(x, y, k, strict=strict)
        assert found == pytest.approx(_slow(x, y, k, strict), rel=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_radii_equal_brute_force(kind: str) -> None:
    x, _ = _sets(kind)
    for k in (1, 4):
        radii, exact = kth_squares(x, k), _own(x, k)
        assert ((radii.low <= exact) & (exact <= radii.high)).all()
        torch.testing.assert_close(radii.all(), exact, rtol=1e-14, atol=0)


def test_the_rules_differ_on_ties() -> None:
    same = torch.ones(20, 3)
    assert precision_recall(same, same) == (1, 1)
    assert precision_recall(same, same, strict=True) == (0, 0)
    x, y = _sets("lattice")
    assert precision_recall(x, y).precision > precision_recall(x, y, strict=True).precision


def test_a_hand_made_case() -> None:
    """Real 0, 1, 3; k = 1 gives radii 1, 1, 2.  Generated -1, 2, 9 with radii 3, 3, 7."""
    x, y = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[-1.0], [2.0], [9.0]])
    assert precision_recall(x, y, 1) == (2 / 3, 1)
    assert precision_recall(x, y, 1, strict=True) == (1 / 3, 1)
    assert density_coverage(x, y, 1) == (1 / 3, 1 / 3)  # 2 lies in the ball of 3 alone
    assert density_coverage(x, y, 1, strict=False) == (1, 1)  # -1 in 0's, 2 in 1's and 3's


def test_order_and_a_common_shift_do_not_matter() -> None:
    x, y = (part.double() for part in _sets("normal"))
    expected = precision_recall(x, y), density_coverage(x, y)
    turned = x.flip(0), y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
    assert (precision_recall(*turned), density_coverage(*turned)) == expected
    assert precision_recall(8 * x + 1, 8 * y + 1) == expected[0]
    assert precision_recall(y, x) == expected[0][::-1]
    assert precision_recall(x.numpy(), y.numpy()) == expected[0]


def test_equal_distributions_have_density_and_coverage_as_published() -> None:
    """Expected density 1 and coverage 1 - (N-1)...(N-k) / ((2N-1)...(2N-k)) (Naeem et al., 2020,
    section 3.3)."""
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(2000, 3, generator=generator) for _ in range(2))
    density, coverage = density_coverage(x, y, 5)
    expected = 1.0
    for i in range(1, 6):
        expected *= (2000 - i) / (4000 - i)
    assert density == pytest.approx(1, abs=0.03)
    assert coverage == pytest.approx(1 - expected, abs=0.015)


def test_modes_that_are_lost_and_found() -> None:
    generator = torch.Generator().manual_seed(4)
    real = torch.randn(600, 4, generator=generator)
    real[300:] += 50
    lost = torch.randn(400, 4, generator=generator)
    precision, recall = precision_recall(real, lost)
    assert precision > 0.9 and 0.4 < recall < 0.5
    assert density_coverage(real, lost).coverage < 0.5
    noise = precision_recall(real, 30 * torch.randn(400, 4, generator=generator))
    assert noise.precision < 0.2


def test_products_of_reduced_precision_change_nothing() -> None:
    x, y = _sets("normal")
    expected = precision_recall(x, y), density_coverage(x, y)
    with _medium_precision():
        assert (precision_recall(x, y), density_coverage(x, y)) == expected


@contextmanager
def _medium_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_pairs_distance_does_not_depend_on_the_pairs_beside_it() -> None:
    x, y = _sets("normal")
    i, j = torch.arange(1000), torch.arange(1000).flip(0)
    together = squares(x, y, i, j)
    for n in (0, 1, 517, 999):
        assert squares(x, y, i[n : n + 1], j[n : n + 1])[0] == together[n]
        assert squares(y, x, j[n : n + 1], i[n : n + 1])[0] == together[n]


def test_realism_is_its_definition() -> None:
    x, y = _sets("normal")
    radii = _own(x, 3).sqrt()
    kept = radii < radii.quantile(0.5)
    expected = (radii[kept, None] / _apart(x[kept], y).sqrt()).amax(0)
    torch.testing.assert_close(realism(x, y), expected, rtol=1e-12, atol=0)
    near = realism(x, torch.cat([x[kept][:2], x[kept][2:3] + 1e-6]))
    assert near[:2].isinf().all() and near[2] > 1e4
    with pytest.raises(FlowkitError, match="no real ball is smaller than the median"):
        realism(torch.ones(9, 2), torch.ones(9, 2))


def test_authenticity_tells_copies() -> None:
    generator = torch.Generator().manual_seed(5)
    train, fresh = (torch.randn(500, 3, generator=generator) for _ in range(2))
    across = _apart(fresh, train).min(1)
    expected = 100 * float((across.values > _own(train, 1)[across.indices]).double().mean())
    assert authentic_percentage(train, fresh) == expected
    assert authentic_percentage(train, train) == 0
    copies = torch.cat([fresh[:100], train[:100] + 1e-5])
    assert authentic_percentage(train, copies) < 40 < expected


@pytest.mark.slow
def test_memory_is_far_below_a_distance_matrix() -> None:
    generator = torch.Generator().manual_seed(6)
    x, y = (torch.randn(10_000, 64, generator=generator) for _ in range(2))
    precision_recall(x[:100], y[:100])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    precision_recall(x, y)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # in kilobytes
    assert grown < 120_000  # one matrix takes 400,000


@pytest.mark.parametrize(
    "x, y, k, message",
    [
        (torch.randn(9, 3), torch.randn(9, 4), 3, "3 and 4 dimensions"),
        (torch.randn(9, 3), torch.randn(3, 3), 3, "k=3 neighbours of 3 samples"),
        (torch.randn(9, 3), torch.randn(9, 3), 0, "k=0 neighbours"),
        (torch.randn(9), torch.randn(9), 3, r"\(N, d\)"),
        (torch.zeros(0, 3), torch.randn(9, 3), 3, r"\(0, 3\)"),
        (torch.randn(9, 3), torch.full((9, 3), float("nan")), 3, "not finite"),
        (torch.randn(9, 3), torch.full((9, 3), float("inf")), 3, "not finite"),
    ],
)
def test_what_they_refuse(x: Tensor, y: Tensor, k: int, message: str) -> None:
    with pytest.raises(FlowkitError, match=message) as caught:
        precision_recall(x, y, k)
    assert "\n" not in str(caught.value)
