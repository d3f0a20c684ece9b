"""Records as rows: what repeats have in common, their mean and spread, their costs.

A row is one way to make pictures; its records differ in their seeds alone.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowkit.eval.records import Record, canonical_sha256

__all__ = ["COLUMNS", "PLOTTED", "Column", "Entry", "Number", "Row", "column_order", "rows_of"]


@dataclass(frozen=True)
class Column:
    """How a number is shown: its label, which end is better (-1 lower, 1 higher, 0 neither), the
    factor and the digits it is shown with."""

    label: str
    better: int = -1
    scale: float = 1.0
    digits: int = 4


# The order of the columns, and of what a group is ranked by.
COLUMNS = {
    "fid": Column("FID"),
    "fd": Column("FD"),
    "fd_dinov2": Column("FD-DINOv2"),
    "cmmd": Column("CMMD"),
    "kid": Column("KID ×10³", scale=1e3),
    "sfid": Column("sFID"),
    "fid_infinity": Column("FID∞"),
    "mind": Column("MIND"),
    "inception_score": Column("IS", 1),
    "is": Column("IS", 1),
    "precision": Column("precision", 1),
    "recall": Column("recall", 1),
    "density": Column("density", 1),
    "coverage": Column("coverage", 1),
    "clip_score": Column("CLIP score", 1),
    "vendi": Column("Vendi", 1),
    "realism": Column("realism", 1),
    "authenticity": Column("AuthPct", 1),
    "nfe": Column("NFE", digits=3),
    "nfe_with_guidance": Column("calls, guided", digits=3),
    "milliseconds": Column("ms / img", digits=3),
    "images_per_second": Column("img / s", 1, digits=3),
    "peak_memory": Column("peak GB", scale=1e-9, digits=3),
    "parameters": Column("params, M", scale=1e-6, digits=3),
    "straightness": Column("straightness", digits=3),
}
PLOTTED = ("nfe", "milliseconds", "parameters")  # what quality is weighed against
_COSTS = list(COLUMNS)[list(COLUMNS).index("nfe") :]
# Options of a run that do not change how its pictures are made.
_INCIDENTAL = {"name", "seed", "repeats", "nfe", "num_samples", "output_dir", "records", "progress"}
_INCIDENTAL |= {"metrics", "metric_options", "manifold_samples", "reference_dir", "jackknife"}
_INCIDENTAL |= {"straightness_samples", "straightness_steps", "save_pictures", "device", "model"}
_INCIDENTAL |= {"reference", "reference_convention", "features", "weights"}  # hashed in the record


@dataclass(frozen=True)
class Entry:
    """A record and the file it lies in, relative to the leaderboard's folder."""

    record: Record
    file: str


@dataclass(frozen=True)
class Number:
    """value +- spread, in the record's own units.

    kind: what the spread is, "std" over `count` seed ranges, "jackknife" (a standard error), or
    "published"; "" without one.
    """

    value: float
    spread: float | None = None
    kind: str = ""
    count: int = 1


@dataclass(frozen=True)
class Row:
    """Records that differ in seeds alone; notes: what a reader must know.

    front: the costs against which the row is on the group's Pareto front.
    """

    entries: tuple[Entry, ...]
    numbers: dict[str, Number]
    notes: tuple[str, ...] = ()
    rank: int | None = None
    front: frozenset[str] = frozenset()

    @property
    def record(self) -> Record:
        return self.entries[0].record

    @property
    def fingerprint(self) -> str:
        """8 hex digits: the record's own, or a hash over those of all the records."""
        prints = sorted(entry.record.fingerprint for entry in self.entries)
        return prints[0] if len(prints) == 1 else canonical_sha256(prints)[:8]

    @property
    def model(self) -> str:
        """The record's name without the solver and steps that the measuring command adds to it."""
        solver = self.record.config.get("solver")
        return self.record.name.partition(f" {solver} ")[0] if solver else self.record.name

    @property
    def method(self) -> str:
        """Solver, steps, grid, cache and guidance in a few words."""
        one = self.record
        words = [one.solver or ""]
        words += [f"{one.steps} step{'s' * (one.steps != 1)}" if one.steps else ""]
        words += [_grid_text(one.grid) if one.grid else ""]
        words += [f"cache {_brief(one.cache)}" if one.cache else ""]
        words += [f"guidance {_brief(one.guidance)}" if one.guidance else ""]
        words += [one.dtype if one.dtype and one.dtype != "float32" else ""]
        return " · ".join(word for word in words if word)


def rows_of(entries: Sequence[Entry], ranked_by: str | None = None) -> list[Row]:
    """The rows of comparable records, repeats over seeds put together.

    A metric whose rule differs between records gets a column for each rule, `ranked_by` apart.
    """
    named = _metric_names([entry.record for entry in entries], ranked_by)
    alike: dict[str, list[Entry]] = {}
    for entry in entries:
        alike.setdefault(_way(entry.record), []).append(entry)
    return [row for part in alike.values() for row in _rows(part, named)]


