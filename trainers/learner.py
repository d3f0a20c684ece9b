"""A network in training: its weights, its optimizer, its learning rate and its skipped steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from flowkit.errors import FlowkitError
from flowkit.trainers.cost import nbytes
from flowkit.trainers.settings import RunOptions, TrainOptions

__all__ = ["Learner", "Role", "set_dropout"]

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "radam": torch.optim.RAdam}
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@dataclass
class Role:
    """A network that a method trains beside its student, with an optimizer of its own.

    model: the loop puts its distributed wrapper here; `net` is what it configures.
    """

    model: Any
    options: TrainOptions


class Learner:
    """One role's share of a training step: gradients in, weights moved, counters kept.

    model: with the network as `net`.  averaged: keep a running average of the weights.
    `model` becomes the distributed wrapper; `network` stays what was given.
    """

    ema: EMAModel | None = None

    def __init__(
        self,
        model: Any,
        options: TrainOptions,
        run: RunOptions,
        accelerator: Accelerator,
        *,
        averaged: bool = False,
    ) -> None:
        self.options, self.accelerator = options, accelerator
        self.network = model.to(accelerator.device).train()
        _configure(self.network.net, options, run)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        optimizer = OPTIMIZERS[options.optimizer](
            self.parameters,
            lr=options.learning_rate,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
        )
        self.schedule = get_scheduler(
            SCHEDULES[options.lr_schedule],
            optimizer,
            num_warmup_steps=options.warmup_steps,
            num_training_steps=options.steps,
        )
        self.model, self.optimizer = accelerator.prepare(self.network, optimizer)
        if averaged:
            self.ema = EMAModel(self.parameters, decay=options.ema_decay, foreach=True)
        self.updates = self.skipped = self.skipped_in_a_row = 0

    @property
    def nbytes(self) -> int:
        """Bytes of weights, their gradients, the optimizer's state and the average."""
        state = [v for of in self.optimizer.state.values() for v in of.values()]
        average = self.ema.shadow_params if self.ema is not None else []
        tensors = [*self.network.parameters(), *self.parameters, *state, *average]
        return nbytes(t for t in tensors if isinstance(t, Tensor))

    def freeze(self, frozen: bool) -> None:
        """Let no gradient reach the weights, or let it again; it still flows through them."""
        for parameter in self.parameters:
            parameter.requires_grad_(not frozen)

    def step(self) -> Tensor:
        """Clip the gradients and move the weights; returns the gradients' norm before that."""
        self.accelerator.unscale_gradients(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.options.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.options.max_grad_norm, norm)
        self._apply(norm)
        return norm

    def _apply(self, norm: Tensor) -> None:
        """Step the optimizer unless a gradient is not finite (it then is so on every process)."""
        finite = bool(norm.isfinite())
        if finite or self.accelerator.scaler is not None:
            self.optimizer.step()  # a loss scaler skips by itself and lowers its scale
        if finite:
            if self.ema is not None:
                self.ema.step(self.parameters)
            self.updates += 1
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The counters, JSON-able; weights, average and optimizer are saved with the run's."""
        counts = {"updates": self.updates, "skipped": self.skipped}
        return {**counts, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the counters back."""
        self.updates, self.skipped = state["updates"], state["skipped"]
        self.schedule.load_state_dict(state["schedule"])


def _configure(net: nn.Module, options: TrainOptions, run: RunOptions) -> None:
    if options.dropout is not None:
        set_dropout(net, options.dropout)
    if run.gradient_checkpointing:
        if not getattr(net, "_supports_gradient_checkpointing", False):
            raise FlowkitError(
                f"{type(net).__name__} cannot recompute activations; "
                "set gradient_checkpointing=false"
            )
        cast(Any, net).enable_gradient_checkpointing()
    if run.channels_last:
        cast(Any, net).to(memory_format=torch.channels_last)
    if run.compile:
        net.compile()


def set_dropout(model: nn.Module, rate: float) -> None:
    """Set the rate of every dropout layer; raises when there is none to set."""
    layers = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    if not layers and rate > 0:
        raise FlowkitError(f"dropout={rate} was asked for, but the network has no dropout layer")
    for layer in layers:
        layer.p = rate
