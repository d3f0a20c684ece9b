"""RF-Edit on digits: what replayed attention values do for reconstruction and for other classes.

  python benchmarks/rf_edit.py                  trains a DiT first, in runs/rf-edit: a few minutes
  python benchmarks/rf_edit.py runs/flow        or takes what trainers/flow.py left there

Prints two tables and writes docs/rf_edit.png.  The network must know classes: for another one train
with data.conditional=true net.name=dit.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowkit.adapters import from_diffusers
from flowkit.data import load_data
from flowkit.eval.features import load_extractor
from flowkit.eval.report import write_grid
from flowkit.samplers import grids
from flowkit.samplers.editing import edit_latents
from flowkit.trainers.settings import (
    DataOptions,
    EvaluateOptions,
    FlowConfig,
    NetOptions,
    TrainOptions,
)
from flowkit.trainers.straighten import train_flow
from flowkit.velocity import Velocity, VelocityModel, bind, guided

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "rf_edit.png"
CLASSES = 10  # and the null class after them
INJECT = (0, 2, 5, 8)  # of 10 steps


def train(folder: Path) -> None:
    """A class-conditional DiT of 0.3 M parameters, 2,500 steps."""
    sizes = {"hidden_size": 64, "num_layers": 4, "num_heads": 4}
    train_flow(
        FlowConfig(
            output_dir=str(folder),
            data=DataOptions(conditional=True),
            net=NetOptions("dit", {"patch_size": 2, **sizes}),
            training=TrainOptions(
                steps=2500, batch_size=64, learning_rate=2e-3, lr_schedule="cosine"
            ),
            evaluate=EvaluateOptions(nfe=[4], num_samples=200, straightness_samples=50),
            sample_every=0,
        )
    )


class Digits:
    """Held-out digits, and what a class-conditional flow makes of them."""

    def __init__(self, model: VelocityModel, count: int) -> None:
        rows = load_data("digits", "test").fetch(range(count))
        self.model, self.data, self.labels = model, rows["data"], rows["class_labels"]
        self.others = (self.labels + 5) % CLASSES

    def velocity(self, labels: Tensor, guidance: float = 1.0) -> Velocity:
        """Of classes (B,)."""
        null = bind(self.model, class_labels=torch.full_like(labels, CLASSES))
        return guided(bind(self.model, class_labels=labels), null, guidance)

    def edited(
        self, labels: Tensor, steps: int, inject: int, *, guidance: float, solver: str = "rf_solver"
    ) -> Tensor:
        """The pictures turned to noise as their own class and back as `labels`."""
        source, target = self.velocity(self.labels), self.velocity(labels, guidance)
        return edit_latents(
            source, target, self.data, grids.uniform(steps), model=self.model, inject=inject,
            solver=solver,
        ).x  # fmt: skip

    def distance(self, pictures: Tensor) -> float:
        """Root mean square to the source, of pictures in [-1, 1]."""
        return float((pictures - self.data).square().mean().sqrt())


def print_reconstruction(digits: Digits, all_steps: tuple[int, ...]) -> None:
    """The same class there and back, without values and with those of 4 of 5 steps."""
    print("Reconstruction: distance to the picture, without -> with replayed values\n")
    print("| solver | guidance | " + " | ".join(f"{n} steps" for n in all_steps) + " |")
    print("|---" * (len(all_steps) + 2) + "|")
    for solver, guidance in (("rf_solver", 1), ("rf_solver", 2), ("rf_solver", 3), ("euler", 1)):
        cells = []
        for steps in all_steps:
            pair = (
                digits.distance(
                    digits.edited(digits.labels, steps, k, guidance=guidance, solver=solver)
                )
                for k in (0, round(0.8 * steps))
            )
            cells.append(" -> ".join(f"{error:.4f}" for error in pair))
        print(f"| {solver} | {guidance} | {' | '.join(cells)} |")


def print_edits(digits: Digits, steps: int) -> None:
    """Another class: how many pictures become it, and how far they go from where they were."""
    features: Any = load_extractor("digits")
    print(f"\nClass y becomes y + 5, {steps} steps of rf_solver\n")
    print("| guidance | steps with values | recognised as the new class | distance to the source |")
    print("|---" * 4 + "|")
    for guidance in (1, 3):
        for inject in INJECT:
            pictures = digits.edited(digits.others, steps, inject, guidance=guidance)
            guessed = features.net.classifier(features(pictures)).argmax(1)
            share = float((guessed == digits.others).float().mean())
            print(f"| {guidance} | {inject} | {share:.2f} | {digits.distance(pictures):.3f} |")


def draw(digits: Digits, steps: int) -> None:
    """Sources in rows, and beside them what they become with more and more values."""
    columns = {"source": digits.data}
    columns["same class"] = digits.edited(digits.labels, steps, 8, guidance=1)
    for inject in INJECT:
        columns[f"+5, {inject} of {steps}"] = digits.edited(
            digits.others, steps, inject, guidance=1
        )
    write_grid(PICTURE, columns, rows=4)


def main() -> None:
    """Train if needed, print, draw."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/rf-edit")
    if not (folder / "model").is_dir():
        train(folder)
    model = from_diffusers(folder / "model").eval()
    print_reconstruction(Digits(model, 100), (4, 6, 8, 10))
    print_edits(Digits(model, 200), 10)
    draw(Digits(model, 16), 10)


if __name__ == "__main__":
    main()
