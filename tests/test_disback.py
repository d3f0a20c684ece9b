"""DisBack: the recorded path, its switches, its restarts, and what is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flowkit.checkpoint import export_model
from flowkit.config import parse
from flowkit.coupling import Independent
from flowkit.errors import FlowkitError
from flowkit.flow_adapters import FlowVelocity
from flowkit.nets.mlp import MLP
from flowkit.samplers.timesteps import density
from flowkit.trainers.backtracking import Recording, WayBack
from flowkit.trainers.distilling import distil
from flowkit.trainers.dmd_settings import CriticOptions, DisBackConfig, DMDConfig
from flowkit.trainers.launch import make_accelerator
from flowkit.trainers.loop import Loop, Preempted
from flowkit.trainers.recorded_path import RecordedPath
from flowkit.trainers.retracing import backtrack
from flowkit.trainers.settings import RunOptions, TrainOptions
from flowkit.velocity import expand_to


class GaussianNet(nn.Module):
    """The exact velocity of N(mean, e^2 log_std), one number a sample, with both learnt."""

    def __init__(self, mean: float, log_std: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([mean]))
        self.log_std = nn.Parameter(torch.tensor([log_std]))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = expand_to(t, x)
        power = (2 * self.log_std).exp()
        slope = (t * power - (1 - t)) / (t * t * power + (1 - t) ** 2)
        return self.mean + slope * (x - t * self.mean)


class Affine(nn.Module):
    """A student whose one step makes N(-1, 0.5^2) of noise."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return -1 + 0.5 * x - x


class Numbers:
    """Rows of one number."""

    shape = (1, 1, 1)

    def __len__(self) -> int:
        return 1000

    def fetch(self, indices: Any) -> dict[str, Tensor]:
        return {"data": torch.zeros(len(indices), 1, 1, 1)}


def test_the_recorded_means_go_from_the_teacher_to_the_student(tmp_path: Path) -> None:
    teacher = FlowVelocity(GaussianNet(2.0, 0.0))
    path = RecordedPath(tmp_path / "path", teacher.net, {})
    method = Recording(
        FlowVelocity(GaussianNet(2.0, 0.0)),
        FlowVelocity(Affine()),
        path,
        every=20,
        start=0.0,
        times=density("uniform"),
        options=CriticOptions(),
    )
    training = TrainOptions(
        steps=160, batch_size=128, learning_rate=0.1, warmup_steps=0, lr_schedule="linear"
    )
    run = RunOptions(sample_every=0)
    Loop(
        method, Independent(Numbers()), training, run,
        folder=tmp_path / "loop", accelerator=make_accelerator(run), name="path",
    ).run()  # fmt: skip
    means, network = [2.0], GaussianNet(0.0, 0.0)
    for node in range(len(path)):
        path.load(node, network)
        means.append(network.mean.item())
    assert len(path) == 8
    assert all(a > b for a, b in pairwise(means) if b > -0.9)  # as long as it is on its way
    assert max(means[4:]) < 0
    assert means[-1] == pytest.approx(-1, abs=0.15)
    assert network.log_std.exp().item() == pytest.approx(0.5, abs=0.15)


def _mlp(seed: int = 0, **options: Any) -> FlowVelocity:
    torch.manual_seed(seed)
    net = MLP(**{"shape": [1, 8, 8], "width": 16, "num_blocks": 1, **options})
    nn.init.normal_(net.proj_out.weight, std=0.1)
    return FlowVelocity(net)


def _states(path: RecordedPath) -> list[dict[str, Tensor]]:
    """Weights of every node, then the teacher's."""
    states = []
    for number in (*range(len(path)), -1):
        network = _mlp(9).net
        path.load(number, network)
        states.append(network.state_dict())
    return states


def _path(folder: Path, count: int) -> RecordedPath:
    path = RecordedPath(folder, _mlp(0).net, {"teacher": "a"})
    for step in range(1, count + 1):
        node = _mlp(0)
        for parameter in node.parameters():
            parameter.data += (
                1e-3
                * step
                * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            )
        path.write(step, node.net)
    return path


