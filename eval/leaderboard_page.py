"""The leaderboard as one HTML page that needs nothing else: no network, no other file.

Its style and script lie beside this module; pictures are in it as data. A content security policy
forbids the page to load anything, or to run any script but its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from flowkit import __version__
from flowkit.eval.leaderboard_details import row_details, thumbnail
from flowkit.eval.leaderboard_plots import group_plots
from flowkit.eval.leaderboard_text import column_of, group_title, number_text, spread_text
from flowkit.eval.ranking import Group
from flowkit.eval.rows import Row

__all__ = ["leaderboard_html"]

HERE = Path(__file__).parent
_SHORT = {"nfe": "NFE", "milliseconds": "time", "parameters": "size"}
COLOURS = 8  # how many series have a colour of their own


def leaderboard_html(
    groups: Sequence[Group], *, title: str = "Leaderboard", grids: Mapping[str, Path] | None = None
) -> str:
    """The page.  grids: a record's file, as in its Entry, to the picture of its samples.

    FlowkitError: a sample grid that is not a picture.
    """
    style = (HERE / "leaderboard.css").read_text(encoding="utf-8")
    script = (HERE / "leaderboard.js").read_text(encoding="utf-8")
    policy = "; ".join([
        "default-src 'none'",
        "img-src data:",
        f"style-src '{_hash(style)}'",
        f"script-src '{_hash(script)}' '{_hash(_EARLY)}'",
        "base-uri 'none'",
        "form-action 'none'",
    ])  # fmt: skip
    colours = _colours(groups)
    sections = [_section(n, groups, colours, grids or {}) for n in range(len(groups))]
    return _PAGE.format(
        policy=escape(policy),
        title=escape(title),
        style=style,
        early=_EARLY,
        script=script,
        lead=_lead(groups),
        nav=_nav(groups),
        sections="\n".join(sections),
        version=escape(__version__),
    )


_EARLY = 'document.documentElement.className = "js"'
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
<script>{early}</script>
</head>
<body>
<header><div><h1>{title}</h1>{lead}{nav}</div></header>
<div class="tools" role="search"><div>
<label><span>Filter</span> <input id="filter" type="search" autocomplete="off"
 placeholder="model, solver, cache, fingerprint ( / )"></label>
<label><input id="front" type="checkbox"> Pareto front only</label>
<output id="count" aria-live="polite"></output>
<button id="theme" type="button" title="light or dark colours">Dark</button>
</div></div>
<main>
{sections}
</main>
<footer>
<p>Rows stand in one table only if they share convention, extractor weights, reference statistics
and number of samples; the page never ranks across tables. ± is the standard deviation over
disjoint seed ranges, or, marked J, the jackknife standard error over the chunks of one range.
The mean is ranked, never the best of several seeds. Being first among many rows is partly luck:
what was chosen by these numbers deserves a measurement on fresh seeds.</p>
<p>Every number links to its record: configuration, hashes, versions, device. The same rows are in
<a href="leaderboard.csv">leaderboard.csv</a>, <a href="leaderboard.jsonl">leaderboard.jsonl</a>
and <a href="leaderboard.md">leaderboard.md</a>, the records in <a href="records/">records/</a>.
Made with flowkit {version}.</p>
</footer>
<div id="tip" hidden></div>
<script type="module">{script}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _colours(groups: Sequence[Group]) -> dict[str, int]:
    """Each row's series number, by fingerprint: one for each model, or for each solver and cache
    where there is one model; those that have fewest rows are grey, 0."""
    rows = [row for group in groups for row in group.rows]
    several = len({row.model for row in rows}) > 1
    series = {
        row.fingerprint: row.model if several else f"{row.record.solver} {row.record.cache}"
        for row in rows
    }
    common = [name for name, _ in Counter(series.values()).most_common(COLOURS)]
    numbers = {name: number for number, name in enumerate(common, 1)}
    return {mark: numbers.get(name, 0) for mark, name in series.items()}


def _lead(groups: Sequence[Group]) -> str:
    rows = [row for group in groups for row in group.rows]
    records = sum(len(row.entries) for row in rows if not row.record.published)
    published = sum(row.record.published for row in rows)
    text = f"{len(rows)} row{'s' * (len(rows) != 1)} from {records} measured "
    text += f"record{'s' * (records != 1)}"
    text += f" and {published} published number{'s' * (published != 1)}" if published else ""
    text += f", in {len(groups)} ranking{'s' * (len(groups) != 1)}."
    return f'<p class="lead">{text} Select a column to sort, a point to find its row, a number to '\
           "see its record.</p>"  # fmt: skip


def _nav(groups: Sequence[Group]) -> str:
    if len(groups) < 2:
        return ""
    links = [
        f'<a href="#table-{n}">{n}. {escape(group_title(group))}'
        f"{' (published)' * group.record.published}</a>"
        for n, group in enumerate(groups, 1)
    ]
    return f'<nav aria-label="rankings">{"".join(links)}</nav>'


def _section(
    place: int, groups: Sequence[Group], colours: dict[str, int], grids: Mapping[str, Path]
) -> str:
    group, number = groups[place], place + 1
    plots = "".join(group_plots(group, colours))
    metric = column_of(group.metric, group).label if group.metric else "Not ranked"
    tags = ['<span class="tag warn">published, not measured here</span>'] * group.record.published
    pictures = any(entry.file in grids for row in group.rows for entry in row.entries)
    rows = "\n".join(_entry(row, group, colours, grids if pictures else None) for row in group.rows)
    return "\n".join([
        f'<section id="table-{number}" aria-labelledby="title-{number}">',
        f'<div class="title"><h2 id="title-{number}">{number}. {escape(metric)} · '
        f"{escape(group_title(group))}</h2>{''.join(tags)}</div>",
        f'<p class="facts">{_facts(group)}</p>',
        f'<div class="plots">{plots}</div>' if plots else "",
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="title-{number}">',
        f"<table>{_head(group, pictures)}\n{rows}\n</table></div>",
        '<p class="empty">No row of this table fits the filter.</p>',
        _why(group, groups),
        "</section>",
    ])  # fmt: skip


def _facts(group: Group) -> str:
    one = group.record
    size, digest = one.reference.get("n"), one.reference.get("sha256")
    words = [
        f"convention <b>{escape(one.convention)}</b>",
        f"extractor <code>{escape(one.extractor)}</code>",
        f"reference {escape(one.reference['name'])}"
        + (f", {size:,} pictures" if size else "")
        + (f", <code>{escape(str(digest)[:12])}</code>" if digest else ", hash unknown"),
        f"{one.num_samples:,} samples",
    ]
    return " · ".join(words)


def _head(group: Group, pictures: bool) -> str:
    cells = [_header("#", "ascending", kind="rank"), _header("model", "ascending", kind="name")]
    cells += ['<th class="text"><span>samples</span></th>'] * pictures
    for key in group.columns:
        column = column_of(key, group)
        arrow = {-1: " ↓", 1: " ↑"}.get(column.better, "")
        first = "descending" if column.better > 0 else "ascending"
        ranked = key == group.metric
        cells.append(_header(f"{column.label}{arrow}", first, sort=first if ranked else ""))
    cells += [_header("source", "ascending", kind="text")] * group.record.published
    cells.append(_header("record", "ascending"))
    return f"<thead><tr>{''.join(cells)}</tr></thead>"


def _header(label: str, first: str, *, kind: str = "", sort: str = "") -> str:
    """A column's head: a button; `first` is the direction it sorts in at the first press."""
    state = f' aria-sort="{sort}"' if sort else ""
    return (
        f'<th scope="col" class="{kind}" data-first="{first}"{state}>'
        f'<button type="button">{escape(label)}</button></th>'
    )


