"""Rankings as text: Markdown tables, CSV, JSON lines, and how numbers and titles are written."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from flowkit.eval.ranking import Group
from flowkit.eval.rows import COLUMNS, Column, Number, Row, column_order

__all__ = [
    "column_of",
    "csv_text",
    "group_title",
    "json_lines",
    "markdown_text",
    "number_text",
    "spread_text",
]

_WHOLE = 1e4  # from here on no decimals


def column_of(key: str, group: Group) -> Column:
    """How a column of a ranking is shown; one that is not known has its key as label and no better
    end.  Without Inception features a Fréchet distance is not called FID, and KID is scaled up only
    where it is small."""
    name, bracket, rule = key.partition(" [")
    column = COLUMNS.get(name, Column(name.replace("_", " "), 0))
    label, scale, extractor = column.label, column.scale, group.record.extractor
    if "fid" in name and not extractor.startswith("inception"):
        label = label.replace("FID", "FD-DINOv2" if extractor.startswith("dinov2") else "FD")
    if name == "kid" and any(
        row.numbers[key].value > 1 for row in group.rows if key in row.numbers
    ):
        label, scale = "KID", 1.0
    return replace(column, label=f"{label}{bracket}{rule}", scale=scale)


def number_text(number: Number, column: Column) -> tuple[str, str]:
    """(value, spread) as text: two digits of the spread and as many decimals of the value, which
    has the column's digits without a spread."""
    value = number.value * column.scale
    if number.kind == "published":  # with the digits it was published with
        spread = "" if number.spread is None else f"{number.spread * column.scale:.10g}"
        return f"{value:.10g}", spread
    if not number.spread:
        if value == int(value) or abs(value) >= _WHOLE:
            return f"{value:,.0f}", ""
        decimals = column.digits - 1 - math.floor(math.log10(abs(value)))
        return f"{value:.{min(max(decimals, 0), 8)}f}", ""
    width = abs(number.spread * column.scale)
    decimals = min(max(0, 1 - math.floor(math.log10(width))), 8)
    return f"{value:,.{decimals}f}", f"{width:,.{decimals}f}"


def spread_text(number: Number) -> str:
    """What the number's +- is, in words."""
    if number.kind == "std":
        return f"mean ± standard deviation over {number.count} seed ranges"
    if number.kind == "jackknife" and number.spread is not None:
        return "± jackknife standard error over chunks, one seed range"
    if number.kind == "published":
        return "as published" + (", ± standard deviation" if number.spread is not None else "")
    return ""


def group_title(group: Group) -> str:
    """`clean · cifar10-train · N = 50,000`; the extractor's name where it has no convention."""
    one = group.record
    kind = one.extractor.partition("@")[0] if one.convention == "none" else one.convention
    return f"{kind} · {one.reference['name']} · N = {one.num_samples:,}"


def markdown_text(groups: Sequence[Group], title: str) -> str:
    """One table a ranking; every number links to its record."""
    lines = [f"# {title}", ""]
    for place, group in enumerate(groups):
        one, columns = group.record, [column_of(key, group) for key in group.columns]
        lines += [f"## {place + 1}. {group_title(group)}", "", _facts(group), ""]
        arrows = [f"{c.label}{({-1: ' ↓', 1: ' ↑'}).get(c.better, '')}" for c in columns]
        source = ["source"] * one.published
        header = ["rank", "model", "method", *arrows, *source, "fingerprint"]
        lines += ["| " + " | ".join(header) + " |"]
        lines += ["|---|---|---" + "|---:" * len(columns) + "|---" * (1 + len(source)) + "|"]
        lines += [_markdown_row(row, group) for row in group.rows]
        reasons = [f"{other + 1} ({reason})" for other, reason in group.apart]
        if reasons:
            lines += ["", "Not ranked with table " + "; ".join(map(_cell, reasons)) + "."]
        lines.append("")
    lines += ["± is the standard deviation over seed ranges, or, marked J, the jackknife standard "
              "error of one range. Every number links to its record."]  # fmt: skip
    return "\n".join(lines) + "\n"


