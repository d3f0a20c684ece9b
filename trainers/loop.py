"""The one training loop: everything about training that is not the method.

Step k of a run draws its rows, its noise and its dropout from (seed, k) alone, so a run that is
killed and resumed ends in the same weights, and so does one on another number of processes that
has the same micro-batches.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from flowkit import checkpoint
from flowkit.coupling import Batch, Coupling
from flowkit.errors import FlowkitError
from flowkit.noise import derive_seed
from flowkit.trainers.launch import log_picture
from flowkit.trainers.order import Order, read
from flowkit.trainers.settings import RunOptions, TrainOptions
from flowkit.velocity import VelocityModel

__all__ = ["Loop", "Loss", "Method", "Phase", "Preempted", "set_dropout"]

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "radam": torch.optim.RAdam}
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
logger = get_logger(__name__)


@dataclass
class Loss:
    """A method's answer: the scalar to descend, and scalars to log."""

    value: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


class Phase(Protocol):
    """What a method does by stages, such as a curriculum: it sees every step's mean loss."""

    stage: int

    def update(self, loss: float, /) -> bool: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


class Method(Protocol):
    """What is trained and how.  The loop replaces `model` by its distributed wrapper."""

    model: Any
    phase: Phase | None

    def loss(self, batch: Batch) -> Loss: ...


