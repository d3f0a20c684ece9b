"""Records: what is written is read back, what may not be compared is told apart."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from flowkit.errors import FlowkitError
from flowkit.eval.records import (
    SCHEMA,
    Record,
    canonical_sha256,
    comparable,
    read_record,
    write_record,
)

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
    "change", [{"metrics": {"fid": "3"}}, {"metrics": {"fid": math.nan}}, {"reference": "cifar"}]
)
def test_bad_values_are_named(change, tmp_path):
    path = write_record(tmp_path, RECORD)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FlowkitError, match="record.*json|must be"):
        read_record(path)
