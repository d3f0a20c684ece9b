"""The Inception Score against its closed forms and its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.eval.inception_scores import inception_score


def _logits(n: int, classes: int = 7) -> Tensor:
    return 3 * torch.randn(n, classes, generator=torch.Generator().manual_seed(0))


def _slow(probabilities: np.ndarray) -> float:
    marginal = probabilities.mean(0)
    return float(np.exp((probabilities * np.log(probabilities / marginal)).sum(1).mean()))


def test_it_is_its_definition() -> None:
    logits = _logits(103)
    p = logits.double().softmax(1).numpy()[np.random.RandomState(2020).permutation(103)]
    values = [_slow(p[i * 103 // 10 : (i + 1) * 103 // 10]) for i in range(10)]
    found = inception_score(logits)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert found.std == pytest.approx(np.std(values), rel=1e-10)
    mean, std = inception_score(logits.numpy())
    assert (mean, std) == found


def test_its_bounds() -> None:
    """Sure and balanced outputs score the number of classes, equal ones 1."""
    sure = torch.eye(5).repeat(20, 1)
    assert inception_score(sure, 1).mean == pytest.approx(5, rel=1e-12)
    assert inception_score(torch.full((40, 5), 0.2)).mean == pytest.approx(1, rel=1e-12)
    assert inception_score(1e4 * sure, 1).mean == pytest.approx(5, rel=1e-12)


def test_probabilities_are_known_from_logits() -> None:
    logits = _logits(60).double()
    expected = inception_score(logits)
    assert inception_score(logits.softmax(1)).mean == pytest.approx(expected.mean, rel=1e-12)
    half = logits.softmax(1).half()
    assert inception_score(half).mean == pytest.approx(expected.mean, rel=1e-2)


def test_pictures_sorted_by_class_need_the_shuffle() -> None:
    by_class = torch.eye(10).repeat_interleave(30, 0)
    assert inception_score(by_class, seed=None).mean == pytest.approx(1, rel=1e-12)
    assert inception_score(by_class).mean > 8
    assert inception_score(by_class, seed=1) != inception_score(by_class, seed=2)


def test_chunks_with_a_short_tail() -> None:
    logits = _logits(25)
    p = logits.double().softmax(1).numpy()
    values = [_slow(part) for part in (p[:10], p[10:20], p[20:])]
    found = inception_score(logits, seed=None, chunk=10)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert inception_score(_logits(4), chunk=10, seed=None).std == 0


@pytest.mark.parametrize(
    "scores, options, message",
    [
        (torch.randn(9, 5), {}, r"\(9, 5\) with 10 splits"),
        (torch.randn(9, 5), {"splits": 0}, "with 0 splits"),
        (torch.randn(9, 5), {"chunk": 0}, "with 0 pictures a chunk"),
        (torch.zeros(0, 5), {"splits": 1}, r"\(0, 5\)"),
        (torch.zeros(20, 0), {}, r"\(20, 0\)"),
        (torch.randn(9), {}, r"\(N, d\)"),
        (torch.full((20, 5), float("nan")), {}, "not finite"),
    ],
)
def test_what_it_refuses(scores: Tensor, options: dict[str, int], message: str) -> None:
    with pytest.raises(FlowkitError, match=message) as caught:
        inception_score(scores, **options)
    assert "\n" not in str(caught.value)
