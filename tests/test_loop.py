"""The training loop: resuming, several processes, non-finite steps, preemption."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flowkit import checkpoint
from flowkit.adapters import FlowVelocity
from flowkit.coupling import Batch, Independent
from flowkit.data import load_data
from flowkit.errors import FlowkitError
from flowkit.losses import premetric
from flowkit.nets.mlp import MLP
from flowkit.samplers.timesteps import density
from flowkit.trainers.launch import make_accelerator
from flowkit.trainers.loop import Loop, Loss, Preempted
from flowkit.trainers.matching import FlowMatching
from flowkit.trainers.settings import RunOptions, TrainOptions

TINY = {"width": 16, "num_blocks": 1}


def _loop(folder: Path, *, method: Any = None, **options: Any) -> Loop:
    run_names = RunOptions.__dataclass_fields__.keys() & options.keys()
    run = RunOptions(sample_every=0, **{name: options.pop(name) for name in run_names})
    training = TrainOptions(**{"steps": 20, "batch_size": 32, "warmup_steps": 5, **options})
    if method is None:
        torch.manual_seed(0)
        model = FlowVelocity(MLP(shape=[1, 8, 8], **TINY))
        method = FlowMatching(model, density("uniform"), premetric("squared"))
    accelerator = make_accelerator(run)
    data = Independent(load_data("digits"), labels=False)
    return Loop(method, data, training, run, folder=folder, accelerator=accelerator, name="test")


def _weights(loop: Loop) -> list[Tensor]:
    return [p.detach().clone() for p in loop.parameters]


class Exploding(FlowMatching):
    """Flow matching whose loss is not finite at the given steps."""

    def __init__(self, bad: range) -> None:
        torch.manual_seed(0)
        model = FlowVelocity(MLP(shape=[1, 8, 8], **TINY))
        super().__init__(model, density("uniform"), premetric("squared"))
        self.bad, self.calls = bad, 0

    def loss(self, batch: Batch) -> Loss:
        loss = super().loss(batch)
        self.calls += 1
        return Loss(loss.value * (math.nan if self.calls - 1 in self.bad else 1.0))


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    loop = _loop(tmp_path, steps=200, learning_rate=1e-2, batch_size=128)
    batch = loop.coupling.couple(loop.coupling.fetch(range(512)))
    torch.manual_seed(0)
    before = loop.method.loss(batch).value.item()
    loop.run()
    torch.manual_seed(0)
    assert loop.method.loss(batch).value.item() < 0.7 * before


def test_a_curriculum_advances_and_survives_a_resume(tmp_path: Path) -> None:
    def method() -> FlowMatching:
        torch.manual_seed(0)
        model = FlowVelocity(MLP(shape=[1, 8, 8], **TINY))
        times = density("curriculum", num_stages=4, patience=3, smoothing=0.5)
        return FlowMatching(model, times, premetric("squared"))

    whole = _loop(tmp_path / "whole", method=method(), steps=40)
    whole.run()
    half = _loop(tmp_path / "halves", method=method(), steps=40, checkpoint_every=10)
    half.options.steps = 23
    half.run()
    resumed = _loop(tmp_path / "halves", method=method(), steps=40, checkpoint_every=10)
    resumed.run()
    assert whole.method.phase.stage > 1
    assert resumed.method.phase.state_dict() == whole.method.phase.state_dict()
    assert all(map(torch.equal, _weights(whole), _weights(resumed)))


def test_twice_n_steps_are_n_steps_a_resume_and_n_steps_more(tmp_path: Path) -> None:
    whole = _loop(tmp_path / "whole", checkpoint_every=100)
    whole.run()
    half = _loop(tmp_path / "halves", checkpoint_every=10)
    half.options.steps = 13  # killed three steps after its checkpoint
    half.run()
    assert checkpoint.latest(tmp_path / "halves").name == "checkpoint-10"
    rest = _loop(tmp_path / "halves", checkpoint_every=10)
    rest.run()
    for a, b in zip(_weights(whole), _weights(rest), strict=True):
        assert torch.equal(a, b)


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path: Path) -> None:
    loop = _loop(tmp_path, method=Exploding(range(5, 8)), steps=10, max_skipped_steps=3)
    loop.run()
    assert loop.skipped == 3 and loop.step == 10
    assert all(w.isfinite().all() for w in _weights(loop))


def test_steps_that_stay_non_finite_stop_the_run_at_its_last_good_checkpoint(
    tmp_path: Path,
) -> None:
    options = {"steps": 50, "checkpoint_every": 4, "max_skipped_steps": 3}
    loop = _loop(tmp_path, method=Exploding(range(10, 99)), **options)
    with pytest.raises(FlowkitError, match=r"not finite .*checkpoint-8; lower learning_rate"):
        loop.run()
    good = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    assert all(w.isfinite().all() for w in good.values())


def test_sigterm_saves_and_leaves(tmp_path: Path) -> None:
    class Terminated(Exploding):
        def loss(self, batch: Batch) -> Loss:
            if self.calls == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().loss(batch)

    with pytest.raises(Preempted) as left:
        _loop(tmp_path, method=Terminated(range(0)), checkpoint_every=100).run()
    assert left.value.code == 143
    assert checkpoint.latest(tmp_path).name == "checkpoint-7"
    resumed = _loop(tmp_path, checkpoint_every=100)
    resumed.run()
    whole = _loop(tmp_path / "whole", checkpoint_every=100)
    whole.run()
    for a, b in zip(_weights(whole), _weights(resumed), strict=True):
        assert torch.equal(a, b)


def test_old_checkpoints_go_and_half_written_ones_are_never_read(tmp_path: Path) -> None:
    (tmp_path / ".tmp-checkpoint-99").mkdir()
    (tmp_path / "checkpoint-98").mkdir()  # no state.json: not complete
    _loop(tmp_path, steps=12, checkpoint_every=3, keep_checkpoints=2).run()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-9", "checkpoint-12", "checkpoint-98", "cost.json"}


def test_a_checkpoint_of_another_network_is_named(tmp_path: Path) -> None:
    _loop(tmp_path, checkpoint_every=10).run()
    other = FlowVelocity(MLP(shape=[1, 8, 8], width=32, num_blocks=1))
    method = FlowMatching(other, density("uniform"), premetric("squared"))
    with pytest.raises(FlowkitError, match="checkpoint-20 does not fit this network"):
        _loop(tmp_path, method=method).run()


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    _loop(tmp_path, checkpoint_every=10).run()
    damaged = tmp_path / "checkpoint-20" / name
    damaged.write_bytes(damaged.read_bytes()[:50])
    with pytest.raises(FlowkitError, match="checkpoint-20.*damaged.*remove the folder") as error:
        _loop(tmp_path, checkpoint_every=10).run()
    assert "\n" not in str(error.value)


def test_accumulated_gradients_equal_those_of_the_whole_batch(tmp_path: Path) -> None:
    class Fixed(Exploding):
        """The loss of given rows at given times: no draws, so batches can be compared."""

        def loss(self, batch: Batch) -> Loss:
            still = Batch(torch.zeros_like(batch.data), batch.data, {})
            t = torch.full((len(batch.data),), 0.5)
            v = self.model(0.5 * still.data, t)
            return Loss((v - still.data).square().mean())

    grads = []
    for micro in (None, 8):
        loop = _loop(tmp_path / str(micro), method=Fixed(range(0)), micro_batch_size=micro)
        loop.learners["student"]._apply = lambda norm: None
        rows = map(
            loop.coupling.fetch, (loop.order.indices(0, m) for m in loop.order.micro_batches)
        )
        loop.update(rows)
        grads.append([p.grad.clone() for p in loop.parameters])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def _launch(processes: int, script: Path, *arguments: str) -> subprocess.CompletedProcess:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*torchrun, f"--nproc_per_node={processes}", str(script), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


FLOW = Path(__file__).resolve().parent.parent / "trainers" / "flow.py"
SMALL = [
    *("net.options.width=16", "net.options.num_blocks=1", "sample_every=0", "evaluate.nfe=[1]"),
    *("training.steps=6", "training.batch_size=64", "training.micro_batch_size=32"),
    *("evaluate.num_samples=100", "evaluate.straightness_samples=50"),
]


@pytest.mark.slow
def test_two_processes_end_where_one_that_accumulates_does(tmp_path: Path) -> None:
    weights = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = _launch(processes, FLOW, f"output_dir={folder}", *SMALL)
        assert done.returncode == 0, done.stderr[-2000:]
        weights.append(load_file(folder / "model" / "diffusion_pytorch_model.safetensors"))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0, atol=1e-6)
