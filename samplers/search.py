"""Search a schedule for a model and a number of evaluations: its times, and how each step is taken.

  python -m flowkit.samplers.search model=runs/flow/model nfe=5
  python -m flowkit.samplers.search model=runs/flow/model nfe=8 method=times solver=ab3

Writes to output_dir: schedule.json, which Schedule.load and FlowScheduler.from_schedule read,
state.json and config.yaml. Run the same command again to resume.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flowkit import config as configs
from flowkit.config import option
from flowkit.errors import FlowkitError
from flowkit.registry import import_named

if TYPE_CHECKING:
    from flowkit.samplers.schedule_file import Schedule

__all__ = ["SearchConfig", "main", "run"]


@dataclass
class SearchConfig:
    """Options of the search."""

    model: str = option(
        help="folder or hub id of a model, or module:attribute, a velocity (x_t, t) -> v"
    )
    output_dir: str = option("runs/search", "everything is written here; the same folder resumes")
    shape: list[int] | None = option(None, "of one sample; null: what the network says", low=1)
    nfe: int = option(5, "evaluations of the velocity a run may take", low=1)
    method: Literal["steps", "times"] = option(
        "steps", "steps: times and the switches of each step (S^3); times: AutoDiffusion"
    )
    analytic: bool = option(
        True,
        "a first step from the data's mean, at no evaluation (method=steps); false for models "
        "with conditions and for pipelines, which evaluate it all the same",
    )
    solver: str = option("abm", "whose times method=times searches")
    solver_options: dict[str, Any] = option({}, "its options")
    measure: str | None = option(
        None, "module:attribute, samples -> number, in place of the distance to fine samples"
    )
    num_samples: int = option(64, "noises that every schedule is scored with", low=1)
    held_out: int = option(512, "other noises, for the reported errors", low=1)
    batch_size: int = option(512, "samples at once", low=1)
    reference_steps: int = option(100, "rk4 steps of the samples that are called true", low=1)
    generations: int = option(60, "of the evolution", low=0)
    children: int = option(32, "schedules scored in a generation", low=1)
    keep: int = option(15, "parents of the next generation", low=1)
    predictor: bool = option(
        False, "score the likeliest of four times as many children, for costly models"
    )
    polished: int = option(2, "how many of the best are polished (method=steps)", low=0)
    polish_evaluations: int = option(1000, "schedules scored in polishing one", low=0)
    seed: int = option(0, "of the noise and of the search", low=0)
    device: str = option("cpu", "torch device of the model")
    progress: bool = option(True, "show a progress bar")


MAY_CHANGE = ("batch_size", "device", "generations", "polished", "polish_evaluations", "progress")


def main() -> None:
    """The command: parse, search, report."""

    def command() -> None:
        run(configs.parse(SearchConfig, doc=__doc__ or ""))

    configs.run_command(command)


def run(options: SearchConfig) -> Schedule:
    """Search as the options say; returns what it wrote to schedule.json."""
    import torch

    from flowkit.adapters import from_diffusers
    from flowkit.noise import derive_seed, keyed_noise
    from flowkit.samplers.evolution import forest
    from flowkit.samplers.schedule_search import (
        SampleError,
        data_mean,
        find_schedule,
        find_times,
        fixed_schedules,
    )

    folder = Path(options.output_dir)
    configs.check_folder(options, folder, ignore=MAY_CHANGE, holds="a search with other options")
    began = time.perf_counter()
    velocity: Any = import_named("model", options.model) if ":" in options.model else None
    velocity = velocity or from_diffusers(options.model)
    if isinstance(velocity, torch.nn.Module):
        velocity = velocity.to(options.device).eval().requires_grad_(False)
    start = float(getattr(velocity, "t_min", 0.0))
    measure = import_named("measure", options.measure) if options.measure else None

    def noise(purpose: str, count: int) -> torch.Tensor:
        seed = derive_seed(options.seed, "search", purpose)
        shape = _shape(velocity, options.shape)
        return keyed_noise(seed, range(count), shape).to(options.device)

    analytic = options.analytic and options.method == "steps"
    mean = data_mean(velocity, noise("mean", options.held_out), start) if analytic else None

    def objective(purpose: str, count: int) -> SampleError:
        return SampleError(
            velocity, noise(purpose, count), measure=measure, start=start, mean=mean,
            reference_steps=options.reference_steps, batch_size=options.batch_size,
        )  # fmt: skip

    common: dict[str, Any] = {
        "start": start, "generations": options.generations, "children": options.children,
        "keep": options.keep, "seed": options.seed, "state": folder / "state.json",
        "progress": options.progress,
    }  # fmt: skip
    train = objective("train", options.num_samples)
    configs.save(options, folder / "config.yaml")
    if options.method == "times":
        found, evolution = find_times(
            train, options.nfe, solver=options.solver, options=options.solver_options, **common
        )
    else:
        found, evolution = find_schedule(
            train, options.nfe, analytic=analytic, polished=options.polished,
            polish_evaluations=options.polish_evaluations,
            predictor=forest if options.predictor else None, **common,
        )  # fmt: skip
    held_out = objective("held out", options.held_out)
    fixed = {one.info["name"]: held_out(one) for one in fixed_schedules(options.nfe, start=start)}
    best = min(fixed, key=lambda name: fixed[name])
    error = held_out(found.schedule)
    seconds = time.perf_counter() - began
    info = {
        "model": options.model, "nfe": options.nfe, "method": options.method, "seed": options.seed,
        "score": found.score, "held_out": error, "best_fixed": best, "its_held_out": fixed[best],
        "seconds": round(seconds, 1),
    }  # fmt: skip
    schedule = replace(found.schedule, info=info)
    if schedule.analytic and mean is not None:
        schedule = replace(schedule, mean=mean.tolist())
    schedule.save(folder / "schedule.json")
    print(f"best fixed solver ({best}): {fixed[best]:.4g} on held-out noise")
    print(f"found: {error:.4g}, {error / fixed[best]:.2f} of it, in {seconds:.0f} s")
    print(f"written to {folder / 'schedule.json'}")
    return schedule


def _shape(velocity: Any, shape: list[int] | None) -> tuple[int, ...]:
    """The shape of one sample: as given, or as the network's own config says."""
    config = getattr(getattr(velocity, "net", None), "config", {})
    if shape is None:
        shape = config.get("shape")
    if shape is None and config.get("in_channels") and isinstance(config.get("sample_size"), int):
        shape = [config["in_channels"], *[config["sample_size"]] * 2]
    if shape is None:
        raise FlowkitError("the network does not say what it takes; give shape, e.g. shape=[1,8,8]")
    return tuple(shape)


if __name__ == "__main__":
    from flowkit.samplers import search

    search.main()