def csv_text(groups: Sequence[Group]) -> str:
    """One line a row, all rankings in one table; empty where a row has no such number."""
    keys = sorted(
        {k for group in groups for row in group.rows for k in row.numbers}, key=column_order
    )
    numbers = [name for key in keys for name in (key, f"{key}_spread", f"{key}_spread_is")]
    fixed = list(_identity(1, groups[0], groups[0].rows[0])) if groups else []
    out = io.StringIO()
    writer = csv.DictWriter(out, [*fixed, *numbers, "records"], restval="", lineterminator="\n")
    writer.writeheader()
    for place, group in enumerate(groups, 1):
        for row in group.rows:
            line: dict[str, Any] = _identity(place, group, row)
            for key, number in row.numbers.items():
                line |= {key: number.value, f"{key}_spread": number.spread}
                line[f"{key}_spread_is"] = number.kind if number.spread is not None else ""
            files = " ".join(entry.file for entry in row.entries)
            writer.writerow({k: _safe(v) for k, v in line.items()} | {"records": files})
    return out.getvalue()


def json_lines(groups: Sequence[Group]) -> str:
    """One JSON object a row: group, rank, what it is, numbers with their spread, record files."""
    lines = []
    for place, group in enumerate(groups, 1):
        for row in group.rows:
            numbers = {
                key: {"value": n.value, "spread": n.spread, "spread_is": n.kind, "count": n.count}
                for key, n in row.numbers.items()
            }
            line = _identity(place, group, row) | {
                "pareto": sorted(row.front),
                "notes": list(row.notes),
                "numbers": numbers,
                "records": [entry.file for entry in row.entries],
            }
            lines.append(json.dumps(line, ensure_ascii=False))
    return "".join(line + "\n" for line in lines)


def _identity(place: int, group: Group, row: Row) -> dict[str, Any]:
    one = row.record
    return {
        "group": place,
        "convention": one.convention,
        "extractor": one.extractor,
        "reference": one.reference["name"],
        "reference_n": one.reference.get("n"),
        "num_samples": one.num_samples,
        "published": one.published,
        "source": one.source,
        "ranked_by": group.metric,
        "rank": row.rank,
        "name": one.name,
        "method": row.method,
        "fingerprint": row.fingerprint,
    }


def _facts(group: Group) -> str:
    one = group.record
    size = one.reference.get("n")
    pictures = f" ({size:,} pictures)" if size else ""
    kind = "Published by others, not measured here. " if one.published else ""
    by = f"ranked by {column_of(group.metric, group).label}" if group.metric else "not ranked"
    return f"{kind}Extractor `{one.extractor}`, reference {one.reference['name']}{pictures}; {by}."


def _markdown_row(row: Row, group: Group) -> str:
    file = row.entries[0].file
    cells = [str(row.rank or ""), _cell(row.model), _cell(row.method)]
    for key in group.columns:
        number = row.numbers.get(key)
        if number is None:
            cells.append("")
            continue
        value, spread = number_text(number, column_of(key, group))
        mark = "J" if number.kind == "jackknife" else ""
        cells.append(f"[{value}{spread and f' ± {spread}{mark}'}]({quote(file)})")
    if row.record.published:
        cells.append(_cell(row.record.source or ""))
    links = [f"[{row.fingerprint}]({quote(file)})"]
    links += [f"[+{n}]({quote(e.file)})" for n, e in enumerate(row.entries[1:], 1)]
    return "| " + " | ".join([*cells, " ".join(links)]) + " |"


def _cell(text: str) -> str:
    """Text that cannot leave its cell, nor be markup."""
    for mark in "\\|<>[]`*_":
        text = text.replace(mark, f"\\{mark}" if mark not in "<>" else f"&#{ord(mark)};")
    return " ".join(text.split())


def _safe(value: Any) -> Any:
    """A text that a spreadsheet would run as a formula is kept from it by an apostrophe."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t")):
        return f"'{value}"
    return "" if value is None else value
