"""Where a training batch's noise and data come from, and which noise belongs to which data.

    Independent(data)             fresh noise: a 1-rectified flow
    Paired(store)                 noise and the data that an ODE made of it: reflow, 2-RF; A to F of
                                  Lee et al., 2024, arXiv:2405.20320
    Mixed(pairs, real, share)     pairs and inverted real pictures together: their config G
    Annealed(pairs, beta)         from the one (beta = 1) to the other (beta = 0): Zhu et al., 2024,
                                  arXiv:2407.12718

Reading (`fetch`: deterministic, on the CPU, in any process) is apart from chance (`couple`: on the
device of the rows).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from flowkit.errors import FlowkitError

__all__ = ["Annealed", "Batch", "Coupling", "Independent", "Mixed", "Paired"]

Rows = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """Coupled noise and data (B, *), and what the model is conditioned on: name -> (B, ...)."""

    noise: Tensor
    data: Tensor
    cond: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.data)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        cond = {name: value.to(device) for name, value in self.cond.items()}
        return Batch(self.noise.to(device), self.data.to(device), cond)


class Coupling(Protocol):
    """Rows 0 .. len - 1, of which `fetch` reads some and `couple` makes a batch."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int] | Tensor) -> Rows: ...

    def couple(self, rows: Rows, generator: torch.Generator | None = None) -> Batch: ...


class Rowed(Protocol):
    """What is read from: `flowkit.data.ImageData`, `flowkit.pairs.PairStore`, or the like."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __len__(self) -> int: ...

    def fetch(self, indices: Any) -> Rows: ...


class Independent:
    """Every data row with fresh noise, another at each draw (Liu et al., 2022, arXiv:2209.03003).

    data: its rows hold "data" (B, *); all else in them is conditioning, dropped unless `labels`.
    flip: mirror half of the pictures along their width.
    """

    def __init__(self, data: Rowed, flip: bool = False, *, labels: bool = True) -> None:
        self.data, self.flip, self.labels = data, flip, labels
        self.shape = _checked_shape(data, flip)

    def __len__(self) -> int:
        return len(self.data)

    def fetch(self, indices: Sequence[int] | Tensor) -> Rows:
        """The rows' data and conditioning."""
        rows = self.data.fetch(indices)
        return rows if self.labels else {"data": rows["data"]}

    def couple(self, rows: Rows, generator: torch.Generator | None = None) -> Batch:
        """Draw noise, and mirror half of the data.  generator: on the rows' device."""
        data, cond = rows["data"], {k: v for k, v in rows.items() if k != "data"}
        if self.flip:
            (data,) = _mirror_half(generator, data)
        noise = torch.randn(data.shape, generator=generator, device=data.device, dtype=data.dtype)
        return Batch(noise, data, cond)


class Paired:
    """The pairs of a store: noise and data that belong together.

    store: its rows hold "noise" and "data" (B, *); all else in them is conditioning.
    flip: mirror half of the pairs along their width, noise and data alike.
    """

    def __init__(self, store: Rowed, flip: bool = False) -> None:
        self.store, self.flip = store, flip
        self.shape = _checked_shape(store, flip)

    def __len__(self) -> int:
        return len(self.store)

    def fetch(self, indices: Sequence[int] | Tensor) -> Rows:
        """The pairs and their conditioning."""
        return self.store.fetch(indices)

    def couple(self, rows: Rows, generator: torch.Generator | None = None) -> Batch:
        """Mirror half of the pairs.  generator: on the rows' device."""
        noise, data = rows["noise"], rows["data"]
        cond = {k: v for k, v in rows.items() if k not in ("noise", "data")}
        if self.flip:
            noise, data = _mirror_half(generator, noise, data)
        return Batch(noise, data, cond)


