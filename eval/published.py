"""Published numbers as records, marked as such: clean-fid's leaderboard rows, and files of yours.

A YAML list, or a CSV with these columns and one for each metric (`fid`, `fid_std`, ...):

    - name: EDM, deterministic
      source: arXiv:2206.00364, table 2
      metrics: {fid: 1.97}
      spread: {fid: 0.02}                       # standard deviations, where they are given
      convention: legacy_tensorflow
      reference: {name: cifar10-train, n: 50000}    # in a CSV: reference, reference_n
      num_samples: 50000
      nfe: 35                                   # and solver, steps, parameters, note, extractor

A CSV whose columns are clean-fid's (Parmar et al., 2022, arXiv:2104.11222) gives one record for
each convention that a row has numbers of.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from flowkit.errors import FlowkitError
from flowkit.eval.records import Record

__all__ = ["clean_fid_records", "read_published"]

_CLEAN_FID = {"model_name", "dataset_name", "dataset_res", "dataset_split", "task_name"}
# A column's first word to the convention it was computed under. "reported" is the model's authors'
# number, whose convention the table does not say.
_PREFIXES = {
    "clean": "clean",
    "reproduced": "legacy_tensorflow",
    "legacy": "legacy_tensorflow",
    "reported": "as reported",
}
_REQUIRED = {"name", "source", "metrics", "convention", "reference", "num_samples"}
_OPTIONAL = {"spread", "nfe", "nfe_with_guidance", "solver", "steps", "parameters"}
_OPTIONAL |= {"note", "extractor"}
_MISSING = {"", "-", "–", "n/a", "na", "none", "null", "- †"}


def read_published(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a YAML or CSV file of published numbers.

    FlowkitError: another kind of file, unknown or missing columns, a number that is none, no rows.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".yaml", ".yml", ".csv"):
        raise FlowkitError(f"{path}: published numbers are read from .yaml or .csv, got {kind!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = list(csv.reader(text.splitlines())) if kind == ".csv" else yaml.safe_load(text)
    except (UnicodeDecodeError, yaml.YAMLError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise FlowkitError(f"{path} is not readable as {kind[1:]}: {reason}") from None
    if not isinstance(rows, list) or len(rows) < 1 + (kind == ".csv"):
        raise FlowkitError(f"{path} holds no rows of published numbers")
    if kind != ".csv":
        return [_record(f"{path}, entry {n}", row) for n, row in enumerate(rows, 1)]
    named = list(_named_rows(path, rows))
    if _CLEAN_FID <= named[0][1].keys():
        return [record for place, row in named for record in clean_fid_records(row, place)]
    return [_record(place, _nested(place, row)) for place, row in named]


def clean_fid_records(row: Mapping[str, str], place: str = "the row") -> list[Record]:
    """The records of one row of clean-fid's leaderboard, as `cleanfid.leaderboard` returns it: one
    for each convention with numbers; KID columns marked `(x 10^3)` are scaled back.

    place: what errors call the row.
    """
    found: dict[str, dict[str, tuple[float, float | None]]] = {}
    for column, text in row.items():
        match = re.fullmatch(r"(\w+?)[_ ](fid|kid)( \(x ?10\^3\))?", column.strip().lower())
        if not match or match[1] not in _PREFIXES or text.strip().lower() in _MISSING:
            continue
        scale = 1e-3 if match[3] else 1.0
        value, spread = _value(f"{place}, {column}", text)
        scaled = value * scale, None if spread is None else spread * scale
        found.setdefault(_PREFIXES[match[1]], {})[match[2]] = scaled
    if not found:
        wanted = ", ".join(f"{prefix}_fid" for prefix in _PREFIXES)
        raise FlowkitError(f"{place} has no number; expected one of the columns {wanted}")
    size, split = row["dataset_res"].strip(), row["dataset_split"].strip()
    reference = f"{row['dataset_name'].strip()}-{size} {split}"
    return [
        _record(
            place,
            {
                "name": row["model_name"].strip(),
                "source": f"clean-fid leaderboard, {row['task_name'].strip()}",
                "metrics": {metric: value for metric, (value, _) in numbers.items()},
                "spread": {k: spread for k, (_, spread) in numbers.items() if spread is not None},
                "convention": convention,
                "reference": {"name": reference, "n": row.get("num_reference_images")},
                "num_samples": row.get("num_generated_images"),
                "note": (row.get("model_url") or "").strip(),
            },
        )
        for convention, numbers in found.items()
    ]


def _named_rows(path: Path, rows: list[list[str]]) -> Iterator[tuple[str, dict[str, str]]]:
    header = [name.strip() for name in rows[0]]
    for line, row in enumerate(rows[1:], 2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(header):
            raise FlowkitError(
                f"{path}, row {line}: {len(row)} cells under {len(header)} column names"
            )
        yield f"{path}, row {line}", dict(zip(header, row, strict=True))


def _nested(place: str, row: Mapping[str, str]) -> dict[str, Any]:
    """A CSV row in the shape of the YAML."""
    known = (_REQUIRED | _OPTIONAL) - {"metrics", "spread"}
    values: dict[str, Any] = {"metrics": {}, "spread": {}}
    for column, text in row.items():
        if text.strip().lower() in _MISSING or column == "reference_n":
            continue
        if column in known:
            values[column] = text.strip()
        elif column.endswith("_std") and column.removesuffix("_std") in row:
            values["spread"][column.removesuffix("_std")] = text
        else:
            values["metrics"][column], spread = _value(f"{place}, {column}", text)
            if spread is not None:
                values["spread"][column] = spread
    if "reference" in values:
        values["reference"] = {"name": values["reference"], "n": row.get("reference_n")}
    return values


def _record(place: str, row: Any) -> Record:
    if not isinstance(row, dict):
        raise FlowkitError(f"{place}: expected a mapping of {', '.join(sorted(_REQUIRED))}")
    if missing := sorted(_REQUIRED - {key for key, value in row.items() if value}):
        raise FlowkitError(f"{place} lacks {missing[0]!r}; a published number needs its source, "
                           f"convention, reference and number of samples")  # fmt: skip
    if unknown := sorted(map(str, row.keys() - _REQUIRED - _OPTIONAL)):
        known = ", ".join(sorted(_REQUIRED | _OPTIONAL))
        raise FlowkitError(f"{place}: unknown entry {unknown[0]!r}; known: {known}")
    for group in ("metrics", "spread"):
        if not isinstance(row.get(group) or {}, dict):
            raise FlowkitError(f"{place}: {group} must be numbers by name, got {row[group]!r}")
    reference = row["reference"]
    if not isinstance(reference, dict) or not reference.get("name"):
        raise FlowkitError(f"{place}: reference must be {{name: ..., n: ...}}, got {reference!r}")
    size = reference.get("n")
    spread = row.get("spread") or {}
    parameters = _optional(place, row, "parameters")
    steps = _optional(place, row, "steps")
    return Record(
        name=str(row["name"]),
        metrics={key: _value(f"{place}, {key}", v)[0] for key, v in row["metrics"].items()},
        errors={key: {"std": _value(f"{place}, {key}", v)[0]} for key, v in spread.items()},
        convention=str(row["convention"]),
        extractor=str(row.get("extractor") or "inception"),
        reference={
            "name": str(reference["name"]),
            "n": None if size in (None, "") else _count(f"{place}, reference n", size),
            "sha256": None,
        },
        num_samples=_count(f"{place}, num_samples", row["num_samples"]),
        nfe=_optional(place, row, "nfe"),
        nfe_with_guidance=_optional(place, row, "nfe_with_guidance"),
        solver=row.get("solver"),
        steps=None if steps is None else int(steps),
        model=None if parameters is None else {"parameters": int(parameters)},
        config={"note": row["note"]} if row.get("note") else {},
        published=True,
        source=str(row["source"]),
    )


def _optional(place: str, row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    return None if value in (None, "") else _value(f"{place}, {key}", value)[0]


def _count(place: str, value: Any) -> int:
    number, _ = _value(place, str(value).replace(",", ""))
    if number < 1 or number != int(number):
        raise FlowkitError(f"{place} must be a whole number, got {value!r}")
    return int(number)


def _value(place: str, text: Any) -> tuple[float, float | None]:
    """`10.85`, `10.85 ± 0.10` or `10.85 +- 0.10` as (value, spread)."""
    try:
        numbers = [float(part) for part in re.split(r"±|\+-|\+/-", str(text))]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(map(math.isfinite, numbers)):
        raise FlowkitError(f"{place}: expected a number, or one as 10.85 ± 0.10, got {text!r}")
    return numbers[0], numbers[1] if len(numbers) == 2 else None
