"""What a row of the leaderboard page opens to: its samples and its records, as HTML.

Pictures become data URIs.
"""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from flowkit.errors import FlowkitError
from flowkit.eval.report import LABEL_HEIGHT
from flowkit.eval.rows import Entry, Row
from flowkit.pictures import UNREADABLE, one_line

__all__ = ["row_details", "thumbnail"]

GRID_SIDE = 200  # wider grids are shown in part, and smaller
COLOURS = 16  # of a picture that is drawn rather than taken
THUMB_SIDE = 44  # what it is shown at


def row_details(row: Row, grid: Path | None) -> str:
    """Facts, samples and the whole records of a row; grid: the picture of its samples."""
    figure = ""
    shown = [entry for entry in row.entries if entry.record.grid_png]
    if grid and shown:
        alt = f"samples of {row.model}, {row.method}"
        whole = quote(f"{shown[0].file.rpartition('/')[0]}/{shown[0].record.grid_png}")
        figure = f'<figure><img alt="{escape(alt)}" loading="lazy" src="{_data_uri(grid)}">'\
                 f'<figcaption><a href="{whole}">all samples</a></figcaption></figure>'  # fmt: skip
    records = "".join(_record(entry, len(row.entries) == 1) for entry in row.entries)
    return f'<div class="details">{figure}<div class="records">{_summary(row)}{records}</div></div>'


def _summary(row: Row) -> str:
    one = row.record
    seeds = [
        f"{r.seed}: {r.seeds[0]:,} to {r.seeds[1]:,}" if r.seeds else str(r.seed)
        for r in (entry.record for entry in row.entries)
        if r.seed is not None
    ]
    model = one.model or {}
    facts: dict[str, Any] = {
        "source": one.source,
        "note": one.config.get("note") if one.published else None,
        "model": model.get("path"),
        "weights": model.get("sha256") and f"sha256 {model['sha256'][:16]}…",
        "seed: samples": "; ".join(seeds),
        "device": one.device,
        "versions": ", ".join(f"{name} {version}" for name, version in one.versions.items()),
    }
    items = [f"<dt>{k}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items() if v]
    return f"<dl>{''.join(items)}</dl>" if items else ""


def _record(entry: Entry, opened: bool) -> str:
    values = asdict(entry.record).items()
    lines = [f'"{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in values]
    text = ",\n ".join(lines)
    name = entry.file.rpartition("/")[2]
    return (
        f"<details{' open' * opened}><summary>{escape(name)}</summary>"
        f'<a href="{quote(entry.file)}">{escape(entry.file)}</a>'
        f"<pre>{{{escape(text, quote=False)}}}</pre></details>"
    )


def thumbnail(grid: Path, mark: str) -> str:
    """The middle of the grid, small."""
    with _opened(grid) as image:
        half = min(*image.size, max(THUMB_SIDE, min(image.size) // 3)) // 2
        x, y = image.width // 2, image.height // 2
        middle = image.convert("RGB").crop((x - half, y - half, x + half, y + half))
        middle.thumbnail((THUMB_SIDE, THUMB_SIDE))
        uri = _encoded(middle, "WEBP")
    return f'<a href="#record-{mark}"><img alt="samples" src="{uri}"></a>'


def _data_uri(grid: Path) -> str:
    """The picture as it is; of a wide one the upper half, no label, at an n-th of its size."""
    with _opened(grid) as image:
        shown = image.convert("RGB")
    if shown.width > GRID_SIDE:
        shown = shown.crop((0, LABEL_HEIGHT, shown.width, (shown.height + LABEL_HEIGHT) // 2))
        shown = shown.reduce(math.ceil(shown.width / GRID_SIDE))
    few = shown.quantize(COLOURS, dither=Image.Dither.NONE)
    return min(_encoded(shown, "WEBP"), _encoded(few, "PNG"), key=len)


def _opened(grid: Path) -> Image.Image:
    try:
        image = Image.open(grid)
        image.load()
    except UNREADABLE as error:
        raise FlowkitError(f"{grid} is not a readable picture: {one_line(error)}") from None
    return image


def _encoded(image: Image.Image, kind: str) -> str:
    out = io.BytesIO()
    options: dict[str, Any] = {"optimize": True} if kind == "PNG" else {"quality": 60}
    image.save(out, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"
