"""Records: one JSON file per result, with all that is needed to trust it, repeat it, compare it.

record = read_record("runs/records/flow-nfe4-1a2b3c4d.json")
record.metrics["fid"], record.errors["fid"]["std"]
comparable(record, other)       # None, or why these two may not stand in one ranking
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import types
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from flowkit.errors import FlowkitError
from flowkit.files import read_json, write_json
from flowkit.schema import describe

__all__ = ["SCHEMA", "Record", "canonical_sha256", "comparable", "read_record", "write_record"]

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """A result.  What is not known, as in a published number, is None.

    name: the table's row.  metrics: {"fid": 3.2, "kid": ...}, finite.  parts: for a metric, the
    numbers it is made of, and "rule", a text that says which definition it follows.  errors: for a
    metric {"jackknife": standard error over chunks} and, over seed ranges, {"mean", "std", "min",
    "values"}.
    convention: the extractor's preprocessing.  extractor: its id, which holds its weights' hash.
    reference: {"name", "n", "sha256"}.  seeds: [start, end) of the samples' indices under `seed`.
    model: {"path", "sha256", "parameters"}.  nfe: evaluations of the velocity a sample;
    nfe_with_guidance: of the network; of both, those that a cache of features had computed in full,
    on average.  samples_sha256: over the hashes of all uint8 pictures.
    straightness: {"total", "per_dim", "relative"}.  grid_png: relative to the record's folder.
    published: a number from a paper or another's table, and `source` says which.
    """

    name: str
    metrics: dict[str, float]
    convention: str
    extractor: str
    reference: dict[str, Any]
    num_samples: int
    schema: int = SCHEMA
    parts: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    seeds: list[int] | None = None
    model: dict[str, Any] | None = None
    solver: str | None = None
    solver_options: dict[str, Any] = field(default_factory=dict)
    grid: str | None = None
    steps: int | None = None
    nfe: float | None = None
    nfe_with_guidance: float | None = None
    guidance: dict[str, Any] | None = None
    cache: dict[str, Any] | None = None
    labels: str | None = None
    dtype: str | None = None
    chunk_size: int | None = None
    samples_sha256: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    config_sha256: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    device: str | None = None
    seconds: float | None = None
    peak_memory: int | None = None
    images_per_second: float | None = None
    straightness: dict[str, float] | None = None
    grid_png: str | None = None
    published: bool = False
    source: str | None = None

    @property
    def fingerprint(self) -> str:
        """8 hex digits of what determines the result: model, configuration, reference, extractor,
        samples."""
        model = self.model or {}
        identity = [
            *(self.name, self.convention, self.extractor, self.num_samples, self.reference),
            *(model.get("sha256"), self.config_sha256, self.samples_sha256, self.nfe, self.source),
        ]
        return canonical_sha256(identity)[:8]


def canonical_sha256(value: Any) -> str:
    """sha256 of a value's canonical JSON: sorted keys, no blanks."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_record(folder: str | os.PathLike[str], record: Record) -> Path:
    """Write folder/NAME-FINGERPRINT.json, atomically, and return its path.

    FlowkitError: a metric is not finite.
    """
    for metric, value in record.metrics.items():
        if not math.isfinite(value):
            raise FlowkitError(
                f"{record.name}: {metric} is {value}; a record holds finite numbers, leave it out"
            )
    name = re.sub(r"[^\w.+-]+", "-", record.name).strip("-.") or "record"
    path = Path(folder) / f"{name}-{record.fingerprint}.json"
    write_json(path, asdict(record))
    return path


def read_record(path: str | os.PathLike[str]) -> Record:
    """The record in a file.

    FlowkitError: not JSON, not a record, of a newer schema than this flowkit reads, not whole, or
    a field is not of its type.
    """
    try:
        values = read_json(path)
    except ValueError as error:
        raise FlowkitError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("schema"), int):
        raise FlowkitError(f"{path} is not a record: it has no number `schema`")
    if values["schema"] > SCHEMA:
        raise FlowkitError(
            f"{path} has record schema {values['schema']}, this flowkit reads {SCHEMA}; "
            "update flowkit to read it"
        )
    known = {one.name for one in fields(Record)}
    if unknown := sorted(values.keys() - known):
        raise FlowkitError(f"{path}: a record has no {unknown[0]!r}; known: {', '.join(known)}")
    try:
        record = Record(**values)
    except TypeError:
        missing = sorted(_REQUIRED - values.keys())
        raise FlowkitError(f"{path} is not a whole record: no {', '.join(missing)}") from None
    _check(path, record)
    return record


