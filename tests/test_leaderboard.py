"""What may be ranked together, how repeats become one row, what the front is, what is written."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
import statistics
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowkit.config import run_command
from flowkit.errors import FlowkitError
from flowkit.eval.leaderboard import (
    LeaderboardSettings,
    main,
    read_folder,
    write_leaderboard,
)
from flowkit.eval.leaderboard_plots import nice_ticks
from flowkit.eval.leaderboard_text import column_of, number_text
from flowkit.eval.ranking import pareto_front, rank_records
from flowkit.eval.records import Record, comparable, write_record
from flowkit.eval.rows import Entry, Number


def record(name="flow", fid=3.0, **changes):
    seed = changes.get("seed", 0)
    return replace(
        Record(
            name=name,
            metrics={"fid": fid, "kid": fid / 1000},
            convention="clean",
            extractor="inception@0123456789ab",
            reference={"name": "cifar10-train", "n": 50_000, "sha256": "ab" * 32},
            num_samples=50_000,
            errors={"fid": {"jackknife": 0.05}},
            seed=0,
            seeds=[0, 50_000],
            model={"path": f"runs/{name}", "sha256": "cd" * 32, "parameters": 35_700_000},
            solver="euler",
            steps=4,
            nfe=4,
            nfe_with_guidance=4,
            images_per_second=100.0,
            device="cpu",
            samples_sha256=f"{name}{fid}{seed}",
        ),
        **changes,
    )


def entries(*records):
    return [Entry(one, f"records/{n}.json") for n, one in enumerate(records)]


OTHER_REFERENCE = {"name": "cifar10-train", "n": 50_000, "sha256": "ef" * 32}


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"convention": "legacy_tensorflow"}, "convention differs"),
        ({"extractor": "inception@ffff"}, "extractor differs"),
        ({"num_samples": 10_000}, "num_samples differs"),
        ({"reference": OTHER_REFERENCE}, "reference sha256 differs"),
        ({"parts": {"fid": {"rule": "unbiased"}}}, "rule of fid differs"),
        ({"published": True, "source": "a paper"}, "published"),
    ],
)
def test_what_may_not_be_compared_is_in_two_rankings_that_say_why(changes, reason) -> None:
    groups = rank_records(entries(record("a", 3.0), record("b", 2.0, **changes)))
    assert [len(group.rows) for group in groups] == [1, 1]
    assert [row.rank for group in groups for row in group.rows] == [1, 1]
    for place, group in enumerate(groups):
        [(other, why)] = group.apart
        assert other == 1 - place and reason in why


def test_no_ranking_holds_two_records_that_may_not_be_compared() -> None:
    draw = random.Random(0)
    records = [
        record(
            f"m{n}",
            draw.uniform(1, 9),
            convention=draw.choice(["clean", "legacy_pytorch"]),
            num_samples=draw.choice([10_000, 50_000]),
            reference=draw.choice([OTHER_REFERENCE, OTHER_REFERENCE | {"sha256": None}]),
            extractor=draw.choice(["inception@1", "dinov2@2"]),
        )
        for n in range(60)
    ]
    groups = rank_records(entries(*records))
    assert len(groups) == 16 and sum(len(group.rows) for group in groups) == 60
    for group in groups:
        own = [entry.record for row in group.rows for entry in row.entries]
        assert all(comparable(a, b, "fid") is None for a in own for b in own)
        assert all(comparable(own[0], groups[other].record, "fid") for other, _ in group.apart)
        values = [row.numbers["fid"].value for row in group.rows]
        assert values == sorted(values)


def test_repeats_over_seeds_are_one_row() -> None:
    values = [3.0, 3.3, 3.9]
    repeats = [record(fid=fid, seed=seed) for seed, fid in enumerate(values)]
    [group] = rank_records(entries(*repeats, record("other", 3.35, solver="heun")))
    first, second = group.rows
    assert first.record.name == "other" and second.rank == 2  # the mean counts, not the best
    number = second.numbers["fid"]
    assert number.value == pytest.approx(3.4) and number.kind == "std" and number.count == 3
    assert number.spread == pytest.approx(statistics.stdev(values))
    assert first.numbers["fid"] == Number(3.35, 0.05, "jackknife")
    assert len({first.fingerprint, second.fingerprint, *(r.fingerprint for r in repeats)}) == 5


def test_ranges_within_a_record_count_as_repeats() -> None:
    values = [2.0, 4.0]
    inside = record(fid=3.0, errors={"fid": {"values": values, "mean": 3.0, "std": 1.4}})
    [group] = rank_records(entries(inside, record(fid=6.0, seed=1)))
    number = group.rows[0].numbers["fid"]
    assert (number.value, number.spread, number.count) == (4.0, 2.0, 3)


@pytest.mark.parametrize("seeds, rows", [([25_000, 75_000], 2), ([50_000, 100_000], 1)])
def test_the_same_samples_are_no_independent_repeat(seeds, rows) -> None:
    [group] = rank_records(entries(record(), record(fid=3.1, seeds=seeds)))
    assert len(group.rows) == rows
    assert any("no independent repeat" in note for row in group.rows for note in row.notes) == (
        rows == 2
    )


@pytest.mark.parametrize("other, rows", [("samples", 2), ("more", 1)])
def test_pictures_drawn_again_under_another_seed_are_no_repeat(other, rows) -> None:
    """Of one folder two seeds give overlapping draws; another folder's are others."""
    first = record(config={"pictures": "samples", "seed": 0})
    again = record(seed=1, config={"pictures": other, "seed": 1})
    groups = rank_records(entries(first, again))
    [noted] = [row for group in groups for row in group.rows if row.notes] or [None]
    assert (noted is not None) == (rows == 2)
    assert noted is None or "no independent repeat" in noted.notes[0]
    assert all(row.numbers["fid"].kind == "jackknife" for g in groups for row in g.rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"solver": "heun"},
        {"steps": 8},
        {"cache": {"name": "encoder", "steps": 2}},
        {"guidance": {"scale": 2.0}},
        {"model": {"sha256": "ee" * 32}},
        {"config": {"rules": {"crop": "adm"}}},
    ],
)
def test_another_way_is_another_row(changes) -> None:
    [group] = rank_records(entries(record(), record(seed=1, **changes)))
    assert len(group.rows) == 2


