"""One-step distance of every few-step method on the digits: same teacher, noise and search budget.

    python benchmarks/few_step_methods.py runs/few_step              hours on one CPU core
    python benchmarks/few_step_methods.py runs/few_step --shorten 4  a first look

Every run is a folder of its own that is not made again: the same command goes on where it was
killed, within a run at the newest checkpoint.  For every method, three learning rates (a third of
the configuration's, itself, three times it; of all its stages alike) are tried on a seed that is
not reported, half as long, and the best goes to those that are.  Writes table.md and samples.png.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from few_step_passes import Passes, count, first_flow, small_flow
from safetensors.torch import load_file

from flowkit.adapters import from_diffusers
from flowkit.config import parse, save
from flowkit.data import load_data
from flowkit.eval import few_step_distances, load_extractor, picture_moments
from flowkit.eval.report import write_grid
from flowkit.files import atomic_file, read_json, write_json
from flowkit.noise import derive_seed, keyed_noise
from flowkit.trainers.distilling import distil
from flowkit.trainers.dmd_settings import DisBackConfig, DMDConfig
from flowkit.trainers.retracing import backtrack
from flowkit.trainers.settings import FlowConfig, ReflowConfig
from flowkit.trainers.slimflow_settings import SlimFlowConfig
from flowkit.trainers.slimming import train_slimflow
from flowkit.trainers.straighten import straighten, train_flow

SHAPE, SAMPLES = (1, 8, 8), 3000
SEARCH_SEED = 100
RATES = {"x 1/3": 1 / 3, "x 1": 1.0, "x 3": 3.0}
LEVELS = (200, 100, 80, 70, 60, 55, 50, 46)  # distances that the two curves' methods reach
UPDATES_A_POINT = 20  # of the student, between two points of its curve
NO_GAN = ("gan.weight=0", "gan.critic_weight=0")
PLAIN = ("annealing.schedule=fixed", "annealing.beta=0", "distillation.two_step=none")
MEASURE = ("evaluate.nfe=[1]", "evaluate.straightness_samples=1")


@dataclass(frozen=True)
class Trainer:
    """A training that rows come from.  stages: parts of its options whose rates are searched."""

    file: str
    schema: type
    train: Callable[[Any], None]
    stages: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    curve: bool = False


_REFLOW = ("student_training", "distillation")
_MATCHING = ("student_training", "critic")
TRAINERS = {
    "reflow": Trainer("reflow", ReflowConfig, straighten, _REFLOW, ("control=false",)),
    "plain": Trainer("slimflow", SlimFlowConfig, train_slimflow, _REFLOW, PLAIN),
    "slimflow": Trainer("slimflow", SlimFlowConfig, train_slimflow, _REFLOW),
    "dmd-no-gan": Trainer("dmd", DMDConfig, distil, _MATCHING, NO_GAN),
    "dmd": Trainer("dmd", DMDConfig, distil, _MATCHING, curve=True),
    "f-js": Trainer("f_distill", DMDConfig, distil, _MATCHING, ("matching.divergence=js",)),
    "f-kl": Trainer("f_distill", DMDConfig, distil, _MATCHING, ("matching.divergence=kl",)),
    "disback": Trainer("disback", DisBackConfig, backtrack, _MATCHING, curve=True),
}


@dataclass(frozen=True)
class Row:
    """A line of the table: a model that a trainer leaves, and what it cost."""

    title: str
    trainer: str
    model: str
    passes: Callable[[Any], Passes] = count


ROWS = [
    Row("2-RF", "reflow", "student", first_flow),
    Row("2-RF, distilled", "reflow", "distilled"),
    Row("DMD2 without GAN", "dmd-no-gan", "student"),
    Row("DMD2", "dmd", "student"),
    Row("f-distill, js", "f-js", "student"),
    Row("f-distill, kl", "f-kl", "student"),
    Row("DisBack", "disback", "student"),
    Row("small: 2-RF", "plain", "student", small_flow),
    Row("small: 2-RF, distilled", "plain", "distilled"),
    Row("small: annealed 2-RF", "slimflow", "student", small_flow),
    Row("small: SlimFlow", "slimflow", "distilled"),
]


class Bench:
    """The runs under a folder.  shorten: divides all steps but the teacher's and the path's."""

    def __init__(self, folder: Path, seeds: list[int], shorten: int) -> None:
        self.folder, self.seeds, self.shorten = folder, seeds, shorten
        self.extractor = load_extractor("digits")
        self.reference = picture_moments(load_data("digits", "test"), self.extractor).moments

    def teacher(self, seed: int) -> Path:
        """The folder of a seed's 1-rectified flow."""
        folder = self.folder / f"seed-{seed}" / "teacher"
        if not (folder / "summary.json").is_file():
            train_flow(self._parse(FlowConfig, "flow", folder, seed))
        return folder

    def config(self, name: str, rate: str, seed: int) -> Any:
        """A trainer's configuration at a learning rate of RATES."""
        trainer = TRAINERS[name]
        folder = self.folder / f"seed-{seed}" / f"{name}-rate-{RATES[rate]:.2f}"
        config = self._parse(
            trainer.schema, trainer.file, folder, seed, *MEASURE, *trainer.overrides
        )
        shorten = self.shorten * (2 if seed == SEARCH_SEED else 1)
        config.teacher = str(self.folder / f"seed-{seed}" / "teacher" / "model")
        for stage in trainer.stages:
            options = getattr(config, stage)
            options.learning_rate *= RATES[rate]
            if stage != "critic":  # whose steps are the student's
                options.steps //= shorten
        if isinstance(config, SlimFlowConfig):
            config.annealing.steps //= shorten
        if trainer.curve and seed != SEARCH_SEED:
            config.checkpoint_every = UPDATES_A_POINT * config.matching.student_every
            config.keep_checkpoints = config.student_training.steps
        return config

    def _parse(self, schema: type, file: str, folder: Path, seed: int, *more: str) -> Any:
        given = [f"output_dir={folder}", f"seed={seed}", "sample_every=0", *more]
        return parse(schema, argv=["--config", f"digits/{file}.yaml", *given], doc=__doc__ or "")

    def run(self, name: str, rate: str, seed: int) -> dict[str, Any]:
        """A finished run's summary, `curve` in it: distances by updates of the student."""
        config = self.config(name, rate, seed)
        done = Path(config.output_dir) / "few_step.json"
        if not done.is_file():
            self.teacher(seed)
            self._share_pairs(config)
            TRAINERS[name].train(config)
            summary = read_json(Path(config.output_dir) / "summary.json")
            if TRAINERS[name].curve and seed != SEARCH_SEED:
                summary["curve"] = dict(self._curve(config))
            write_json(done, summary)
            shutil.rmtree(Path(config.output_dir) / "stages")
            print(f"{name}, learning rate {rate}, seed {seed}: {distances(summary)}", flush=True)
        return read_json(done)

    def _share_pairs(self, config: Any) -> None:
        """Give a run that needs them the teacher's pairs that another of its seed has made."""
        folder = Path(config.output_dir)
        made = [done.parent / "pairs-1" for done in folder.parent.glob("*/few_step.json")]
        found = next((pairs for pairs in sorted(made) if pairs.is_dir()), None)
        if found and hasattr(config, "pairs") and not folder.exists():
            save(config, folder / "config.yaml")
            shutil.copytree(found, folder / "pairs-1")

    def _curve(self, config: Any) -> Iterator[tuple[int, float]]:
        """(updates, distance in one step) of the averaged student, from the run's checkpoints."""
        model = from_diffusers(Path(config.output_dir) / "student").requires_grad_(False)
        stage = Path(config.output_dir) / "stages" / "student"
        steps = sorted(int(p.name.split("-")[1]) for p in stage.glob("checkpoint-*"))
        for step in steps:
            averaged = load_file(stage / f"checkpoint-{step}" / "ema.safetensors")
            for key, parameter in zip(sorted(averaged), model.parameters(), strict=True):
                parameter.copy_(averaged[key])
            found = few_step_distances(
                lambda _: model,
                SHAPE,
                nfe=[1],
                num_samples=SAMPLES,
                seed=derive_seed(config.seed, "evaluate"),
                extractor=self.extractor,
                reference=self.reference,
            )
            yield step // config.matching.student_every, found[0].distance.value

    def best(self, name: str) -> str:
        """The learning rate with the least distance of the trainer's last model."""
        return min(RATES, key=lambda rate: list(distances(self.run(name, rate, SEARCH_SEED)))[-1])

    def rates(self, name: str) -> list[str]:
        """The searched learning rate, and for DMD2's relatives DMD2's beside it."""
        other = "dmd" if name in ("f-js", "f-kl", "disback") else name
        return list(dict.fromkeys([self.best(name), self.best(other)]))

    def work(self) -> None:
        """All runs: the search's, then seed by seed."""
        runs = [(name, rate) for name in TRAINERS for rate in self.rates(name)]
        for seed in self.seeds:
            for name, rate in runs:
                self.run(name, rate, seed)


