"""What training costs: samples through each network, forward and backward, and bytes held."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flowkit.samplers import evaluation_times, grids
from flowkit.samplers.solve import find_solver, is_adaptive
from flowkit.trainers.settings import PairOptions
from flowkit.velocity import VelocityModel

if TYPE_CHECKING:
    from flowkit.trainers.learner import Learner

__all__ = ["Cost", "nbytes", "solver_passes"]


class Cost:
    """Counts samples through networks while it is entered, by role, and adds up their memory.

    learners: the networks that learn.  frozen: those that are only asked.
    counts[name] is [forward, backward] of this process; backward are the samples of passes that
    keep a graph, of which a discriminator's reach only the layers before its features.
    """

    def __init__(
        self,
        learners: Mapping[str, Learner],
        frozen: Mapping[str, VelocityModel],
        accelerator: Accelerator,
    ) -> None:
        self.learners, self.frozen, self.accelerator = learners, frozen, accelerator
        networks = {**{name: learner.network for name, learner in learners.items()}, **frozen}
        self.networks = {
            name: next(m for m in network.modules() if isinstance(m, VelocityModel))
            for name, network in networks.items()
        }
        self.counts = {name: [0, 0] for name in networks}
        self._hooks: list[RemovableHandle] = []
        if accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(accelerator.device)

    def __enter__(self) -> None:
        self._hooks = [
            network.register_forward_hook(_counter(self.counts[name]))
            for name, network in self.networks.items()
        ]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def totals(self) -> dict[str, list[int]]:
        """The counts of all processes together, which must ask together."""
        counts = torch.tensor(list(self.counts.values()), device=self.accelerator.device)
        summed = self.accelerator.reduce(counts, "sum").tolist()
        return dict(zip(self.counts, summed, strict=True))

    def load(self, totals: Mapping[str, list[int]]) -> None:
        """Go on counting from the `totals` of a checkpoint."""
        for name, count in totals.items():
            self.counts[name][:] = count if self.accelerator.is_main_process else [0, 0]

    def report(self) -> dict[str, Any]:
        """{"forward", "backward"}: samples by role, over all processes; {"memory"}: bytes by role
        on one, of weights, gradients, optimizer and average; {"peak_memory"}: bytes allocated there
        at most, activations included, since training began or was resumed; None without CUDA.

        All processes must ask together."""
        device, totals = self.accelerator.device, self.totals()
        held = {name: learner.nbytes for name, learner in self.learners.items()}
        held |= {name: nbytes(model.parameters()) for name, model in self.frozen.items()}
        cuda = device.type == "cuda"
        return {
            "forward": {name: count[0] for name, count in totals.items()},
            "backward": {name: count[1] for name, count in totals.items()},
            "memory": held,
            "peak_memory": torch.cuda.max_memory_allocated(device) if cuda else None,
        }


def solver_passes(options: PairOptions, samples: int, *, invert: bool = False) -> int | None:
    """Samples through the flow while `samples` pairs are made, or real pictures inverted; None
    for an adaptive solver, of which nobody can tell beforehand."""
    if is_adaptive(find_solver(options.solver, {})):
        return None
    steps = options.real_steps if invert else options.num_steps
    times = grids.edm(steps) if options.grid == "edm" else grids.uniform(steps)
    nfe = len(evaluation_times(options.solver, times[::-1] if invert else times))
    guided = options.guidance_scale != 1 and not invert
    return nfe * samples * (2 if guided else 1)


def _counter(count: list[int]) -> Callable[..., None]:
    def add(module: nn.Module, inputs: Any, output: Tensor) -> None:
        count[0] += len(output)
        count[1] += len(output) * output.requires_grad

    return add


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
