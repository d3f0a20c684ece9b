"""What the trainers are made of: opening a run, and one stage of training."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowkit import checkpoint, config
from flowkit.adapters import from_diffusers
from flowkit.coupling import Coupling, Independent
from flowkit.data import load_data
from flowkit.errors import FlowkitError
from flowkit.eval.report import write_grid
from flowkit.files import read_json, write_json
from flowkit.latents import Latents, decode_latents, encode_latents, load_vae
from flowkit.losses import premetric
from flowkit.noise import derive_seed, keyed_noise
from flowkit.samplers import grids, sample
from flowkit.samplers.timesteps import density
from flowkit.schema import leaves
from flowkit.trainers.building import build_model, checked
from flowkit.trainers.launch import make_accelerator
from flowkit.trainers.loop import Loop, Method
from flowkit.trainers.matching import FlowMatching
from flowkit.trainers.order import Order
from flowkit.trainers.pairing import conditioned, keyed_labels
from flowkit.trainers.settings import NetOptions, PictureOptions, TrainOptions
from flowkit.velocity import VelocityModel

__all__ = ["Run"]

# Options that do not change what a run computes: a resumed run may be given others.
MAY_CHANGE = {
    *("output_dir", "num_workers", "checkpoint_every", "keep_checkpoints", "sample_every"),
    *("log_every", "data_on_device", "max_skipped_steps", "report_to", "push_to_hub", "evaluate"),
}


def _scalar(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)


class Run:
    """A trainer's run: its folder, its processes, its pictures.

    Opening one checks what can be checked before any compute: the folder holds the same
    configuration or none, the pictures, losses and densities exist.
    """

    def __init__(self, options: PictureOptions, trainings: Sequence[TrainOptions]) -> None:
        self.options = options
        self.folder = Path(options.output_dir)
        self._check_folder()
        data = options.data
        self.data: Any = load_data(
            data.name, "train", root=data.root, size=data.size, download=data.download
        )
        self.num_classes = self.data.num_classes if data.conditional else None
        if data.conditional and self.num_classes is None:
            raise FlowkitError(f"data.conditional=true needs labels, but {data.name} has none")
        if options.data_on_device and (options.num_workers or data.vae is not None):
            raise FlowkitError(
                "data_on_device=true is for pictures and leaves nothing to read ahead; "
                "set num_workers=0 and data.vae=null"
            )
        self.vae = None if data.vae is None else load_vae(data.vae)
        if self.vae is not None and data.flip:
            raise FlowkitError(
                "a mirrored latent is not that of a mirrored picture; data.flip=false"
            )
        for training in trainings:
            checked("times", density, training.times)
            checked("loss", premetric, training.loss)
        self.accelerator = make_accelerator(options)
        world = self.accelerator.num_processes
        for training in trainings:
            Order(1, training.batch_size, 0, training.micro_batch_size, 0, world)
        self.first_step = 0
        if self.accelerator.is_main_process:
            config.save(options, self.folder / "config.yaml")
        self.accelerator.wait_for_everyone()
        if self.vae is not None:
            with self.accelerator.main_process_first():
                self.data = encode_latents(
                    self.data,
                    self.vae,
                    self.folder / "latents",
                    device=self.accelerator.device,
                    progress=self.accelerator.is_main_process,
                )
        self.shape = tuple(self.data.shape)
        try:
            self.accelerator.init_trackers(
                "flowkit",
                config={name: _scalar(value) for name, value in leaves(config.to_dict(options))},
                init_kwargs={"wandb": {"dir": str(self.folder)}},
            )
        except Exception as error:
            if options.report_to != "wandb":
                raise
            reason = " ".join(str(error).split())
            raise FlowkitError(
                f"report_to=wandb cannot start ({reason}); run `wandb login`, set "
                "WANDB_MODE=offline, or report_to=none"
            ) from error

    def _check_folder(self) -> None:
        if (self.folder / "config.yaml").is_file() and not (self.folder / "stages").exists():
            return  # nothing was made yet: a run that was refused, and may be put right
        config.check_folder(self.options, self.folder, ignore=MAY_CHANGE, kind="trainer")

    def build(self, net: NetOptions) -> VelocityModel:
        """A new network for this run's pictures; its weights depend on the run's seed alone."""
        torch.manual_seed(derive_seed(self.options.seed, "weights"))
        return build_model(net, self.shape, self.num_classes)

    def independent(self) -> Coupling:
        """Fresh noise with the training pictures."""
        labels = self.num_classes is not None
        data = self.data
        if self.options.data_on_device:
            data = data.to(self.accelerator.device)
        return Independent(data, flip=self.options.data.flip, labels=labels)

    def train(
        self,
        name: str,
        model: VelocityModel,
        coupling: Coupling,
        training: TrainOptions,
        *,
        method: Callable[..., Method] = FlowMatching,
    ) -> VelocityModel:
        """Train a copy of `model` to the end and export it to folder/name, unless it is there.

        stages/name keeps what it took, in seconds.json and cost.json.
        method: what is built of the copy, the density of t and the premetric.
        """
        if not self.exported(name):
            loop = Loop(
                method(
                    copy.deepcopy(model).requires_grad_(True),
                    density(**training.times),
                    premetric(**training.loss).to(self.accelerator.device),
                ),
                coupling,
                training,
                self.options,
                folder=self.folder / "stages" / name,
                accelerator=self.accelerator,
                name=name,
                preview=self._preview(name),
                first_step=self.first_step,
            )
            trained = loop.run()
            if self.accelerator.is_main_process:
                self.record_seconds(name, loop.seconds)
                self.export(name, trained)
            self.accelerator.free_memory()
            self.accelerator.wait_for_everyone()
        self.first_step += training.steps
        return self.load(self.folder / name)

    def exported(self, name: str) -> bool:
        """Whether a stage is complete."""
        return (self.folder / name / "flowkit.json").is_file()

    def export(self, name: str, model: VelocityModel) -> None:
        """Write folder/name, which from_pretrained and from_diffusers read."""
        latents = None if self.vae is None else dataclasses.asdict(self.data.latents)
        checkpoint.export_model(
            model,
            self.folder / name,
            shape=self.shape,
            num_classes=self.num_classes,
            extra={"latents": latents, "vae": self.options.data.vae},
        )

    def decode(self, x: Tensor) -> Tensor:
        """Pictures in [-1, 1] of what a flow makes: itself, or decoded by the VAE."""
        if self.vae is None:
            return x
        return decode_latents(x, self.vae, self.data.latents)

    def load(self, path: str | Path) -> VelocityModel:
        """A model for this run's pictures, frozen, on this process's device."""
        model = from_diffusers(path)
        record = Path(path) / "flowkit.json"
        if record.is_file():
            made_for = read_json(record)
            theirs = (tuple(made_for["shape"]), made_for["num_classes"])
            if theirs != (self.shape, self.num_classes):
                raise FlowkitError(
                    f"{path} was trained for pictures {theirs[0]} with classes {theirs[1]}, "
                    f"the data has {self.shape} with classes {self.num_classes}; "
                    "choose other data, or another model"
                )
            latents = made_for.get("latents")
            if latents and (self.vae is None or Latents(**latents) != self.data.latents):
                raise FlowkitError(
                    f"{path} was trained on latents with other statistics than this data's; "
                    "give the data and the VAE that it was trained with"
                )
        return model.to(self.accelerator.device).eval().requires_grad_(False)

    def identity(self, model: VelocityModel) -> dict[str, Any]:
        """What a model is, for the records of what it made: its description and weights' hash."""
        weights = hashlib.sha256()
        for tensor in model.state_dict().values():
            weights.update(
                tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            )
        net = type(model.net).__name__
        return {"net": net, **model.description(), "weights": weights.hexdigest()}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Record the seconds of a stage that needs no loop, once it was not done yet."""
        start = time.perf_counter()
        yield
        if self.accelerator.is_main_process and not self._seconds_file(name).is_file():
            self.record_seconds(name, time.perf_counter() - start)

    def record_seconds(self, name: str, seconds: float) -> None:
        """Keep what a stage took, for the summary of a run that may be resumed."""
        write_json(self._seconds_file(name), round(seconds, 2))

    def record_cost(self, name: str, cost: dict[str, Any]) -> None:
        """Keep what a stage without a loop cost, as a loop does; see flowkit.trainers.cost."""
        if self.accelerator.is_main_process:
            write_json(self.folder / "stages" / name / "cost.json", cost)

    def _seconds_file(self, name: str) -> Path:
        return self.folder / "stages" / name / "seconds.json"

    def seconds(self, *names: str) -> float:
        """Wall seconds of the stages of these names together."""
        files = [self._seconds_file(name) for name in names]
        return round(sum(read_json(file) for file in files if file.is_file()), 2)

    @cached_property
    def preview_noise(self) -> Tensor:
        """64 noises, the same for every grid of the run."""
        return keyed_noise(derive_seed(self.options.seed, "preview"), range(64), self.shape)

    def preview_pictures(self, model: VelocityModel, num_steps: int) -> Tensor:
        """The pictures that `num_steps` Euler steps make of the preview noise."""
        device = self.accelerator.device
        labels = None
        if self.num_classes is not None:
            labels = keyed_labels(self.options.seed, range(64), self.num_classes)
        times = grids.from_start(model.t_min, num_steps)
        start = (1 - times[0]) * self.preview_noise.to(device)
        with torch.no_grad():
            x = sample(conditioned(model, labels, 1.0, device), start, times, solver="euler").x
            return self.decode(x).cpu()

    def _preview(self, name: str) -> Any:
        def preview(model: VelocityModel, step: int) -> Path:
            path = self.folder / "samples" / f"{name}-{step:07d}.png"
            columns = {f"{n} steps": self.preview_pictures(model, n) for n in (1, 4, 16)}
            write_grid(path, columns)
            return path

        return preview