def distances(summary: dict[str, Any]) -> list[float]:
    """The students' distances in one step, in the order of training."""
    return [summary[m]["fd"][0] for m in ("student", "distilled") if m in summary]


def table(bench: Bench) -> str:
    """Distances in one step on the reported seeds, and what they cost."""
    seeds = " | ".join(f"seed {seed}" for seed in bench.seeds)
    lines = [
        f"| one step | {seeds} | mean | learning rate | teacher | student | critic |",
        "|---" * (len(bench.seeds) + 6) + "|",
    ]
    teachers = [read_json(bench.teacher(s) / "summary.json")["model"]["fd"] for s in bench.seeds]
    for steps, place in ((1, 0), (16, 4)):
        lines.append(f"| 1-RF, {steps} NFE | {_cells([fd[place] for fd in teachers])} | | | | |")
    for row, rate in [(r, rate) for r in ROWS for rate in bench.rates(r.trainer)]:
        found = [bench.run(row.trainer, rate, seed)[row.model]["fd"][0] for seed in bench.seeds]
        p = row.passes(bench.config(row.trainer, rate, bench.seeds[0]))
        cost = f"{_k(p.teacher)} | {_k(p.student, p.student_back)} | {_k(p.critic, p.critic_back)}"
        lines.append(f"| {row.title} | {_cells(found)} | {rate} | {cost} |")
    return "\n".join(lines)