class TestPath:
    def test_a_node_is_its_difference_to_the_teacher_in_half_the_bytes(self, tmp_path) -> None:
        path, node = RecordedPath(tmp_path, _mlp(0).net, {}), _mlp(0)
        for parameter in node.parameters():
            parameter.data += 1e-5 * torch.ones_like(parameter)  # bfloat16 weights would lose it
        path.write(7, node.net)
        found = _mlp(1)
        path.load(0, found.net)
        for a, b in zip(found.parameters(), node.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
        size = (tmp_path / "node-000007.safetensors").stat().st_size
        assert size < 0.7 * sum(4 * p.numel() for p in node.parameters())

    def test_the_teacher_comes_back_exactly(self, tmp_path: Path) -> None:
        path, network = _path(tmp_path, 2), _mlp(0).net
        path.load(0, network)
        path.load(-1, network)
        for name, value in _mlp(0).net.state_dict().items():
            assert torch.equal(network.state_dict()[name], value)

    def test_a_switch_that_switches_nothing_is_refused(self, tmp_path: Path) -> None:
        path, network = _path(tmp_path, 1), _mlp(3).net
        path.load(0, network)
        with pytest.raises(FlowkitError, match="changes no weight"):
            path.load(0, network)

    def test_what_does_not_fit_is_named(self, tmp_path: Path) -> None:
        path = _path(tmp_path, 1)
        with pytest.raises(FlowkitError, match="path of another teacher"):
            RecordedPath(tmp_path, _mlp(0).net, {"teacher": "b"})
        wide = RecordedPath(tmp_path, _mlp(0, width=32).net, {"teacher": "a"})
        with pytest.raises(FlowkitError, match="another architecture than the teacher: "):
            wide.load(0, _mlp(0, width=32).net)
        with pytest.raises(FlowkitError, match="network to record is of another architecture"):
            path.write(2, _mlp(0, width=32).net)
        file = tmp_path / "node-000001.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        with pytest.raises(FlowkitError, match="not what was recorded"):
            path.load(0, _mlp(3).net)


class TestWayBack:
    def test_every_switch_fires_and_the_teacher_is_last(self, tmp_path: Path) -> None:
        path = _path(tmp_path, 4)  # nodes 1 to 4; the fake score starts at 4
        *nodes, teacher = _states(path)
        target = _mlp(0)
        back = WayBack(target, path, every=3)
        seen, switches = [], []
        for _ in range(12):
            seen.append({k: v.clone() for k, v in target.net.state_dict().items()})
            switches.append(back.update(0.0))
        expected = [nodes[2], nodes[1], nodes[0], teacher]
        for k, state in enumerate(seen):
            wanted = expected[k // 3]
            assert all(torch.equal(state[name], value) for name, value in wanted.items()), k
        assert [k for k, switched in enumerate(switches) if switched] == [2, 5, 8]

    @pytest.mark.parametrize("count", [0, 1])
    def test_a_path_of_one_node_is_the_teacher_throughout(self, tmp_path: Path, count) -> None:
        back = WayBack(_mlp(0), _path(tmp_path, count), every=1)
        assert not any(back.update(0.0) for _ in range(5))
        for name, value in _mlp(0).state_dict().items():
            assert torch.equal(back.target.state_dict()[name], value)

    @pytest.mark.parametrize("updates", [1, 3, 4, 8, 20])
    def test_it_survives_a_resume(self, tmp_path: Path, updates: int) -> None:
        path = _path(tmp_path, 4)
        whole = WayBack(_mlp(0), path, every=3)
        for _ in range(updates):
            whole.update(0.0)
        state = json.loads(json.dumps(whole.state_dict()))
        resumed = WayBack(_mlp(0), path, every=3)
        resumed.load_state_dict(state)
        assert (resumed.stage, resumed.updates) == (whole.stage, updates)
        for name, value in whole.target.state_dict().items():
            assert torch.equal(resumed.target.state_dict()[name], value)

    def test_another_path_or_schedule_is_refused(self, tmp_path: Path) -> None:
        state = WayBack(_mlp(0), _path(tmp_path / "a", 3), every=3).state_dict()
        for other in (
            WayBack(_mlp(0), _path(tmp_path / "a", 3), every=4),
            WayBack(_mlp(0), _path(tmp_path / "b", 2), every=3),
        ):
            with pytest.raises(FlowkitError, match="along another path"):
                other.load_state_dict(state)


SMALL = [
    *("student_training.steps=12", "student_training.batch_size=32", "matching.student_every=2"),
    *("student_training.warmup_steps=2", "sample_every=0", "log_every=1", "checkpoint_every=3"),
    *("evaluate.nfe=[1]", "evaluate.num_samples=40", "evaluate.straightness_samples=4"),
]
PATH = ["path.steps=6", "path.record_every=2", "path.switch_every=2", "path.learning_rate=0.001"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved flow for digits with random weights."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    export_model(_mlp(), folder, shape=(1, 8, 8))
    return folder


def _config(folder: Path, teacher: Path, *overrides: str) -> DisBackConfig:
    words = [*SMALL, *PATH, f"output_dir={folder}", f"teacher={teacher}", *overrides]
    return parse(DisBackConfig, words, doc="")


def _student(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "student" / "diffusion_pytorch_model.safetensors")


def _interrupted_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM's effect after so many steps of any loop."""
    update, taken = Loop.update, [0]

    def then_stop(self: Loop, rows: Any) -> dict[str, Tensor]:
        taken[0] += 1
        self.terminating = taken[0] == steps
        return update(self, rows)

    monkeypatch.setattr(Loop, "update", then_stop)


# After 3 steps of the recording, then 2, 6 and 10 steps of the way back: at each of its targets
@pytest.mark.parametrize("stops", [[3, 5, 4, 4]])
def test_stopped_in_every_phase_it_ends_in_the_same_bits(
    teacher: Path, tmp_path: Path, stops: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    backtrack(_config(tmp_path / "whole", teacher))
    for steps in stops:
        with monkeypatch.context() as patched, pytest.raises(Preempted):
            _interrupted_after(steps, patched)
            backtrack(_config(tmp_path / "parts", teacher))
    backtrack(_config(tmp_path / "parts", teacher))
    whole, parts = _student(tmp_path / "whole"), _student(tmp_path / "parts")
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    nodes = json.loads((tmp_path / "whole" / "path" / "path.json").read_text())["nodes"]
    assert list(nodes) == [f"node-{k:06d}.safetensors" for k in (2, 4, 6)]
    assert json.loads((tmp_path / "parts" / "path" / "path.json").read_text())["nodes"] == nodes


def test_without_a_path_it_is_plain_distribution_matching(teacher: Path, tmp_path: Path) -> None:
    backtrack(_config(tmp_path / "a", teacher, "path.steps=0"))
    words = [*SMALL, f"output_dir={tmp_path / 'b'}", f"teacher={teacher}"]
    distil(parse(DMDConfig, words, doc=""))
    a, b = _student(tmp_path / "a"), _student(tmp_path / "b")
    assert all(torch.equal(b[name], value) for name, value in a.items())


BAD = [
    (["path.switch_every=3"], "6 updates, and 3 nodes of path.switch_every 3 take 6"),
    (["path.record_every=7"], "no node would be recorded"),
    (["mixed_precision=fp16"], "diverges in fp16"),
]


@pytest.mark.parametrize("overrides, message", BAD)
def test_bad_input_is_one_line(
    teacher: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(FlowkitError, match=message) as error:
        backtrack(_config(tmp_path / "run", teacher, *overrides))
    assert "\n" not in str(error.value)
