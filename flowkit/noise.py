"""Noise that depends on (seed, index) alone: a counter-based key per sample.

Sample i of seed s is numpy's Philox generator with the 128-bit key (s, i), drawn on the CPU, so
it is the same on any device, in any batch, on any number of processes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["derive_seed", "keyed_noise"]


def keyed_noise(seed: int, indices: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise of the samples `indices`: (len(indices), *shape), float32, on the CPU.

    seed, indices: in [0, 2**64).
    """
    rows = [int(i) for i in indices]
    noise = np.empty((len(rows), math.prod(shape)), dtype=np.float32)
    for row, index in zip(noise, rows, strict=True):
        key = np.array([seed, index], dtype=np.uint64)
        np.random.Generator(np.random.Philox(key=key)).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(noise).reshape(len(rows), *shape)


def derive_seed(seed: int, *names: object) -> int:
    """A seed of its own for each purpose: derive_seed(0, "pairs", 1).  In [0, 2**63)."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