class Mixed:
    """Two couplings in one: a `share` in (0, 1) of all rows comes from `second`.

    Every row of both is there at least once, and repeated as evenly as the share asks for.  Within
    a batch, rows of `first` stand before those of `second`.
    """

    def __init__(self, first: Coupling, second: Coupling, share: float) -> None:
        if not 0 < share < 1:
            raise FlowkitError(
                f"share must lie between 0 and 1, got {share}; for 0 or 1 use the coupling itself"
            )
        if first.shape != second.shape:
            raise FlowkitError(
                f"both couplings must have one shape, got {first.shape} and {second.shape}"
            )
        self.parts = {"first": first, "second": second}
        self.shape = first.shape
        self._length = math.ceil(max(len(first) / (1 - share), len(second) / share))
        self._begin_second = self._length - round(self._length * share)

    def __len__(self) -> int:
        return self._length

    def fetch(self, indices: Sequence[int] | Tensor) -> Rows:
        """The rows of both: "first.data", "second.data" and so on."""
        numbers = torch.as_tensor(indices, dtype=torch.int64)
        is_second = numbers >= self._begin_second
        chosen = {"first": numbers[~is_second], "second": numbers[is_second] - self._begin_second}
        rows: Rows = {}
        for name, part in self.parts.items():
            if len(chosen[name]):
                found = part.fetch(chosen[name] % len(part))
                rows |= {f"{name}.{key}": value for key, value in found.items()}
        return rows

    def couple(self, rows: Rows, generator: torch.Generator | None = None) -> Batch:
        """Couple each part's rows in its own way."""
        batches = []
        for name, part in self.parts.items():
            own = {k.removeprefix(f"{name}."): v for k, v in rows.items() if k.startswith(name)}
            if own:
                batches.append(part.couple(own, generator))
        if len(batches) == 1:
            return batches[0]
        first, second = batches
        if first.cond.keys() != second.cond.keys():
            raise FlowkitError(
                f"the mixed couplings must have the same conditioning, got {sorted(first.cond)} "
                f"and {sorted(second.cond)}"
            )
        return Batch(
            torch.cat([first.noise, second.noise]),
            torch.cat([first.data, second.data]),
            {name: torch.cat([first.cond[name], second.cond[name]]) for name in first.cond},
        )


class Annealed:
    """Pairs whose noise is turned towards fresh noise (Zhu et al., 2024, arXiv:2407.12718):

        noise_beta = sqrt(1 - beta^2) noise + beta fresh

    It is N(0, I) for every beta, and of correlation sqrt(1 - beta^2) with the pair's own.  beta = 1
    is a 1-rectified flow on the pairs' data, beta = 0 the pairs themselves: both to the bit, with
    all that is drawn after them, since beta = 0 draws nothing.

    pairs: whose batches are turned, with its flips and its conditioning.
    beta: in [0, 1]; may be set between batches.
    """

    def __init__(self, pairs: Coupling, beta: float = 1.0) -> None:
        self.pairs, self.shape = pairs, pairs.shape
        self.beta = beta

    @property
    def beta(self) -> float:
        """The share of fresh noise: 1 is all, 0 none."""
        return self._beta

    @beta.setter
    def beta(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise FlowkitError(f"beta must lie in [0, 1], got {value}; 1 is all fresh noise")
        self._beta = float(value)

    def __len__(self) -> int:
        return len(self.pairs)

    def fetch(self, indices: Sequence[int] | Tensor) -> Rows:
        """The pairs' rows."""
        return self.pairs.fetch(indices)

    def couple(self, rows: Rows, generator: torch.Generator | None = None) -> Batch:
        """Couple the pairs in their own way, then draw the fresh noise."""
        batch, beta = self.pairs.couple(rows, generator), self._beta
        if beta == 0:
            return batch
        own = batch.noise
        fresh = torch.randn(own.shape, generator=generator, device=own.device, dtype=own.dtype)
        # (1 - beta)(1 + beta) keeps the digits that 1 - beta^2 would cancel near beta = 1
        kept = math.sqrt((1 - beta) * (1 + beta))
        return Batch(kept * own + beta * fresh, batch.data, batch.cond)


def _checked_shape(rows: Rowed, flip: bool) -> tuple[int, ...]:
    shape = tuple(rows.shape)
    if flip and len(shape) != 3:
        raise FlowkitError(f"flip mirrors pictures (C, H, W), but the data has shape {shape}")
    return shape


def _mirror_half(generator: torch.Generator | None, *pictures: Tensor) -> list[Tensor]:
    """Mirror each sample along its width with probability 1/2, in all of `pictures` alike."""
    like = pictures[0]
    heads = torch.rand(len(like), 1, 1, 1, generator=generator, device=like.device) < 0.5
    return [torch.where(heads, picture.flip(-1), picture) for picture in pictures]
