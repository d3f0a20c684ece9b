"""The run behind eval/fid.py: samples or pictures to chunks of features, and those to records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowkit import config
from flowkit.errors import FlowkitError
from flowkit.eval.feature_pass import (
    chunk_tensors,
    main_only,
    pass_identity,
    picture_chunks,
    refuse_grey,
    same_identity,
)
from flowkit.eval.features import load_extractor
from flowkit.eval.fid_records import Result, write_results
from flowkit.eval.metric_table import check_metrics, measure, needs_rows, parts_of
from flowkit.eval.model_parts import own_sampler
from flowkit.eval.model_pass import ModelPass
from flowkit.eval.model_source import ModelSource
from flowkit.eval.records import Record
from flowkit.eval.reference_check import check_reference
from flowkit.eval.reference_files import Reference, is_statistics, read_statistics
from flowkit.eval.resize import exact_float32
from flowkit.eval.sampling_plan import OWN, Plan, sampling_plans
from flowkit.eval.settings import FidConfig
from flowkit.eval.sources import open_pictures, picked
from flowkit.eval.streaming import FeatureSet, chunk_ranges
from flowkit.processes import launched

__all__ = ["FidRun"]

SAMPLES = 50_000  # of a model, where num_samples does not say
# Options that leave finished chunks what they are: a resumed run may be given others.
MAY_CHANGE = {
    *("output_dir", "records", "name", "metrics", "metric_options", "manifold_samples"),
    *("reference", "reference_convention", "reference_dir", "nfe", "num_samples", "repeats"),
    *("jackknife", "straightness_samples", "straightness_steps", "progress"),
}
Sets = list[tuple[Plan | None, list[FeatureSet]]]  # for each plan, a set per seed range


class FidRun:
    """One run of the command.  What can be checked is checked before anything is computed."""

    def __init__(self, options: FidConfig) -> None:
        if (options.model is None) == (options.pictures is None):
            raise FlowkitError("say what to measure: either model=... or pictures=...")
        check_metrics(options)
        self.options, self.folder = options, Path(options.output_dir)
        self.accelerator = launched()
        self.device = self.accelerator.device
        self.extractor = load_extractor(options.features, options.weights, self.device)
        self.parts = parts_of(options.metrics)
        main_only(self.accelerator, self._check_folder)

    def records(self) -> list[Record]:
        """Compute what is missing and write the records; empty in all processes but the main."""
        options = self.options
        with exact_float32():
            model, lengths = (None, {}) if options.model is None else self._model()
            reference = self._reference()
            if model is None:
                sets = self._picture_sets(reference)
            else:
                self._check_reference(reference, lengths, options.num_samples or SAMPLES)
                sets = self._model_sets(model)
            straightness = None if model is None else model.straightness()

            def write() -> list[Record]:
                results = [self._result(plan, found, reference) for plan, found in sets]
                return write_results(
                    options, results, reference=reference, extractor=self.extractor,
                    model=None if model is None else model.model,
                    straightness=straightness, device=self.device,
                )  # fmt: skip

            return main_only(self.accelerator, write) or []

    def _result(self, plan: Plan | None, sets: list[FeatureSet], reference: Reference) -> Result:
        measured = [measure(one, reference, self.options, self.device) for one in sets]
        return Result(plan, sets, measured)

    def _check_folder(self) -> None:
        """Refuse a folder with anything but chunks of the same options."""
        config.check_folder(
            self.options, self.folder, ignore=MAY_CHANGE, holds="samples of another run"
        )

    def _check_reference(
        self, reference: Reference, lengths: Mapping[str, int], count: int
    ) -> None:
        def check() -> None:
            check_reference(reference, self.options, lengths, count)

        main_only(self.accelerator, check)

    def _model(self) -> tuple[ModelPass, dict[str, int]]:
        """The model, checked by two of its pictures, and its folder, by what is in it; and how
        long each part of its pictures' features is."""
        options = self.options
        source = ModelSource(options, self.device)
        plans = sampling_plans(options, source.start)
        if options.solver != OWN and (own := own_sampler(str(options.model))):
            self.accelerator.print(
                f"{options.model} was trained for its own sampler, {own[0]} at "
                f"{', '.join(f'{t:g}' for t in own[1])}: solver=own nfe=null measures that"
            )
        model = ModelPass(source, plans, self.extractor, self.parts, self.folder, self.accelerator)
        lengths = model.check()
        main_only(self.accelerator, lambda: self._own_folder(model))
        return model, lengths

    def _own_folder(self, model: ModelPass) -> None:
        """Say in the run's folder what its chunks are of, or refuse those of something else."""
        options, source = self.options, model.model
        for what, known in (
            (options.model, source.reusable),
            (options.features, self.extractor.reusable),
        ):
            if not known and (self.folder / "chunks").exists():
                raise FlowkitError(
                    f"{self.folder} holds samples, and {what!r} has no source that tells whether "
                    "they are of the same code; give another output_dir, or delete that one"
                )
        made: dict[str, Any] = {"model": source.identity["sha256"], "vae": source.decoder_sha256}
        made["shape"] = list(source.parts.shape)
        made |= {f"plan {plan.name}": plan.identity for plan in model.plans}
        new = [f"plan {p.name}" for p in model.plans if not model.chunks(p).folder.is_dir()]
        ours = pass_identity(self.extractor, self.device, options.chunk_size)
        same_identity(self.folder / "identity.json", made | ours, new)
        config.save(options, self.folder / "config.yaml")

    def _model_sets(self, model: ModelPass) -> Sets:
        parts = self._ranges(self.options.num_samples or SAMPLES)
        model.sample([indices for part in parts for indices in part])
        return [(p, [FeatureSet(model.chunks(p), part) for part in parts]) for p in model.plans]

    def _picture_sets(self, reference: Reference) -> Sets:
        options = self.options
        pictures = open_pictures(str(options.pictures), options.rules)
        count = options.num_samples
        if options.repeats > 1 and count is None:
            raise FlowkitError("repeats of pictures need num_samples, the size of each part")
        wanted = None if count is None else count * options.repeats
        rows = picked(len(pictures), wanted, options.seed, pictures.name)
        if len(rows) < 2:
            raise FlowkitError(f"{pictures.name} has {len(rows)} picture; measuring needs two")
        # Each part a draw of its own, not a stretch of the sorted names.
        shuffle = torch.randperm(len(rows), generator=torch.Generator().manual_seed(options.seed))
        rows = [rows[i] for i in shuffle.tolist()]
        parts = self._ranges(count or len(rows))
        refuse_grey(pictures.shape, self.extractor, options.rules)
        first = chunk_tensors(pictures.fetch(rows[:1]), range(1), self.extractor, self.parts)
        lengths = {part: first[part].shape[1] for part in self.parts}
        self._check_reference(reference, lengths, count or len(rows))
        main_only(self.accelerator, lambda: config.save(options, self.folder / "config.yaml"))
        chunks = picture_chunks(
            pictures, rows, [indices for part in parts for indices in part],
            extractor=self.extractor, parts=self.parts,
            folder=self.folder / "chunks", chunk_size=options.chunk_size,
            accelerator=self.accelerator, progress=options.progress,
        )  # fmt: skip
        return [(None, [FeatureSet(chunks, part) for part in parts])]

    def _ranges(self, count: int) -> list[list[range]]:
        """The chunks of each seed range."""
        size, repeats = self.options.chunk_size, self.options.repeats
        return [chunk_ranges(part * count, (part + 1) * count, size) for part in range(repeats)]

    def _reference(self) -> Reference:
        options, name = self.options, self.options.reference
        if not is_statistics(name):
            title, found = self._reference_features(self.parts)
            return Reference(title, len(found), found.sha256(), found.moments, found.rows)

        def own() -> Callable[[str], Tensor]:
            return self._reference_features(["features"])[1].rows

        return read_statistics(
            name, self.extractor, convention=options.reference_convention,
            pictures=own if needs_rows(options.metrics) else None,
        )  # fmt: skip

    def _reference_features(self, parts: Sequence[str]) -> tuple[str, FeatureSet]:
        options = self.options
        pictures = open_pictures(options.reference, options.rules)
        if len(pictures) < 2:
            raise FlowkitError(f"reference {pictures.name} has one picture; it takes two or more")
        ranges = chunk_ranges(0, len(pictures), options.chunk_size)
        wanted: Any = [part for part in parts if part != "logits"]
        chunks = picture_chunks(
            pictures, range(len(pictures)), ranges,
            extractor=self.extractor, parts=wanted,
            folder=options.reference_dir, chunk_size=options.chunk_size,
            accelerator=self.accelerator, progress=options.progress,
        )  # fmt: skip
        return pictures.name, FeatureSet(chunks, ranges)
