"""Every packaged configuration: it is read, its network has the published size, and it trains."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.models import vgg16

from flowkit.adapters import from_diffusers
from flowkit.config import parse
from flowkit.losses import premetric
from flowkit.samplers.timesteps import density
from flowkit.trainers import compare
from flowkit.trainers.building import build_model
from flowkit.trainers.distilling import distil
from flowkit.trainers.dmd_settings import DisBackConfig, DMDConfig
from flowkit.trainers.retracing import backtrack
from flowkit.trainers.settings import FlowConfig, PictureOptions, ReflowConfig, TrainOptions
from flowkit.trainers.slimflow_settings import SlimFlowConfig
from flowkit.trainers.slimming import train_slimflow
from flowkit.trainers.straighten import straighten, train_flow

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

# file: (C, H, W) of its pictures, classes, parameters of its network, the same in millions:
# as Lee et al., 2024, arXiv:2405.20320 (55.7, 61.8 and 295.9) and gnobitab/RectifiedFlow (61.8)
# state them, and as the file's comment does
NETS = {
    "afhq64/reflow.yaml": ((3, 64, 64), None, 61_804_419, "61.8 M"),
    "cifar10/dit16-flow.yaml": ((3, 16, 16), None, 4_163_916, "4.2 M"),
    "cifar10/dmd.yaml": ((3, 32, 32), 10, 55_734_019, "55.7 M"),
    "cifar10/dmd_small.yaml": ((3, 16, 16), None, 1_002_883, "1.0 M"),
    "cifar10/f_distill.yaml": ((3, 32, 32), 10, 55_734_019, "55.7 M"),
    "cifar10/flow.yaml": ((3, 32, 32), None, 61_804_419, "61.8 M"),
    "cifar10/reflow.yaml": ((3, 32, 32), None, 55_732_739, "55.7 M"),
    "cifar10/slimflow.yaml": ((3, 32, 32), None, 61_804_419, "61.8 M"),
    "cifar10/small.yaml": ((3, 16, 16), None, 1_002_883, "1.0 M"),
    "digits/disback.yaml": ((1, 8, 8), None, 338_240, "0.3 M"),
    "digits/dmd.yaml": ((1, 8, 8), None, 338_240, "0.3 M"),
    "digits/f_distill.yaml": ((1, 8, 8), None, 338_240, "0.3 M"),
    "digits/flow.yaml": ((1, 8, 8), None, 338_240, "0.3 M"),
    "digits/reflow.yaml": ((1, 8, 8), None, 338_240, "0.3 M"),
    "digits/slimflow.yaml": ((1, 8, 8), None, 338_240, "0.3 M"),
    "ffhq64/dmd.yaml": ((3, 64, 64), None, 61_804_419, "61.8 M"),
    "ffhq64/f_distill.yaml": ((3, 64, 64), None, 61_804_419, "61.8 M"),
    "ffhq64/reflow.yaml": ((3, 64, 64), None, 61_804_419, "61.8 M"),
    "ffhq64/slimflow.yaml": ((3, 64, 64), None, 61_804_419, "61.8 M"),
    "imagenet64/disback.yaml": ((3, 64, 64), 1000, 295_899_267, "295.9 M"),
    "imagenet64/dmd.yaml": ((3, 64, 64), 1000, 295_899_267, "295.9 M"),
    "imagenet64/f_distill.yaml": ((3, 64, 64), 1000, 295_899_267, "295.9 M"),
    "imagenet64/reflow.yaml": ((3, 64, 64), 1000, 295_899_267, "295.9 M"),
    "imagenet64/slimflow.yaml": ((3, 64, 64), 1000, 295_899_267, "295.9 M"),
    "mnist/reflow.yaml": ((1, 28, 28), None, 4_165_456, "4.2 M"),
}
# lr, warm-up, batch, steps, dropout, loss: Lee et al., 2024, and sangyun884/rfpp's commands
PUBLISHED = {
    "cifar10": (2e-4, 5000, 512, 800_001, 0.13, "lpips_huber_1/t"),
    "imagenet64": (1e-4, 2500, 2048, 700_001, 0.10, "lpips_huber"),
    "afhq64": (2e-4, 5000, 256, 1_000_001, 0.25, "lpips_huber"),
    "ffhq64": (2e-4, 5000, 256, 1_000_000, 0.25, "lpips_huber"),
}
SCHEMAS = {  # by the file's name; all others are a FlowConfig
    **dict.fromkeys(("reflow", "small"), ReflowConfig),
    **dict.fromkeys(("dmd", "dmd_small", "f_distill"), DMDConfig),
    "disback": DisBackConfig,
    "slimflow": SlimFlowConfig,
}
# what runs a configuration, and the stages that it trains beside a distillation
TRAINERS = {
    FlowConfig: (train_flow, ["model"]),
    ReflowConfig: (straighten, ["teacher", "student"]),
    SlimFlowConfig: (train_slimflow, ["teacher", "student"]),
    DMDConfig: (distil, ["teacher", "student"]),
    DisBackConfig: (backtrack, ["teacher", "degraded", "student"]),
}
TINY = {  # the same networks with as little as they can do with
    "mlp": ["width=16", "num_blocks=1"],
    "dit": ["hidden_size=32", "num_layers=1", "num_heads=2"],
    "unet2d": [
        *("block_out_channels=[8]", "layers_per_block=1", "norm_num_groups=4"),
        *("down_block_types=[AttnDownBlock2D]", "up_block_types=[AttnUpBlock2D]"),
        "attention_head_dim=8",
    ],
    "ncsnpp": ["model_channels=8", "channel_mult=[1]", "num_blocks=1", "attention_resolutions=[8]"],
    "adm": ["model_channels=8", "channel_mult=[1]", "num_blocks=1", "attention_resolutions=[8]"],
}
SIDE = 8  # of all pictures


def read(name: str, *overrides: str) -> PictureOptions:
    schema = SCHEMAS.get(Path(name).stem, FlowConfig)
    return parse(schema, ["--config", str(CONFIGS / name), *overrides], doc="")


def trainings(config: PictureOptions) -> dict[str, TrainOptions]:
    return {
        field.name: value
        for field in dataclasses.fields(config)
        if isinstance(value := getattr(config, field.name), TrainOptions)
    }


@pytest.fixture(scope="module")
def vgg_weights(tmp_path_factory) -> Path:
    """A file of VGG16's names and shapes: LPIPS on random features."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        layers = vgg16(weights=None).features.state_dict()
    state = {
        f"features.{key}": torch.empty(value.shape).uniform_(-0.05, 0.05, generator=generator)
        for key, value in layers.items()
    }
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, path)
    return path


