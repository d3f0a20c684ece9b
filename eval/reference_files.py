"""What samples are compared with: pictures whose features are computed, or an npz of statistics.

    ours             mu, sigma, mu_s, sigma_s, feats, metadata
    EDM, pytorch-fid, clean-fid            mu, sigma                  clean-fid's KID: feats
    guided-diffusion (ADM)                 mu, sigma, mu_s, sigma_s, arr_0: some of the pictures

Only ours says how it was made; of the others one must say it, since the numbers do not tell.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.eval.features import Extractor
from flowkit.eval.frechet import FrechetMoments, FrechetReference
from flowkit.eval.provenance import versions
from flowkit.eval.streaming import FeatureSet
from flowkit.files import atomic_file, write_json
from flowkit.pictures import UNREADABLE, one_line

__all__ = ["Reference", "is_statistics", "read_statistics", "write_statistics"]

SCHEMA = 1
_SUFFIXES = {"features": "", "spatial": "_s"}  # of the names mu and sigma
_PICKLES = (".pkl", ".pickle", ".pt", ".pth")
_UNTOLD = 1 << 30  # stands in for a number of samples that a file does not tell


@dataclass
class Reference:
    """A set that others are measured against.

    n: pictures, None when a file does not tell.  sha256: of its pictures, or of the statistics.
    statistics: part -> moments.  rows: part -> features (N, d); raises FlowkitError when there are
    statistics only.
    """

    name: str
    n: int | None
    sha256: str
    statistics: Callable[[str], FrechetMoments]
    rows: Callable[[str], Tensor]
    _factored: dict[str, FrechetReference] = field(default_factory=dict, repr=False)

    def frechet(self, part: str) -> FrechetReference:
        """This set under the Fréchet distance, on one part of the features."""
        if part not in self._factored:
            self._factored[part] = FrechetReference(self.statistics(part))
        return self._factored[part]

    def to_dict(self) -> dict[str, Any]:
        """For a record."""
        return {"name": self.name, "n": self.n, "sha256": self.sha256}


def is_statistics(name: str) -> bool:
    """Whether a reference is a file of statistics; FlowkitError for a pickle, which could run code
    when it is read."""
    path = Path(name).expanduser()
    if path.suffix.lower() in _PICKLES and path.is_file():
        raise FlowkitError(
            f"{name} is a pickle, which may run code; save its mu and sigma as an npz, or make "
            "statistics with python -m flowkit.eval.reference"
        )
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    arrays = set(_arrays(path))
    return bool(arrays & {"mu", "sigma", "feats"})


def read_statistics(
    name: str,
    extractor: Extractor,
    *,
    convention: str | None = None,
    pictures: Callable[[], Callable[[str], Tensor]] | None = None,
) -> Reference:
    """The reference in an npz of statistics.

    convention: what a file without metadata was made with, which must be the extractor's
    preprocessing.  pictures: called at once when the file holds pictures and no features; it
    computes theirs, part -> (N, d).  None: they are not needed.
    FlowkitError: made by another extractor or convention, damaged, or mu and sigma do not fit.
    """
    path = Path(name).expanduser()
    arrays = _arrays(path)
    metadata = _metadata(path, arrays, convention)
    _check_origin(name, metadata, extractor, convention)
    n = metadata.get("n")
    own = pictures() if pictures and "arr_0" in arrays and "feats" not in arrays else None

    def rows(part: str) -> Tensor:
        if part == "features" and "feats" in arrays:
            return torch.from_numpy(_read(path, "feats")).float()
        if own is not None:
            return own(part)
        raise FlowkitError(
            f"{name} holds statistics, and a metric needs features; give the pictures as reference,"
            " or make it with keep_features=true"
        )

    digest = metadata.get("sha256") or _sha256(path, arrays)
    told = metadata.get("name", path.name)
    return Reference(told, n, digest, partial(_statistics, path, arrays, n), rows)


def _statistics(path: Path, arrays: Mapping[str, Any], n: int | None, part: str) -> FrechetMoments:
    """The moments of a part, from the file's mean and covariance or its features."""
    mean, cov = (f"{what}{_SUFFIXES[part]}" for what in ("mu", "sigma"))
    if {mean, cov} <= arrays.keys():
        return _moments(str(path), _read(path, mean), _read(path, cov), n)
    if part == "features" and "feats" in arrays:
        moments = FrechetMoments()
        moments.update(_read(path, "feats"))
        return moments
    raise FlowkitError(f"{path} has no {mean} and {cov}; it holds {', '.join(arrays)}")