def _entry(
    row: Row, group: Group, colours: dict[str, int], grids: Mapping[str, Path] | None
) -> str:
    one, mark = row.record, row.fingerprint
    cells = [
        f'<td class="rank" data-value="{row.rank or ""}">{row.rank or "–"}</td>',
        f'<td class="name" data-value="{escape(row.model)}">{_name(row, group, colours)}</td>',
    ]
    files = [entry.file for entry in row.entries if entry.file in (grids or {})]
    grid = grids[files[0]] if grids and files else None
    if grids is not None:
        cells.append(f'<td class="thumb">{thumbnail(grid, mark) if grid else ""}</td>')
    cells += [_number(row, key, group) for key in group.columns]
    if one.published:
        cells.append(f'<td class="text" data-value="{escape(one.source or "")}">'
                     f"{escape(one.source or '')}</td>")  # fmt: skip
    cells.append(
        f'<td class="print" data-value="{mark}"><a href="#record-{mark}">{mark}</a> '
        f'<button type="button" class="toggle" aria-expanded="false" aria-controls="record-{mark}" '
        f'aria-label="record {mark}"></button></td>'
    )
    words = [one.name, row.method, mark, one.device, one.source, *row.notes]
    search = escape(" ".join(str(word) for word in words if word).lower())
    return (
        f'<tbody class="entry" id="row-{mark}" data-row="{mark}" data-search="{search}" '
        f'data-front="{" ".join(sorted(row.front))}"><tr>{"".join(cells)}</tr>\n'
        f'<tr class="more" id="record-{mark}"><td colspan="{len(cells)}">'
        f"{row_details(row, grid)}</td></tr></tbody>"
    )


def _name(row: Row, group: Group, colours: dict[str, int]) -> str:
    costs = [_SHORT[cost] for cost in _SHORT if cost in row.front]
    pill = ""
    if costs:
        label = escape(column_of(group.metric or "", group).label)
        title = (
            f"on the Pareto front of {label}: no row with smaller {' or '.join(costs)} is as good"
        )
        pill = f' <span class="pill" title="{title}">front: {", ".join(costs)}</span>'
    notes = "".join(f"<small>{escape(note)}</small>" for note in row.notes)
    swatch = f'<span class="swatch c{colours[row.fingerprint]}"></span>'
    return f"<b>{swatch}{escape(row.model)}</b>{pill}<small>{escape(row.method)}</small>{notes}"


def _number(row: Row, key: str, group: Group) -> str:
    number = row.numbers.get(key)
    if number is None:
        return '<td class="none" data-value="">–</td>'
    value, spread = number_text(number, column_of(key, group))
    mark = "<sup>J</sup>" if number.kind == "jackknife" else ""
    small = f"<small> ±{spread}{mark}</small>" if spread else ""
    best = ' class="best"' if key == group.metric and row.rank == 1 else ""
    return (
        f'<td{best} data-value="{number.value!r}"><a href="#record-{row.fingerprint}" '
        f'title="{escape(spread_text(number) or "see the record")}">{value}{small}</a></td>'
    )


def _why(group: Group, groups: Sequence[Group]) -> str:
    if not group.apart:
        return ""
    items = [
        f'<li><a href="#table-{other + 1}">{other + 1}. '
        f"{escape(group_title(groups[other]))}</a>: {escape(reason)}</li>"
        for other, reason in group.apart
    ]
    return (
        '<details class="why"><summary>Why these rows are not ranked with those of the other '
        f"{'table' if len(items) == 1 else f'{len(items)} tables'}</summary>"
        f"<ul>{''.join(items)}</ul></details>"
    )
