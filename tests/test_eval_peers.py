"""The measures beside other packages' own functions, on the same features.

Each comparison skips where its package is not installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowkit.eval.frechet import frechet_distance
from flowkit.eval.inception_scores import inception_score
from flowkit.eval.kernel import kernel_distance, kernel_parts
from flowkit.eval.manifold import density_coverage, precision_recall
from flowkit.eval.sliced import sliced_distance

Distance = Callable[[Tensor, Tensor], float]


def _normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _smooth(n: int, d: int, seed: int) -> Tensor:
    """Correlated and skewed, with a decaying spectrum, as networks' features are."""
    mix = _normal(d, d, 99) / torch.arange(1, d + 1).double()[:, None] ** 0.5
    return (_normal(n, d, seed) @ mix).relu()


def _statistics(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return x.numpy().mean(0), np.cov(x.numpy(), rowvar=False)


def _with_sqrtm(function: Any) -> Distance:
    import scipy.linalg

    if "disp" not in inspect.signature(scipy.linalg.sqrtm).parameters:
        pytest.skip("this scipy's sqrtm has no disp, which the package passes; needs scipy<1.18")

    def distance(a: Tensor, b: Tensor) -> float:
        (m1, s1), (m2, s2) = _statistics(a), _statistics(b)
        return float(function(m1, s1, m2, s2))

    return distance


def _clean_fid() -> Distance:
    return _with_sqrtm(pytest.importorskip("cleanfid.fid").frechet_distance)


def _pytorch_fid() -> Distance:
    module = pytest.importorskip("pytorch_fid.fid_score", reason="pytorch-fid is not installed")
    return _with_sqrtm(module.calculate_frechet_distance)


def _torch_fidelity() -> Distance:
    module = _fidelity("metric_fid")

    def distance(a: Tensor, b: Tensor) -> float:
        first, second = (module.fid_features_to_statistics(part) for part in (a, b))
        found = module.fid_statistics_to_metric(first, second, False)
        return float(found["frechet_inception_distance"])

    return distance


def _fidelity(name: str) -> Any:
    return pytest.importorskip(f"torch_fidelity.{name}", reason="torch-fidelity is not installed")


@pytest.mark.filterwarnings("ignore:.*disp.*:DeprecationWarning")
@pytest.mark.parametrize("peer", [_clean_fid, _pytorch_fid, _torch_fidelity])
@pytest.mark.parametrize(
    "a, b, tolerance",
    [
        (_smooth(900, 64, 0), _smooth(800, 64, 1) * 1.1, 1e-9),
        (_smooth(3000, 256, 2), _smooth(2500, 256, 3) + 0.05, 1e-9),
        (_smooth(900, 64, 0) + 1e3, _smooth(800, 64, 1) * 1.1 + 1e3, 1e-6),
        (_normal(100, 256, 4), _normal(120, 256, 5) + 0.1, 1e-6),
        (_normal(100, 256, 4), _normal(700, 256, 5) + 0.1, 1e-6),
    ],
    ids=["smooth", "larger", "offset", "both below d", "one below d"],
)
def test_frechet_distance(
    peer: Callable[[], Distance], a: Tensor, b: Tensor, tolerance: float
) -> None:
    assert frechet_distance(a, b) == pytest.approx(peer()(a, b), rel=tolerance)


def test_kernel_distance_with_torch_fidelitys_draws() -> None:
    module = _fidelity("metric_kid")
    a, b = _smooth(700, 64, 0), _smooth(600, 64, 1) * 1.2
    options = {"kid_subsets": 20, "kid_subset_size": 200, "rng_seed": 11, "verbose": False}
    theirs = module.kid_features_to_metric(a, b, **options)
    ours = kernel_parts(a, b, subsets=20, subset_size=200, seed=11)
    assert ours.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert ours.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


def test_kernel_distance_of_whole_sets_is_clean_fids() -> None:
    """With one subset that is the whole set, its draw is only an order."""
    theirs = pytest.importorskip("cleanfid.fid").kernel_distance
    a, b = _smooth(500, 32, 0), _smooth(500, 32, 1) * 1.2
    expected = theirs(a.numpy(), b.numpy(), num_subsets=1, max_subset_size=500)
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_inception_score() -> None:
    module = _fidelity("metric_isc")
    for n, splits in ((1003, 10), (77, 3)):
        logits = 4 * _normal(n, 1008, 0).float()
        theirs = module.isc_features_to_metric(logits, splits=splits)
        ours = inception_score(logits, splits)
        assert ours.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
        assert ours.std == pytest.approx(theirs["inception_score_std"], rel=1e-9)


def _lattice(n: int, high: int, seed: int) -> Tensor:
    return torch.randint(0, high, (n, 3), generator=torch.Generator().manual_seed(seed)).double()


SETS = [
    (_smooth(1500, 64, 0), 1.05 * _smooth(1200, 64, 1)),
    (_smooth(1500, 64, 0).float(), 1.05 * _smooth(1200, 64, 1).float()),
    (_lattice(600, 5, 0), _lattice(500, 6, 1)),
    (_normal(200, 8, 0).repeat(2, 1), _normal(300, 8, 1)),
]


@pytest.mark.parametrize("real, generated", SETS, ids=["float64", "float32", "lattice", "repeated"])
def test_precision_and_recall_are_torch_fidelitys(real: Tensor, generated: Tensor) -> None:
    module = _fidelity("metric_prc")
    options = {"prc_neighborhood": 3, "prc_batch_size": 1000, "verbose": False}
    for saving in (False, True):
        theirs = module.prc_features_to_metric(generated, real, save_cpu_ram=saving, **options)
        expected = theirs["precision"], theirs["recall"]
        assert precision_recall(real, generated) == pytest.approx(expected, rel=1e-6)  # its floats


@pytest.mark.parametrize("real, generated", SETS, ids=["float64", "float32", "lattice", "repeated"])
def test_all_four_are_prdcs(real: Tensor, generated: Tensor) -> None:
    prdc = pytest.importorskip("prdc", reason="prdc is not installed")
    theirs = prdc.compute_prdc(real.numpy(), generated.numpy(), 5)
    found = *precision_recall(real, generated, 5, strict=True), *density_coverage(real, generated)
    expected = [theirs[name] for name in ("precision", "recall", "density", "coverage")]
    assert list(found) == pytest.approx(expected, rel=1e-12)


def test_mind() -> None:
    module = _fidelity("metric_mind")
    a, b = _smooth(500, 32, 0).float(), 1.2 * _smooth(400, 32, 1).float()
    theirs = module.mind_features_to_metric(
        a, b, mind_num_projections=300, rng_seed=2020, cuda=False, verbose=False
    )
    expected = theirs["monge_inception_distance"]
    assert sliced_distance(a, b, projections=300) == pytest.approx(expected, rel=1e-5)
