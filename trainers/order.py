"""Which pictures a step sees: a function of (seed, step) alone, so that resuming needs no state.

The positions step * batch_size + 0, 1, ... run through one permutation of the data after another.
A step's batch is cut into micro-batches; process r of W takes micro-batches r, r + W, ..., so W
processes see what one process sees that accumulates W times as many.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flowkit.coupling import Coupling
from flowkit.errors import FlowkitError
from flowkit.noise import derive_seed

__all__ = ["Order", "read"]


@dataclass(frozen=True)
class Order:
    """The data order of one process.

    size: pictures there are.  batch_size: pictures a step, over all processes.
    micro_batch_size: pictures a forward pass, or None for an even share of the batch.
    """

    size: int
    batch_size: int
    seed: int
    micro_batch_size: int | None = None
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        micro = self.micro_batch_size or self.batch_size // self.world
        if not micro or self.batch_size % (micro * self.world):
            raise FlowkitError(
                f"batch_size {self.batch_size} must be a multiple of processes ({self.world}) x "
                f"micro_batch_size ({micro}); change one of them"
            )
        object.__setattr__(self, "micro_batch_size", micro)

    @property
    def micro_batches(self) -> range:
        """Numbers of this process's micro-batches within a step."""
        return range(self.rank, self.batch_size // (self.micro_batch_size or 1), self.world)

    def indices(self, step: int, micro: int) -> Tensor:
        """Rows of micro-batch `micro` of step `step`: (micro_batch_size,) int64."""
        count = self.micro_batch_size or 0
        start = step * self.batch_size + micro * count
        epoch, offset = divmod(start, self.size)
        parts = []
        while count:
            part = _permutation(self.seed, epoch, self.size)[offset : offset + count]
            parts.append(part)
            count, epoch, offset = count - len(part), epoch + 1, 0
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
    return torch.randperm(size, generator=generator)


def read(
    coupling: Coupling,
    order: Order,
    steps: range,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """The rows of every micro-batch of `steps`, in order; num_workers processes read ahead."""
    batches = (order.indices(step, micro) for step in steps for micro in order.micro_batches)
    if not num_workers:
        return map(coupling.fetch, batches)
    return iter(
        DataLoader(
            _Rows(coupling),
            batch_sampler=(batch.tolist() for batch in batches),
            num_workers=num_workers,
            collate_fn=_as_read,
            worker_init_fn=_outlive_sigterm,
            pin_memory=pin_memory,
        )
    )


def _as_read(rows: Any) -> Any:
    return rows


def _outlive_sigterm(worker: int) -> None:
    """A launcher sends SIGTERM to all processes; a reader that died of it would stop the save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Rows(Dataset):
    def __init__(self, coupling: Coupling) -> None:
        self.coupling = coupling

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return self.coupling.fetch(indices)
