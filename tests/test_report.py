"""The page of numbers and the picture of samples; distances that do not depend on chunks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from flowkit.data import load_data
from flowkit.errors import FlowkitError
from flowkit.eval import few_step_distances, load_extractor, picture_moments
from flowkit.eval.report import summary_markdown, write_grid

SUMMARY = {
    "seed": 3,
    "nfe": [1, 16],
    "num_samples": 3000,
    "features": "digits",
    "reference": "digits test (500)",
    "teacher": {"fd": [866.0, 25.0], "straightness": 0.125},
    "student": {"fd": [47.6, 28.9], "straightness": 0.0056},
    "distilled": {"fd": [40.1, 45.0], "straightness": 0.01},
    "seconds": {"teacher": 80.0},
}


def test_the_page_says_what_reflow_gives_and_costs() -> None:
    page = summary_markdown(SUMMARY)
    assert "| 2-RF (student) | 47.6 | 28.9 | 0.0056 |" in page
    assert "0.055 of the teacher's" in page and "22.3 times straighter" in page
    assert "at 16 NFE the student is 16% worse" in page
    assert "0.84 of the student's" in page
    assert "control" not in page


@pytest.mark.parametrize("channels", [1, 3])
def test_the_grid_shows_every_picture(tmp_path: Path, channels: int) -> None:
    dark, light = -torch.ones(64, channels, 8, 8), torch.ones(64, channels, 8, 8)
    write_grid(tmp_path / "grid.png", {"dark": dark, "light": light})
    with Image.open(tmp_path / "grid.png") as picture:
        left, right = picture.getpixel((20, 40)), picture.getpixel((picture.width - 20, 40))
        assert picture.width > 2 * 8 * 32 and picture.mode == "RGB"
    assert left == (0, 0, 0) and right == (255, 255, 255)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_labels_are_not_cut(tmp_path: Path) -> None:
    """One small picture is narrower than what is written above it."""
    label = "a rather long label, 16 steps"
    write_grid(tmp_path / "grid.png", {label: torch.zeros(1, 1, 8, 8)})
    write_grid(tmp_path / "wide.png", {label: torch.zeros(64, 1, 8, 8)})
    ink = []
    for name in ("grid.png", "wide.png"):
        with Image.open(tmp_path / name) as picture:
            head = picture.convert("L").crop((0, 0, picture.width, 16))
            ink.append(sum(head.histogram()[:128]))
    assert ink[0] == ink[1] > 0


def _shrink(x_t: Tensor, t: float | Tensor) -> Tensor:
    return -0.5 * x_t


def test_distances_do_not_depend_on_the_chunks() -> None:
    features = load_extractor("pixels")
    reference = picture_moments(load_data("digits", "test"), features, chunk_size=77).moments
    found = [
        few_step_distances(
            lambda indices: _shrink,
            (1, 8, 8),
            nfe=[1, 4],
            num_samples=200,
            seed=1,
            extractor=features,
            reference=reference,
            chunk_size=chunk,
        )
        for chunk in (200, 64)
    ]
    values = [[one.distance.value for one in run] for run in found]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert values[0][0] != pytest.approx(values[0][1], rel=1e-3)
    assert [one.samples_sha256 for one in found[0]] == [one.samples_sha256 for one in found[1]]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_pictures_that_are_not_finite_are_refused(value: float) -> None:
    features = load_extractor("pixels")
    with pytest.raises(FlowkitError, match=r"not finite in 4 steps \(samples 0 to 9\)"):
        few_step_distances(
            lambda indices: lambda x, t: x * (value if t > 0.5 else 0.0),
            (1, 8, 8),
            nfe=[1, 4],
            num_samples=10,
            seed=1,
            extractor=features,
            reference=picture_moments(load_data("digits", "test"), features).moments,
        )


def test_nothing_to_measure_is_refused() -> None:
    features = load_extractor("pixels")
    reference = picture_moments(load_data("digits", "test"), features).moments
    with pytest.raises(FlowkitError, match="nfe="):
        few_step_distances(
            lambda indices: _shrink,
            (1, 8, 8),
            nfe=[0],
            num_samples=200,
            seed=1,
            extractor=features,
            reference=reference,
        )
