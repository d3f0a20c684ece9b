"""Reference statistics: ours and the peers' files, and every way in which one does not fit."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from flowkit.data import load_data
from flowkit.errors import FlowkitError
from flowkit.eval.features import load_extractor
from flowkit.eval.frechet import frechet_distance
from flowkit.eval.reference import make_reference
from flowkit.eval.reference_files import is_statistics, read_statistics
from flowkit.eval.settings import ReferenceConfig
from flowkit.pictures import to_uint8


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("digits")


@pytest.fixture(scope="module")
def real(extractor):
    """Features of the 500 held-out digits, in batches of 70 as the command takes them below."""
    levels = to_uint8(load_data("digits", "test").fetch(range(500))["data"])
    return torch.cat([extractor(part) for part in levels.split(70)])


@pytest.fixture
def ours(tmp_path):
    options = ReferenceConfig(
        data="digits-test", out=str(tmp_path / "digits.npz"), features="digits",
        keep_features=True, chunk_size=70, output_dir=str(tmp_path / "chunks"), progress=False,
    )  # fmt: skip
    return make_reference(options)


def rewritten(path, to, **changes):
    """A copy of an npz with other arrays; None leaves one out."""
    with np.load(path) as found:
        arrays = {name: found[name] for name in found.files} | changes
    np.savez(to, **{name: value for name, value in arrays.items() if value is not None})
    return str(to)


@pytest.fixture
def foreign(ours, tmp_path):
    """The form of EDM, pytorch-fid and clean-fid: mu and sigma, no word of their origin."""
    (tmp_path / "edm").mkdir()
    return rewritten(ours, tmp_path / "edm" / "stats.npz", metadata=None, feats=None)


def test_the_command_writes_statistics_and_says_how(ours, real):
    with np.load(ours, allow_pickle=False) as found:
        assert set(found.files) == {"mu", "sigma", "feats", "metadata"}
        np.testing.assert_allclose(found["mu"], real.double().mean(0), rtol=1e-12)
        np.testing.assert_allclose(found["sigma"], np.cov(real.double().T), rtol=1e-9, atol=1e-9)
        told = json.loads(str(found["metadata"]))
    assert json.loads(ours.with_suffix(".json").read_text()) == told
    assert (told["name"], told["n"], told["convention"]) == ("digits-test", 500, "none")
    assert told["extractor"].startswith("digits@") and len(told["sha256"]) == 64
    assert {"flowkit", "torch", "numpy"} <= told["versions"].keys()


def test_statistics_measure_like_their_pictures(ours, real, extractor):
    reference = read_statistics(str(ours), extractor)
    other = real[:250] * 1.1
    value = reference.frechet("features").parts(other).value
    assert abs(value / frechet_distance(other, real) - 1) < 1e-10
    assert torch.equal(reference.rows("features"), real)
    assert reference.n == 500


def test_they_do_not_depend_on_the_chunks(ours, tmp_path):
    options = ReferenceConfig(
        data="digits-test", out=str(tmp_path / "whole.npz"), features="digits",
        chunk_size=500, output_dir=str(tmp_path / "chunks"), progress=False,
    )  # fmt: skip
    with np.load(ours) as one, np.load(make_reference(options)) as other:
        np.testing.assert_allclose(one["sigma"], other["sigma"], rtol=1e-5, atol=1e-5)
        hashes = [json.loads(str(found["metadata"]))["sha256"] for found in (one, other)]
    assert hashes[0] == hashes[1]


def test_foreign_statistics_need_their_convention(foreign, real, extractor):
    with pytest.raises(FlowkitError, match="does not say how it was made; say reference_conv"):
        read_statistics(foreign, extractor)
    with pytest.raises(FlowkitError, match="are of convention 'none'; choose features=incep"):
        read_statistics(foreign, extractor, convention="legacy_tensorflow")
    reference = read_statistics(foreign, extractor, convention="none")
    assert reference.n is None and len(reference.sha256) == 64
    value = reference.frechet("features").parts(real[:250]).value
    assert abs(value / frechet_distance(real[:250], real) - 1) < 1e-9
    with pytest.raises(FlowkitError, match="holds statistics, and a metric needs features"):
        reference.rows("features")


def test_adm_files_bring_pictures_and_spatial_statistics(foreign, tmp_path, extractor):
    mu, sigma = np.zeros(7), np.eye(7)
    pictures = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    path = rewritten(foreign, tmp_path / "adm.npz", arr_0=pictures, mu_s=mu, sigma_s=sigma)
    rows, asked = torch.ones(3, 64), []

    def own():
        asked.append("computed at once")
        return lambda part: rows

    reference = read_statistics(path, extractor, convention="none", pictures=own)
    assert asked and torch.equal(reference.rows("features"), rows)
    torch.testing.assert_close(reference.statistics("spatial").cov, torch.eye(7).double())
    with pytest.raises(FlowkitError, match="no mu_s and sigma_s; it holds"):
        read_statistics(foreign, extractor, convention="none").statistics("spatial")


def test_clean_fids_kernel_files_hold_features(real, tmp_path, extractor):
    np.savez(tmp_path / "kid.npz", feats=real.numpy())
    assert is_statistics(str(tmp_path / "kid.npz"))
    reference = read_statistics(str(tmp_path / "kid.npz"), extractor, convention="none")
    assert torch.equal(reference.rows("features"), real)
    assert abs(reference.frechet("features").parts(real).value) < 1e-6


@pytest.mark.parametrize(
    "change, message",
    [
        ({"extractor": "digits@000000000000"}, "made with extractor 'digits@0.*this run uses 'di"),
        ({"convention": "clean"}, "made with convention 'clean', this run uses 'none'"),
        ({"schema": 2}, "statistics of schema 2, this flowkit reads 1; update flowkit"),
    ],
)
def test_statistics_of_another_kind_are_refused(change, message, ours, tmp_path, extractor):
    with np.load(ours) as found:
        told = json.loads(str(found["metadata"])) | change
    path = rewritten(ours, tmp_path / "other.npz", metadata=np.array(json.dumps(told)))
    with pytest.raises(FlowkitError, match=message) as caught:
        read_statistics(path, extractor)
    assert "other.npz" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mu": np.zeros((64, 64)), "sigma": np.zeros(64)}, "must be .d,. and .d, d."),
        ({"sigma": np.triu(np.ones((64, 64)))}, "not symmetric"),
        ({"mu": np.full(64, np.nan)}, "must be finite"),
        ({"mu": np.array(["a"] * 64)}, "mu is of <U1, expected numbers"),
        ({"mu": np.array([None] * 64)}, "holds pickled objects"),
    ],
)
def test_damaged_statistics_are_named(change, message, foreign, tmp_path, extractor):
    path = rewritten(foreign, tmp_path / "bad.npz", **change)
    with pytest.raises(FlowkitError, match=message) as caught:
        read_statistics(path, extractor, convention="none").statistics("features")
    assert "bad.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_another_dimension_is_refused(foreign, tmp_path, extractor, real):
    path = rewritten(foreign, tmp_path / "wide.npz", mu=np.zeros(9), sigma=np.eye(9))
    reference = read_statistics(path, extractor, convention="none")
    with pytest.raises(FlowkitError, match="64 and 9 dimensions; use one extractor"):
        reference.frechet("features").parts(real)


class Trap:
    """A pickle that would write a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["stats.pkl", "stats.pt"])
