"""The measures by name, computed from one feature pass.

A measure gives numbers, what they are made of with the rule they follow, and what they may be off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.eval.diversity import vendi_score
from flowkit.eval.extrapolate import frechet_infinity, frechet_jackknife
from flowkit.eval.frechet import FrechetMoments
from flowkit.eval.inception_scores import inception_score
from flowkit.eval.kernel import cmmd, kernel_parts
from flowkit.eval.manifold import authentic_percentage, density_coverage, precision_recall
from flowkit.eval.reference_files import Reference
from flowkit.eval.settings import FidConfig
from flowkit.eval.sliced import sliced_distance
from flowkit.eval.sources import picked
from flowkit.eval.streaming import FeatureSet
from flowkit.registry import check_options, look_up

__all__ = ["Measured", "check_metrics", "measure", "needs_rows", "parts_of"]


@dataclass
class Measured:
    """Results of one set: metric -> number, -> parts, -> errors."""

    metrics: dict[str, float] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, value: float, rule: str, parts: dict[str, Any] | None = None) -> None:
        """Take in one number."""
        self.metrics[name], self.parts[name] = float(value), {"rule": rule, **(parts or {})}


@dataclass(frozen=True)
class _Pair:
    """What a measure sees: two sets, and how it is to be computed."""

    generated: FeatureSet
    reference: Reference
    options: FidConfig
    device: torch.device

    def rows(self, part: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """(generated, reference), on the device, in an order drawn with the run's seed.

        A folder's pictures stand by class, which blocks of neighbours would tell.  Rules leave
        the order out, as they leave out which samples that seed gives.
        """
        ours, theirs = self.generated.rows(part), self.reference.rows(part)
        return self._drawn(ours, limit), self._drawn(theirs, limit)

    def _drawn(self, rows: Tensor, limit: int | None) -> Tensor:
        order = picked(len(rows), min(limit or len(rows), len(rows)), self.options.seed, "a set")
        generator = torch.Generator().manual_seed(self.options.seed)
        shuffle = torch.randperm(len(order), generator=generator)
        return rows[torch.tensor(order)[shuffle]].to(self.device)


Measure = Callable[..., None]
LEAST_GROUPS = 5  # of a jackknife; a spread of fewer says next to nothing


def _fid(pair: _Pair, out: Measured) -> None:
    _frechet(pair, out, "fid", "features")


def _sfid(pair: _Pair, out: Measured) -> None:
    _frechet(pair, out, "sfid", "spatial")


def _frechet(pair: _Pair, out: Measured, name: str, part: str) -> None:
    against = pair.reference.frechet(part)
    count = pair.options.jackknife
    groups = list(pair.generated.groups(max(count, 1), part))
    total = FrechetMoments()
    for group in groups:
        total.merge(group)
    found = against.parts(total)
    parts = asdict(found) | {"n_2": pair.reference.n}
    out.add(name, found.value, f"Fréchet distance of {part}", parts)
    if len(groups) >= LEAST_GROUPS and min(total.n - group.n for group in groups) > 1:
        spread = frechet_jackknife(groups, against, groups=len(groups))
        bias = found.value - spread.corrected  # most of the distance's 1/N term
        out.errors[name] = {"jackknife": spread.std, "bias": bias, "groups": spread.groups}


def _kid(pair: _Pair, out: Measured, **options: Any) -> None:
    if options.get("subsets") is None:
        rows = pair.rows("features")
    else:  # which are drawn from both sets as they stand
        rows = pair.generated.rows().to(pair.device), pair.reference.rows("features")
    found = kernel_parts(rows[0], rows[1].to(pair.device), **options)
    drawn = "" if found.seed is None else f", seed {found.seed}"
    form = found.form if found.count > 1 else found.form[:-1]
    rule = f"cubic kernel, {found.count} {form} of {found.size}{drawn}"
    out.add("kid", found.value, rule, asdict(found))
    if found.count > 1:
        out.errors["kid"] = {f"std_over_{found.form}": found.std}


def _is(pair: _Pair, out: Measured, **options: Any) -> None:
    found = inception_score(pair.generated.rows("logits").to(pair.device), **options)
    rule = ", ".join(f"{k} {v}" for k, v in {"splits": 10, "seed": 2020, **options}.items())
    out.add("is", found.mean, rule)
    out.errors["is"] = {"std_over_splits": found.std}


def _precision_recall(pair: _Pair, out: Measured, k: int = 3, strict: bool = False) -> None:
    generated, real = pair.rows("features", pair.options.manifold_samples)
    found = precision_recall(real, generated, k=k, strict=strict)
    rule = f"k={k}, {'<' if strict else '<='}, {len(real)} real and {len(generated)} generated"
    for name, value in zip(("precision", "recall"), found, strict=True):
        out.add(name, value, rule)


def _density_coverage(pair: _Pair, out: Measured, k: int = 5, strict: bool = True) -> None:
    generated, real = pair.rows("features", pair.options.manifold_samples)
    found = density_coverage(real, generated, k=k, strict=strict)
    rule = f"k={k}, {'<' if strict else '<='}, {len(real)} real and {len(generated)} generated"
    for name, value in zip(("density", "coverage"), found, strict=True):
        out.add(name, value, rule)


def _authenticity(pair: _Pair, out: Measured) -> None:
    generated, real = pair.rows("features", pair.options.manifold_samples)
    rule = f"AuthPct, {len(real)} real and {len(generated)} generated"
    out.add("authenticity", authentic_percentage(real, generated), rule)


def _fid_infinity(pair: _Pair, out: Measured, **options: Any) -> None:
    generated = pair.generated.rows()
    found = frechet_infinity(pair.reference.statistics("features"), generated, **options)
    ends = f"from {found.sizes[0]} to {found.sizes[-1]}"
    seed = options.get("seed", 0)
    rule = f"line in 1/N through {len(found.sizes)} sizes {ends}, seed {seed}"
    out.add("fid_infinity", found.value, rule, asdict(found))


def _mind(pair: _Pair, out: Measured, **options: Any) -> None:
    value = sliced_distance(*pair.rows("features"), **options)
    rule = ", ".join(f"{k} {v}" for k, v in {"projections": 1000, "seed": 2020, **options}.items())
    out.add("mind", value, rule)


def _vendi(pair: _Pair, out: Measured, **options: Any) -> None:
    rule = ", ".join(f"{k} {v}" for k, v in {"order": 1, "kernel": "linear", **options}.items())
    out.add("vendi", vendi_score(pair.generated.rows().to(pair.device), **options), rule)


def _cmmd(pair: _Pair, out: Measured, **options: Any) -> None:
    rule = ", ".join(f"{k} {v}" for k, v in {"sigma": 10.0, **options}.items())
    out.add("cmmd", cmmd(*pair.rows("features"), **options), rule)


@dataclass(frozen=True)
class _Metric:
    """part: of the features that it needs.  takes: the function whose options it has, after the
    first `skip` parameters.  needs_rows: of the reference, where its moments do not do."""

    part: str
    compute: Measure
    takes: Callable[..., Any]
    skip: int = 2
    needs_rows: bool = True


METRICS = {
    "fid": _Metric("features", _fid, _fid, needs_rows=False),
    "sfid": _Metric("spatial", _sfid, _sfid, needs_rows=False),
    "kid": _Metric("features", _kid, kernel_parts),
    "is": _Metric("logits", _is, inception_score, 1, False),
    "precision_recall": _Metric("features", _precision_recall, precision_recall),
    "density_coverage": _Metric("features", _density_coverage, density_coverage),
    "authenticity": _Metric("features", _authenticity, _authenticity),
    "fid_infinity": _Metric("features", _fid_infinity, frechet_infinity, needs_rows=False),
    "mind": _Metric("features", _mind, sliced_distance),
    "vendi": _Metric("features", _vendi, vendi_score, 1, False),
    "cmmd": _Metric("features", _cmmd, cmmd),
}


def check_metrics(options: FidConfig) -> None:
    """FlowkitError for a metric or an option of one that does not exist."""
    if not options.metrics:
        raise FlowkitError("metrics is empty; say e.g. metrics=[fid,kid]")
    for name in (*options.metrics, *options.metric_options):
        look_up("metric", name, METRICS)
    for name, given in options.metric_options.items():
        if not isinstance(given, dict):
            raise FlowkitError(f"metric_options.{name} must be its options by name, got {given!r}")
        check_options(f"metric {name!r}", METRICS[name].takes, given, skip=METRICS[name].skip)


def parts_of(metrics: Sequence[str]) -> list[str]:
    """The parts of an extractor's pass that these metrics need, "features" always among them."""
    return sorted({"features", *(METRICS[name].part for name in metrics)})


def needs_rows(metrics: Sequence[str]) -> bool:
    """Whether a metric needs the reference's features, not its moments alone."""
    return any(METRICS[name].needs_rows for name in metrics)


def measure(
    generated: FeatureSet, reference: Reference, options: FidConfig, device: torch.device
) -> Measured:
    """All metrics of the options for one set; FlowkitError for what the reference lacks."""
    pair, out = _Pair(generated, reference, options, device), Measured()
    for name in options.metrics:
        METRICS[name].compute(pair, out, **options.metric_options.get(name, {}))
    return out