def test_every_config_is_tested():
    found = sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.yaml"))
    assert [name for name in found if not name.endswith(("/sweep.yaml", "/search.yaml"))] == list(
        NETS
    )


@pytest.mark.parametrize("name", NETS)
def test_it_is_read(name, vgg_weights):
    config = read(name)
    for training in trainings(config).values():
        assert density(**training.times).sample(4).shape == (4,)
        loss = dict(training.loss)
        weights = {"weights": str(vgg_weights)} if "lpips" in loss["name"] else {}
        premetric(**loss, **weights)
    assert config.data.size in (None, NETS[name][0][1])
    assert config.data.conditional == (NETS[name][1] is not None)


@pytest.mark.parametrize("name", NETS)
def test_its_network_has_the_published_size(name):
    shape, num_classes, count, millions = NETS[name]
    with torch.device("meta"):
        net = build_model(read(name).net, shape, num_classes).net
    assert net.num_parameters() == count
    assert f"{count / 1e6:.1f} M" == millions
    assert f"{millions} parameters" in (CONFIGS / name).read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_rfpp_settings(name):
    config = read(f"{name}/reflow.yaml")
    student, pairs = config.student_training, config.pairs
    rate, warmup, batch, steps, dropout, loss = PUBLISHED[name]
    assert (student.learning_rate, student.warmup_steps, student.steps) == (rate, warmup, steps)
    assert (student.batch_size, student.dropout, student.ema_decay) == (batch, dropout, 0.9999)
    assert (student.optimizer, student.betas, student.eps) == ("adam", (0.9, 0.999), 1e-8)
    assert student.weight_decay == 0 and student.max_grad_norm is None
    assert student.lr_schedule == "constant"
    assert student.loss == {"name": loss, "pooling": "average"}
    assert student.times == {"name": "u_shaped", "a": 4.0}
    assert not config.data.flip and pairs.dtype == "uint8" and pairs.grid == "edm"
    assert config.mixed_precision == ("fp16" if name == "imagenet64" else "no")
    assert config.rounds == 1 and config.distillation.steps == 0 and config.student_net is None
    if name in ("cifar10", "imagenet64"):
        assert (pairs.num_pairs, pairs.num_steps) == {
            "cifar10": (1_000_000, 18),
            "imagenet64": (5_000_000, 40),
        }[name]


