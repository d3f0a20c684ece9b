"""Records: what is written is read back, what may not be compared is told apart."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from flowkit.errors import FlowkitError
from flowkit.eval.frechet import FrechetMoments
from flowkit.eval.kernel import kernel_distance
from flowkit.eval.metric_table import measure
from flowkit.eval.records import (
    SCHEMA,
    Record,
    canonical_sha256,
    comparable,
    read_record,
    write_record,
)
from flowkit.eval.reference_files import Reference
from flowkit.eval.settings import FidConfig
from flowkit.eval.streaming import Chunks, FeatureSet, chunk_ranges

RECORD = Record(
    name="flow nfe=4",
    metrics={"fid": 3.25, "kid": -1e-4},
    convention="clean",
    extractor="inception@f58cb9b6ec32",
    reference={"name": "cifar10-train", "n": 50_000, "sha256": "a" * 64},
    num_samples=50_000,
    seed=0,
    seeds=[0, 50_000],
    nfe=4,
    parts={"precision": {"rule": "k=3, <="}},
    errors={"fid": {"jackknife": 0.02}},
)


def test_round_trip_is_exact(tmp_path):
    path = write_record(tmp_path, RECORD)
    assert read_record(path) == RECORD
    assert path.name == f"flow-nfe-4-{RECORD.fingerprint}.json"
    assert json.loads(path.read_text())["schema"] == SCHEMA


def test_a_path_that_does_not_move_has_no_relative_straightness(tmp_path):
    still = {"total": 0.0, "per_dim": 0.0, "relative": math.nan}
    path = write_record(tmp_path, replace(RECORD, straightness=still))
    assert math.isnan((read_record(path).straightness or {})["relative"])


def test_one_file_a_result(tmp_path):
    """The same result writes the same file; another number of samples another one."""
    first = write_record(tmp_path, RECORD)
    assert write_record(tmp_path, replace(RECORD, seconds=3.0)) == first
    assert write_record(tmp_path, replace(RECORD, num_samples=10_000)) != first
    assert len(list(tmp_path.iterdir())) == 2


def test_canonical_hash_ignores_order_alone():
    assert canonical_sha256({"a": 1, "b": [1, 2]}) == canonical_sha256({"b": [1, 2], "a": 1})
    assert canonical_sha256([1, 2]) != canonical_sha256([2, 1])


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", "ä ö"])
def test_names_stay_in_the_folder(name, tmp_path):
    path = write_record(tmp_path / "records", replace(RECORD, name=name))
    assert path.parent == tmp_path / "records" and path.is_file()


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"convention": "legacy_pytorch"}, "convention differs: clean and legacy_pytorch"),
        ({"extractor": "inception@000000000000"}, "extractor differs"),
        ({"num_samples": 10_000}, "num_samples differs: 50000 and 10000"),
        ({"reference": RECORD.reference | {"n": 10}}, "reference size differs"),
        ({"reference": RECORD.reference | {"sha256": "b" * 64}}, "reference sha256 differs"),
        ({"reference": RECORD.reference | {"sha256": None}}, "has no hash to verify"),
    ],
)
def test_what_may_not_be_compared(change, reason):
    other = replace(RECORD, **change)
    assert reason in (comparable(RECORD, other) or "")
    assert reason.partition(":")[0] in (comparable(other, RECORD) or "")
    assert comparable(other, other) is None


def test_what_may_be_compared():
    other = replace(RECORD, name="other", nfe=8, seeds=[50_000, 100_000], chunk_size=7)
    assert comparable(RECORD, other) is None
    renamed = replace(RECORD, reference=RECORD.reference | {"name": "a copy of it"})
    assert comparable(RECORD, renamed) is None


def test_a_metric_has_one_rule_in_a_ranking():
    other = replace(RECORD, parts={"precision": {"rule": "k=3, <"}})
    assert comparable(RECORD, other) is None
    assert comparable(RECORD, other, "fid") is None
    assert "rule of precision differs" in (comparable(RECORD, other, "precision") or "")


@pytest.fixture
def sets(tmp_path):
    """40 generated features in four chunks, and a reference of 50."""
    ours, theirs = (torch.randn(n, 6, generator=torch.manual_seed(n)) for n in (40, 50))
    chunks, ranges = Chunks(tmp_path, frozenset({"features"})), chunk_ranges(0, 40, 10)
    for indices in ranges:
        chunks.write(indices, {"features": ours[indices.start : indices.stop]}, {})

    def moments(part):
        found = FrechetMoments()
        found.update(theirs)
        return found

    return FeatureSet(chunks, ranges), Reference("r", 50, "a" * 64, moments, lambda part: theirs)


def _measured(sets, seed=0, **options):
    metrics = list(options) or ["fid"]
    given = FidConfig(reference="r", metrics=metrics, metric_options=options, seed=seed)
    return measure(*sets, given, torch.device("cpu"))


@pytest.mark.parametrize(
    "metric, one, other, rule",
    [
        ("fid_infinity", {"seed": 1}, {}, "line in 1/N through 15 sizes from 4 to 40, seed 1"),
        ("fid_infinity", {"points": 4}, {}, "line in 1/N through 4 sizes from 4 to 40, seed 0"),
        ("fid_infinity", {"smallest": 9}, {}, "line in 1/N through 15 sizes from 9 to 40, seed 0"),
        ("kid", {"block_size": 10}, {"block_size": 25}, "cubic kernel, 5 blocks of 10"),
        ("kid", {"block_size": 50}, {"block_size": 49}, "cubic kernel, 1 block of 50"),
        (
            *("kid", {"subsets": 7, "subset_size": 9}, {"subsets": 8, "subset_size": 9}),
            "cubic kernel, 7 subsets of 9, seed 2020",
        ),
    ],
)
def test_a_rule_tells_all_that_changes_the_number(metric, one, other, rule, sets):
    found, again = (_measured(sets, **{metric: options}) for options in (one, other))
    assert found.parts[metric]["rule"] == rule != again.parts[metric]["rule"]


def test_subsets_are_drawn_from_the_sets_as_they_stand(sets):
    """As torch-fidelity draws them: RandomState(seed), the generated set's rows first."""
    ours, theirs = sets[0].rows(), sets[1].rows("features")
    options = {"subsets": 5, "subset_size": 20, "seed": 3}
    expected = kernel_distance(ours, theirs, **options)
    for seed in (0, 1):
        assert _measured(sets, seed, kid=options).metrics["kid"] == pytest.approx(expected)