_REQUIRED = {"name", "metrics", "convention", "extractor", "reference", "num_samples"}


def _check(path: str | os.PathLike[str], record: Record) -> None:
    """FlowkitError for a field that is not of its type, or holds what no reader could use."""
    for name, hint in typing.get_type_hints(Record).items():
        value, finite = getattr(record, name), name != "straightness"  # a still path's is nan
        if not _fits(hint, value, finite):
            raise FlowkitError(f"{path}: {name} must be {describe(hint)}, got {_short(value)}")
    reference, model = record.reference, record.model or {}
    rules = [part.get("rule") for part in record.parts.values() if isinstance(part, dict)]
    for what, value, hint in (
        ("reference name", reference.get("name"), str),
        ("reference n", reference.get("n"), int | None),
        ("reference sha256", reference.get("sha256"), str | None),
        ("model parameters", model.get("parameters"), float | None),
        *(("a metric's rule", rule, str | None) for rule in rules),
        *(("a metric's errors", errors, dict[str, Any]) for errors in record.errors.values()),
    ):
        if not _fits(hint, value):
            raise FlowkitError(f"{path}: {what} must be {describe(hint)}, got {_short(value)}")
    for metric, errors in record.errors.items():
        told = {key: errors.get(key) for key in ("std", "jackknife")}
        if not (_fits(dict[str, float | None], told) and _fits(_VALUES, errors.get("values"))):
            raise FlowkitError(
                f"{path}: errors of {metric} must be numbers, and values a list of some, got "
                f"{_short(errors)}"
            )
    if record.seeds is not None and len(record.seeds) != 2:
        raise FlowkitError(f"{path}: seeds must be [start, end), got {_short(record.seeds)}")


_VALUES = list[float] | None


def _fits(hint: Any, value: Any, finite: bool = True) -> bool:
    """Whether JSON's value is of an annotation's type, its numbers finite where they must be."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(one, value, finite) for one in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(arguments[0], v, finite) for v in value)
    if origin is dict:
        if not isinstance(value, dict):
            return False
        return all(_fits(arguments[1], v, finite) for v in value.values())
    if hint is float:
        return type(value) in (int, float) and (math.isfinite(value) or not finite)
    return type(value) is hint


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def comparable(a: Record, b: Record, metric: str | None = None) -> str | None:
    """None when two records may stand in one ranking (of that metric), else the reason they may
    not: convention, extractor, number of samples, reference, or the metric's rule differ.

    A reference without a hash compares only with others without one, by name and size.
    """
    pairs = [
        ("convention", a.convention, b.convention),
        ("extractor", a.extractor, b.extractor),
        ("num_samples", a.num_samples, b.num_samples),
        ("reference size", a.reference.get("n"), b.reference.get("n")),
    ]
    mine, theirs = a.reference.get("sha256"), b.reference.get("sha256")
    if mine is None and theirs is None:
        pairs.append(("reference", a.reference["name"], b.reference["name"]))
    elif mine is None or theirs is None:
        unknown = a if mine is None else b
        return f"the reference of {unknown.name!r} has no hash to verify"
    else:
        pairs.append(("reference sha256", mine[:12], theirs[:12]))
    if metric is not None:
        pairs.append((f"rule of {metric}", _rule(a, metric), _rule(b, metric)))
    for what, mine, theirs in pairs:
        if mine != theirs:
            return f"{what} differs: {mine} and {theirs}"
    return None


def _rule(record: Record, metric: str) -> Any:
    parts = record.parts.get(metric)
    return parts.get("rule") if isinstance(parts, dict) else None
