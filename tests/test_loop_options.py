"""What a run may ask of the loop: a time budget, channels last, data on the device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flowkit.adapters import from_diffusers
from flowkit.config import parse
from flowkit.data import ImageData, load_data
from flowkit.errors import FlowkitError
from flowkit.trainers.settings import FlowConfig
from flowkit.trainers.straighten import train_flow

SMALL = [
    *("net.options.width=16", "net.options.num_blocks=1", "training.batch_size=16"),
    *("sample_every=0", "evaluate.num_samples=8", "evaluate.straightness_samples=1"),
    *("evaluate.features=pixels", "evaluate.nfe=[1]"),
]
UNET = [
    *("net.name=unet2d", "net.options={block_out_channels: [8], layers_per_block: 1}"),
    *("net.options.norm_num_groups=4", "net.options.down_block_types=[DownBlock2D]"),
    *("net.options.up_block_types=[UpBlock2D]", "training.steps=3"),
]


def trained(folder: Path, *words: str) -> dict[str, torch.Tensor]:
    """The weights that such a run ends with."""
    train_flow(parse(FlowConfig, [*SMALL, f"output_dir={folder}", *words], doc=""))
    return from_diffusers(folder / "model").state_dict()


def test_a_stage_ends_with_its_minutes_and_is_exported(tmp_path: Path) -> None:
    trained(tmp_path, "training.steps=10000000", "training.minutes=0.01")
    cost = json.loads((tmp_path / "stages/model/cost.json").read_text())
    assert 16 <= cost["forward"]["student"] < 16 * 10_000_000
    assert json.loads((tmp_path / "summary.json").read_text())["model"]["fd"][0] > 0


def test_minutes_to_spare_change_nothing(tmp_path: Path) -> None:
    whole, budgeted = (
        trained(tmp_path / str(i), "training.steps=5", *words)
        for i, words in enumerate(([], ["training.minutes=60"]))
    )
    assert all(torch.equal(whole[name], budgeted[name]) for name in whole)


def test_data_on_the_device_are_the_same_data(tmp_path: Path) -> None:
    from_files, resident = (
        trained(tmp_path / word, *UNET, f"data_on_device={word}") for word in ("false", "true")
    )
    assert all(torch.equal(from_files[name], resident[name]) for name in from_files)


def test_channels_last_trains_the_same_network(tmp_path: Path) -> None:
    plain, last = (
        trained(tmp_path / word, *UNET, f"channels_last={word}") for word in ("false", "true")
    )
    for name in plain:
        torch.testing.assert_close(plain[name], last[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("words", [["num_workers=1"], ["data.vae=somewhere"]])
def test_data_on_the_device_leave_nothing_to_read(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(FlowkitError, match="num_workers=0 and data.vae=null"):
        trained(tmp_path, "data_on_device=true", *words)


def test_files_are_on_no_device() -> None:
    data = load_data("digits")
    assert torch.equal(data.to("cpu").fetch([3, 1])["data"], data.fetch([3, 1])["data"])
    assert data.to("meta").fetch([0])["data"].device.type == "meta"

    class Files:
        shape = (2, 1, 8, 8)

    files = ImageData("mine", "train", Files())  # type: ignore[arg-type]
    with pytest.raises(FlowkitError, match="mine is decoded from files.*data_on_device=false"):
        files.to("cpu")
