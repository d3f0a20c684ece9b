"""Extrapolated distances and their errors on Gaussians, and on real pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from flowkit.data import load_data
from flowkit.errors import FlowkitError
from flowkit.eval.extrapolate import frechet_infinity, frechet_jackknife
from flowkit.eval.features import load_extractor
from flowkit.eval.frechet import (
    FrechetMoments,
    FrechetReference,
    frechet_distance,
    frechet_parts,
)
from flowkit.eval.kernel import kernel_distance
from flowkit.eval.manifold import density_coverage, precision_recall


def _normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _moments(features: Tensor) -> FrechetMoments:
    moments = FrechetMoments()
    moments.update(features)
    return moments


def _standard(d: int) -> FrechetMoments:
    return FrechetMoments.from_statistics(torch.zeros(d), torch.eye(d), 1_000_000)


def test_the_bias_goes() -> None:
    """N(0, I) against its exact moments: FD_N is near (d + d^2 / 4) / N, FD_inf is 0."""
    d = 20
    x = _normal(20_000, d, 0)
    found = frechet_infinity(_standard(d), x, smallest=500)
    assert found.slope == pytest.approx(d + d * d / 4, rel=0.15)
    assert abs(found.value) < 0.3 * found.distances[-1]
    assert found.sizes[0] == 500 and found.sizes[-1] == 20_000 and len(found.sizes) == 15
    assert found.distances[-1] == pytest.approx(frechet_distance(x, _standard(d)), rel=1e-9)


def test_a_true_distance_stays() -> None:
    d, shift = 10, 0.5
    found = frechet_infinity(_standard(d), _normal(5000, d, 1) + shift)
    assert found.value == pytest.approx(d * shift**2, rel=0.03)


def test_the_line_is_the_least_squares_line() -> None:
    found = frechet_infinity(_normal(300, 5, 2), _normal(400, 5, 3), points=6)
    assert found.sizes[0] == 40
    design = np.stack([np.ones(6), 1 / np.array(found.sizes)], 1)
    (value, slope), square, *_ = np.linalg.lstsq(design, np.array(found.distances), rcond=None)
    assert (found.value, found.slope) == pytest.approx((value, slope), rel=1e-9)
    assert found.residual == pytest.approx(np.sqrt(square[0] / 6), rel=1e-6)


def test_the_seed_draws_the_sizes() -> None:
    x, y = _normal(300, 5, 2), _normal(400, 5, 3)
    one, same, other = (frechet_infinity(x, y, points=4, seed=s) for s in (1, 1, 2))
    assert one == same and one.distances[:3] != other.distances[:3]
    assert one.distances[-1] == pytest.approx(other.distances[-1], rel=1e-9)


def test_the_jackknife_leaves_groups_out() -> None:
    rows, reference = _normal(600, 6, 4) + 0.2, _normal(500, 6, 5)
    chunks = [_moments(part) for part in rows.split(50)]
    found = frechet_jackknife(chunks, reference, groups=6)
    kept = [torch.cat([rows[: 100 * i], rows[100 * i + 100 :]]) for i in range(6)]
    values = np.array([frechet_distance(part, reference) for part in kept])
    assert found.value == pytest.approx(frechet_distance(rows, reference), rel=1e-10)
    assert found.std == pytest.approx(
        np.sqrt(5 / 6 * ((values - values.mean()) ** 2).sum()), rel=1e-7
    )
    assert found.corrected == pytest.approx(6 * found.value - 5 * values.mean(), rel=1e-8)
    assert found.groups == 6 and chunks[0].n == 50
    assert frechet_jackknife(chunks, FrechetReference(reference)).groups == 12


def test_a_short_last_chunk_hardly_moves_the_jackknife() -> None:
    """Beside the even chunks alone, and against the formula of unequal groups, written out."""
    rows, reference = _normal(410, 6, 9) + 0.2, FrechetReference(_normal(500, 6, 5))
    even = frechet_jackknife([_moments(p) for p in rows[:400].split(50)], reference)
    short = frechet_jackknife([_moments(p) for p in rows.split(50)], reference)
    assert short.groups == 9
    assert short.std == pytest.approx(even.std, rel=0.25)
    assert short.corrected == pytest.approx(even.corrected, abs=even.std)
    kept = [torch.cat([rows[: 50 * i], rows[50 * i + 50 :]]) for i in range(9)]
    left = np.array([reference.parts(_moments(part)).value for part in kept])
    sizes = np.array([50] * 8 + [10])
    h = 410 / sizes
    corrected = 9 * short.value - np.sum((1 - sizes / 410) * left)
    pseudo = h * short.value - (h - 1) * left
    assert short.corrected == pytest.approx(corrected, rel=1e-7)
    assert short.std**2 == pytest.approx(np.mean((pseudo - corrected) ** 2 / (h - 1)), rel=1e-6)


def test_the_jackknifes_error_is_that_of_fresh_samples() -> None:
    """Against the spread over 40 sets drawn anew; 20 groups leave it 16 % uncertain."""
    d, reference = 4, _standard(4)
    sets = [_normal(500, d, 100 + s) + 0.3 for s in range(40)]
    spread = np.std([frechet_distance(x, reference) for x in sets], ddof=1)
    errors = [frechet_jackknife([_moments(p) for p in x.split(25)], reference) for x in sets]
    assert np.mean([e.std for e in errors]) == pytest.approx(spread, rel=0.3)
    truth, raw = d * 0.3**2, np.mean([e.value for e in errors])
    assert abs(np.mean([e.corrected for e in errors]) - truth) < 0.5 * abs(raw - truth)


def test_what_is_taken_out_was_never_in() -> None:
    x = _normal(300, 5, 6) + 1e4
    whole, part = _moments(x), _moments(x[100:250])
    left, expected = whole.without(part), torch.cat([x[:100], x[250:]])
    assert left.n == 150 and whole.n == 300
    torch.testing.assert_close(left.mean, expected.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(left.cov, expected.T.cov(), rtol=1e-7, atol=1e-7)
    with pytest.raises(FlowkitError, match="cannot take 300 samples out of the moments of 150"):
        left.without(whole)


def test_published_statistics_are_moments() -> None:
    x, y = _normal(200, 6, 7), _normal(150, 6, 8) + 1
    read = FrechetMoments.from_statistics(y.mean(0).numpy(), np.cov(y.T.numpy()), 150)
    assert frechet_distance(x, read) == pytest.approx(frechet_distance(x, y), rel=1e-12)
    read.merge(_moments(x))
    joined = torch.cat([x, y])
    torch.testing.assert_close(read.cov, joined.T.cov(), rtol=1e-10, atol=1e-12)
    for mean, cov, n, message in [
        (torch.zeros(3), torch.eye(4), 9, r"\(3,\) and \(4, 4\)"),
        (torch.zeros(3), torch.eye(3), 1, "two or more"),
        (torch.zeros(3) / 0, torch.eye(3), 9, "finite"),
        (torch.zeros(3), torch.eye(3) + torch.ones(3, 3).triu(1), 9, "not symmetric"),
    ]:
        with pytest.raises(FlowkitError, match=message):
            FrechetMoments.from_statistics(mean, cov, n)


def test_a_reference_measures_many() -> None:
    reference = FrechetReference(_normal(400, 8, 9))
    for seed, n in ((10, 300), (11, 6)):  # the second has a covariance of rank 5
        x = _normal(n, 8, seed)
        expected = frechet_parts(x, _normal(400, 8, 9))
        assert reference.parts(x).value == pytest.approx(expected.value, rel=1e-12)


def test_streamed_sets_below_the_dimension_are_exact() -> None:
    """Moments keep no features, yet give the nuclear norm's value to ten digits."""
    for n, m in ((40, 50), (50, 40), (40, 300)):
        a, b = _normal(n, 100, 12), _normal(m, 100, 13) @ torch.rand(100, 100).double()
        x, y = (a - a.mean(0)) / (n - 1) ** 0.5, (b - b.mean(0)) / (m - 1) ** 0.5
        nuclear = float(torch.linalg.svdvals(x @ y.T).sum())
        for first, second in ((a, b), (b, a)):
            parts = frechet_parts(_moments(first), _moments(second))
            assert parts.cross == pytest.approx(nuclear, rel=1e-10) and parts.rank_deficient


