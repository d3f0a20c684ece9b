"""What a SlimFlow run refuses, in one line each and before it costs anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from small_slimflow import FEW, SHAPE, random_lpips, small_config

from flowkit.adapters import FlowVelocity
from flowkit.checkpoint import export_model
from flowkit.config import parse
from flowkit.errors import FlowkitError
from flowkit.nets.mlp import MLP
from flowkit.trainers.settings import ReflowConfig
from flowkit.trainers.slimming import train_slimflow
from flowkit.trainers.straighten import straighten

BAD = [
    (["annealing.schedule=liner"], "annealing.schedule"),
    (["annealing.steps=0"], "at least 1"),
    (["annealing.beta=1.5"], r"in \[0, 1\], got 1.5"),
    (["distillation.two_step=both"], "distillation.two_step"),
    (["distillation.two_step_between=[0.8,0.2]"], r"two_step_between must be \(low, high\)"),
    (["distillation.two_step_between=[0,1.5]"], r"\[0, 1\]"),
    (["distillation.loss.name=squarred"], "did you mean 'squared'"),
    (["distillation.times={name: curriculum}"], "curriculum"),
    (["student_training.times={name: curriculum}"], "curriculum"),
    (["student_net.options.width=15"], "net.options: .*width that 4 divides"),
    (["student_net.name=nothing"], "unknown net"),
    (["student_training.dropout=0.1"], "no dropout layer"),
    (["distillation.dropout=0.1"], "no dropout layer"),
    (["own_pairs.chunk_size=2000"], "chunk_size 2000"),
    (["own_pairs.guidance_scale=2", "data.conditional=true"], "own_pairs.guidance_scale at 1"),
    (["own_pairs.real_share=0.5"], "own_pairs.real_share at 0"),
    (["own_pairs.solver=hein"], "did you mean 'heun'"),
    (["data.conditional=true", "pairs.guidance_scale=2"], "label_dropout"),
    (["student_training.steps=0"], "student_training.steps must be at least 1"),
    (["annealing.steps=8"], "annealing.steps 8 .* beta would end at 0.75"),
    (["annealing.steps=3", "annealing.schedule=cosine"], "beta would end at 0.25"),
    (["rounds=2"], "rounds"),
    (["teacher=no/such/folder"], "no/such/folder"),
    (["distillation.micro_batch_size=48"], "multiple of"),
]


@pytest.mark.parametrize("overrides, message", BAD)
def test_bad_input_is_one_line(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(FlowkitError, match=message) as error:
        train_slimflow(small_config(tmp_path / "run", *FEW, *overrides))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "stages").exists()


def test_a_loss_that_cannot_take_the_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlowkitError, match=r"distillation.loss cannot take pictures") as error:
        train_slimflow(small_config(tmp_path, *FEW, random_lpips(tmp_path.parent, 8)))
    assert "\n" not in str(error.value) and not (tmp_path / "stages").exists()


def export(folder: Path, **options: int) -> str:
    """A teacher of random weights; returns the option that names it."""
    torch.manual_seed(0)
    net = MLP(shape=list(SHAPE), **{"width": 16, "num_blocks": 1, **options})
    classes = options.get("num_classes")
    export_model(FlowVelocity(net), folder, shape=SHAPE, num_classes=classes)
    return f"teacher={folder}"


def test_teachers_for_other_classes_are_refused(tmp_path: Path) -> None:
    plain = export(tmp_path / "plain")
    with pytest.raises(FlowkitError, match=r"trained for pictures \(1, 8, 8\) with classes None"):
        train_slimflow(small_config(tmp_path / "a", plain, "data.conditional=true"))
    labelled = export(tmp_path / "labelled", num_classes=10)
    with pytest.raises(FlowkitError, match=r"trained for pictures \(1, 8, 8\) with classes 10"):
        train_slimflow(small_config(tmp_path / "b", labelled))


def test_foreign_teachers_of_other_pictures_are_refused(tmp_path: Path) -> None:
    """They say nothing of what they were trained for, so they are asked for one velocity."""
    net = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    DDPMPipeline(net, DDPMScheduler()).save_pretrained(tmp_path / "foreign")  # of (3, 8, 8)
    words = [f"teacher={tmp_path / 'foreign'}", f"output_dir={tmp_path / 'reflow'}"]
    for train, config in (
        (train_slimflow, small_config(tmp_path / "slimflow", words[0])),
        (straighten, parse(ReflowConfig, words, doc="")),
    ):
        with pytest.raises(
            FlowkitError, match=r"foreign cannot take pictures \(1, 8, 8\)"
        ) as error:
            train(config)
        assert "\n" not in str(error.value)


def test_pairs_of_another_teacher_are_refused(tmp_path: Path) -> None:
    ours, other = export(tmp_path / "ours"), export(tmp_path / "other", width=20)
    train_slimflow(small_config(tmp_path / "run", *FEW, ours))
    again = small_config(tmp_path / "run", *FEW, other)
    with pytest.raises(FlowkitError, match="'teacher' is "):
        train_slimflow(again)
    moved = tmp_path / "run" / "config.yaml"
    moved.write_text(moved.read_text().replace(str(tmp_path / "ours"), str(tmp_path / "other")))
    with pytest.raises(FlowkitError, match="pair store made with another source") as error:
        train_slimflow(again)
    assert "\n" not in str(error.value)