def test_options_that_change_no_picture_make_no_row() -> None:
    configs = [{"solver": "euler", "seed": n, "output_dir": f"runs/{n}"} for n in range(2)]
    [group] = rank_records(entries(*(record(seed=n, config=c) for n, c in enumerate(configs))))
    assert len(group.rows) == 1


def test_equal_values_share_a_rank_and_higher_is_better_where_it_is() -> None:
    scores = {"a": 1.0, "b": 3.0, "c": 3.0, "d": 2.0}
    found = [record(name, metrics={"inception_score": score}) for name, score in scores.items()]
    [group] = rank_records(entries(*found))
    assert [(row.record.name, row.rank) for row in group.rows] == [
        *(("b", 1), ("c", 1), ("d", 3), ("a", 4))
    ]


def test_rules_of_a_second_metric_have_columns_of_their_own() -> None:
    rules = [{"parts": {"kid": {"rule": rule}}} for rule in ("blocks", "subsets")]
    [group] = rank_records(entries(record("a", **rules[0]), record("b", **rules[1])))
    assert {"kid [blocks]", "kid [subsets]"} < set(group.columns) and "kid" not in group.columns


def test_the_metric_of_the_ranking_can_be_chosen() -> None:
    a = record("a", metrics={"fid": 1.0, "kid": 2.0})
    b = record("b", metrics={"fid": 2.0, "kid": 1.0})
    assert [g.rows[0].record.name for g in rank_records(entries(a, b), "kid")] == ["b"]
    with pytest.raises(FlowkitError, match="no record has the metric 'cmmd'; they have fid, kid"):
        rank_records(entries(a, b), "cmmd")


