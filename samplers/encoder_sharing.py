"""An encoder that runs in some evaluations only: DDT's, whose decoder also takes an older state.

    with shared_encoder(velocity, times, "abm", steps=6, probe=noise) as shared:
        x = sample(shared, noise, times, "abm").x

Wang et al., 2025, arXiv:2504.05741, section 3.4.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowkit.errors import FlowkitError
from flowkit.samplers.evaluations import Solver
from flowkit.samplers.sharing import checked_steps, optimal_sharing, state_similarity
from flowkit.samplers.solve import DEFAULT_SOLVER, evaluation_times, invert, sample
from flowkit.velocity import Velocity, VelocityModel, bind, guided

__all__ = ["SharedEncoder", "encoder_states", "shared_encoder"]


@contextmanager
def shared_encoder(
    velocity: Velocity,
    times: Sequence[float],
    solver: str | Solver = DEFAULT_SOLVER,
    *,
    steps: int | Sequence[int] | None = None,
    probe: Tensor | None = None,
    model: nn.Module | None = None,
    refresh_time: bool = False,
    order: int = 0,
    **options: Any,
) -> Iterator[SharedEncoder]:
    """`velocity` for runs of a solver in which the encoder runs in the evaluations `steps` only.

    times: in the order of the run, decreasing for an inversion.  solver, options: those of the run.
    steps: evaluations of the run, counted from 0, which must be one (a step of Heun has two); None
    for all.  Their number alone, with probe (B, *), a state at times[0] that the conditioning of
    `velocity` fits: a run from there finds out which (`encoder_states`, `optimal_sharing`).
    model: the network with the encoder; None for that of `velocity`, through bind and guided.  Its
    forward takes `state` and `encoded` and gives them back, as flowkit.nets.DDT's.
    refresh_time: share what the encoder gave before the time enters, so that the decoder sees the
    time it is at.  The authors share the state, whose time is that of its making.
    order: 0 shares the latest as it is, which is the authors' way; up to 4, the polynomial in t of
    that degree through the latest ones.  Order 1 errs several times less where states move evenly.

    Calls of the network under another conditioning, as guidance makes, share a state of their own,
    made in the evaluation that first needs it.  With all `steps` nothing changes, bit for bit.
    Raises FlowkitError for a network without such a state, and for steps that do not fit.
    """
    where = evaluation_times(solver, times, **options)
    if order not in range(5):
        raise FlowkitError(f"order must be a whole number from 0 to 4, got {order!r}")
    net = _network(velocity if model is None else model)
    kind = "encoded" if refresh_time else "state"
    bare = getattr(net, "_orig_mod", net)  # torch.compile's wrapper
    signature = inspect.signature(bare.forward)
    if kind not in signature.parameters:
        raise FlowkitError(
            f"{type(bare).__name__} has no encoder state: its forward does not take {kind!r}; "
            "give model= a network such as flowkit.nets.DDT"
        )
    if isinstance(steps, int) and probe is not None and 1 <= steps <= len(where):
        how: dict[str, Any] = {"model": net, "refresh_time": refresh_time}
        states = encoder_states(velocity, probe, times, solver, **how, **options)
        steps = optimal_sharing(state_similarity(states), steps)
    elif isinstance(steps, int) or probe is not None:
        raise FlowkitError(
            f"steps is a list of evaluations, or with probe=noise their number, 1 to {len(where)}; "
            f"got {steps!r}{' without a' if probe is None else ' and a'} probe"
        )
    chosen = checked_steps(range(len(where)) if steps is None else steps, len(where))
    shared = SharedEncoder(velocity, signature, where, chosen, kind, order)
    with ExitStack() as undo:
        undo.callback(shared.reset)
        undo.callback(net.register_forward_pre_hook(shared.before, with_kwargs=True).remove)
        undo.callback(net.register_forward_hook(shared.after).remove)
        yield shared


@torch.no_grad()
def encoder_states(
    velocity: Velocity,
    x: Tensor,
    times: Sequence[float],
    solver: str | Solver = DEFAULT_SOLVER,
    *,
    model: nn.Module | None = None,
    refresh_time: bool = False,
    **options: Any,
) -> list[Tensor]:
    """The state in each evaluation of one run from x, nothing shared: NFE tensors (B', N, D).

    Of guidance both branches are in B'; one that runs in part of the evaluations is left out.
    Arguments as of `shared_encoder`; x: (B, *), a few samples (the authors take 8).
    """
    found: list[list[Tensor]] = []
    how: dict[str, Any] = {"model": model, "refresh_time": refresh_time}
    with shared_encoder(velocity, times, solver, **how, **options) as shared:

        def watched(x_t: Tensor, t: float | Tensor) -> Tensor:
            v = shared(x_t, t)
            found.append([branch.made[-1][1] for branch in shared.branches])
            return v

        if times[0] < times[-1]:
            sample(watched, x, times, solver, **options)
        else:
            invert(watched, x, times[::-1], solver, **options)
    always = min(len(states) for states in found)
    return [torch.cat(states[:always]) for states in found]


@dataclass
class _Branch:
    """What is shared by the calls of the network under one conditioning."""

    inputs: dict[str, Any]  # the shape of the sample, and the conditioning
    made: list[tuple[float, Tensor]]  # time and state, the latest last
    evaluation: int  # that made the latest
    used: bool = True  # in the evaluation under way: two calls alike are two branches

    def at(self, t: float) -> Tensor:
        """The polynomial through the states, in Lagrange's form; one alone as it is."""
        (_, latest), times = self.made[-1], [t_a for t_a, _ in self.made]
        if len(times) == 1:
            return latest
        total = torch.zeros_like(latest, dtype=torch.promote_types(latest.dtype, torch.float32))
        for t_a, state in self.made:
            total += math.prod((t - t_b) / (t_a - t_b) for t_b in times if t_b != t_a) * state
        return total.to(latest.dtype)


class SharedEncoder:
    """A velocity for run after run along the same times; see `shared_encoder`.

    steps: the evaluations that make new states.  encoder_calls, decoder_calls: of all runs so far,
    guidance counts each branch.
    """

    def __init__(
        self,
        velocity: Velocity,
        signature: inspect.Signature,
        times: list[float],
        steps: list[int],
        kind: str,
        order: int,
    ) -> None:
        self.velocity, self.signature, self.kind, self.order = velocity, signature, kind, order
        self.times, self.steps = times, steps
        self.encoder_calls = self.decoder_calls = 0
        self.reset()

    def reset(self) -> None:
        """Forget the states of a run that did not reach its end; the next call begins a run."""
        self.branches: list[_Branch] = []
        self.done, self.latest, self.running = 0, 0, False
        self._making: _Branch | None = None

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        if float(t) != self.times[self.done]:
            raise FlowkitError(
                f"evaluation {self.done} is at t = {float(t):.6g}, expected was "
                f"t = {self.times[self.done]:.6g}; give shared_encoder the run's times, in its "
                "order, its solver and options, and reset() after a run that was broken off"
            )
        if self.done == 0:
            self.branches.clear()
        if self.done in self.steps:
            self.latest = self.done
        for branch in self.branches:
            branch.used = False
        calls, self.running = self.decoder_calls, True
        try:
            v = self.velocity(x_t, t)
        finally:
            self.running, self._making = False, None
        if self.decoder_calls == calls:
            raise FlowkitError(
                "the velocity did not call the network whose encoder is shared; give model= the "
                "one it calls, and torch.compile the network rather than its adapter"
            )
        self.done = (self.done + 1) % len(self.times)
        return v

    @torch.compiler.disable
    def before(
        self, net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook: give the network the state of its branch, unless a new one is due."""
        if not self.running:
            return None
        call = self.signature.bind(*args, **kwargs)
        if any(call.arguments.get(name) is not None for name in ("state", "encoded")):
            raise FlowkitError("the network is given a state already; share its encoder only once")
        inputs = _inputs(call.arguments)
        fits = (b for b in self.branches if not b.used and _equal(b.inputs, inputs))
        branch = next(fits, None) or _Branch(inputs, [], -1)
        branch.used = True
        self.decoder_calls += 1
        if branch.evaluation < self.latest:
            self.encoder_calls += 1
            self._making = branch
            return None
        call.arguments[self.kind] = branch.at(self.times[self.done])
        return call.args, call.kwargs

    @torch.compiler.disable
    def after(self, net: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook: keep the state that was made."""
        branch, self._making = self._making, None
        if branch is None:
            return
        place = 1 if self.kind == "state" else 2
        state = output[place] if isinstance(output, tuple) else getattr(output, self.kind)
        if branch.evaluation < 0:
            self.branches.append(branch)
        t = self.times[self.done]
        older = [(t_a, made) for t_a, made in branch.made if t_a != t]
        branch.made = [*older, (t, state)][-self.order - 1 :]
        branch.evaluation = self.done


def _network(velocity: Any) -> nn.Module:
    """The one network under bind, guided and adapters."""
    if isinstance(velocity, bind):
        return _network(velocity.velocity)
    if isinstance(velocity, guided):
        found = _network(velocity.conditional)
        if _network(velocity.unconditional) is found:
            return found
    if isinstance(velocity, nn.Module):
        bare = getattr(velocity, "_orig_mod", velocity)
        return bare.net if isinstance(bare, VelocityModel) else velocity
    raise FlowkitError(
        f"cannot tell the one network under a {type(velocity).__name__}; give model= the one whose "
        "encoder is to be shared"
    )


def _inputs(arguments: dict[str, Any]) -> dict[str, Any]:
    """What tells a call from those of other branches: all but the numbers of x_t and t."""
    (name, x), _, *others = arguments.items()
    return {name: x.shape} | dict(others)


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)
