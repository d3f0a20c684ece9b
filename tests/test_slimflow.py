"""SlimFlow's annealing: its schedules, its coupling in the loop, its published settings."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flowkit.adapters import FlowVelocity
from flowkit.config import parse
from flowkit.coupling import Annealed, Batch, Coupling, Independent, Paired
from flowkit.errors import FlowkitError
from flowkit.losses import Squared
from flowkit.nets.mlp import MLP
from flowkit.samplers.timesteps import Curriculum, Uniform
from flowkit.trainers.annealing import AnnealedReflow, Annealing, beta_at
from flowkit.trainers.building import build_model
from flowkit.trainers.launch import make_accelerator
from flowkit.trainers.loop import Loop
from flowkit.trainers.matching import FlowMatching
from flowkit.trainers.settings import NetOptions, RunOptions, TrainOptions
from flowkit.trainers.slimflow_settings import SlimFlowConfig

SHAPE = (1, 8, 8)
CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class Rows:
    """64 pairs of fixed numbers, without their noise if not `paired`."""

    shape = SHAPE

    def __init__(self, paired: bool = True) -> None:
        generator = torch.Generator().manual_seed(5)
        self.rows = {
            name: torch.randn(64, *SHAPE, generator=generator) for name in ("noise", "data")
        }
        if not paired:
            del self.rows["noise"]

    def __len__(self) -> int:
        return 64

    def fetch(self, indices: Any) -> dict[str, Tensor]:
        return {name: value[torch.as_tensor(indices)] for name, value in self.rows.items()}


def mlp(width: int = 16) -> FlowVelocity:
    torch.manual_seed(0)
    return FlowVelocity(MLP(shape=list(SHAPE), width=width, num_blocks=1))


class TestSchedules:
    @pytest.mark.parametrize(
        "schedule, wanted",
        [
            ("linear", [1, 0.75, 0.5, 0.25, 0, 0, 0]),
            ("cosine", [1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5), 0, 0, 0]),
            ("exponential", [math.exp(-k / 4) for k in (0, 1, 2, 3, 4, 5, 400)]),
            ("fixed", [0.3] * 7),
        ],
    )
    def test_table(self, schedule: str, wanted: list[float]) -> None:
        steps = (0, 1, 2, 3, 4, 5, 400)
        found = [beta_at(schedule, k, 4, beta=0.3) for k in steps]
        assert found == pytest.approx(wanted, abs=1e-15)
        assert (found[4] == 0) == (schedule in ("linear", "cosine"))

    def test_the_published_annealing(self) -> None:
        """beta(k) = 1 - min(1, k / (6 * 50,000))."""
        found = [beta_at("linear", k, 300_000) for k in (0, 30_000, 150_000, 300_000, 800_000)]
        assert found == pytest.approx([1, 0.9, 0.5, 0, 0])

    def test_bad_input(self) -> None:
        with pytest.raises(FlowkitError, match=r"unknown schedule of beta 'liner', did you mean"):
            beta_at("liner", 0, 10)
        with pytest.raises(FlowkitError, match="at least 1 step, got 0"):
            beta_at("linear", 0, 0)


class TestAnnealing:
    def test_it_leads_the_coupling_from_1_to_0(self) -> None:
        coupling = Annealed(Paired(Rows()), 0.0)
        annealing = Annealing(coupling, "linear", 4)
        betas, changes = [coupling.beta], []
        for _ in range(6):
            changes.append(annealing.update(0.5))
            betas.append(coupling.beta)
        assert betas == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
        assert changes == [False, False, False, True, False, False]
        assert annealing.stage == 1

    def test_a_state_of_another_schedule_is_refused(self) -> None:
        ours, theirs = (Annealing(Annealed(Paired(Rows())), "linear", k) for k in (4, 8))
        theirs.update(0.5)
        for state in (theirs.state_dict(), None, {"stage": 1}):
            with pytest.raises(FlowkitError, match="the checkpoint was annealed by") as error:
                ours.load_state_dict(state)
            assert "\n" not in str(error.value)
        assert ours.step == 0


def train(folder: Path, method: Any, coupling: Coupling, steps: int = 12) -> dict[str, Tensor]:
    """The weights after that many steps."""
    run = RunOptions(sample_every=0, checkpoint_every=5)
    loop = Loop(
        method,
        coupling,
        TrainOptions(steps=steps, batch_size=16, micro_batch_size=8, warmup_steps=2),
        run,
        folder=folder,
        accelerator=make_accelerator(run),
        name="test",
    )
    loop.run()
    return load_file(folder / "checkpoint-10" / "model.safetensors")


def annealed(coupling: Annealed, **options: Any) -> AnnealedReflow:
    annealing = Annealing(coupling, **options)
    return AnnealedReflow(mlp(), Uniform(), Squared(), annealing=annealing)


class TestAnnealedReflow:
    @pytest.mark.parametrize("beta", [0.0, 1.0])
    def test_its_ends_are_reflow_and_flow_matching_bit_for_bit(
        self, tmp_path: Path, beta: float
    ) -> None:
        coupling = Annealed(Paired(Rows(), flip=True))
        ours = train(tmp_path / "ours", annealed(coupling, schedule="fixed", beta=beta), coupling)
        plain = Paired(Rows(), flip=True) if beta == 0 else Independent(Rows(False), flip=True)
        method = FlowMatching(mlp(), Uniform(), Squared())
        theirs = train(tmp_path / "theirs", method, plain)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    def test_accumulated_batches_of_a_step_share_its_beta(self, tmp_path: Path) -> None:
        seen = []

        class Watched(Annealed):
            def couple(self, rows: Any, generator: torch.Generator | None = None) -> Batch:
                seen.append(self.beta)
                return super().couple(rows, generator)

        coupling = Watched(Paired(Rows()))
        train(tmp_path, annealed(coupling, steps=5), coupling)
        assert seen[::2] == seen[1::2]
        assert seen[::2] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2] + [0] * 7)

    def test_resumed_while_annealing_it_ends_in_the_same_bits(self, tmp_path: Path) -> None:
        def begin() -> tuple[Annealed, AnnealedReflow]:
            coupling = Annealed(Paired(Rows()))
            return coupling, annealed(coupling, schedule="cosine", steps=9)

        coupling, method = begin()
        whole = train(tmp_path / "whole", method, coupling)
        coupling, method = begin()
        with pytest.raises(InterruptedError):  # two steps after a checkpoint: they are lost
            train(tmp_path / "halves", Interrupted(method, calls=2 * 7), coupling)
        coupling, method = begin()
        resumed = train(tmp_path / "halves", method, coupling)
        assert coupling.beta == 0 and method.annealing.step == 12
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    def test_a_curriculum_is_refused(self) -> None:
        annealing = Annealing(Annealed(Paired(Rows())))
        with pytest.raises(FlowkitError, match="curriculum"):
            AnnealedReflow(mlp(), Curriculum(), Squared(), annealing=annealing)


class Interrupted:
    """A method that ends without a word after some calls, as a killed process does."""

    def __init__(self, method: Any, calls: int) -> None:
        self.method, self.calls = method, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["method"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("method", "calls"):
            self.__dict__[name] = value
        else:
            setattr(self.method, name, value)

    def loss(self, batch: Batch) -> Any:
        if not self.calls:
            raise InterruptedError
        self.calls -= 1
        return self.method.loss(batch)


STUDENTS = {  # the line that a configuration says it with: parameters of that student
    "cifar10": {
        "15.7 M parameters": 15_707_235,
        "27.9 M, FID 4.53   student_net.options.model_channels=128": 27_906_179,
        "7.0 M              student_net.options.model_channels=64": 6_989_891,
        "3.4 M              student_net.options.model_channels=64 "
        "student_net.options.num_blocks=1 student_net.options.channel_mult=[1,1,2]": 3_437_123,
    },
    "ffhq64": {
        "27.9 M": 27_906_179,
        "15.7 M, FID 7.70   student_net.options.model_channels=96": 15_707_235,
        "7.0 M              student_net.options.model_channels=64": 6_989_891,
    },
    "imagenet64": {
        "80.7 M parameters": 80_685_315,
        "44.7 M             student_net.options.channel_mult=[1,2,2,2]": 44_685_827,
    },
}
SHAPES = {
    "digits": ((1, 8, 8), None),
    "cifar10": ((3, 32, 32), None),
    "ffhq64": ((3, 64, 64), None),
    "imagenet64": ((3, 64, 64), 1000),
}


def read(name: str, *overrides: str) -> SlimFlowConfig:
    return parse(SlimFlowConfig, ["--config", f"{name}/slimflow.yaml", *overrides], doc="")


def count(net: NetOptions, name: str) -> int:
    with torch.device("meta"):
        return build_model(net, *SHAPES[name]).net.num_parameters()


@pytest.mark.parametrize("name", STUDENTS)
def test_published_students(name: str) -> None:
    text = (CONFIGS / name / "slimflow.yaml").read_text()
    text = re.sub(r" \\\n# +", " ", text)  # lines that go on
    for line, parameters in STUDENTS[name].items():
        assert line in text and line.startswith(f"{parameters / 1e6:.1f} M")
        overrides = [word for word in line.split() if word.startswith("student_net")]
        assert count(read(name, *overrides).student_net, name) == parameters


def test_configs() -> None:
    """What all of them share, and the settings that were published."""
    for name in SHAPES:
        config = read(name)
        assert config.data.conditional == (SHAPES[name][1] is not None)
        assert config.annealing.schedule == "linear"
        distilled = config.distillation
        assert distilled.two_step == "student" and distilled.two_step_between == (0.2, 0.8)
        assert distilled.times == {"name": "constant", "t": 0.0}
    for name in STUDENTS:
        config = read(name)
        student, distilled = config.student_training, config.distillation
        assert config.annealing.steps == 300_000 and config.data.flip
        assert (student.steps, distilled.steps) == (800_000, 400_000)
        for stage in (student, distilled):
            assert (stage.optimizer, stage.learning_rate, stage.batch_size) == ("adam", 2e-4, 128)
            assert (stage.betas, stage.eps, stage.weight_decay) == ((0.9, 0.999), 1e-8, 0)
            assert (stage.max_grad_norm, stage.ema_decay) == (1.0, 0.999999)
        assert (student.warmup_steps, distilled.warmup_steps) == (5000, 0)
        assert student.loss == {"name": "squared"} and student.times == {"name": "uniform"}
        assert student.dropout == (0.13 if name == "imagenet64" else 0.15)
        assert distilled.loss == {"name": "lpips", "size": 64}


def test_the_digits_are_the_defaults() -> None:
    config = read("digits")
    assert config == SlimFlowConfig()
    assert count(config.student_net, "digits") == 79_024 < count(config.net, "digits") / 4
