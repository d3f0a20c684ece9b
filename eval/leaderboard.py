"""A leaderboard from a folder of records: an HTML page, Markdown, CSV and JSON lines.

    python -m flowkit.eval.leaderboard records=runs/records output_dir=docs/leaderboard

Records that may not be compared (another convention, extractor, reference or number of samples)
are in separate rankings; repeats over seeds are one row, mean +- std. Every number links to its
record, of which a copy lies beside the page.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from flowkit.config import option, parse, run_command
from flowkit.errors import FlowkitError
from flowkit.eval.leaderboard_text import csv_text, json_lines, markdown_text
from flowkit.eval.published import read_published
from flowkit.eval.ranking import Group, rank_records
from flowkit.eval.records import Record, read_record, write_record
from flowkit.eval.rows import Entry
from flowkit.files import atomic_file

__all__ = ["LeaderboardSettings", "read_folder", "write_leaderboard"]


@dataclass(frozen=True)
class LeaderboardSettings:
    """Options of the leaderboard command."""

    records: Path = option(Path("runs/records"), "folder of records, subfolders included")
    output_dir: Path = option(Path("runs/leaderboard"), "where index.html and the tables go")
    published: list[Path] = option([], "YAML or CSV files of published numbers")
    metric: str | None = option(None, "what to rank by; by default the first a record has")
    title: str = option("Leaderboard", "heading of the page")


def read_folder(folder: Path) -> dict[Path, Record]:
    """The records in a folder and below, by path.

    FlowkitError: no such folder, no record in it, or a file that is none (then nothing is read,
    so that no result goes missing unnoticed).
    """
    if not folder.is_dir():
        raise FlowkitError(f"no folder of records at {folder}; measure something first")
    paths = [path for path in sorted(folder.rglob("*.json")) if not _hidden(path, folder)]
    if not paths:
        raise FlowkitError(f"{folder} holds no records (*.json); measure something first")
    return {path: read_record(path) for path in paths}


def write_leaderboard(settings: LeaderboardSettings) -> list[Group]:
    """Write index.html, leaderboard.md, .csv, .jsonl and records/ under output_dir; returns the
    rankings.

    FlowkitError: output_dir lies in records; what `read_folder`, `read_published` and
    `rank_records` raise.
    """
    from flowkit.eval.leaderboard_page import leaderboard_html  # torch, which --help need not know

    _check_places(settings)
    published = [record for path in settings.published for record in read_published(path)]
    if not settings.records.exists() and published:
        found = {}
    else:
        found = read_folder(settings.records)
    output = settings.output_dir
    entries = [Entry(record, _relative(path, settings)) for path, record in found.items()]
    groups = rank_records([*entries, *_write_published(output, published)], settings.metric)
    grids = {
        entry.file: grid
        for path, entry in zip(found, entries, strict=True)
        if (grid := _grid(path, entry.record)) is not None
    }
    html = leaderboard_html(groups, title=settings.title, grids=grids)
    for path, entry in zip(found, entries, strict=True):
        _copy(path, output / entry.file)
        if entry.file in grids and entry.record.grid_png:
            _copy(grids[entry.file], (output / entry.file).parent / entry.record.grid_png)
    _write(output / "leaderboard.md", markdown_text(groups, settings.title))
    _write(output / "leaderboard.csv", csv_text(groups))
    _write(output / "leaderboard.jsonl", json_lines(groups))
    _write(output / "index.html", html)
    return groups


def _check_places(settings: LeaderboardSettings) -> None:
    """FlowkitError where the copies beside the page would be records of the next page."""
    if settings.output_dir.resolve().is_relative_to(settings.records.resolve()):
        raise FlowkitError(
            f"output_dir={settings.output_dir} lies in records={settings.records}, where its copies"
            " would count as records again; choose an output_dir outside"
        )


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _relative(path: Path, settings: LeaderboardSettings) -> str:
    return (PurePosixPath("records") / path.relative_to(settings.records).as_posix()).as_posix()


def _write_published(output: Path, records: Sequence[Record]) -> list[Entry]:
    """Published numbers as record files of their own; two of one identity are an error."""
    entries: dict[str, Entry] = {}
    for record in records:
        path = write_record(output / "published", record)
        file = path.relative_to(output).as_posix()
        if file in entries:
            raise FlowkitError(
                f"published number of {record.name!r} ({record.source}) is given twice for "
                f"{record.convention}; keep one"
            )
        entries[file] = Entry(record, file)
    return list(entries.values())


def _grid(path: Path, record: Record) -> Path | None:
    """The record's sample grid; it must lie in the record's own folder or below."""
    if record.grid_png is None:
        return None
    inside = PurePosixPath(record.grid_png)
    if inside.is_absolute() or ".." in inside.parts:
        raise FlowkitError(f"{path}: grid_png must be a path below its folder, got {inside}")
    grid = path.parent / inside
    if not grid.is_file():
        raise FlowkitError(f"{path} names the sample grid {grid}, which is not there")
    return grid


def _copy(source: Path, target: Path) -> None:
    if not (target.exists() and source.samefile(target)):
        with atomic_file(target) as temporary:
            shutil.copyfile(source, temporary)


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main() -> None:
    """The command."""
    settings = parse(LeaderboardSettings, doc=__doc__ or "")
    groups = write_leaderboard(settings)
    rows = sum(len(group.rows) for group in groups)
    print(f"{rows} rows in {len(groups)} rankings: {settings.output_dir / 'index.html'}")


if __name__ == "__main__":
    from flowkit.eval import leaderboard

    run_command(leaderboard.main)