def test_pareto_front_against_brute_force() -> None:
    draw = random.Random(0)
    for _ in range(200):
        points = [(draw.randrange(6), draw.randrange(6)) for _ in range(draw.randrange(1, 12))]
        beaten = [any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points) for p in points]
        front = pareto_front(points)
        assert sorted(front) == [n for n, lost in enumerate(beaten) if not lost]
        assert [points[n][0] for n in front] == sorted(points[n][0] for n in front)
    assert pareto_front([]) == []


def test_rows_know_the_fronts_they_are_on() -> None:
    found = [
        record("cheap", 9.0, nfe=1, images_per_second=90.0),
        record("good", 3.0, nfe=8, images_per_second=10.0),
        record("beaten", 9.5, nfe=8, images_per_second=50.0),
        record("elsewhere", 3.5, nfe=9, images_per_second=1e6, device="NVIDIA H200"),
    ]
    [group] = rank_records(entries(*found))
    fronts = {row.record.name: row.front for row in group.rows}
    assert fronts["cheap"] == {"nfe", "milliseconds"} == fronts["good"]  # one model: no size front
    assert not fronts["beaten"] and not fronts["elsewhere"]  # other devices' times do not compare


@pytest.mark.parametrize(
    "number, key, text",
    [
        (Number(12.3456, 0.0345), "fid", ("12.346", "0.035")),
        (Number(12.3456, 3.45), "fid", ("12.3", "3.5")),
        (Number(0.0012345, 0.0001), "kid", ("1.23", "0.10")),
        (Number(0.97, None, "published"), "fid", ("0.97", "")),
        (Number(35_700_000), "parameters", ("35.7", "")),
        (Number(0.5), "recall", ("0.5000", "")),
        (Number(50_000.4), "fid", ("50,000", "")),
        (Number(0.0), "fid", ("0", "")),
        (Number(4, 0.0), "nfe", ("4", "")),
    ],
)
def test_numbers_have_the_digits_that_mean_something(number, key, text) -> None:
    [group] = rank_records(entries(record()))
    assert number_text(number, column_of(key, group)) == text


@pytest.mark.parametrize(
    "extractor, labels",
    [
        ("inception@12", ["FID", "KID ×10³", "NFE"]),
        ("dinov2-vitl14@12", ["FD-DINOv2", "KID ×10³", "NFE"]),
        ("digits@12", ["FD", "KID ×10³", "NFE"]),
    ],
)
def test_a_distance_without_inception_is_not_called_fid(extractor, labels) -> None:
    [group] = rank_records(entries(record(extractor=extractor)))
    assert [column_of(key, group).label for key in group.columns[:3]] == labels
    [group] = rank_records(entries(record(fid=2000.0)))
    assert column_of("kid", group).scale == 1  # of a large KID no thousands


def test_ticks_are_round_and_few() -> None:
    assert nice_ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(1.0, 60.0, logarithmic=True) == [1, 2, 5, 10, 20, 50]
    assert nice_ticks(3.0, 3.0) == [3.0]
    draw = random.Random(0)
    for _ in range(200):
        low = draw.uniform(0.001, 100)
        high = low * draw.uniform(1.01, 1e6)
        for logarithmic in (False, True):
            ticks = nice_ticks(low, high, logarithmic=logarithmic)
            assert 1 <= len(ticks) <= 6
            assert low * (1 - 1e-9) <= min(ticks) and max(ticks) <= high * (1 + 1e-9)


