"""What a row of the leaderboard page opens to: its samples and its records, as HTML.

Pictures become data URIs.
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from flowkit.errors import FlowkitError
from flowkit.eval.rows import Entry, Row
from flowkit.pictures import UNREADABLE, one_line

__all__ = ["row_details", "thumbnail"]

GRID_SIDE, GRID_BYTES = 640, 150_000  # larger grids are shown smaller
THUMB_SIDE = 88  # twice what it is shown at


def row_details(row: Row, grid: Path | None) -> str:
    """Facts, samples and the whole records of a row; grid: the picture of its samples."""
    figure = ""
    if grid:
        alt = f"samples of {row.model}, {row.method}"
        figure = f'<figure><img alt="{escape(alt)}" loading="lazy" src="{_data_uri(grid)}">'\
                 "<figcaption>samples</figcaption></figure>"  # fmt: skip
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
    text = json.dumps(asdict(entry.record), indent=2, ensure_ascii=False)
    name = entry.file.rpartition("/")[2]
    return (
        f"<details{' open' * opened}><summary>{escape(name)}</summary>"
        f'<a href="{quote(entry.file)}">{escape(entry.file)}</a>'
        f"<pre>{escape(text)}</pre></details>"
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
    """The picture as it is, or smaller if it is large."""
    with _opened(grid) as image:
        small = max(image.size) <= GRID_SIDE and grid.stat().st_size <= GRID_BYTES
        if small and image.format == "PNG":
            return f"data:image/png;base64,{base64.b64encode(grid.read_bytes()).decode()}"
        shown = image.convert("RGB")
        shown.thumbnail((GRID_SIDE, GRID_SIDE))
        return _encoded(shown, "WEBP")


def _opened(grid: Path) -> Image.Image:
    try:
        image = Image.open(grid)
        image.load()
    except UNREADABLE as error:
        raise FlowkitError(f"{grid} is not a readable picture: {one_line(error)}") from None
    return image


def _encoded(image: Image.Image, kind: str) -> str:
    out = io.BytesIO()
    image.save(out, format=kind, quality=82)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"
