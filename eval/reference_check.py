"""What metrics need of a reference and of the number of pictures, checked before any is made."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping

from flowkit.errors import FlowkitError
from flowkit.eval.metric_table import METRICS
from flowkit.eval.reference_files import Reference
from flowkit.eval.settings import FidConfig

__all__ = ["check_reference"]


def check_reference(
    reference: Reference, options: FidConfig, dims: Mapping[str, int], count: int
) -> None:
    """FlowkitError when a metric of the options cannot compare `count` pictures with a reference.

    dims: part -> its length for a picture of this run.  Statistics may lack a part or features; a
    set may be too small for a metric's subsets, blocks or neighbours.
    """
    for name in options.metrics:
        metric = METRICS[name]
        if metric.skip == 1:  # a measure of the pictures alone
            continue
        n = 0
        if metric.needs_rows:
            n, d = reference.rows(metric.part).shape
        else:
            d = len(reference.frechet(metric.part).mean)
        if d != dims[metric.part]:
            raise FlowkitError(
                f"{name}: reference {reference.name} has {d} {metric.part} a picture and this run "
                f"{dims[metric.part]}; give a reference of pictures of the same size"
            )
        if metric.needs_rows:
            _check_sizes(name, options, count, n)


def _check_sizes(name: str, options: FidConfig, ours: int, theirs: int) -> None:
    given = options.metric_options.get(name, {})
    sizes = f"{ours} pictures and {theirs} of the reference"
    if name == "kid":
        _check_kid(given, min(ours, theirs), max(ours, theirs), sizes)
        return
    limits = inspect.signature(METRICS[name].compute).parameters
    if "k" in limits:
        k, least = given.get("k", limits["k"].default), min(ours, theirs, options.manifold_samples)
        if not 1 <= k < least:
            raise FlowkitError(
                f"{name}: k={k} neighbours need more than k of {sizes}, at most manifold_samples="
                f"{options.manifold_samples}; lower metric_options.{name}.k"
            )


def _check_kid(given: Mapping[str, int | None], least: int, most: int, sizes: str) -> None:
    if given.get("subsets") is not None:
        size = given.get("subset_size") or 1000
        if not 2 <= size <= least:
            raise FlowkitError(
                f"kid: subsets of {size} cannot be drawn from {sizes}; lower "
                "metric_options.kid.subset_size"
            )
        return
    block = given.get("block_size") or 5000
    if block < 2 or least < 2 * math.ceil(most / block):
        raise FlowkitError(
            f"kid: {sizes} leave fewer than two of one in a block of {block}; raise "
            "metric_options.kid.block_size"
        )
