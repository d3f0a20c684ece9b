"""A schedule: the times of a run, and for each step how it is taken; kept in a JSON file.

    schedule = Schedule.load("runs/search/schedule.json")
    sample(velocity, noise, schedule.times, schedule.solver, **schedule.solver_options)

`python -m flowkit.samplers.search` finds one for a model and a number of evaluations.
Nothing here needs torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any

import numpy as np

from flowkit.errors import FlowkitError
from flowkit.files import read_json, write_json

__all__ = ["CORRECTORS", "QUANTITIES", "RELAXATIONS", "UNIFIED", "VERSION", "Schedule", "Step"]

VERSION = 1
UNIFIED = "unified"  # the solver that takes steps of its own kind each
QUANTITIES = ("velocity", "noise", "data")
RELAXATIONS = ("bh1", "bh2", "exp+", "exp-")
CORRECTORS = ("none", "pseudo")


@dataclass(frozen=True)
class Step:
    """How the solver "unified" takes one step; see flowkit.samplers.unified for the formulas.

    quantity: what the polynomial goes through: "velocity", "noise" or "data".
    order: 1 to 4, terms of its Taylor series.  stencil: earlier predictions that estimate its
    derivatives, order - 1 to 3; near the start there are fewer, and the order falls with them.
    relaxation: of the first derivative: a number c for the factor 1 + c h, or one of RELAXATIONS.
    corrector: "pseudo" corrects the step with the velocity found at its end, at no cost.
    corrector_relaxation: the same as relaxation, in that correction.
    """

    quantity: str = "velocity"
    order: int = 1
    stencil: int = 0
    relaxation: str | float = 0.0
    corrector: str = "none"
    corrector_relaxation: str | float = 0.0

    def __post_init__(self) -> None:
        _one_of("quantity", self.quantity, QUANTITIES)
        _one_of("corrector", self.corrector, CORRECTORS)
        _whole("order", self.order, 1, 4)
        _whole("stencil", self.stencil, self.order - 1, 3)
        for name in ("relaxation", "corrector_relaxation"):
            value = getattr(self, name)
            if _is_number(value) and math.isfinite(value):
                continue
            _one_of(name, value, RELAXATIONS, "or a number")
            if self.quantity == "velocity":
                raise FlowkitError(
                    f"{name} {value!r} is for the noise and the data; the velocity takes a number"
                )


@dataclass(frozen=True)
class Schedule:
    """The times of a run and how its steps are taken, by a solver's name or step by step.

    times: n + 1 increasing floats in [0, 1].
    steps: n of Step, for the solver "unified"; empty for any other.
    solver, options: the solver and its options.
    analytic: the first velocity is taken from the data's mean, at no evaluation ("unified" only).
    mean: of the data, nested lists that broadcast to a sample; the solver may be given it instead.
    info: whatever belongs to the schedule's origin; it does not count in comparisons.
    Raises FlowkitError for what does not fit together.
    """

    times: tuple[float, ...]
    steps: tuple[Step, ...] = ()
    solver: str = UNIFIED
    options: Mapping[str, Any] = field(default_factory=dict)
    analytic: bool = False
    mean: Any = None
    info: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        times = self.times
        if len(times) < 2 or not all(_is_number(t) and 0 <= t <= 1 for t in times):
            raise FlowkitError(
                f"a schedule's times are two or more numbers in [0, 1], got {list(times)}"
            )
        if not all(t < s for t, s in pairwise(times)):
            raise FlowkitError(f"a schedule's times must increase, got {list(times)}")
        wanted = len(times) - 1 if self.solver == UNIFIED else 0
        if len(self.steps) != wanted:
            raise FlowkitError(
                f"a schedule of solver {self.solver!r} with {len(times)} times has {wanted} "
                f"steps, got {len(self.steps)}"
            )
        if self.solver == UNIFIED and self.options:
            raise FlowkitError(f"solver {UNIFIED!r} has no options but its steps")
        if self.analytic and self.solver != UNIFIED:
            raise FlowkitError(
                f"an analytic first step is of solver {UNIFIED!r}, got {self.solver!r}"
            )
        if self.mean is not None and not _are_numbers(self.mean):
            raise FlowkitError(
                f"mean is a number or nested lists of numbers, got {self.mean!r:.60}"
            )

    @property
    def solver_options(self) -> dict[str, Any]:
        """The keyword options of `solver` in flowkit.samplers.sample; plain, fit for JSON."""
        return dict(self.options) if self.solver != UNIFIED else {"schedule": self.to_dict()}

    def step_at(self, t: float) -> Step:
        """The step in which time t lies; the first and the last reach on to 0 and 1."""
        index = sum(start <= t for start in self.times[1:-1])
        return self.steps[index]

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts and lists, as in the file."""
        values: dict[str, Any] = {"version": VERSION, "times": list(self.times)}
        if self.solver == UNIFIED:
            values["steps"] = [asdict(step) for step in self.steps]
        else:
            values |= {"solver": self.solver, "options": dict(self.options)}
        if self.analytic:
            values |= {"analytic": True, "mean": self.mean}
        return values | ({"info": dict(self.info)} if self.info else {})

    @classmethod
    def from_dict(cls, values: Any) -> Schedule:
        """The schedule that `to_dict` gave; raises FlowkitError for anything else."""
        if isinstance(values, Schedule):
            return values
        if not isinstance(values, Mapping) or not isinstance(values.get("times"), Sequence):
            raise FlowkitError(f"a schedule is a mapping with times and steps, got {values!r:.60}")
        if values.get("version") != VERSION:
            raise FlowkitError(
                f"a schedule of version {VERSION} was expected, got version "
                f"{values.get('version')!r}; search anew, or take the flowkit it was made with"
            )
        rest = {name: value for name, value in values.items() if name != "version"}
        _known_names("a schedule", rest, [f.name for f in fields(cls)])
        rest["times"] = tuple(rest["times"])
        if "steps" in rest:
            rest["steps"] = tuple(_step(step) for step in rest["steps"])
        return cls(**rest)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Schedule:
        """Read a file; raises OSError, or FlowkitError for one that is no schedule."""
        try:
            return cls.from_dict(read_json(path))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise FlowkitError(f"{os.fspath(path)}: not a JSON file: {error}") from None
        except FlowkitError as error:
            raise FlowkitError(f"{os.fspath(path)}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all; its floats are kept to the last digit."""
        write_json(path, self.to_dict())


def _step(values: Any) -> Step:
    if not isinstance(values, Mapping):
        raise FlowkitError(f"a step of a schedule is a mapping, got {values!r:.60}")
    _known_names("a step", values, [f.name for f in fields(Step)])
    return Step(**values)


def _known_names(what: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in values:
        if name not in known:
            raise FlowkitError(f"{what} has no {name!r}; it has {', '.join(known)}")


def _one_of(name: str, value: Any, known: Sequence[str], also: str = "") -> None:
    if value not in known:
        raise FlowkitError(
            f"{name} must be {', '.join(known)} {also}".rstrip() + f", got {value!r}"
        )


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise FlowkitError(f"{name} must be a whole number from {low} to {high}, got {value!r}")


def _are_numbers(values: Any) -> bool:
    """Whether it is a finite number or lists of equal length, as deep as one likes, of them."""
    try:
        return bool(np.isfinite(np.array(values, dtype=np.float64)).all())
    except (TypeError, ValueError):
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