def pictures(folder: Path, channels: int, num_classes: int) -> None:
    """Eight random pictures, in folders for two classes when there are classes."""
    rng = np.random.default_rng(0)
    for i in range(8):
        levels = rng.integers(0, 256, (SIDE, SIDE, channels), dtype=np.uint8)
        path = folder / (f"class{i % 2}" if num_classes else ".") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(levels[..., 0] if channels == 1 else levels).save(path)


def small_run(name: str, folder: Path, vgg_weights: Path) -> list[str]:
    """Two steps of each stage, on eight pictures, with a tiny network."""
    (channels, *_), num_classes, *_ = NETS[name]
    config = read(name)
    words = [f"output_dir={folder / 'run'}", "sample_every=0", "checkpoint_every=1"]
    words += ["mixed_precision=no"]  # accelerate allows one choice a process
    words += [f"net.options.{option}" for option in TINY[config.net.name]]
    if config.data.name != "digits":
        pictures(folder / "data", channels, num_classes or 0)
        words += [f"data.name=folder:{folder / 'data'}", "data.root=null", f"data.size={SIDE}"]
        # no trained network takes every size: an untrained one of 112 features
        words += ["evaluate.features=flowkit.eval.features:ResNet20", "evaluate.split=train"]
    words += ["evaluate.nfe=[1]", "evaluate.num_samples=4", "evaluate.straightness_samples=1"]
    for stage, training in trainings(config).items():
        words += [f"{stage}.steps={min(2, training.steps)}", f"{stage}.batch_size=2"]
        words += [f"{stage}.micro_batch_size=null", f"{stage}.warmup_steps=0"]
        if "lpips" in training.loss["name"]:
            words += [f"{stage}.loss.weights={vgg_weights}", f"{stage}.loss.size=16"]
    made = ["num_pairs=4", "num_steps=2", "dtype=float32"]  # untrained flows make no pictures
    if isinstance(config, ReflowConfig | SlimFlowConfig):
        words += [f"pairs.{option}" for option in made]
    if isinstance(config, ReflowConfig):
        words += ["control=false"]
    if isinstance(config, SlimFlowConfig):
        words += [f"own_pairs.{option}" for option in made] + ["annealing.steps=2"]
        words += [f"student_net.options.{option}" for option in TINY[config.student_net.name]]
    if isinstance(config, DMDConfig):
        words += ["matching.student_every=1", "matching.num_bins=1"]
    if isinstance(config, DisBackConfig):
        words += ["path.steps=2", "path.record_every=1", "path.switch_every=1"]
    return words if isinstance(config, FlowConfig) else [*words, "teacher=train"]


@pytest.mark.parametrize("name", NETS)
def test_two_steps(name, tmp_path, vgg_weights, monkeypatch):
    monkeypatch.setattr(compare, "STRAIGHTNESS_STEPS", 2)  # else they take half of the time
    config, run = read(name, *small_run(name, tmp_path, vgg_weights)), tmp_path / "run"
    train, trained = TRAINERS[type(config)]
    train(config)
    if "distillation" in trainings(config) and config.distillation.steps:
        trained = [*trained, "distilled"]
    summary = json.loads((run / "summary.json").read_text())
    for stage in trained:
        assert stage == "degraded" or np.isfinite(summary[stage]["fd"]).all()
        exported = from_diffusers(run / stage).state_dict()
        first, second = (load_file(path) for path in _weights(run / "stages" / stage))
        for state in (exported, first, second):
            assert all(tensor.isfinite().all() for tensor in state.values())
        assert any(not torch.equal(first[key], second[key]) for key in first)


def _weights(stage: Path) -> list[Path]:
    return [stage / f"checkpoint-{step}" / "model.safetensors" for step in (1, 2)]