HOSTILE = '=cmd|"<script>alert(1)</script>|\n`x`'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven records of real kinds: seeds, costs, another convention, a grid, a hostile name."""
    records = tmp_path / "in"
    rows, columns = np.mgrid[:900, :700]
    levels = np.stack([rows // 4, columns // 3, rows ^ columns], -1).astype(np.uint8)
    (records / "grids").mkdir(parents=True)
    Image.fromarray(levels).save(records / "grids/a.png")
    Image.fromarray(levels[:80, :80]).save(records / "grids/b.png")
    for seed in range(3):
        write_record(records, record(fid=3 + seed / 10, seed=seed, grid_png="grids/a.png"))
    write_record(records, record("small", 5.0, nfe=1, steps=1, grid_png="grids/b.png"))
    write_record(records / "more", record("legacy", 4.0, convention="legacy_pytorch"))
    write_record(records, record(HOSTILE, 6.0, nfe=2, solver="heun", images_per_second=50.0))
    write_record(records, record("no costs", 7.0, nfe=None, model=None, images_per_second=None))
    return records


def build(records: Path, **options):
    output = records.parent / "out"
    settings = LeaderboardSettings(records=records, output_dir=output, **options)
    return output, write_leaderboard(settings)


class Page(HTMLParser):
    """Tags with their attributes, ids, and the text of <pre>."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.texts, self._inside = [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag == "pre"

    def handle_data(self, data):
        if self._inside:
            self.texts.append(data)
            self._inside = False


def test_every_number_of_the_page_leads_to_its_record(folder: Path) -> None:
    output, groups = build(folder)
    page = Page((output / "index.html").read_text())
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    for link in links:
        assert (link[1:] in ids) if link.startswith("#") else (output / link).exists(), link
    numbers = sum(len(set(row.numbers) & set(g.columns)) for g in groups for row in g.rows)
    to_records = [link for link in links if link.startswith("#record-")]
    rows, thumbs = sum(len(group.rows) for group in groups), 2
    assert len(to_records) == numbers + rows + thumbs and numbers > 20
    shown = {json.dumps(json.loads(text), sort_keys=True) for text in page.texts}
    files = [json.loads(path.read_text()) for path in folder.rglob("*.json")]
    assert shown == {json.dumps(values, sort_keys=True) for values in files}


def test_the_page_needs_no_network_and_runs_no_foreign_script(folder: Path) -> None:
    output, _ = build(folder)
    page = Page((output / "index.html").read_text())
    for tag, attrs in page.tags:
        assert tag not in {"iframe", "object", "embed", "base"}
        assert not any(name.startswith("on") or name == "style" for name in attrs), attrs
        assert attrs.get("src", "data:").startswith("data:")
        if tag == "link":
            assert attrs["href"] == "data:,"
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    [policy] = [attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs]
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy


def test_large_grids_are_shown_smaller(folder: Path) -> None:
    output, _ = build(folder)
    page = Page((output / "index.html").read_text())
    pictures = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 4 and all(len(source) < 12_000 for source in pictures)
    assert (output / "records/grids/a.png").read_bytes() == (folder / "grids/a.png").read_bytes()


