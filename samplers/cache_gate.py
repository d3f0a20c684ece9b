"""Whether a pass of a cached network is computed, decided once its first block has run."""

from __future__ import annotations

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.samplers.cache_state import Pass
from flowkit.samplers.forecast import History, Rule

__all__ = ["FirstBlock"]


class FirstBlock:
    """Trusts the blocks behind the first as far as this one was forecast.

    threshold: the relative error up to which it does, 0 or more.  rule: of the first block's
    forecast.  per_sample: of the worst sample, else of the batch.
    change: look at what the block adds to its input instead of at its output.
    """

    def __init__(
        self, threshold: float, rule: Rule, *, per_sample: bool, change: bool = False
    ) -> None:
        if not threshold >= 0:
            raise FlowkitError(f"threshold must be 0 (always compute) or more, got {threshold!r}")
        self.threshold, self.rule, self.per_sample = threshold, rule, per_sample
        self.change = change

    def trusts(self, now: Pass, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
        """Whether the other blocks may be forecast."""
        seen = self._signal(inputs, outputs)
        histories = now.branch.histories.get("first", [])
        expected = [h.forecast(now.at, s.device) for h, s in zip(histories, seen, strict=True)]
        error = self._error(expected, seen)
        return error <= self.threshold if self.change else error < self.threshold

    def keep(self, now: Pass, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Learn from the first block of a pass that is computed."""
        seen = self._signal(inputs, outputs)
        histories = now.branch.histories.setdefault("first", [])
        while len(histories) < len(seen):
            histories.append(History(self.rule))
        for history, value in zip(histories, seen, strict=True):
            history.add(now.at, value)

    def _signal(self, inputs: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
        outputs = [out.detach() for out in outputs]
        if not self.change:
            return outputs
        below = [next((x for x in inputs if x.shape == out.shape), None) for out in outputs]
        return [
            out if x is None else out - x.detach() for out, x in zip(outputs, below, strict=True)
        ]

    def _error(self, expected: list[Tensor], seen: list[Tensor]) -> float:
        """The relative error of the forecast, of the batch or of its worst sample."""
        size = expected if self.change else seen
        above = self._sums([e.float() - s.float() for e, s in zip(expected, seen, strict=True)])
        return float((above / self._sums(size)).max())

    def _sums(self, values: list[Tensor]) -> Tensor:
        """sum |values|, of every sample or of all."""
        rows = [v.float().abs().flatten(1 if self.per_sample else 0).sum(-1) for v in values]
        return torch.stack(rows).sum(0)
