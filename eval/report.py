"""What a comparison leaves behind: a grid of samples, and its numbers as a page of markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from flowkit.files import atomic_file

__all__ = ["summary_markdown", "write_grid"]

MIN_SIDE = 32  # pixels that a shown picture has at least
LABEL_HEIGHT, GAP, PADDING = 18, 12, 2
MODELS = {
    "teacher": "1-RF (teacher)",
    "student": "{rounds}-RF (student)",
    "distilled": "distilled to one step",
    "control": "control: teacher trained on",
    "model": "1-RF",
}


def write_grid(path: str | Path, columns: Mapping[str, Tensor], *, rows: int = 8) -> None:
    """Write a PNG of labelled sample grids side by side, row i of each from the same noise.

    columns: label -> pictures (B, C, H, W) in [-1, 1], grey or RGB; the first `rows`^2 are shown.
    """
    grids = [_labelled(label, pictures, rows) for label, pictures in columns.items()]
    width = sum(grid.width for grid in grids) + GAP * (len(grids) - 1)
    page = Image.new("RGB", (width, max(grid.height for grid in grids)), "white")
    left = 0
    for grid in grids:
        page.paste(grid, (left, 0))
        left += grid.width + GAP
    with atomic_file(path) as temporary:
        page.save(temporary, format="PNG")


def _labelled(label: str, pictures: Tensor, rows: int) -> Image.Image:
    shown = ((pictures[: rows * rows].float().clamp(-1, 1) + 1) / 2).nan_to_num(0.5)
    zoom = max(1, math.ceil(MIN_SIDE / shown.shape[-1]))
    shown = F.interpolate(shown, scale_factor=zoom, mode="nearest")
    grid = to_pil_image(make_grid(shown, nrow=rows, padding=PADDING, pad_value=1.0))
    width = max(grid.width, math.ceil(ImageDraw.Draw(grid).textlength(label)) + 2 * PADDING)
    canvas = Image.new("RGB", (width, grid.height + LABEL_HEIGHT), "white")
    canvas.paste(grid, (0, LABEL_HEIGHT))
    ImageDraw.Draw(canvas).text((PADDING, 3), label, fill="black")
    return canvas


def summary_markdown(summary: Mapping[str, Any]) -> str:
    """The comparison as a markdown page.

    summary: {"seed", "nfe", "num_samples", "features", "reference", "seconds", and for each model
    {"fd": one per NFE, "straightness": per dimension}}.
    """
    nfe = summary["nfe"]
    named = [name for name in MODELS if name in summary]
    lines = [
        f"Fréchet distance, features {summary['features']}, {summary['num_samples']:,} samples "
        f"against {summary['reference']}; Euler steps, the same noise for all, "
        f"seed {summary['seed']}.",
        "",
        "| NFE | " + " | ".join(map(str, nfe)) + " | straightness per dim |",
        "|---" * (len(nfe) + 2) + "|",
    ]
    for name in named:
        values = " | ".join(f"{value:.4g}" for value in summary[name]["fd"])
        label = summary.get("labels", {}).get(name) or MODELS[name]
        label = label.format(rounds=summary.get("rounds", 1) + 1)
        lines.append(f"| {label} | {values} | {summary[name]['straightness']:.3g} |")
    lines += ["", *_readings(summary), ""]
    seconds = summary.get("seconds", {})
    lines.append("Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    lines += [_cost(stage, cost) for stage, cost in summary.get("cost", {}).items()]
    return "\n".join(lines) + "\n"


def _cost(stage: str, cost: Mapping[str, Any]) -> str:
    """A stage's passes and memory, of flowkit.trainers.cost, in a line; pairs have passes alone."""
    if "memory" not in cost:
        count = cost["forward"]["flow"]
        return f"\nCost of {stage}: {'unknown' if count is None else f'{count:,} samples forward'}."
    alone = len(cost["forward"]) == 1  # a network of one name only: the stage says it
    passes = ", ".join(
        f"{'' if alone else role + ' '}{count:,} ({cost['backward'][role]:,})"
        for role, count in cost["forward"].items()
    )
    held = ", ".join(f"{role} {_mib(size)}" for role, size in cost["memory"].items() if not alone)
    peak = f", at most {_mib(cost['peak_memory'])} in use" if cost["peak_memory"] else ""
    return (
        f"\nCost of {stage}, samples forward (of these backward): {passes}. Memory of weights, "
        f"gradients, optimizers and averages: {held}{', together ' * (not alone)}"
        f"{_mib(sum(cost['memory'].values()))}{peak}."
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _straighter(summary: Mapping[str, Any]) -> str:
    before, after = summary["teacher"]["straightness"], summary["student"]["straightness"]
    return f", and the paths are {before / after:.3g} times straighter" if before and after else ""


def _readings(summary: Mapping[str, Any]) -> list[str]:
    """What the table says, in words."""
    if not {"teacher", "student"} <= summary.keys():
        return []
    nfe, teacher, student = summary["nfe"], summary["teacher"], summary["student"]
    if own := student.get("own"):
        return [_own_reading(summary, own)]
    first, last = student["fd"][0] / teacher["fd"][0], student["fd"][-1] / teacher["fd"][-1]
    verdict = f"{last - 1:.0%} worse" if last > 1 else f"{1 - last:.0%} better"
    method = str(summary.get("method", "reflow")).split(" (")[0]
    lines = [
        f"{method[0].upper() + method[1:]} takes the distance at {nfe[0]} NFE to {first:.3f} of "
        f"the teacher's{_straighter(summary)}.",
        f"What it costs: at {nfe[-1]} NFE the student is {verdict} than its teacher.",
    ]
    if "distilled" in summary:
        ratio = summary["distilled"]["fd"][0] / student["fd"][0]
        lines.append(
            f"Distillation takes the {nfe[0]}-step distance to {ratio:.2f} of the student's."
        )
    return lines


def _own_reading(summary: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """What a student gives by the sampler it was trained for, against its teacher."""
    nfe, values = summary["nfe"], summary["teacher"]["fd"]
    count = len(own["times"]) - 1
    how = f"its {count} steps ({own['solver']})" if count > 1 else "its one step"
    best = min(range(len(nfe)), key=lambda k: values[k])
    return (
        f"The student's distance by {how} is {own['fd']:.4g}: {own['fd'] / values[0]:.3f} of the "
        f"teacher's at {nfe[0]} NFE, {own['fd'] / values[best]:.2f} of its best here, at "
        f"{nfe[best]} NFE."
    )
