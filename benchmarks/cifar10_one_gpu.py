"""CIFAR-10 on one GPU: a flow, its pairs, a straight flow and one-step students, in one chain.

    python benchmarks/cifar10_one_gpu.py data.root=data                # torchvision's files
    python benchmarks/cifar10_one_gpu.py smoke=true                    # two minutes on a CPU

Every stage has a time budget of its own, `minutes`; what it ends with lies in output_dir/keep, in
bfloat16 and in files of at most 15 MB, to be carried from machine to machine.  Run the same command
again: finished stages are left out, one that was killed or stopped (`stop_after`) goes on.  At the
end, or when stopped, it prints what there is: the training's speed beside the card's matrix rate,
and the Fréchet distance at 1, 2, 4 and 8 evaluations.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from flowkit.adapters import from_diffusers
from flowkit.config import option, parse, run_command
from flowkit.files import atomic_folder
from flowkit.trainers.distilling import distil
from flowkit.trainers.dmd_settings import (
    BacktrackingOptions,
    CriticOptions,
    DisBackConfig,
    DMDConfig,
    MatchingOptions,
)
from flowkit.trainers.retracing import backtrack
from flowkit.trainers.settings import (
    DataOptions,
    EvaluateOptions,
    FlowConfig,
    NetOptions,
    PairOptions,
    ReflowConfig,
    TrainOptions,
)
from flowkit.trainers.slimflow_settings import AnnealingOptions, GuidedOptions, SlimFlowConfig
from flowkit.trainers.slimming import train_slimflow
from flowkit.trainers.stages import build_model
from flowkit.trainers.straighten import straighten, train_flow

NFES = [1, 2, 4, 8]
FOREVER = 10_000_000  # steps: the minutes end a stage
DDPMPP = {"model_channels": 128, "channel_mult": [2, 2, 2], "num_blocks": 4}
SLIM = {"model_channels": 96, "channel_mult": [1, 2, 2], "num_blocks": 2}
TINY = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}


@dataclass
class Minutes:
    """Of training, of each stage."""

    flow: float = option(60, "the 1-rectified flow, teacher of all", low=0)
    reflow: float = option(20, "the 2-rectified flow, on its pairs", low=0)
    slimflow: float = option(40, "the small student on annealed pairs", low=0)
    slimflow_distillation: float = option(20, "its one step", low=0)
    dmd: float = option(20, "DMD2", low=0)
    f_distill: float = option(20, "f-distill, Jensen-Shannon", low=0)
    disback: float = option(20, "DisBack over DMD2", low=0)


@dataclass
class Chain:
    """Options of the chain."""

    output_dir: str = option("runs/cifar10-one-gpu", "everything is written here")
    data: DataOptions = field(default_factory=lambda: DataOptions("CIFAR10", flip=True))
    net: NetOptions = field(default_factory=lambda: NetOptions("ncsnpp", dict(DDPMPP)))
    slim_net: NetOptions = field(default_factory=lambda: NetOptions("ncsnpp", dict(SLIM)))
    minutes: Minutes = field(default_factory=Minutes)
    batch_size: int = option(256, "pictures a step", low=1)
    num_pairs: int = option(50_000, "pairs of the flow, and of the small student", low=1)
    num_samples: int = option(10_000, "pictures a measurement", low=2)
    features: str = option("cifar-resnet20", "of the distance; or module:attribute")
    weights: str | None = option(None, "weights file of the feature network")
    stop_after: float | None = option(None, "stop and save after so many minutes in all", low=0)
    smoke: bool = option(False, "a tiny network, seconds a stage: does it all run?")
    seed: int = option(0, "seed of everything", low=0)

    def shrink(self) -> None:
        """What a CPU does in two minutes."""
        self.data = DataOptions("cifar10-jpeg", root=self.data.root, size=8, flip=True)
        self.net = self.slim_net = NetOptions("ncsnpp", dict(TINY))
        self.minutes = Minutes(**{one.name: 0.03 for one in fields(Minutes)})
        self.batch_size, self.num_pairs, self.num_samples = 16, 32, 64
        self.features = "pixels"


class Stages:
    """The stages of one chain, by name; each writes output_dir/NAME and what it keeps."""

    def __init__(self, chain: Chain) -> None:
        self.chain, self.folder = chain, Path(chain.output_dir)
        self.on_gpu = torch.cuda.is_available()

    def common(self, name: str) -> dict[str, Any]:
        """The options that all trainers share."""
        chain = self.chain
        return {
            "output_dir": str(self.folder / name), "seed": chain.seed, "data": chain.data,
            "mixed_precision": "bf16" if self.on_gpu else "no", "compile": self.on_gpu,
            "channels_last": True, "data_on_device": True, "sample_every": 5000,
            "evaluate": EvaluateOptions(
                nfe=NFES, num_samples=chain.num_samples, features=chain.features,
                weights=chain.weights, straightness_samples=min(chain.num_samples, 256),
            ),
        }  # fmt: skip

    def training(self, minutes: float, kind: type[Any] = TrainOptions, **options: Any) -> Any:
        """A training that its minutes end."""
        shared = {"steps": FOREVER, "minutes": minutes, "batch_size": self.chain.batch_size}
        shared |= {"learning_rate": 2e-4, "warmup_steps": 500, "ema_decay": 0.9995}
        shared |= options
        if self.chain.smoke:  # so that a few steps show
            shared |= {"learning_rate": 1e-3, "warmup_steps": 0, "ema_decay": 0.0}
        return kind(**shared)

    def pairs(self) -> PairOptions:
        """Pairs by 18 Heun steps, as uint8."""
        count = self.chain.num_pairs
        size = min(count, 5000)
        return PairOptions(
            num_pairs=count, num_steps=2 if self.chain.smoke else 18,
            dtype="float32" if self.chain.smoke else "uint8",  # an untrained flow makes no pictures
            shard_size=size, chunk_size=min(size, 1000),
        )  # fmt: skip

    def flow(self) -> None:
        """The 1-rectified flow."""
        training = self.training(self.chain.minutes.flow)
        train_flow(FlowConfig(**self.common("flow"), net=self.chain.net, training=training))

    def reflow(self) -> None:
        """The 2-rectified flow: U-shaped times, pseudo-Huber loss."""
        u_shaped = {"times": {"name": "u_shaped"}, "loss": {"name": "huber", "preset": "rfpp"}}
        straighten(
            ReflowConfig(
                **self.common("reflow"),
                teacher=self.model("flow"),
                pairs=self.pairs(),
                student_training=self.training(self.chain.minutes.reflow, **u_shaped),
                distillation=TrainOptions(steps=0),
                control=False,
            )  # fmt: skip
        )

    def slimflow(self) -> None:
        """A student of a quarter of the parameters, annealed and distilled."""
        minutes = self.chain.minutes
        at_noise = {"times": {"name": "constant", "t": 0.0}}
        train_slimflow(
            SlimFlowConfig(
                **self.common("slimflow"),
                teacher=self.model("flow"),
                pairs=self.pairs(),
                student_net=self.chain.slim_net,
                annealing=AnnealingOptions(steps=10_000),
                student_training=self.training(minutes.slimflow),
                own_pairs=self.pairs(),
                distillation=self.training(
                    minutes.slimflow_distillation, GuidedOptions, **at_noise
                ),
            )  # fmt: skip
        )

    def matching(self, name: str, minutes: float, **options: Any) -> dict[str, Any]:
        """What DMD2, f-distill and DisBack share."""
        return {
            **self.common(name), "teacher": self.model("flow"),
            "student_training": self.training(minutes, betas=(0.0, 0.999), learning_rate=1e-4),
            "matching": MatchingOptions(**options), "critic": CriticOptions(learning_rate=1e-4),
        }  # fmt: skip

    def dmd(self) -> None:
        """DMD2, one step, from the flow."""
        distil(DMDConfig(**self.matching("dmd", self.chain.minutes.dmd)))

    def f_distill(self) -> None:
        """f-distill with the Jensen-Shannon divergence."""
        minutes, bins = self.chain.minutes.f_distill, 2 if self.chain.smoke else 10
        distil(DMDConfig(**self.matching("f_distill", minutes, divergence="js", num_bins=bins)))

    def disback(self) -> None:
        """DisBack: DMD2 along the path from the student's first pictures back to the flow's."""
        few = self.chain.smoke
        path = BacktrackingOptions(steps=4 if few else 500, record_every=2 if few else 50)
        options = self.matching("disback", self.chain.minutes.disback)
        backtrack(DisBackConfig(**options, path=path))

    def model(self, name: str) -> str:
        """The folder of a stage's model in float32: the run's own, or made of what is kept."""
        own = self.folder / name / "model"
        if own.is_dir():
            return str(own)
        kept, restored = self.folder / "keep" / name, self.folder / "restored" / name
        if not restored.is_dir():
            with atomic_folder(restored) as temporary:
                shutil.copytree(kept, temporary, dirs_exist_ok=True)
                _save(kept, temporary, torch.float32)
        return str(restored)

    def keep(self, name: str) -> None:
        """Copy a stage's result to keep/NAME: bfloat16, small files, and its distances."""
        run = self.folder / name
        results = [run / one for one in ("distilled", "student", "model")]
        source = next(one for one in results if (one / "flowkit.json").is_file())
        with atomic_folder(self.folder / "keep" / name) as temporary:
            shutil.copytree(
                source,
                temporary,
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns("*.safetensors*"),
            )
            _save(source, temporary, torch.bfloat16)
            shutil.copy(run / "summary.json", temporary / "summary.json")