def test_pickles_are_refused_unread(name, tmp_path):
    (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(FlowkitError, match=f"{name} is a pickle, which may run code; save its mu"):
        is_statistics(str(tmp_path / name))
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_by_another_name_is_refused_unread(tmp_path):
    path = tmp_path / "stats.npz"
    path.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(
        FlowkitError, match="stats.npz is no npz but a pickle, .* refused"
    ) as caught:
        is_statistics(str(path))
    assert "allow_pickle" not in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("text", ['{"batch": 64}', "[1]", "no JSON"])
def test_anothers_json_beside_statistics_is_passed_over(text, foreign, extractor):
    """Once it is said what the statistics were made with; without that it is named."""
    beside = Path(foreign).with_suffix(".json")
    beside.write_text(text)
    assert read_statistics(foreign, extractor, convention="none").n is None
    with pytest.raises(FlowkitError, match="in stats.json, .*say reference_convention") as caught:
        read_statistics(foreign, extractor)
    assert "\n" not in str(caught.value)


def test_our_json_beside_statistics_counts_whatever_is_said(foreign, extractor):
    told = {"extractor": extractor.id, "convention": "clean"}
    Path(foreign).with_suffix(".json").write_text(json.dumps(told))
    with pytest.raises(FlowkitError, match="made with convention 'clean', this run uses 'none'"):
        read_statistics(foreign, extractor, convention="none")


def test_a_truncated_npz_is_named(ours, tmp_path):
    path = tmp_path / "cut.npz"
    path.write_bytes(ours.read_bytes()[:-100])
    with pytest.raises(FlowkitError, match="cut.npz is not a readable npz"):
        is_statistics(str(path))


def test_too_few_pictures_for_statistics(tmp_path):
    common = {"data": "digits-test", "features": "digits", "output_dir": str(tmp_path)}
    with pytest.raises(FlowkitError, match="has 500 pictures, 501 were asked for"):
        make_reference(ReferenceConfig(out=str(tmp_path / "a.npz"), num_samples=501, **common))
    with pytest.raises(FlowkitError, match="must end in .npz"):
        make_reference(ReferenceConfig(out=str(tmp_path / "a.json"), **common))
