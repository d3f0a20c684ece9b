"""Published numbers as records: clean-fid's rows, files of one's own, and what is refused."""

from __future__ import annotations

import csv
import urllib.request
from pathlib import Path

import pytest

from flowkit.errors import FlowkitError
from flowkit.eval.published import clean_fid_records, read_published
from flowkit.eval.ranking import rank_records
from flowkit.eval.records import read_record, write_record
from flowkit.eval.rows import Entry

# As clean-fid's tables have them (its README, CIFAR-10 few shot and its AFHQ tables).
COLUMNS = [
    *("model_name", "model_url", "reported_fid", "reproduced_fid", "clean_fid"),
    *("reported_kid (x 10^3)", "reproduced_kid (x 10^3)", "clean_kid (x 10^3)", "dataset_split"),
    *("num_reference_images", "num_generated_images", "dataset_name", "dataset_res", "task_name"),
]
ROWS = [
    ["stylegan2-diff-augment (100%)", "https://a/b.pkl", "9.89", "9.90 ± 0.09", "10.85 ± 0.10"]
    + ["", "", "", "test", "10000", "10000", "cifar10", "32", "few_shot_generation"],
    ["stylegan2-mirror-flips (100%)", "", "11.07", "11.07 +- 0.10", "12.96 +- 0.07"]
    + ["", "", "", "test", "10,000", "10,000", "cifar10", "32", "few_shot_generation"],
    ["AutoGAN (config A)", "", "- †", "N/A", "21.18 ± 0.12"]
    + ["-", "-", "1.50 ± 0.20", "test", "10000", "10000", "cifar10", "32", "few_shot_generation"],
]


def write_csv(path: Path, columns, rows) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_rows_of_clean_fid_are_one_record_a_convention(tmp_path: Path) -> None:
    records = read_published(write_csv(tmp_path / "leaderboard.csv", COLUMNS, ROWS))
    assert len(records) == 3 + 3 + 1
    assert all(record.published and record.source for record in records)
    first = {record.convention: record for record in records[:3]}
    assert set(first) == {"as reported", "legacy_tensorflow", "clean"}
    clean = first["clean"]
    assert clean.metrics == {"fid": 10.85} and clean.errors == {"fid": {"std": 0.10}}
    assert first["as reported"].metrics == {"fid": 9.89} and not first["as reported"].errors
    assert clean.reference == {"name": "cifar10-32 test", "n": 10_000, "sha256": None}
    assert clean.num_samples == 10_000 and "few_shot_generation" in (clean.source or "")
    last = records[-1]
    assert last.metrics == {"fid": 21.18, "kid": pytest.approx(0.0015)}
    assert last.errors["kid"]["std"] == pytest.approx(0.0002)


def test_conventions_are_never_in_one_ranking(tmp_path: Path) -> None:
    records = read_published(write_csv(tmp_path / "a.csv", COLUMNS, ROWS))
    groups = rank_records([Entry(one, f"{n}.json") for n, one in enumerate(records)])
    assert len(groups) == 3
    for group in groups:
        assert len({row.record.convention for row in group.rows}) == 1
    [clean] = [group for group in groups if group.record.convention == "clean"]
    assert [row.record.metrics["fid"] for row in clean.rows] == [10.85, 12.96, 21.18]


def test_rows_that_the_installed_package_gives_are_understood(tmp_path: Path, monkeypatch) -> None:
    """cleanfid.leaderboard.get_score reads the file from its address, here a local one."""
    leaderboard = pytest.importorskip("cleanfid.leaderboard", reason="clean-fid is not installed")
    file = write_csv(tmp_path / "leaderboard.csv", COLUMNS, ROWS)
    local = urllib.request.urlopen
    monkeypatch.setattr(urllib.request, "urlopen", lambda url: local(file.as_uri()))
    rows = leaderboard.get_score(dataset_name="cifar10", model_name="AutoGAN (config A)")
    assert len(rows) == 1
    assert clean_fid_records(rows[0])[0].metrics["fid"] == 21.18