def column_order(key: str) -> tuple[int, str]:
    """Where a column stands: known ones as in COLUMNS, other metrics before the costs."""
    known = list(COLUMNS)
    name = key.partition(" [")[0]
    return (known.index(name) if name in known else known.index("nfe") - 1, key)


def _metric_names(records: Sequence[Record], by: str | None) -> dict[tuple[str, Any], str]:
    """(metric, rule) to its column: one of its own for each rule, where rules differ."""
    rules: dict[str, set[Any]] = {}
    for record in records:
        for metric in record.metrics:
            rules.setdefault(metric, set()).add(_rule(record, metric))
    return {
        (metric, rule): metric if len(found) == 1 or metric == by else f"{metric} [{rule}]"
        for metric, found in rules.items()
        for rule in found
    }


def _rule(record: Record, metric: str) -> Any:
    parts = record.parts.get(metric)
    return parts.get("rule") if isinstance(parts, Mapping) else None


def _way(record: Record) -> str:
    """What repeats have in common: all that makes the pictures, but for the seeds."""
    config = {key: value for key, value in record.config.items() if key not in _INCIDENTAL}
    model = (record.model or {}).get("sha256") or (record.model or {}).get("path")
    return canonical_sha256([
        *(record.name, model, record.solver, record.solver_options, record.grid, record.steps),
        *(record.guidance, record.cache, record.labels, record.dtype, record.source, config),
        *(record.published and record.metrics,),
    ])  # fmt: skip


def _rows(entries: Sequence[Entry], named: Mapping[tuple[str, Any], str]) -> list[Row]:
    """The records of one way as one row; those whose samples another has already, in their own."""
    if entries[0].record.published:
        return [_row((entry,), named) for entry in entries]
    repeats: list[Entry] = []
    again: list[Entry] = []
    for entry in entries:
        seen = any(_overlap(entry.record, other.record) for other in repeats)
        (again if seen else repeats).append(entry)
    note = ("made of samples that another row has too: no independent repeat",)
    rows = [_row((entry,), named, note) for entry in again]
    return [_row(tuple(repeats), named), *rows]


def _overlap(a: Record, b: Record) -> bool:
    """Whether two records may have samples in common: of one seed, or of one set of pictures, of
    which a seed tells only the order and the choice."""
    pictures = a.config.get("pictures")
    if a.seed != b.seed and pictures is not None and pictures == b.config.get("pictures"):
        return True
    if a.seed != b.seed or a.seeds is None or b.seeds is None:
        return a.seed == b.seed
    return a.seeds[0] < b.seeds[1] and b.seeds[0] < a.seeds[1]


def _row(
    entries: tuple[Entry, ...], named: Mapping[tuple[str, Any], str], notes: tuple[str, ...] = ()
) -> Row:
    records = [entry.record for entry in entries]
    numbers = {}
    for metric in dict.fromkeys(metric for record in records for metric in record.metrics):
        having = [record for record in records if metric in record.metrics]
        numbers[named[metric, _rule(having[0], metric)]] = _number(having, metric)
    costs = [_costs(record) for record in records]
    for key in _COSTS:
        values = [value for cost in costs if (value := cost[key]) is not None]
        if values:
            numbers[key] = Number(max(values) if key == "peak_memory" else statistics.fmean(values))
    return Row(entries, numbers, notes)


def _number(records: Sequence[Record], metric: str) -> Number:
    """The mean over all seed ranges, with their standard deviation; one range has its jackknife."""
    errors = [record.errors.get(metric) or {} for record in records]
    values: list[float] = []
    for record, error in zip(records, errors, strict=True):
        values += error.get("values") or [record.metrics[metric]]
    if len(values) > 1:
        return Number(statistics.fmean(values), statistics.stdev(values), "std", len(values))
    if records[0].published:
        return Number(values[0], errors[0].get("std"), "published")
    return Number(values[0], errors[0].get("jackknife"), "jackknife")


def _costs(record: Record) -> dict[str, float | None]:
    speed = record.images_per_second
    return {
        "nfe": record.nfe,
        "nfe_with_guidance": record.nfe_with_guidance,
        "milliseconds": 1e3 / speed if speed else None,
        "images_per_second": speed,
        "peak_memory": record.peak_memory,
        "parameters": (record.model or {}).get("parameters"),
        "straightness": (record.straightness or {}).get("per_dim"),
    }


def _grid_text(grid: str) -> str:
    """A grid's name and options, which records have as JSON, in words."""
    if not grid.startswith("{"):
        return grid
    try:
        return _brief(json.loads(grid))
    except ValueError:
        return grid


def _brief(options: Mapping[str, Any]) -> str:
    """{"name": "taylor", "order": 1} as `taylor order=1`."""
    rest = [f"{key}={value}" for key, value in options.items() if key != "name"]
    return " ".join([str(options["name"])] * ("name" in options) + rest)