def _cells(found: list[float]) -> str:
    return " | ".join(f"{value:.1f}" for value in [*found, mean(found)])


def _k(forward: int, backward: int = 0) -> str:
    """Thousands of samples, forward / backward."""
    return f"{forward / 1e3:.0f} / {backward / 1e3:.0f}" if backward else f"{forward / 1e3:.0f}"


def search_table(bench: Bench) -> str:
    """What each learning rate gave on the seed of the search."""
    lines = ["| search, half as long | " + " | ".join(RATES) + " |", "|---|---|---|---|"]
    for row in ROWS:
        found = (bench.run(row.trainer, rate, SEARCH_SEED)[row.model]["fd"][0] for rate in RATES)
        lines.append(f"| {row.title} | " + " | ".join(f"{value:.1f}" for value in found) + " |")
    return "\n".join(lines)


def curve_table(bench: Bench) -> str:
    """Distance against the student's updates, DMD2's and DisBack's at DMD2's learning rate."""
    rate = bench.best("dmd")
    curves = {n: [bench.run(n, rate, s)["curve"] for s in bench.seeds] for n in ("dmd", "disback")}
    points = list(curves["dmd"][0])
    shown = [p for p in points if int(p) <= 200 or int(p) % 100 == 0]
    lines = ["| updates | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for name, title in (("dmd", "DMD2"), ("disback", "DisBack")):
        means = [mean(curve[p] for curve in curves[name]) for p in shown]
        lines.append(f"| {title} | " + " | ".join(f"{value:.1f}" for value in means) + " |")
    lines += ["", "| updates until | " + " | ".join(map(str, LEVELS)) + " |"]
    lines += ["|---" * (len(LEVELS) + 1) + "|"]
    for name, title in (("dmd", "DMD2"), ("disback", "DisBack")):
        for seed, curve in zip(bench.seeds, curves[name], strict=True):
            found = " | ".join(first_below(curve, level) for level in LEVELS)
            lines.append(f"| {title}, seed {seed} | {found} |")
    return "\n".join(lines)


def first_below(curve: dict[str, float], value: float) -> str:
    """The first number of updates with at most that distance."""
    return next((updates for updates, distance in curve.items() if distance <= value), "never")


@torch.no_grad()
def write_samples(bench: Bench) -> None:
    """One step of every model from the same noise, seed 0."""
    noise = keyed_noise(derive_seed(bench.seeds[0], "samples"), range(64), SHAPE)
    models = {"1-RF": bench.teacher(bench.seeds[0]) / "model"}
    for row in ROWS:
        config = bench.config(row.trainer, bench.rates(row.trainer)[-1], bench.seeds[0])
        models[row.title.replace("small: ", "small ")] = Path(config.output_dir) / row.model
    columns = {title: noise + from_diffusers(path)(noise, 0.0) for title, path in models.items()}
    write_grid(bench.folder / "samples.png", columns, rows=6)


def main() -> None:
    """Run, and print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shorten", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options.folder, options.seeds, options.shorten)
    bench.work()
    text = "\n\n".join([table(bench), search_table(bench), curve_table(bench)])
    print(f"\n{text}")
    with atomic_file(bench.folder / "table.md") as path:
        path.write_text(text + "\n", encoding="utf-8")
    write_samples(bench)


if __name__ == "__main__":
    main()
