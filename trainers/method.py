"""What a training method is: its networks, its losses, its phases; the loop does all else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from flowkit.coupling import Batch
from flowkit.trainers.learner import Role
from flowkit.velocity import VelocityModel

__all__ = ["Loss", "Method", "Phase", "Several", "Turn"]


@dataclass
class Loss:
    """A method's answer: the scalar to descend, and scalars to log."""

    value: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


class Phase(Protocol):
    """What a method does by stages, such as a curriculum: it sees the student's every mean loss."""

    stage: int

    def update(self, loss: float, /) -> bool: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


class Method(Protocol):
    """What is trained and how.  The loop replaces `model` by its distributed wrapper.

    A method that asks frozen velocity models may name them, in `frozen: dict[str, VelocityModel]`:
    they are counted in what training costs.
    """

    model: Any
    phase: Phase | None

    def loss(self, batch: Batch) -> Loss: ...


@dataclass(frozen=True)
class Turn:
    """One optimizer step: the role whose weights move, and the loss that they descend."""

    role: str
    loss: Callable[[Batch], Loss]


@runtime_checkable
class Several(Protocol):
    """A method that trains other networks beside its model, which is the role "student".

    roles: the others by name; the loop replaces each one's model by its distributed wrapper.
    turns: those of step k, in order; all of one step see the same batch.
    pictures: what to look at beside the student's samples, by title: (B, C, H, W) in [-1, 1].
    """

    roles: dict[str, Role]

    def turns(self, step: int) -> Sequence[Turn]: ...

    def pictures(self, student: VelocityModel, batch: Batch) -> dict[str, Tensor]: ...
