"""The one training loop: everything about training that is not the method.

Step k of a run draws its rows, its noise and its dropout from (seed, k) alone, so a run that is
killed and resumed ends in the same weights, and so does one on another number of processes that
has the same micro-batches.

A step is made of turns: one optimizer steps once, over all micro-batches, while the networks of
all others stand still.  Most methods have one turn, the student's; those with several networks say
which take theirs at which step.  So accumulation starves no optimizer, and no gradient leaks.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice, tee
from pathlib import Path
from types import FrameType
from typing import cast

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from flowkit import checkpoint
from flowkit.coupling import Batch, Coupling
from flowkit.errors import FlowkitError
from flowkit.eval.report import write_grid
from flowkit.files import write_json
from flowkit.noise import derive_seed
from flowkit.trainers.cost import Cost
from flowkit.trainers.launch import banner, log_picture
from flowkit.trainers.learner import Learner, set_dropout
from flowkit.trainers.method import Loss, Method, Phase, Several, Turn
from flowkit.trainers.order import Order, read
from flowkit.trainers.settings import RunOptions, TrainOptions
from flowkit.velocity import VelocityModel

__all__ = ["Loop", "Loss", "Method", "Phase", "Preempted", "set_dropout"]

Rows = dict[str, Tensor]


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
        student = Learner(method.model, options, run, accelerator, averaged=True)
        self.student: VelocityModel = student.network
        self.parameters, self.ema = student.parameters, cast(EMAModel, student.ema)
        self.learners = {"student": student}
        method.model = student.model
        for role_name, role in (method.roles if isinstance(method, Several) else {}).items():
            self.learners[role_name] = Learner(role.model, role.options, run, accelerator)
            role.model = self.learners[role_name].model
        self.cost = Cost(self.learners, getattr(method, "frozen", {}), accelerator)
        self.step = 0
        self.saved_step: int | None = None
        self.seconds_before, self.started = 0.0, time.perf_counter()

    @property
    def skipped(self) -> int:
        """Steps of any role that were left out because a gradient was not finite."""
        return sum(learner.skipped for learner in self.learners.values())

    @property
    def seconds(self) -> float:
        """Wall seconds so far, those before a resume included."""
        return self.seconds_before + time.perf_counter() - self.started

    def run(self) -> VelocityModel:
        """Train to the end; returns the averaged model, in eval mode."""
        self._resume()
        self.accelerator.print(banner(self.name, self.options, self.order, self.parameters))
        self.terminating = False
        previous = signal.signal(signal.SIGTERM, self._terminate)
        try:
            self._train()
        finally:
            signal.signal(signal.SIGTERM, previous)
        cost = self.cost.report()
        if self.accelerator.is_main_process:
            write_json(self.folder / "cost.json", cost)
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
        quiet = not accelerator.is_main_process
        steps = self.options.steps
        bar = tqdm(total=steps, initial=self.step, desc=self.name, unit="step", disable=quiet)
        due, logs = False, dict[str, Tensor]()
        with bar:
            while self.step < self.options.steps and not self._time_is_up():
                logs |= self.update(rows)  # who had no turn is logged with its last values
                self.step += 1
                bar.update()
                if self.step % run.log_every == 0 or self.step == self.options.steps:
                    self._log(logs, bar)
                if run.sample_every and self.step % run.sample_every == 0:
                    self._preview()
                due = due or self.step % run.checkpoint_every == 0
                if due and not any(a.skipped_in_a_row for a in self.learners.values()):
                    due = self._save()
                if self._told_to_stop():
                    self._save()
                    accelerator.print(
                        f"\n{self.name}: saved at step {self.step} after SIGTERM; "
                        "the same command resumes"
                    )
                    raise Preempted

    def update(self, rows: Iterator[Rows]) -> dict[str, Tensor]:
        """One step: its turns, each over this process's micro-batches."""
        method, logs = self.method, dict[str, Tensor]()
        turns = [Turn("student", method.loss)]
        if isinstance(method, Several):
            turns = list(method.turns(self.step))
        copies = tee(islice(rows, len(self.order.micro_batches)), len(turns))
        for turn, micro_rows in zip(turns, copies, strict=True):
            prefix = "" if turn.role == "student" else f"{turn.role}_"
            with self.cost:
                taken = self._take(turn, micro_rows)
            logs |= {prefix + key: value for key, value in taken.items()}
        for learner in self.learners.values():
            learner.schedule.step()
        if method.phase is not None and "loss" in logs:
            method.phase.update(float(self.accelerator.reduce(logs["loss"], "mean")))
            logs["stage"] = torch.tensor(float(method.phase.stage))
        return logs

    def _take(self, turn: Turn, rows: Iterable[Rows]) -> dict[str, Tensor]:
        """A role's optimizer step on its loss, while the other roles stand still."""
        accelerator, micro_batches = self.accelerator, self.order.micro_batches
        learner = self.learners[turn.role]
        if len(self.learners) > 1:
            for each in self.learners.values():
                each.freeze(each is not learner)
        logs: dict[str, Tensor] = {}
        for micro, row in zip(micro_batches, rows, strict=True):
            torch.manual_seed(derive_seed(self.seed, self.step, micro))
            batch = self.coupling.couple(
                {k: v.to(accelerator.device, non_blocking=True) for k, v in row.items()}
            )
            last = micro == micro_batches[-1]
            with nullcontext() if last else accelerator.no_sync(learner.model):
                loss = turn.loss(batch)
                accelerator.backward(loss.value / len(micro_batches))
            for key, value in {"loss": loss.value, **loss.logs}.items():
                share = value.detach().float() / len(micro_batches)
                logs[key] = logs[key] + share if key in logs else share
        logs["grad_norm"] = learner.step()
        if learner.skipped_in_a_row > self.run_options.max_skipped_steps:
            good = checkpoint.latest(self.folder)
            raise FlowkitError(
                f"{self.name}: the {turn.role}'s loss was not finite for "
                f"{learner.skipped_in_a_row} steps in a row, up to step {self.step}; "
                f"last good checkpoint: {good or 'none'}; lower learning_rate or set max_grad_norm"
            )
        return logs

    def _log(self, logs: dict[str, Tensor], bar: tqdm) -> None:
        names = sorted(logs)
        values = torch.stack([logs[name].float().to(self.accelerator.device) for name in names])
        values = self.accelerator.reduce(values, "mean")
        shown = dict(zip(names, values.tolist(), strict=True))
        lr = self.learners["student"].schedule.get_last_lr()[0]
        shown |= {"lr": lr, "skipped": self.skipped}
        shown |= {f"{name}_updates": learner.updates for name, learner in self.learners.items()}
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
            pictures = {"samples": self.preview(self.student, self.step)}
            if isinstance(self.method, Several):
                path = self.folder / f"pictures-{self.step:07d}.png"
                write_grid(path, self.method.pictures(self.student, self._first_rows()))
                pictures["networks"] = path
        self.student.train()
        self.ema.restore(self.parameters)
        for title, path in pictures.items():
            log_picture(self.accelerator, f"{self.name}/{title}", path, self.first_step + self.step)

    def _first_rows(self) -> Batch:
        """The same rows with the same noise at every call, 64 where there are as many."""
        torch.manual_seed(self.seed)
        rows = self.coupling.fetch(range(min(64, len(self.coupling))))
        return self.coupling.couple({k: v.to(self.accelerator.device) for k, v in rows.items()})

    def _save(self) -> bool:
        """Write a checkpoint unless this step has one; returns False: none is due any more."""
        if self.saved_step == self.step:
            return False
        state = {
            "roles": {name: learner.state_dict() for name, learner in self.learners.items()},
            "passes": self.cost.totals(),
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
        if state.get("roles", {}).keys() != self.learners.keys():
            raise FlowkitError(
                f"{newest} holds the roles {', '.join(state.get('roles', {})) or 'of old'}, "
                f"this method trains {', '.join(self.learners)}; use another output_dir"
            )
        if (state["phase"] is None) != (self.method.phase is None):
            raise FlowkitError(
                f"{newest} was saved by a method {'without' if self.method.phase else 'with'} "
                "phases, this one is not such; use another output_dir"
            )
        self.step = self.saved_step = state["step"]
        self.seconds_before = state["seconds"]
        for name, learner in self.learners.items():
            learner.load_state_dict(state["roles"][name])
        self.cost.load(state["passes"])
        if self.method.phase is not None:
            self.method.phase.load_state_dict(state["phase"])
        self.accelerator.print(f"{self.name}: resuming at step {self.step} from {newest}")

    def _terminate(self, signum: int, frame: FrameType | None) -> None:
        self.terminating = True

    def _told_to_stop(self) -> bool:
        """Whether SIGTERM reached any process: all must save together."""
        return self._anywhere(self.terminating)

    def _time_is_up(self) -> bool:
        """Whether options.minutes are over on any process: all must end together."""
        minutes = self.options.minutes
        return minutes is not None and self._anywhere(self.seconds >= 60 * minutes)

    def _anywhere(self, here: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return here
        flag = torch.tensor(float(here), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)