def write_statistics(
    path: Path,
    features: FeatureSet,
    extractor: Extractor,
    parts: Sequence[str],
    *,
    metadata: Mapping[str, Any],
    keep_features: bool = False,
) -> None:
    """Write the statistics of these parts of a set's features, with metadata, in the npz and in a
    .json beside it.

    metadata: what else is known.  keep_features: store the features too.
    """
    arrays: dict[str, Any] = {}
    for part in parts:
        moments = features.moments(part)
        arrays[f"mu{_SUFFIXES[part]}"] = moments.mean.numpy()
        arrays[f"sigma{_SUFFIXES[part]}"] = moments.cov.numpy()
    if keep_features:
        arrays["feats"] = features.rows().numpy()
    told = {
        "schema": SCHEMA,
        "n": len(features),
        "sha256": features.sha256(),
        "extractor": extractor.id,
        "convention": extractor.preprocessing,
        "weights_sha256": extractor.weights_sha256,
        "dtype": "float64 statistics of float32 features",
        "versions": versions(),
        **metadata,
    }
    arrays["metadata"] = np.array(json.dumps(told))
    with atomic_file(path) as temporary, open(temporary, "wb") as handle:
        np.savez(handle, **arrays)
    write_json(path.with_suffix(".json"), told)


def _arrays(path: Path) -> dict[str, Any]:
    """The names in an npz."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return dict.fromkeys(found.files)
    except (*UNREADABLE, AttributeError) as error:
        if _speaks_of_pickles(error):  # numpy says how to load it all the same
            raise FlowkitError(
                f"{path} is no npz but a pickle, which may run code, or another kind of file, and "
                "is refused; save its mu and sigma as an npz"
            ) from None
        raise FlowkitError(f"{path} is not a readable npz: {one_line(error)}") from None


def _speaks_of_pickles(error: Exception) -> bool:
    return isinstance(error, ValueError) and "allow_pickle" in str(error)


def _read(path: Path, name: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as found:
            return found[name]
    except UNREADABLE as error:
        if _speaks_of_pickles(error):
            raise FlowkitError(
                f"{path} holds pickled objects ({name}), which may run code, and is refused; save "
                "its arrays as numbers"
            ) from None
        raise FlowkitError(f"{path} cannot be read ({name}: {one_line(error)})") from None


def _metadata(path: Path, arrays: Mapping[str, Any], convention: str | None) -> dict[str, Any]:
    """What the file says of its origin, in it or in a .json beside it; {} when nothing does.

    A .json beside it that says something else is another's, which a given convention settles.
    """
    beside, inside = path.with_suffix(".json"), "metadata" in arrays
    if not inside and not beside.is_file():
        return {}
    where = f"the metadata of {path}" if inside else f"the metadata of {path}, in {beside.name},"
    other = "" if inside else "; if that file is another's, say reference_convention=NAME"
    try:
        text = str(_read(path, "metadata")) if inside else beside.read_text(encoding="utf-8")
        found = json.loads(text)
        problem = "lack extractor and convention"
    except ValueError as error:
        if isinstance(error, FlowkitError):
            raise
        found, problem = None, f"are not JSON: {error}"
    if not isinstance(found, dict) or not {"extractor", "convention"} <= found.keys():
        if convention is not None and not inside:
            return {}
        raise FlowkitError(f"{where} {problem}{other}")
    if found.get("schema", SCHEMA) > SCHEMA:
        raise FlowkitError(
            f"{path} has statistics of schema {found['schema']}, this flowkit reads {SCHEMA}; "
            "update flowkit"
        )
    return found


def _check_origin(
    name: str, metadata: Mapping[str, Any], extractor: Extractor, convention: str | None
) -> None:
    if metadata:
        for what, ours in (("extractor", extractor.id), ("convention", extractor.preprocessing)):
            if metadata[what] != ours:
                raise FlowkitError(
                    f"{name} was made with {what} {metadata[what]!r}, this run uses {ours!r}; "
                    "choose the same features, or make statistics anew"
                )
    elif convention is None:
        raise FlowkitError(
            f"{name} does not say how it was made; say reference_convention=NAME: "
            "legacy_tensorflow (EDM, guided-diffusion), legacy_pytorch (pytorch-fid) or clean"
        )
    elif convention != extractor.preprocessing:
        raise FlowkitError(
            f"reference_convention={convention}, but features {extractor.id!r} are of convention "
            f"{extractor.preprocessing!r}; choose features=inception:{convention}"
        )


def _moments(name: str, mean: np.ndarray, cov: np.ndarray, n: int | None) -> FrechetMoments:
    try:
        return FrechetMoments.from_statistics(mean, cov, n or _UNTOLD)
    except (FlowkitError, TypeError) as error:
        raise FlowkitError(f"{name}: {error}") from None


def _sha256(path: Path, arrays: Mapping[str, Any]) -> str:
    """Over the statistics, as numbers in float64."""
    digest = hashlib.sha256()
    for key in sorted(set(arrays) & {"mu", "sigma", "feats"}):
        array = _read(path, key)
        if array.dtype.kind not in "fiu":
            raise FlowkitError(f"{path}: {key} is of {array.dtype}, expected numbers")
        digest.update(np.ascontiguousarray(array, dtype=np.float64).tobytes())
    return digest.hexdigest()