def _save(source: Path, target: Path, dtype: torch.dtype) -> None:
    for old in target.glob("*.safetensors*"):
        old.unlink()
    net: Any = from_diffusers(source, torch_dtype=dtype).net
    net.to(dtype).save_pretrained(target, max_shard_size="15MB")


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rate(work: Callable[[], Any], rounds: int) -> float:
    """Calls a second, the median of `rounds`, after two that do not count."""
    seconds = []
    for _ in range(rounds + 2):
        synchronise()
        began = time.perf_counter()
        work()
        synchronise()
        seconds.append(time.perf_counter() - began)
    return 1 / statistics.median(seconds[2:])


def matrix_rate(device: str) -> float:
    """The device's measured FLOP/s in a large product: bfloat16 on a GPU, float32 elsewhere."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 * rate(lambda: a @ b, 10)


def print_speed(chain: Chain, shape: tuple[int, ...]) -> None:
    """Pictures a second of training the flow's network, beside what the matrix rate allows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(chain.net, shape, None).to(device)
    x = torch.randn(chain.batch_size, *shape, device=device)
    t = torch.rand(chain.batch_size, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x[:1], t[:1])
    model.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if device == "cuda":
        model.net.compile()
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = (model(x, t).float() - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    pictures = chain.batch_size * rate(step, 3 if chain.smoke else 20)
    used, most = 3 * counter.get_total_flops() * pictures, matrix_rate(device)
    print(
        f"\ntraining: {pictures:,.0f} pictures/s, {used / 1e12:.3g} TFLOP/s, {used / most:.0%} of "
        f"the {most / 1e12:.3g} TFLOP/s of one large matrix product"
    )


def print_distances(folder: Path) -> None:
    """One row for each model that is kept."""
    print("\n| stage | model |" + "".join(f" FD, {n} NFE |" for n in NFES))
    print("|" + "---|" * (2 + len(NFES)))
    for name in STAGES:
        file = folder / "keep" / name / "summary.json"
        summary = json.loads(file.read_text()) if file.is_file() else {}
        for model in ("model", "teacher", "student", "distilled"):
            if model in summary and (model != "teacher" or name == "reflow"):
                distances = " | ".join(f"{fd:.2f}" for fd in summary[model]["fd"])
                print(f"| {name} | {model} | {distances} |")


STAGES = ("flow", "reflow", "slimflow", "dmd", "f_distill", "disback")


@contextmanager
def stopping(minutes: float | None) -> Iterator[None]:
    """SIGTERM, which a trainer answers by saving, after so many minutes; it ends the block."""

    def stop(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    timer = threading.Timer(60 * (minutes or 0), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    if minutes is not None:
        timer.start()
    try:
        yield
    except SystemExit:
        print("\nstopped: the same command goes on")
    finally:
        timer.cancel()


def main() -> None:
    """Run what is not done yet, then say what there is."""
    chain = parse(Chain, doc=__doc__ or "")
    if chain.smoke:
        chain.shrink()
    stages = Stages(chain)
    with stopping(chain.stop_after):
        for name in STAGES:
            if not (stages.folder / "keep" / name).is_dir():
                getattr(stages, name)()
                stages.keep(name)
    size = chain.data.size or 32
    print_speed(chain, (3, size, size))
    print_distances(stages.folder)


if __name__ == "__main__":
    run_command(main)
