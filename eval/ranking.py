"""Rankings of records: only what may be compared stands in one.

A group is a ranking: its rows share convention, extractor, reference and number of samples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flowkit.errors import FlowkitError
from flowkit.eval.records import Record, comparable
from flowkit.eval.rows import COLUMNS, PLOTTED, Column, Entry, Row, column_order, rows_of

__all__ = ["Group", "main_device", "pareto_front", "rank_records"]


@dataclass(frozen=True)
class Group:
    """One ranking, best row first.  metric: what it is ranked by, None if there is nothing.

    columns: the keys of the numbers that any row has, in order.
    """

    rows: tuple[Row, ...]
    metric: str | None
    columns: tuple[str, ...]
    apart: tuple[tuple[int, str], ...] = ()

    @property
    def record(self) -> Record:
        return self.rows[0].record


def rank_records(entries: Iterable[Entry], metric: str | None = None) -> list[Group]:
    """Rankings of the records, measured ones first; `apart` says why each is not in the others.

    metric: what to rank by where a record has it; else the first of COLUMNS that it has.
    FlowkitError: `metric` is in no record.
    """
    entries = sorted(entries, key=lambda entry: (entry.record.fingerprint, entry.file))
    if metric is not None and not any(metric in entry.record.metrics for entry in entries):
        known = sorted({name for entry in entries for name in entry.record.metrics})
        raise FlowkitError(f"no record has the metric {metric!r}; they have {', '.join(known)}")
    parts: list[list[Entry]] = []
    for entry in entries:
        part = next((p for p in parts if _apart(p[0].record, entry.record, metric) is None), None)
        if part is None:
            parts.append([entry])
        else:
            part.append(entry)
    groups = sorted((_group(part, metric) for part in parts), key=_group_order)
    return [
        replace(
            group,
            apart=tuple(
                (place, _apart(group.record, other.record, metric) or "")
                for place, other in enumerate(groups)
                if other is not group
            ),
        )
        for group in groups
    ]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, loss) that no other beats: no cheaper one has as small a loss,
    and no equally cheap one a smaller; by rising cost.  Equal points are all in."""
    front: list[int] = []
    best = math.inf
    for index in sorted(range(len(points)), key=points.__getitem__):
        if points[index][1] < best or (front and points[index] == points[front[-1]]):
            front.append(index)
            best = points[index][1]
    return front


def _apart(a: Record, b: Record, metric: str | None) -> str | None:
    """Why two records are not in one ranking, None if they are."""
    if a.published != b.published:
        return "one is measured, the other published by others"
    by = _ranked_by(a, metric)
    return comparable(a, b, by if by in b.metrics else None)


def _ranked_by(record: Record, metric: str | None) -> str | None:
    if metric in record.metrics:
        return metric
    return min(record.metrics, key=column_order, default=None)


def _group_order(group: Group) -> tuple[Any, ...]:
    one = group.record
    what = (one.reference["name"], one.convention, one.extractor, -one.num_samples, group.metric)
    return (one.published, -len(group.rows), *map(str, what))


def _group(entries: Sequence[Entry], metric: str | None) -> Group:
    """The ranking of comparable records."""
    by = _ranked_by(entries[0].record, metric)
    rows = rows_of(entries, by)
    better = COLUMNS.get(by or "", Column("")).better or -1
    rows.sort(key=lambda row: _loss(row, by, better))
    losses = [_loss(row, by, better)[0] for row in rows]
    rows = [
        replace(row, rank=losses.index(loss) + 1 if loss < math.inf else None)
        for row, loss in zip(rows, losses, strict=True)
    ]
    rows = _with_fronts(rows, by, better)
    return Group(tuple(rows), by, _columns(rows))


def _columns(rows: Sequence[Row]) -> tuple[str, ...]:
    """What the rows have: times once, as pictures a second, and calls where they are not NFE."""
    keys = {key for row in rows for key in row.numbers}
    if all(row.numbers.get("nfe") == row.numbers.get("nfe_with_guidance") for row in rows):
        keys.discard("nfe_with_guidance")
    return tuple(sorted(keys - {"milliseconds"}, key=column_order))


def _loss(row: Row, by: str | None, better: int) -> tuple[float, str, str]:
    number = row.numbers.get(by or "")
    return (-better * number.value if number else math.inf), row.record.name, row.fingerprint


def _with_fronts(rows: Sequence[Row], by: str | None, better: int) -> list[Row]:
    """The rows, each told the costs against which it is on the front."""
    fronts: dict[int, set[str]] = {place: set() for place in range(len(rows))}
    for cost in PLOTTED:
        places = [p for p, row in enumerate(rows) if by in row.numbers and cost in row.numbers]
        if cost == "milliseconds":
            places = [p for p in places if rows[p].record.device == main_device(rows)]
        points = [(rows[p].numbers[cost].value, _loss(rows[p], by, better)[0]) for p in places]
        if len({cost for cost, _ in points}) < 2:
            continue
        for index in pareto_front(points):
            fronts[places[index]].add(cost)
    return [replace(row, front=frozenset(fronts[place])) for place, row in enumerate(rows)]


def main_device(rows: Sequence[Row]) -> str | None:
    """The device on which most rows were timed: times of others do not compare with them."""
    devices = [row.record.device for row in rows if "milliseconds" in row.numbers]
    return statistics.mode(devices) if devices else None