@pytest.mark.parametrize(
    "generated, options, message",
    [
        (torch.randn(9, 3), {"points": 1}, "cannot fit a line through 1 sizes"),
        (torch.randn(9, 3), {"smallest": 9}, "from 9 to 9 samples"),
        (torch.randn(9, 3), {"smallest": 1}, "from 1 to 9"),
        (torch.randn(9, 4), {}, "3 dimensions|4 and 3"),
        (torch.full((9, 3), float("nan")), {}, "not finite"),
    ],
)
def test_what_it_refuses(generated: Tensor, options: dict[str, int], message: str) -> None:
    with pytest.raises(FlowkitError, match=message):
        frechet_infinity(torch.randn(20, 3), generated, **options)


def test_what_the_jackknife_refuses() -> None:
    chunk, reference = _moments(_normal(20, 3, 0)), _normal(20, 3, 1)
    for chunks, groups in (([chunk], 20), ([chunk, chunk], 1), ([chunk, FrechetMoments()], 5)):
        with pytest.raises(FlowkitError, match="two or more of both"):
            frechet_jackknife(chunks, reference, groups=groups)


def _pictures(data_root: Path, split: str, n: int) -> Tensor:
    return load_data("cifar10-jpeg", split, root=data_root).fetch(range(n))["data"]