def test_tables_agree(folder: Path) -> None:
    output, groups = build(folder)
    lines = [json.loads(line) for line in (output / "leaderboard.jsonl").read_text().splitlines()]
    with (output / "leaderboard.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    rows = [row for group in groups for row in group.rows]
    assert len(lines) == len(table) == len(rows) == 5
    for line, cells, row in zip(lines, table, rows, strict=True):
        assert line["fingerprint"] == cells["fingerprint"] == row.fingerprint
        assert re.fullmatch("[0-9a-f]{8}", row.fingerprint)
        assert float(cells["fid"]) == line["numbers"]["fid"]["value"] == row.numbers["fid"].value
        assert all((output / file).is_file() for file in line["records"])
        assert line["name"] == row.record.name
    [hostile] = [cells for cells in table if "cmd" in cells["name"]]
    assert hostile["name"].startswith("'=")  # no formula in a spreadsheet


def test_markdown_tables_are_whole(folder: Path) -> None:
    output, _ = build(folder)
    page = (output / "leaderboard.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        cells = [re.split(r"(?<!\\)\|", line) for line in table.splitlines()]
        assert len({len(row) for row in cells}) == 1
    assert "3.10 ± 0.10" in page and "0.050J" in page and "<script" not in page
    assert "Not ranked with table 2 (convention differs: clean and legacy\\_pytorch)" in page
    for link in re.findall(r"\]\((records/[^)]+)\)", page):
        assert (output / link).is_file()


def test_the_same_records_give_the_same_bytes(folder: Path) -> None:
    output, _ = build(folder)
    names = ["index.html", "leaderboard.md", "leaderboard.csv", "leaderboard.jsonl"]
    first = [(output / name).read_bytes() for name in names]
    shutil.copytree(output / "records", output / "records.kept")
    settings = LeaderboardSettings(records=output / "records", output_dir=output)
    write_leaderboard(settings)  # in its own folder: the copies are the records
    assert [(output / name).read_bytes() for name in names] == first
    kept = sorted(path.name for path in (output / "records.kept").rglob("*"))
    assert kept == sorted(path.name for path in (output / "records").rglob("*"))


def test_published_numbers_stand_apart(folder: Path) -> None:
    file = folder.parent / "published.yaml"
    file.write_text(
        "- {name: theirs, source: 'arXiv:1, table 2', metrics: {fid: 1.97}, convention: clean, "
        "reference: {name: cifar10-train, n: 50000}, num_samples: 50000, nfe: 1}\n"
    )
    output, groups = build(folder, published=[file])
    assert [group.record.published for group in groups] == [False, False, True]
    assert len(groups[2].rows) == 1 and groups[0].rows[0].rank == 1
    html = (output / "index.html").read_text()
    assert "published, not measured here" in html and "arXiv:1, table 2" in html
    assert len(list((output / "published").glob("*.json"))) == 1


def _broken(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "x.json is not JSON"),
        ("[1]", "x.json is not a record"),
        ('{"schema": 99}', "x.json has record schema 99, this flowkit reads 1; update"),
        ('{"schema": 1, "name": "a"}', "x.json is not a whole record"),
    ],
)
def test_a_file_that_is_no_record_is_named(folder: Path, text: str, message: str) -> None:
    with pytest.raises(FlowkitError, match=message) as caught:
        build(_broken(folder, "x.json", text))
    assert "\n" not in str(caught.value)
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("inside", ["", "page", "more/../deep/page"])
def test_copies_are_no_records_of_the_next_page(folder: Path, inside: str) -> None:
    settings = LeaderboardSettings(records=folder, output_dir=folder / inside)
    before = sorted(folder.rglob("*"))
    with pytest.raises(FlowkitError, match="choose an output_dir outside") as caught:
        write_leaderboard(settings)
    assert "\n" not in str(caught.value) and sorted(folder.rglob("*")) == before


def test_nothing_to_show_is_said(tmp_path: Path) -> None:
    with pytest.raises(FlowkitError, match="no folder of records"):
        read_folder(tmp_path / "absent")
    (tmp_path / ".tmp-1.json").write_text("{")  # a file that is being written
    with pytest.raises(FlowkitError, match="holds no records"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "grid, message",
    [
        ("../secret.png", "below its folder"),
        ("/etc/hostname", "below its folder"),
        ("absent.png", "is not there"),
        ("text.png", "not a readable picture"),
    ],
)
def test_a_grid_that_is_none_is_refused(tmp_path: Path, grid: str, message: str) -> None:
    records = tmp_path / "in"
    write_record(records, record(grid_png=grid))
    (records / "text.png").write_text("no picture")
    Image.new("L", (8, 8)).save(tmp_path / "secret.png")
    with pytest.raises(FlowkitError, match=message):
        build(records)


def test_the_command(folder: Path, monkeypatch, capsys) -> None:
    output = folder.parent / "page"
    arguments = [f"records={folder}", f"output_dir={output}"]
    monkeypatch.setattr(sys, "argv", ["leaderboard", *arguments])
    run_command(main)
    assert capsys.readouterr().out == f"5 rows in 2 rankings: {output / 'index.html'}\n"
    _broken(folder, "x.json", "{")
    with pytest.raises(SystemExit, match="1"):
        run_command(main)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "x.json" in error
