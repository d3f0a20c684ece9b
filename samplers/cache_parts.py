"""How the parts of a network act together in a cached pass: as one stack, or each by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowkit.errors import FlowkitError
from flowkit.samplers.cache_blocks import leaves, rebuild
from flowkit.samplers.cache_gate import FirstBlock
from flowkit.samplers.cache_state import Features, Pass, inputs_of

__all__ = ["Each", "Stack"]


class Each:
    """Every part keeps its own output and is forecast.

    blocks: the parts are blocks, of which what they add to their input may be kept.
    """

    def __init__(self, features: Features, *, blocks: bool) -> None:
        self.features, self.blocks = features, blocks

    def run(
        self,
        now: Pass,
        index: int,
        inner: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The output of the part of that index."""
        slot = index, now.visits[index]
        now.visits[index] += 1
        now.calls += 1
        base = inputs_of((args, kwargs)) if self.blocks else []
        if now.full:
            out = inner(*args, **kwargs)
            self.features.keep(now, slot, out, base)
            return out
        return self.features.forecast(now, slot, base)

    def finish(self, now: Pass) -> None:
        """All parts have run."""


class Stack:
    """The last block is forecast by what all of them add to the first one's input; none else runs.

    With a gate the first block always runs, and the others add to its output.
    """

    def __init__(self, features: Features, gate: FirstBlock | None = None) -> None:
        self.features, self.gate = features, gate

    def run(
        self,
        now: Pass,
        index: int,
        inner: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The output of the block that comes next."""
        call, branch = now.calls, now.branch
        now.calls += 1
        if call == 0:
            now.base = inputs_of((args, kwargs))
            if self.gate is not None:
                return self._decide(self.gate, now, inner(*args, **kwargs))
        last = call + 1 == branch.calls
        if not now.full:
            if last:
                return self.features.forecast(now, "stack", now.base)
            return branch.outputs.get(call)  # missing where more blocks run than before
        out = inner(*args, **kwargs)
        if branch.calls is None:  # which block is the last one is yet to be seen
            now.last = self.features.snapshot(out)
        if last:
            self.features.keep(now, "stack", out, now.base)
        elif call not in branch.outputs:
            branch.outputs[call] = rebuild(out, self.features.nan)
        return out

    def finish(self, now: Pass) -> None:
        """Keep the output of a first pass's last block; FlowkitError when other blocks ran."""
        branch = now.branch
        if branch.calls is None:
            branch.calls = now.calls
            self.features.keep(now, "stack", now.last, now.base)
        if branch.calls != now.calls:
            raise FlowkitError(
                f"{now.calls} blocks ran in a pass where {branch.calls} ran before; "
                'use level="each"'
            )

    def _decide(self, gate: FirstBlock, now: Pass, out: Any) -> Any:
        """The first block's output, by which it is decided whether the others run."""
        inputs, outputs = [x for x, _ in now.base], leaves(out)
        if now.full is None:
            now.full = not gate.trusts(now, inputs, outputs)
        if now.full:
            gate.keep(now, inputs, outputs)
        now.base = inputs_of(out)
        return out
