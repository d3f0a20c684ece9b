"""Parameter counts, on the meta device, against the published ones."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import flowkit.nets
from flowkit.nets import MLP, PRESETS, DiT
from flowkit.nets.dit import DIT_SIZES


def count(kind, **options):
    with torch.device("meta"):
        return kind(**options).num_parameters(only_trainable=True)


# facebookresearch/DiT and willisma/SiT, without the position table they keep as a parameter
TRAINABLE = [
    ("S", 2, 8, 32_865_056),
    ("B", 2, 8, 130_315_808),
    ("L", 2, 8, 457_840_672),
    ("XL", 2, 8, 674_834_720),
    ("XL", 4, 8, 675_000_704),
    ("XL", 8, 8, 675_664_640),
]
# the same with the table of (32 / patch)^2 positions; 4 output channels: no variance head
WITH_TABLE = [
    ("S", 2, 4, 32_957_200),
    ("B", 2, 4, 130_500_112),
    ("L", 2, 4, 458_086_416),
    ("XL", 2, 4, 675_111_184),
    ("S", 4, 8, 32_945_024),
    ("S", 8, 8, 33_148_160),
    ("B", 4, 8, 130_475_648),
    ("B", 8, 8, 130_881_536),
    ("L", 4, 8, 458_053_760),
    ("L", 8, 8, 458_594_816),
]


@pytest.mark.parametrize("size, patch, out_channels, published", TRAINABLE)
def test_dit_trainable_counts(size, patch, out_channels, published):
    options = {"patch_size": patch, "out_channels": out_channels, "num_classes": 1000}
    assert count(DiT, **options, **DIT_SIZES[size]) == published


@pytest.mark.parametrize("size, patch, out_channels, published", WITH_TABLE)
def test_dit_total_counts(size, patch, out_channels, published):
    options = {"patch_size": patch, "out_channels": out_channels, "num_classes": 1000}
    table = (32 // patch) ** 2 * DIT_SIZES[size]["hidden_size"]
    assert count(DiT, **options, **DIT_SIZES[size]) + table == published


@pytest.mark.parametrize(
    "preset, millions",
    [
        ("ddpmpp-cifar10", "55.7"),
        ("ddpmpp-64", "61.8"),
        ("rectified-flow-cifar10", "61.8"),
        ("adm-imagenet64", "295.9"),
        ("slimflow-27.9m", "27.9"),
        ("slimflow-15.7m", "15.7"),
        ("slimflow-7.0m", "7.0"),
        ("slimflow-3.4m", "3.4"),
        ("slimflow-imagenet64-80.7m", "80.7"),
        ("slimflow-imagenet64-44.7m", "44.7"),
    ],
)
def test_published_unet_sizes(preset, millions):
    options = dict(PRESETS[preset])
    kind = getattr(flowkit.nets, options.pop("class"))
    assert f"{count(kind, **options) / 1e6:.1f}" == millions


def test_every_preset_builds():
    for options in PRESETS.values():
        arguments = {key: value for key, value in options.items() if key != "class"}
        assert count(getattr(flowkit.nets, options["class"]), **arguments) > 1e6


def test_mlp_size():
    assert count(MLP, shape=(1, 8, 8)) == 338_240
    assert count(MLP, shape=(1, 8, 8), num_classes=10) == 338_240 + 10 * 128


def test_importing_the_package_does_not_import_torch():
    code = "import sys, flowkit.nets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="Unet"):
        flowkit.nets.Unet  # noqa: B018
