"""Pairs of noise and picture made by a flow's ODE: the coupling of the next flow.

Pair i's noise and label depend on (seed, i) alone and the ODE is solved in chunks of a fixed
size, so any number of processes write the same files, and a restart only fills the gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from flowkit.errors import FlowkitError
from flowkit.noise import derive_seed
from flowkit.pairs import (
    Compute,
    PairIndex,
    PairStore,
    TensorSpec,
    create,
    missing_shards,
    write_shard,
)
from flowkit.samplers import grids, invert, sample
from flowkit.trainers.settings import PairOptions
from flowkit.velocity import Velocity, VelocityModel, bind, guided

__all__ = ["generate_pairs", "invert_pictures", "keyed_labels"]


def keyed_labels(seed: int, indices: Sequence[int], num_classes: int) -> Tensor:
    """A uniform class for each index, from (seed, index) alone: (len(indices),) int64."""
    key = derive_seed(seed, "labels")
    rows = [
        np.random.Generator(np.random.Philox(key=np.array([key, i], dtype=np.uint64))).integers(
            num_classes
        )
        for i in indices
    ]
    return torch.from_numpy(np.array(rows, dtype=np.int64))


def generate_pairs(
    model: VelocityModel,
    folder: Path,
    options: PairOptions,
    *,
    shape: Sequence[int],
    num_classes: int | None,
    seed: int,
    source: dict[str, Any],
    accelerator: Accelerator,
    name: str,
) -> PairStore:
    """Solve the model's ODE from keyed noise until every shard is there; returns the store.

    num_classes: labels are drawn uniformly from that many classes; None: unconditional.
    source: JSON-able, what made the pairs (kept in the index, and compared on a restart).
    """
    index = _index(options, shape, num_classes, options.num_pairs, seed, source, "key")
    times = _times(model, options.grid, options.num_steps)
    device = accelerator.device

    def compute(indices: range, noise: Tensor | None) -> dict[str, Tensor]:
        labels = None if num_classes is None else keyed_labels(seed, indices, num_classes)
        velocity = conditioned(model, labels, options.guidance_scale, device)
        start = (1 - times[0]) * cast(Tensor, noise).to(device)
        data = sample(velocity, start, times, solver=options.solver).x.cpu()
        return {"data": data} if labels is None else {"data": data, "class_labels": labels}

    return _write(folder, index, compute, accelerator, name)


def invert_pictures(
    model: VelocityModel,
    data: Any,
    folder: Path,
    options: PairOptions,
    *,
    num_classes: int | None,
    seed: int,
    source: dict[str, Any],
    accelerator: Accelerator,
    name: str,
) -> PairStore:
    """Pair the real pictures with the noise of their inversion (Lee et al., 2024, config G)."""
    index = _index(options, data.shape, num_classes, len(data), seed, source, "tensor")
    times = _times(model, options.grid, options.real_steps)
    device = accelerator.device

    def compute(indices: range, noise: Tensor | None) -> dict[str, Tensor]:
        rows = data.fetch(indices)
        labels = None if num_classes is None else rows["class_labels"]
        velocity = conditioned(model, labels, 1.0, device)
        end = invert(velocity, rows["data"].to(device), times, solver=options.solver).x
        pairs = {"data": rows["data"], "noise": (end / (1 - times[0])).cpu()}
        return pairs if labels is None else {**pairs, "class_labels": labels}

    return _write(folder, index, compute, accelerator, name)


def conditioned(
    model: VelocityModel, labels: Tensor | None, scale: float, device: torch.device
) -> Velocity:
    """The model with its labels fixed, and guided when scale is not 1."""
    if labels is None:
        return model
    labels = labels.to(device)
    conditional = bind(model, class_labels=labels)
    if scale == 1:
        return conditional
    nothing = bind(model, class_labels=torch.full_like(labels, null_class(model)))
    return guided(conditional, nothing, scale)


def _times(model: VelocityModel, grid: str, num_steps: int) -> list[float]:
    if grid == "uniform":
        return grids.from_start(model.t_min, num_steps)
    return grids.edm(num_steps, sigma_max=1 / max(model.t_min, 1e-3) - 1)


def null_class(model: VelocityModel) -> int:
    config: Any = getattr(model.net, "config", {})
    count = getattr(model, "null_class", None)
    if count is None and config.get("label_dropout"):
        count = config.get("num_classes")
    if count is None:
        raise FlowkitError(
            f"{type(model.net).__name__} has no unconditional class to guide with; "
            "set pairs.guidance_scale=1, or train it with net.options.label_dropout=0.1"
        )
    return int(count)


def _index(
    options: PairOptions,
    shape: Sequence[int],
    num_classes: int | None,
    num_pairs: int,
    seed: int,
    source: dict[str, Any],
    noise: str,
) -> PairIndex:
    return PairIndex(
        shape=tuple(shape),
        num_pairs=num_pairs,
        seed=seed,
        shard_size=options.shard_size,
        chunk_size=options.chunk_size,
        noise=noise,
        dtype=options.dtype,
        cond={} if num_classes is None else {"class_labels": TensorSpec("int64")},
        source=source,
    )


def _write(
    folder: Path, index: PairIndex, compute: Compute, accelerator: Accelerator, name: str
) -> PairStore:
    create(folder, index)
    rank, world = accelerator.process_index, accelerator.num_processes
    shards = missing_shards(folder, rank=rank, world=world)
    with torch.inference_mode():
        for shard in tqdm(shards, desc=name, unit="shard", disable=rank != 0):
            write_shard(folder, shard, compute)
    accelerator.wait_for_everyone()
    return PairStore(folder, verify="hash" if rank == 0 else "size", shape=index.shape)