ENTRY = """
- name: EDM, deterministic
  source: arXiv:2206.00364, table 2
  metrics: {fid: 1.97, kid: 5e-4}
  spread: {fid: 0.02}
  convention: legacy_tensorflow
  reference: {name: cifar10-train, n: 50000}
  num_samples: 50000
  nfe: 35
  solver: edm_heun
  steps: 18
  parameters: 55.7e6
  note: the smallest of three seed ranges
"""


def test_a_yaml_entry_is_a_record_that_reads_back(tmp_path: Path) -> None:
    (tmp_path / "published.yaml").write_text(ENTRY)
    [record] = read_published(tmp_path / "published.yaml")
    assert record.metrics == {"fid": 1.97, "kid": 5e-4} and record.errors["fid"]["std"] == 0.02
    assert (record.nfe, record.steps, record.solver) == (35, 18, "edm_heun")
    assert record.model == {"parameters": 55_700_000}
    assert read_record(write_record(tmp_path / "records", record)) == record


def test_a_csv_says_the_same_as_yaml(tmp_path: Path) -> None:
    (tmp_path / "published.yaml").write_text(ENTRY)
    columns = ["name", "source", "convention", "reference", "reference_n", "num_samples"]
    columns += ["nfe", "solver", "steps", "parameters", "note", "fid", "fid_std", "kid", "recall"]
    row = ["EDM, deterministic", "arXiv:2206.00364, table 2", "legacy_tensorflow", "cifar10-train"]
    row += ["50000", "50,000", "35", "edm_heun", "18", "55.7e6"]
    row += ["the smallest of three seed ranges", "1.97", "0.02", "5e-4", ""]
    found = read_published(write_csv(tmp_path / "a.csv", columns, [row, [""] * len(row)]))
    assert found == read_published(tmp_path / "published.yaml")


def _without(key: str) -> str:
    lines = [line for line in ENTRY.splitlines() if not line.strip().startswith(f"{key}:")]
    return "\n".join(lines)


@pytest.mark.parametrize("key", ["source", "convention", "reference", "num_samples", "metrics"])
def test_a_number_without_its_circumstances_is_refused(tmp_path: Path, key: str) -> None:
    (tmp_path / "p.yaml").write_text(_without(key))
    with pytest.raises(FlowkitError, match=f"entry 1 lacks '{key}'"):
        read_published(tmp_path / "p.yaml")


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("nfe: 35", "nef: 35", "unknown entry 'nef'"),
        ("fid: 1.97", "fid: good", "fid: expected a number, or one as 10.85 ± 0.10, got 'good'"),
        ("fid: 1.97", "fid: .nan", "expected a number"),
        ("num_samples: 50000", "num_samples: 0.5", "num_samples must be a whole number"),
        ("{name: cifar10-train, n: 50000}", "cifar10", "reference must be"),
        ("{fid: 1.97, kid: 5e-4}", "[1.97]", "metrics must be numbers by name"),
        ("- name: EDM, deterministic", "- {", "not readable as yaml"),
    ],
)
def test_bad_entries_are_one_clear_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in ENTRY
    (tmp_path / "p.yaml").write_text(ENTRY.replace(old, new))
    with pytest.raises(FlowkitError, match=message) as caught:
        read_published(tmp_path / "p.yaml")
    assert "\n" not in str(caught.value) and "p.yaml" in str(caught.value)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("p.txt", "", "read from .yaml or .csv"),
        ("p.csv", "", "holds no rows"),
        ("p.csv", "name,source\n", "holds no rows"),
        ("p.csv", "name,source\na\n", "row 2: 1 cells under 2 column names"),
        ("p.yaml", "", "holds no rows"),
        ("p.yaml", "a: 1", "holds no rows"),
        ("p.yaml", "[1]", "entry 1: expected a mapping"),
    ],
)
def test_files_without_numbers_are_refused(tmp_path: Path, name, text, message) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(FlowkitError, match=message):
        read_published(tmp_path / name)


def test_a_clean_fid_row_without_numbers_is_refused(tmp_path: Path) -> None:
    row = ["a", "", "", "-", "n/a", "", "", "", "test", "1", "1", "x", "32", "t"]
    with pytest.raises(FlowkitError, match="row 2 has no number; expected one of the columns"):
        read_published(write_csv(tmp_path / "a.csv", COLUMNS, [row]))