def test_blocks_stand_in_an_order_of_the_seed(sets):
    """Another seed's blocks are others; one block knows no order."""
    several = [_measured(sets, seed, kid={"block_size": 10}).metrics["kid"] for seed in (20, 1, 2)]
    assert len(set(several)) == 3
    whole = [_measured(sets, seed, kid={}).metrics["kid"] for seed in (0, 1)]
    assert whole[0] == pytest.approx(whole[1])


def test_few_chunks_give_no_jackknife(sets):
    """Four groups tell next to nothing of a spread; five do."""
    assert "fid" not in _measured(sets).errors
    finer = Chunks(sets[0].chunks.folder / "finer", frozenset({"features"}))
    ranges = chunk_ranges(0, 40, 9)
    for indices in ranges:
        rows = sets[0].rows()[indices.start : indices.stop]
        finer.write(indices, {"features": rows}, {})
    assert _measured((FeatureSet(finer, ranges), sets[1])).errors["fid"]["groups"] == 5


def test_published_numbers_compare_by_name():
    hashless = RECORD.reference | {"sha256": None}
    one = replace(RECORD, reference=hashless, published=True, source="a paper")
    other = replace(one, reference=hashless | {"name": "cifar10-test"})
    assert comparable(one, replace(one, name="two")) is None
    assert "reference differs: cifar10-train and cifar10-test" in (comparable(one, other) or "")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_only_finite_numbers_are_recorded(value, tmp_path):
    with pytest.raises(FlowkitError, match="fid is"):
        write_record(tmp_path, replace(RECORD, metrics={"fid": value}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not JSON"),
        ("[]", "not a record"),
        ('{"name": "x"}', "has no number `schema`"),
        ('{"schema": 2}', "schema 2, this flowkit reads 1; update flowkit"),
        ('{"schema": 1, "name": "x", "metrics": {}}', "no convention, extractor, num_samples"),
        ('{"schema": 1, "nam": "x"}', "a record has no 'nam'"),
    ],
)
def test_bad_files_are_named(text, message, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(FlowkitError, match=message) as caught:
        read_record(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"metrics": {"fid": "3"}}, "metrics must be"),
        ({"metrics": {"fid": math.nan}}, "metrics must be"),
        ({"metrics": {"fid": True}}, "metrics must be"),
        ({"reference": "cifar"}, "reference must be"),
        ({"reference": {"n": 3}}, "reference name must be text, got None"),
        ({"reference": {"name": "x", "sha256": 3}}, "reference sha256 must be"),
        ({"errors": [1]}, r"errors must be {text: any}, got \[1\]"),
        ({"errors": {"fid": 1}}, "a metric's errors must be"),
        ({"errors": {"fid": {"values": 3}}}, "errors of fid must be numbers"),
        ({"errors": {"fid": {"jackknife": "0.1"}}}, "errors of fid must be numbers"),
        ({"parts": {"fid": {"rule": ["a"]}}}, "a metric's rule must be"),
        ({"config": None}, "config must be {text: any}, got None"),
        ({"versions": None}, "versions must be"),
        ({"nfe": "four"}, "nfe must be .*, got 'four'"),
        ({"nfe": math.inf}, "nfe must be"),
        ({"num_samples": "many"}, "num_samples must be int, got 'many'"),
        ({"num_samples": 3.5}, "num_samples must be"),
        ({"seeds": [1]}, r"seeds must be \[start, end\)"),
        ({"seeds": ["a", "b"]}, "seeds must be"),
        ({"model": {"parameters": "35M"}}, "model parameters must be"),
        ({"published": 1}, "published must be"),
    ],
)
def test_bad_values_are_named(change, message, tmp_path):
    path = write_record(tmp_path, RECORD)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FlowkitError, match=message) as caught:
        read_record(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