def test_worse_pictures_are_farther(data_root: Path) -> None:
    """Blur and noise lie far beyond a mirror image, under every measure."""
    extractor = load_extractor("cifar-resnet20")
    real, test = extractor(_pictures(data_root, "train", 400)), _pictures(data_root, "test", 150)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(test.shape, generator=generator) * 16 / 255
    flip, blur, noisy = (
        extractor(part)
        for part in (test.flip(-1), gaussian_blur(test, [5, 5], [0.7, 0.7]), test + noise)
    )
    for measure in (frechet_distance, kernel_distance):
        assert 4 * measure(real, flip) < min(measure(real, blur), measure(real, noisy))
    for part in (blur, noisy):
        assert density_coverage(real, flip).coverage > 1.2 * density_coverage(real, part).coverage
    assert precision_recall(real, flip).recall > precision_recall(real, noisy).recall + 0.2


@pytest.fixture(scope="module")
def features(data_root: Path) -> tuple[Tensor, Tensor]:
    """Of 2,000 training and 2,000 test pictures."""
    extractor = load_extractor("cifar-resnet20")
    train, test = (extractor(_pictures(data_root, split, 2000)) for split in ("train", "test"))
    return train, test


@pytest.mark.slow
def test_real_pictures_give_the_known_distance(features: tuple[Tensor, Tensor]) -> None:
    assert frechet_distance(*features) == pytest.approx(0.131, abs=0.002)


@pytest.mark.slow
def test_real_pictures_follow_the_law_of_one_over_n(features: tuple[Tensor, Tensor]) -> None:
    """The line through at most 1,000 pictures foretells the distance of 2,000."""
    train, test = features
    found = frechet_infinity(train, test[:1000], smallest=250, points=8)
    whole = frechet_distance(train, test)
    assert found.residual < 0.05 * found.distances[0]
    assert found.value + found.slope / 2000 == pytest.approx(whole, rel=0.15)
    assert 100 < found.slope < 250 and abs(found.value) < 0.5 * whole
