"""The comparison that ends a run: every flow, at every number of Euler steps and by the sampler it
was trained for, from one noise."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from flowkit.checkpoint import model_card, push
from flowkit.data import load_data
from flowkit.errors import FlowkitError
from flowkit.eval import (
    FewSteps,
    Record,
    few_step_distances,
    load_extractor,
    picture_moments,
    straightness,
    write_record,
)
from flowkit.eval.feature_pass import device_name
from flowkit.eval.model_source import model_identity
from flowkit.eval.provenance import versions
from flowkit.eval.records import canonical_sha256
from flowkit.eval.report import summary_markdown, write_grid
from flowkit.files import atomic_file, read_json, write_json
from flowkit.noise import derive_seed, keyed_noise
from flowkit.samplers import sample
from flowkit.samplers.grids import from_start
from flowkit.schema import to_dict
from flowkit.trainers.pairing import conditioned, keyed_labels
from flowkit.trainers.stages import Run
from flowkit.velocity import Velocity, VelocityModel

__all__ = ["Comparison"]

Sampler = tuple[str, list[float]]  # a solver and its times
CHUNK = 500  # pictures that are sampled at once
STRAIGHTNESS_STEPS = 100


class Comparison:
    """Measures a run's flows.  Made before training, so that a missing file is found at once."""

    def __init__(self, run: Run) -> None:
        self.run, self.options = run, run.options.evaluate
        self.extractor = load_extractor(
            self.options.features, weights=self.options.weights, device=run.accelerator.device
        )
        data = run.options.data
        self.reference = load_data(
            data.name, self.options.split, root=data.root, size=data.size, download=data.download
        )
        self.extractor(self.reference.fetch([0])["data"])  # refuses pictures it cannot take
        if run.options.push_to_hub and run.accelerator.is_main_process:
            _check_login()

    def finish(
        self,
        models: dict[str, VelocityModel],
        *,
        method: str,
        samplers: Mapping[str, Sampler] | None = None,
    ) -> None:
        """Measure, write summary.json, summary.md, samples.png and the model card, and print.

        method: what it is called, for people.  samplers: of the models that were trained for a
        solver with its own times.
        """
        run, self.samplers = self.run, samplers or {}
        if run.accelerator.is_main_process:
            start = time.perf_counter()
            summary = {"method": method, "labels": self._labels(method), **self._measure(models)}
            seconds = {name: run.seconds(name) for name in models if name != "student"}
            stages = {p.name for p in (run.folder / "stages").iterdir()}
            seconds["pairs"] = run.seconds(*(s for s in stages if "pairs" in s))
            seconds["student"] = run.seconds(*(s for s in stages if s.startswith("student")))
            seconds["evaluate"] = round(time.perf_counter() - start, 2)
            summary["seconds"] = {name: value for name, value in seconds.items() if value}
            costs = sorted((run.folder / "stages").glob("*/cost.json"))
            summary["cost"] = {file.parent.name: read_json(file) for file in costs}
            self._write(summary, models, method)
        run.accelerator.wait_for_everyone()
        run.accelerator.end_training()

    def _measure(self, models: dict[str, VelocityModel]) -> dict[str, Any]:
        options, run = self.options, self.run
        seed = derive_seed(run.options.seed, "evaluate")
        reference = picture_moments(self.reference, self.extractor, chunk_size=CHUNK)
        title = f"{run.options.data.name}-{options.split}"
        against = {"name": title, "n": len(self.reference), "sha256": reference.sha256}
        summary: dict[str, Any] = {
            "seed": run.options.seed,
            "nfe": list(options.nfe),
            "num_samples": options.num_samples,
            "rounds": getattr(run.options, "rounds", 0),
            "features": self.extractor.id,
            "reference": f"{run.options.data.name} {options.split} ({len(self.reference)})",
        }
        for name, model in models.items():
            own = self.samplers.get(name)
            known = own is not None and own[0] == "euler" and len(own[1]) == 2 and 1 in options.nfe
            extra = None if known else own
            work = (len(options.nfe) + (extra is not None)) * options.num_samples
            with tqdm(total=work, desc=f"measure {name}", unit="pictures") as bar:
                found = few_step_distances(
                    partial(self._labelled, model),
                    run.shape,
                    nfe=options.nfe,
                    num_samples=options.num_samples,
                    seed=seed,
                    extractor=self.extractor,
                    reference=reference.moments,
                    start=model.t_min,
                    decode=run.decode,
                    own=extra,
                    chunk_size=CHUNK,
                    device=run.accelerator.device,
                    progress=bar.update,
                )
            straight = self._straightness(model, seed)
            values = [one.distance.value for one in found]
            summary[name] = {"fd": values[: len(options.nfe)], "straightness": straight}
            if own is not None:
                value = values[options.nfe.index(1)] if known else values[-1]
                summary[name]["own"] = {"solver": own[0], "times": own[1], "fd": value}
            for one in found:
                self._publish(name, model, one, seed, against, straight)
        return summary

    def _labels(self, method: str) -> dict[str, str]:
        """What the models are called in the table."""
        options = self.run.options
        labels = {"student": f"student ({method})"}
        if rounds := getattr(options, "rounds", 0):
            labels["student"] = f"{rounds + 1}-RF (student)"
        if getattr(options, "teacher", "train") != "train":
            labels["teacher"] = "teacher"
        return labels

    def _publish(
        self,
        name: str,
        model: VelocityModel,
        found: FewSteps,
        seed: int,
        reference: dict[str, Any],
        straight: float,
    ) -> None:
        """Write a measurement as a record, which the leaderboard ranks."""
        options, run = self.options, self.run
        told: dict[str, Any] = to_dict(run.options)
        grid: dict[str, Any] = {"name": "uniform"}
        if found.solver != "euler":
            grid = {"name": "own", "times": self.samplers[name][1]}
        record = Record(
            name=f"{name} {found.solver} nfe-{found.steps:04d}",
            metrics={"fid": found.distance.value},
            parts={"fid": {"rule": "Fréchet distance of features", **asdict(found.distance)}},
            convention=self.extractor.preprocessing,
            extractor=self.extractor.id,
            reference=reference,
            num_samples=options.num_samples,
            seed=seed,
            seeds=[0, options.num_samples],
            model=model_identity(str(run.folder / name), model),
            solver=found.solver,
            grid=json.dumps(grid, separators=(",", ":")),
            steps=found.steps,
            nfe=found.steps,
            nfe_with_guidance=found.steps,
            labels=None if run.num_classes is None else "random",
            dtype=str(model.dtype).removeprefix("torch."),
            chunk_size=CHUNK,
            samples_sha256=found.samples_sha256,
            config=told,
            config_sha256=canonical_sha256(told),
            versions=versions(),
            device=device_name(run.accelerator.device),
            straightness={"per_dim": straight},
        )
        write_record(run.folder / "records", record)

    def _labelled(self, model: VelocityModel, indices: range) -> Velocity:
        run, labels = self.run, None
        if run.num_classes is not None:
            labels = keyed_labels(run.options.seed, indices, run.num_classes)
        return conditioned(model, labels, 1.0, run.accelerator.device)

    def _straightness(self, model: VelocityModel, seed: int) -> float:
        times = from_start(model.t_min, STRAIGHTNESS_STEPS)
        count, total = self.options.straightness_samples, 0.0
        for first in range(0, count, CHUNK):
            indices = range(first, min(first + CHUNK, count))
            noise = keyed_noise(seed, indices, self.run.shape).to(self.run.accelerator.device)
            start, velocity = (1 - times[0]) * noise, self._labelled(model, indices)
            total += straightness(velocity, start, times=times).per_dim * len(indices)
        return total / count

    def _write(
        self, summary: dict[str, Any], models: dict[str, VelocityModel], method: str
    ) -> None:
        run = self.run
        text = summary_markdown(summary)
        write_grid(run.folder / "samples.png", self._columns(models))
        with atomic_file(run.folder / "summary.md") as path:
            path.write_text(text, encoding="utf-8")
        write_json(run.folder / "summary.json", summary)
        for name in models:
            folder = run.folder / name
            if (folder / "README.md").is_file():
                with atomic_file(folder / "README.md") as path:
                    path.write_text(
                        model_card(folder, method, run.options.data.name, text), "utf-8"
                    )
        print(f"\n{text}\nwritten to {run.folder}")
        if run.options.push_to_hub:
            last = list(models)[-1] if "student" not in models else "student"
            print(f"pushed to {push(run.folder / last, run.options.push_to_hub)}")

    def _columns(self, models: dict[str, VelocityModel]) -> dict[str, Tensor]:
        steps, columns = {"distilled": (1,)}, dict[str, Tensor]()
        shown = {name: model for name, model in models.items() if name != "control"}
        for name, model in shown.items():
            if name in self.samplers:
                count = len(self.samplers[name][1]) - 1
                columns[_steps(name, count)] = self._own_pictures(model, self.samplers[name])
                continue
            for n in steps.get(name, (1, 16)):
                columns[_steps(name, n)] = self.run.preview_pictures(model, n)
        return columns

    @torch.no_grad()
    def _own_pictures(self, model: VelocityModel, sampler: Sampler) -> Tensor:
        """The pictures that the model's own sampler makes of the preview noise."""
        run, (solver, times) = self.run, sampler
        noise = run.preview_noise.to(run.accelerator.device)
        velocity = self._labelled(model, range(len(noise)))
        return run.decode(sample(velocity, (1 - times[0]) * noise, times, solver).x).cpu()


def _steps(name: str, count: int) -> str:
    return f"{name}, {count} step{'s' * (count > 1)}"


def _check_login() -> None:
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # no token, no network, or whatever its HTTP library raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FlowkitError(
            f"push_to_hub needs a login ({reason}); run `hf auth login`, or leave push_to_hub out"
        ) from None
