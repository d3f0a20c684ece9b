"""Pareto plots as SVG: quality against a cost, the front drawn, every point a link to its row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from flowkit.eval.leaderboard_text import column_of, number_text
from flowkit.eval.ranking import Group, main_device
from flowkit.eval.rows import PLOTTED, Row

__all__ = ["group_plots", "nice_ticks"]

WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 54, 16, 14, 44
WIDE = 8  # a ratio of largest to smallest from which an axis is logarithmic


@dataclass(frozen=True)
class _Axis:
    """Values to pixels: start and end of the range, in values, and of the axis, in pixels."""

    values: Sequence[float]
    pixels: tuple[float, float]
    few: int = 6

    @property
    def logarithmic(self) -> bool:
        return min(self.values) > 0 and max(self.values) / min(self.values) >= WIDE

    @property
    def scale(self) -> Callable[[float], float]:
        return math.log10 if self.logarithmic else float

    def __call__(self, value: float) -> float:
        low, high = (self.scale(end) for end in (min(self.values), max(self.values)))
        gap = 0.07 * (high - low) or 0.5 * abs(low) or 0.5
        share = (self.scale(value) - low + gap) / (high - low + 2 * gap)
        return self.pixels[0] + share * (self.pixels[1] - self.pixels[0])

    def ticks(self) -> list[float]:
        """The values themselves where they are few and apart, else round numbers."""
        single = sorted(set(self.values))
        places = [self(value) for value in single]
        apart = all(abs(b - a) > 24 for a, b in zip(places, places[1:], strict=False))
        if len(single) <= self.few and apart and all(v == int(v) for v in single):
            return single
        return nice_ticks(min(single), max(single), logarithmic=self.logarithmic)


def nice_ticks(low: float, high: float, *, logarithmic: bool = False) -> list[float]:
    """Up to 6 round numbers in [low, high]: 1, 2 or 5 times a power of ten, evenly spaced unless
    `logarithmic`."""
    if low == high:
        return [low]
    if logarithmic:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks: list[float] = []
        for digits in ((1, 2, 5), (1, 3), (1,)):
            ticks = [d * 10.0**k for k in decades for d in digits if low <= d * 10.0**k <= high]
            if len(ticks) <= 6:
                return ticks or [low, high]
        return ticks[:: math.ceil(len(ticks) / 6)]
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def group_plots(group: Group, colours: dict[str, int]) -> list[str]:
    """A <figure> for each cost that tells the rows apart.

    colours: the series number of a row, by its fingerprint.
    """
    return [figure for cost in PLOTTED if (figure := _figure(group, cost, colours))]


def _figure(group: Group, cost: str, colours: dict[str, int]) -> str:
    metric = group.metric or ""
    rows = [row for row in group.rows if metric in row.numbers and cost in row.numbers]
    note = ""
    if cost == "milliseconds":
        device = main_device(rows)
        others = sum(row.record.device != device for row in rows)
        rows = [row for row in rows if row.record.device == device]
        note = f" Timed on {device or 'an unnamed device'}."
        note += f" {others} timed elsewhere left out." if others else ""
    if len({row.numbers[cost].value for row in rows}) < 2:
        return ""
    x_of, y_of = column_of(cost, group), column_of(metric, group)
    xs = [row.numbers[cost].value * x_of.scale for row in rows]
    ys = [row.numbers[metric].value * y_of.scale for row in rows]
    x = _Axis(xs, (LEFT, WIDTH - RIGHT))
    y = _Axis(ys, (HEIGHT - BOTTOM, TOP))
    points = list(zip(rows, map(x, xs), map(y, ys), strict=True))
    better = {-1: "lower is better", 1: "higher is better"}.get(y_of.better, "")
    title = f"{y_of.label} against {x_of.label}"
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="{escape(title)}">',
        *_axes(x, y, (x_of.label, y_of.label)),
        *_curves(points, colours),
        _front_path(points, cost),
        *[
            _point(row, (px, py), group=group, cost=cost, colours=colours)
            for row, px, py in reversed(points)  # the best on top
        ],
        "</svg>",
    ]
    caption = f"<b>{escape(title)}</b> {better}. Dashed: the Pareto front.{escape(note)}"
    return f"<figure>{''.join(parts)}<figcaption>{caption}</figcaption></figure>"


def _axes(x: _Axis, y: _Axis, labels: tuple[str, str]) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in x.ticks():
        at = f"{x(tick):.1f}"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{bottom}"/>')
        text = _tick(tick)
        parts.append(f'<text x="{at}" y="{bottom + 16}" text-anchor="middle">{text}</text>')
    for tick in y.ticks():
        at = f"{y(tick):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at}" y2="{at}"/>')
        text = _tick(tick)
        parts.append(f'<text x="{LEFT - 7}" y="{at}" dy=".35em" text-anchor="end">{text}</text>')
    pairs = zip(labels, (x, y), strict=True)
    logs = [f"{label}{' (log)' * axis.logarithmic}" for label, axis in pairs]
    middle = (LEFT + right) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 6}" '
                 f'text-anchor="middle">{escape(logs[0])}</text>')  # fmt: skip
    parts.append(f'<text class="label" transform="translate(13 {(TOP + bottom) / 2}) rotate(-90)" '
                 f'text-anchor="middle">{escape(logs[1])}</text>')  # fmt: skip
    return parts


def _tick(value: float) -> str:
    return f"{value:,.10g}"


def _curves(points: Sequence[tuple[Row, float, float]], colours: dict[str, int]) -> list[str]:
    """A faint line through the rows of one model, solver and cache."""
    series: dict[tuple[str, ...], list[tuple[float, float, Row]]] = {}
    for row, px, py in points:
        one = row.record
        options = (one.solver, one.solver_options, one.grid, one.cache, one.guidance, one.dtype)
        series.setdefault((row.model, *map(str, options)), []).append((px, py, row))
    parts = []
    for line in series.values():
        if len({px for px, _, _ in line}) > 1:
            line.sort(key=lambda point: point[:2])
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in line)
            colour = colours[line[0][2].fingerprint]
            parts.append(f'<polyline class="curve c{colour}" points="{path}"/>')
    return parts


def _front_path(points: Sequence[tuple[Row, float, float]], cost: str) -> str:
    """Steps through the front: for a budget, the best that it buys."""
    front = sorted((px, py) for row, px, py in points if cost in row.front)
    if len(front) < 2:
        return ""
    steps = [f"M{front[0][0]:.1f} {front[0][1]:.1f}"]
    steps += [f"H{px:.1f}V{py:.1f}" for px, py in front[1:]]
    return f'<path class="front" d="{"".join(steps)}"/>'


def _point(
    row: Row, at: tuple[float, float], *, group: Group, cost: str, colours: dict[str, int]
) -> str:
    texts = []
    for key in (cost, group.metric or ""):
        column = column_of(key, group)
        value, spread = number_text(row.numbers[key], column)
        texts.append(f"{column.label} {value}{spread and ' ± ' + spread}")
    label = escape(" — ".join([f"{row.model}, {row.method}".rstrip(", "), ", ".join(texts)]))
    kind = f"c{colours[row.fingerprint]}"
    kind += " on-front" if cost in row.front else ""
    kind += " published" if row.record.published else ""
    return (
        f'<a href="#row-{row.fingerprint}" data-row="{row.fingerprint}" aria-label="{label}">'
        f'<circle class="hit" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="11"/>'
        f'<circle class="dot {kind}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="5"/>'
        f"<title>{label}</title></a>"
    )
