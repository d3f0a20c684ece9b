"""Results of eval/fid.py as records, sample grids and a table."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flowkit.eval.feature_pass import device_name
from flowkit.eval.features import Extractor
from flowkit.eval.metric_table import Measured
from flowkit.eval.model_source import ModelSource
from flowkit.eval.provenance import versions
from flowkit.eval.records import Record, canonical_sha256, write_record
from flowkit.eval.reference_files import Reference
from flowkit.eval.report import write_grid
from flowkit.eval.sampling_plan import Plan
from flowkit.eval.settings import FidConfig
from flowkit.eval.streaming import FeatureSet
from flowkit.files import atomic_file
from flowkit.schema import to_dict

__all__ = ["Result", "write_results"]

# Options that say where things lie or what they are called, not what is computed.
_PLACES = ("output_dir", "records", "name", "reference_dir", "progress")
_ROWS = 8  # of the sample grid


@dataclass(frozen=True)
class Result:
    """What one plan gave: a set of features and its measures for each seed range."""

    plan: Plan | None
    sets: list[FeatureSet]
    measured: list[Measured]


def write_results(
    options: FidConfig,
    results: Sequence[Result],
    *,
    reference: Reference,
    extractor: Extractor,
    model: ModelSource | None,
    straightness: dict[str, float] | None,
    device: torch.device,
) -> list[Record]:
    """Write a record, its grid and the table of all; print the table; return the records."""
    folder = Path(options.records or Path(options.output_dir) / "records")
    common: dict[str, Any] = {
        "convention": extractor.preprocessing,
        "extractor": extractor.id,
        "reference": reference.to_dict(),
        "versions": versions(),
        "device": device_name(device),
        "straightness": straightness,
        "model": None if model is None else model.identity,
    }
    records, paths = [], []
    for result in results:
        record = _record(options, result, common, model)
        record = _with_grid(folder, record, result)
        records.append(record)
        paths.append(write_record(folder, record))
    text = _table(records, paths, Path(options.output_dir))
    with atomic_file(Path(options.output_dir) / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"\n{text}")
    return records


def _configuration(
    options: FidConfig, plan: Plan | None, model: ModelSource | None
) -> dict[str, Any]:
    """The options, and a hash of them and of what is in the files that they name."""
    told = to_dict(options)
    computed = {name: value for name, value in told.items() if name not in _PLACES}
    if plan is not None and model is not None:
        computed |= {"plan": plan.identity, "vae_sha256": model.decoder_sha256}
    return {"config": told, "config_sha256": canonical_sha256(computed)}


def _record(
    options: FidConfig, result: Result, common: dict[str, Any], model: ModelSource | None
) -> Record:
    plan, first = result.plan, result.sets[0]
    source = options.name or Path(str(options.model or options.pictures)).resolve().name
    if options.name is None and source == "model":  # what trainers call their folder
        source = Path(str(options.model)).resolve().parent.name
    metrics, errors = _over_ranges(result.measured)
    cost = {} if plan is None or model is None else _cost(result)
    sampled = {} if plan is None or model is None else _sampled(options, plan, model)
    return Record(
        name=source if plan is None else f"{source} {options.solver} {plan.name}",
        metrics=metrics,
        errors=errors,
        parts=result.measured[0].parts,
        num_samples=len(first),
        seed=options.seed,
        seeds=[first.ranges[0].start, result.sets[-1].ranges[-1].stop],
        chunk_size=options.chunk_size,
        samples_sha256=_samples(result.sets),
        **common,
        **_configuration(options, plan, model),
        **sampled,
        **cost,
    )


def _sampled(options: FidConfig, plan: Plan, model: ModelSource) -> dict[str, Any]:
    """How the samples were made."""
    guidance = options.guidance
    return {
        "solver": plan.solver,
        "solver_options": dict(plan.options),
        "grid": plan.grid,
        "steps": len(plan.times) - 1,
        "guidance": None if guidance.scale == 1 else to_dict(guidance),
        "cache": options.cache,
        "labels": None if model.parts.num_classes is None else options.labels,
        "dtype": options.dtype,
    }


def _cost(result: Result) -> dict[str, Any]:
    """Evaluations a sample, time and memory, over all chunks of all seed ranges."""
    weighted = [(len(r), c.chunks.info(r)) for c in result.sets for r in c.ranges]
    count = sum(n for n, _ in weighted)
    seconds = math.fsum(info["seconds"] for _, info in weighted)
    memory = [info["peak_memory"] for _, info in weighted if info["peak_memory"] is not None]
    nfe, calls = (
        math.fsum(n * info[key] for n, info in weighted) / count for key in ("nfe", "network_calls")
    )
    return {
        "nfe": nfe,
        "nfe_with_guidance": calls,
        "seconds": seconds,
        "images_per_second": count / seconds,
        "peak_memory": max(memory, default=None),
    }


def _over_ranges(measured: Sequence[Measured]) -> tuple[dict[str, float], dict[str, Any]]:
    """Means over the seed ranges, and with several of them their spread."""
    metrics, errors = {}, {}
    for name in measured[0].metrics:
        values = [one.metrics[name] for one in measured]
        mean = math.fsum(values) / len(values)
        metrics[name] = mean
        errors[name] = dict(measured[0].errors.get(name, {}))
        if len(values) > 1:
            spread = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
            errors[name] |= {"mean": mean, "std": math.sqrt(spread), "min": min(values)}
            errors[name]["values"] = values
    return metrics, {name: found for name, found in errors.items() if found}


def _samples(sets: Sequence[FeatureSet]) -> str:
    """One set: over its pictures' hashes; several: over the sets' own."""
    hashes = [one.sha256() for one in sets]
    return hashes[0] if len(hashes) == 1 else canonical_sha256(hashes)


def _with_grid(folder: Path, record: Record, result: Result) -> Record:
    pictures = result.sets[0].pictures()
    if pictures is None:
        return record
    name = f"{record.name.replace(os.sep, '-').replace(' ', '-')}-{record.fingerprint}.png"
    write_grid(folder / name, {record.name: pictures.float() / 127.5 - 1}, rows=_ROWS)
    return replace(record, grid_png=name)


def _table(records: Sequence[Record], paths: Sequence[Path], folder: Path) -> str:
    """The records as a markdown table, under what they have in common."""
    one = records[0]
    n = one.reference["n"]
    against = f"{one.reference['name']} ({'?' if n is None else format(n, ',')})"
    names = list(one.metrics)
    head = ["name", "NFE", "with guidance", *names, "pictures/s", "record"]
    lines = [
        f"{one.num_samples:,} pictures against {against}; {one.extractor}, "
        f"convention {one.convention}; seed {one.seed}, pictures {one.seeds}.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for record, path in zip(records, paths, strict=True):
        values = [_told(record, name) for name in names]
        cells = [record.name, _number(record.nfe), _number(record.nfe_with_guidance), *values]
        cells += [_number(record.images_per_second), os.path.relpath(path, folder)]
        lines.append("| " + " | ".join(cells) + " |")
    if shape := one.straightness:
        lines += ["", f"Straightness of the paths: {shape['per_dim']:.4g} per dimension."]
    return "\n".join(lines) + "\n"


def _told(record: Record, name: str) -> str:
    errors = record.errors.get(name, {})
    error = errors.get("std", errors.get("jackknife"))
    return f"{record.metrics[name]:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