class Preempted(SystemExit):
    """SIGTERM came and the state is saved: the process ends with the usual code, 128 + 15."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class Loop:
    """Trains method.model for options.steps steps; resumes from the newest checkpoint in `folder`.

    name: heads the logged values and the progress bar.  preview: called on the main process with
    the averaged model and the step, every run.sample_every steps; returns a picture to log.
    first_step: where this stage's logged steps begin.
    """

    def __init__(
        self,
        method: Method,
        coupling: Coupling,
        options: TrainOptions,
        run: RunOptions,
        *,
        folder: Path,
        accelerator: Accelerator,
        name: str,
        preview: Callable[[VelocityModel, int], Path] | None = None,
        first_step: int = 0,
    ) -> None:
        self.method, self.coupling, self.options, self.run_options = method, coupling, options, run
        self.folder, self.accelerator, self.name = folder, accelerator, name
        self.preview, self.first_step = preview, first_step
        self.seed = derive_seed(run.seed, name)
        self.order = Order(
            len(coupling),
            options.batch_size,
            self.seed,
            options.micro_batch_size,
            accelerator.process_index,
            accelerator.num_processes,
        )
        self.student: VelocityModel = method.model.to(accelerator.device).train()
        self._configure_network()
        self.parameters = [p for p in self.student.parameters() if p.requires_grad]
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
        method.model, self.optimizer = accelerator.prepare(self.student, optimizer)
        self.ema = EMAModel(self.parameters, decay=options.ema_decay, foreach=True)
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.saved_step: int | None = None
        self.seconds_before, self.started = 0.0, time.perf_counter()

    def _configure_network(self) -> None:
        net, options = self.student.net, self.run_options
        if self.options.dropout is not None:
            set_dropout(net, self.options.dropout)
        if options.gradient_checkpointing:
            if not getattr(net, "_supports_gradient_checkpointing", False):
                raise FlowkitError(
                    f"{type(net).__name__} cannot recompute activations; "
                    "set gradient_checkpointing=false"
                )
            cast(Any, net).enable_gradient_checkpointing()
        if options.compile:
            net.compile()

    @property
    def seconds(self) -> float:
        """Wall seconds so far, those before a resume included."""
        return self.seconds_before + time.perf_counter() - self.started

    def run(self) -> VelocityModel:
        """Train to the end; returns the averaged model, in eval mode."""
        self._resume()
        self._banner()
        self.terminating = False
        previous = signal.signal(signal.SIGTERM, self._terminate)
        try:
            self._train()
        finally:
            signal.signal(signal.SIGTERM, previous)
        return self.averaged()

    def averaged(self) -> VelocityModel:
        """The student with the EMA weights in the place of its own."""
        self.ema.copy_to(self.parameters)
        student = self.accelerator.unwrap_model(self.method.model, keep_fp32_wrapper=False)
        return student.eval().requires_grad_(False)

    def _train(self) -> None:
        run, accelerator = self.run_options, self.accelerator
        rows = read(
            self.coupling,
            self.order,
            range(self.step, self.options.steps),
            num_workers=run.num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        bar = tqdm(
            total=self.options.steps,
            initial=self.step,
            desc=self.name,
            unit="step",
            disable=not accelerator.is_main_process,
        )
        due = False
        with bar:
            while self.step < self.options.steps:
                logs = self.update(rows)
                self.step += 1
                bar.update()
                if self.step % run.log_every == 0 or self.step == self.options.steps:
                    self._log(logs, bar)
                if run.sample_every and self.step % run.sample_every == 0:
                    self._preview()
                due = due or self.step % run.checkpoint_every == 0
                if due and not self.skipped_in_a_row:
                    due = self._save()
                if self._told_to_stop():
                    self._save()
                    accelerator.print(
                        f"\n{self.name}: saved at step {self.step} after SIGTERM; "
                        "the same command resumes"
                    )
                    raise Preempted

    def update(self, rows: Any) -> dict[str, Tensor]:
        """One optimizer step over this process's micro-batches."""
        accelerator, micro_batches = self.accelerator, self.order.micro_batches
        logs: dict[str, Tensor] = {}
        for micro in micro_batches:
            torch.manual_seed(derive_seed(self.seed, self.step, micro))
            batch = self.coupling.couple(
                {k: v.to(accelerator.device, non_blocking=True) for k, v in next(rows).items()}
            )
            last = micro == micro_batches[-1]
            with nullcontext() if last else accelerator.no_sync(self.method.model):
                loss = self.method.loss(batch)
                accelerator.backward(loss.value / len(micro_batches))
            for key, value in {"loss": loss.value, **loss.logs}.items():
                share = value.detach().float() / len(micro_batches)
                logs[key] = logs[key] + share if key in logs else share
        accelerator.unscale_gradients(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.options.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.options.max_grad_norm, norm)
        self._apply(norm)
        if (phase := self.method.phase) is not None:
            phase.update(float(accelerator.reduce(logs["loss"], "mean")))
            logs["stage"] = torch.tensor(float(phase.stage))
        return {**logs, "grad_norm": norm}

    def _apply(self, norm: Tensor) -> None:
        """Step the optimizer unless a gradient is not finite (it then is so on every process)."""
        finite = bool(norm.isfinite())
        if finite or self.accelerator.scaler is not None:
            self.optimizer.step()  # a loss scaler skips by itself and lowers its scale
        if finite:
            self.ema.step(self.parameters)
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        if self.skipped_in_a_row > self.run_options.max_skipped_steps:
            good = checkpoint.latest(self.folder)
            raise FlowkitError(
                f"{self.name}: the loss was not finite for {self.skipped_in_a_row} steps in a row, "
                f"up to step {self.step}; last good checkpoint: {good or 'none'}; "
                "lower learning_rate or set max_grad_norm"
            )

    def _log(self, logs: dict[str, Tensor], bar: tqdm) -> None:
        names = sorted(logs)
        values = torch.stack([logs[name].float().to(self.accelerator.device) for name in names])
        values = self.accelerator.reduce(values, "mean")
        shown = dict(zip(names, values.tolist(), strict=True))
        shown |= {"lr": self.schedule.get_last_lr()[0], "skipped": self.skipped}
        bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items() if k in ("loss", "lr")})
        scalars = {f"{self.name}/{key}": value for key, value in shown.items()}
        self.accelerator.log(scalars, step=self.first_step + self.step)

    def _preview(self) -> None:
        if self.preview is None or not self.accelerator.is_main_process:
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        self.student.eval()
        with torch.no_grad():
            picture = self.preview(self.student, self.step)
        self.student.train()
        self.ema.restore(self.parameters)
        log_picture(self.accelerator, f"{self.name}/samples", picture, self.first_step + self.step)

    def _save(self) -> bool:
        """Write a checkpoint unless this step has one; returns False: none is due any more."""
        if self.saved_step == self.step:
            return False
        state = {
            "skipped": self.skipped,
            "schedule": self.schedule.state_dict(),
            "seconds": self.seconds,
            "phase": self.method.phase.state_dict() if self.method.phase else None,
        }
        checkpoint.save(self.folder, self.step, self.accelerator, self.ema, state)
        self.saved_step = self.step
        if self.accelerator.is_main_process:
            checkpoint.prune(self.folder, self.run_options.keep_checkpoints)
        return False

    def _resume(self) -> None:
        self.ema.to(self.accelerator.device)
        newest = checkpoint.latest(self.folder)
        if newest is None:
            return
        state = checkpoint.load(newest, self.accelerator, self.ema)
        self.step = self.saved_step = state["step"]
        self.skipped = state["skipped"]
        self.seconds_before = state["seconds"]
        self.schedule.load_state_dict(state["schedule"])
        if self.method.phase is not None:
            self.method.phase.load_state_dict(state["phase"])
        self.accelerator.print(f"{self.name}: resuming at step {self.step} from {newest}")

    def _terminate(self, signum: int, frame: FrameType | None) -> None:
        self.terminating = True

    def _told_to_stop(self) -> bool:
        """Whether SIGTERM reached any process: all must save together."""
        if self.accelerator.num_processes == 1:
            return self.terminating
        flag = torch.tensor(float(self.terminating), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _banner(self) -> None:
        options, world = self.options, self.accelerator.num_processes
        micro = self.order.micro_batch_size or 0
        self.accelerator.print(
            f"***** Running training: {self.name} *****\n"
            f"  Num examples = {len(self.coupling):,}\n"
            f"  Num parameters = {sum(p.numel() for p in self.parameters):,}\n"
            f"  Batch size per device = {micro}\n"
            f"  Gradient accumulation steps = {options.batch_size // (micro * world)}\n"
            f"  Total train batch size (parallel, accumulated) = {options.batch_size}\n"
            f"  Total optimization steps = {options.steps:,}"
        )


def set_dropout(model: nn.Module, rate: float) -> None:
    """Set the rate of every dropout layer; raises when there is none to set."""
    layers = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    if not layers and rate > 0:
        raise FlowkitError(f"dropout={rate} was asked for, but the network has no dropout layer")
    for layer in layers:
        layer.p = rate
