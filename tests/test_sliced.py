"""MIND against closed forms of the sliced Wasserstein distance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.eval.sliced import sliced_distance


def _normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_shift_costs_three_times_its_square() -> None:
    """3 d E (u.c)^2 = 3 |c|^2 for unit u in d dimensions."""
    x, c = _normal(200, 10, 0), torch.arange(10.0)
    found = sliced_distance(x, x + c, projections=4000)
    assert found == pytest.approx(3 * float(c.square().sum()), rel=0.06)
    exact = sliced_distance(x[:, :1], x[:, :1] + 2)  # in one dimension every u is 1 or -1
    assert exact == pytest.approx(3 * 4, rel=1e-12)


def test_a_scale_costs_three_times_its_change() -> None:
    """W2 of projections is |s - 1| times their spread: 3 d (s - 1)^2 E (u.x)^2."""
    x = _normal(300, 6, 1)
    found = sliced_distance(x, 1.5 * x, projections=4000)
    assert found == pytest.approx(3 * 0.25 * float(x.square().sum(1).mean()), rel=0.05)


def test_it_is_its_definition() -> None:
    x, y = _normal(90, 5, 2), _normal(90, 5, 3) + 0.2
    generator = torch.Generator().manual_seed(11)
    u = torch.randn(70, 5, generator=generator).double()
    u /= u.norm(dim=1, keepdim=True)
    gaps = ((x @ u.T).sort(0).values - (y @ u.T).sort(0).values).square().mean()
    found = sliced_distance(x, y, projections=70, seed=11)
    assert found == pytest.approx(3 * 5 * float(gaps), rel=1e-12)
    assert sliced_distance(y, x, projections=70, seed=11) == pytest.approx(found, rel=1e-12)
    assert sliced_distance(x, y, projections=70, seed=12) != found


def test_the_larger_set_is_cut() -> None:
    x, y = _normal(400, 3, 4), _normal(150, 3, 5)
    kept = torch.randperm(400, generator=torch.Generator().manual_seed(2020))[:150]
    assert sliced_distance(x, y, projections=9) == pytest.approx(
        sliced_distance(y, x, projections=9), rel=1e-12
    )
    x[kept] = y[:150]  # the very rows that are drawn
    assert sliced_distance(x, y, projections=9) == 0
    assert sliced_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-20)


def test_what_it_refuses() -> None:
    x = torch.randn(5, 3)
    for a, b, options, message in [
        (x, torch.randn(5, 4), {}, "3 and 4 dimensions"),
        (x, x[:0], {}, "needs 1 or more"),
        (x, x, {"projections": 0}, "one direction or more"),
        (x, x / 0, {}, "not finite"),
    ]:
        with pytest.raises(FlowkitError, match=message):
            sliced_distance(a, b, **options)
