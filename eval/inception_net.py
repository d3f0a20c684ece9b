"""The Inception network of December 2015 behind FID, sFID, IS and KID (Szegedy et al., 2015,
arXiv:1512.00567, as TensorFlow published it; not torchvision's, which was trained and pools
otherwise).

Its own ways: average pools leave the border's padding out of the mean, the last block pools by
maximum, there are 1008 classes.  It takes the two files in which its weights go around: the
PyTorch port's state dict, and the TorchScript archive; batch norms are folded into convolutions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowkit.eval.weights_files import WeightsFile, find_weights, load_into

__all__ = ["PORT", "SCRIPT", "InceptionNet", "folded", "load_inception"]

PORT = WeightsFile(
    "pt_inception-2015-12-05-6726825d.pth",
    "6726825d",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    aliases=("weights-inception-2015-12-05-6726825d.pth",),
)
SCRIPT = WeightsFile(
    "inception-2015-12-05.pt",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
)
_EPSILON = 1e-3  # of its batch norms
_CLASSES = 1008

Kernel = int | tuple[int, int]
Step = tuple[int, Kernel] | tuple[int, Kernel, int]  # channels out, kernel, stride


class _Fork(NamedTuple):
    """1x3 and 3x1 side by side on one input."""

    outputs: int  # channels of each


class _Conv(nn.Conv2d):
    """Convolution, folded batch norm, ReLU.  script: its name in the TorchScript archive."""

    def __init__(self, inputs: int, step: Step, script: str) -> None:
        outputs, kernel, stride = (*step, 1)[:3]
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if stride == 1 else 0
        super().__init__(inputs, outputs, (height, width), stride, padding)
        self.script = script

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x), inplace=True)


class _Mixed(nn.Module):
    """Towers of convolutions on one input, their outputs side by side.

    pool: "average" or "max" and the channels of the convolution behind it, or None for a max
    pool that halves.
    """

    def __init__(
        self,
        inputs: int,
        towers: dict[str, list[Step | _Fork]],
        pool: tuple[str, int] | None,
        *,
        script: str,
        joint: str = ".",
    ) -> None:
        super().__init__()
        self.pool, self.towers = pool, dict.fromkeys(towers, 0)
        number = 0
        for name, steps in towers.items():
            self.towers[name] = len(steps)
            title = f"{script}."
            if len(steps) > 1:
                title += ("tower" if number == 0 else f"tower_{number}") + joint
                number += 1
            channels = inputs
            for i, step in enumerate(steps):
                key = f"{name}_{i + 1}" if len(steps) > 1 else name
                if isinstance(step, _Fork):
                    [out] = step
                    self.add_module(f"{key}a", _Conv(channels, (out, (1, 3)), f"{title}mixed_conv"))
                    other = _Conv(channels, (out, (3, 1)), f"{title}mixed_conv_1")
                    self.add_module(f"{key}b", other)
                else:
                    self.add_module(key, _Conv(channels, step, f"{title}conv" + f"_{i}" * (i > 0)))
                channels = step[0]
        if pool is not None:
            self.branch_pool = _Conv(inputs, (pool[1], 1), f"{script}.tower_{number}{joint}conv")

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([*self._convolved(x), self._pooled(x)], 1)

    def _convolved(self, x: Tensor) -> Iterator[Tensor]:
        for name, length in self.towers.items():
            h = x
            for i in range(1, length + 1):
                key = f"{name}_{i}" if length > 1 else name
                if hasattr(self, key):
                    h = getattr(self, key)(h)
                else:
                    h = torch.cat([getattr(self, f"{key}{side}")(h) for side in "ab"], 1)
            yield h

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool is None:
            return F.max_pool2d(x, 3, 2)
        if self.pool[0] == "max":
            return self.branch_pool(F.max_pool2d(x, 3, 1, 1))
        return self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))


def _mixed_a(inputs: int, pool: int, script: str) -> _Mixed:
    towers: dict[str, list[Step | _Fork]] = {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
    }
    return _Mixed(inputs, towers, ("average", pool), script=script)


def _mixed_b(inputs: int, script: str) -> _Mixed:
    towers: dict[str, list[Step | _Fork]] = {
        "branch3x3": [(384, 3, 2)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)],
    }
    return _Mixed(inputs, towers, None, script=script)


def _mixed_c(width: int, script: str) -> _Mixed:
    row, column = (1, 7), (7, 1)
    towers: dict[str, list[Step | _Fork]] = {
        "branch1x1": [(192, 1)],
        "branch7x7": [(width, 1), (width, row), (192, column)],
        "branch7x7dbl": [(width, 1), *((width, k) for k in (column, row, column)), (192, row)],
    }
    return _Mixed(768, towers, ("average", 192), script=script)


def _mixed_d(script: str) -> _Mixed:
    towers: dict[str, list[Step | _Fork]] = {
        "branch3x3": [(192, 1), (320, 3, 2)],
        "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)],
    }
    return _Mixed(768, towers, None, script=script)


def _mixed_e(inputs: int, pool: str, script: str) -> _Mixed:
    towers: dict[str, list[Step | _Fork]] = {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), _Fork(384)],
        "branch3x3dbl": [(448, 1), (384, 3), _Fork(384)],
    }
    return _Mixed(inputs, towers, (pool, 192), script=script, joint="_")


class InceptionNet(nn.Module):
    """Pictures of 299x299, scaled to about [-1, 1], to Inception's activations."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, (32, 3, 2), "conv")
        self.Conv2d_2a_3x3 = _Conv(32, (32, 3), "conv_1")
        self.Conv2d_2a_3x3.padding = (0, 0)
        self.Conv2d_2b_3x3 = _Conv(32, (64, 3), "conv_2")
        self.Conv2d_3b_1x1 = _Conv(64, (80, 1), "conv_3")
        self.Conv2d_4a_3x3 = _Conv(80, (192, 3), "conv_4")
        self.Conv2d_4a_3x3.padding = (0, 0)
        self.Mixed_5b = _mixed_a(192, 32, "mixed")
        self.Mixed_5c = _mixed_a(256, 64, "mixed_1")
        self.Mixed_5d = _mixed_a(288, 64, "mixed_2")
        self.Mixed_6a = _mixed_b(288, "mixed_3")
        self.Mixed_6b = _mixed_c(128, "mixed_4")
        self.Mixed_6c = _mixed_c(160, "mixed_5")
        self.Mixed_6d = _mixed_c(160, "mixed_6")
        self.Mixed_6e = _mixed_c(192, "mixed_7")
        self.Mixed_7a = _mixed_d("mixed_8")
        self.Mixed_7b = _mixed_e(1280, "average", "mixed_9")
        self.Mixed_7c = _mixed_e(2048, "max", "mixed_10")
        self.fc = nn.Linear(2048, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 299, 299) -> features (B, 2048)."""
        return self.parts(x)["features"]

    def parts(self, x: Tensor) -> dict[str, Tensor]:
        """features (B, 2048); logits (B, 1008) without the bias, as the Inception Score takes
        them; spatial (B, 2023): seven channels of 17x17 for sFID, in TensorFlow's order."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        outer = self.Mixed_6d(x)
        spatial = outer[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(outer))))
        features = x.mean((2, 3))
        return {"features": features, "logits": features @ self.fc.weight.T, "spatial": spatial}


def folded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by either file's names, as InceptionNet's: each batch norm, which is a scale and a
    shift by now, goes into the convolution before it.  KeyError: a tensor that is not there."""
    port = "fc.weight" in state
    result = {"fc.weight": state["fc.weight" if port else "output.weight"]}
    result["fc.bias"] = state["fc.bias" if port else "output.bias"]
    with torch.device("meta"):
        convolutions = InceptionNet().named_modules()
    for name, module in convolutions:
        if not isinstance(module, _Conv):
            continue
        if port:
            keys = ["conv.weight", "bn.running_mean", "bn.running_var", "bn.bias", "bn.weight"]
            tensors = [state[f"{name}.{key}"].double() for key in keys]
        else:  # without a learned scale
            keys = ["weight", "mean", "var", "beta"]
            tensors = [state[f"layers.{module.script}.{key}"].double() for key in keys]
        weight, mean, variance, shift, *scale = tensors
        factor = (variance + _EPSILON).rsqrt() * (scale[0] if scale else 1)
        result[f"{name}.weight"] = (weight * factor[:, None, None, None]).float()
        result[f"{name}.bias"] = (shift - mean * factor).float()
    return result


def load_inception(weights: str | os.PathLike[str] | None = None) -> tuple[InceptionNet, str]:
    """The network and the sha256 of its file: `weights`, or what lies in the usual places.

    FlowkitError: no file, or one that holds something else.
    """
    path, digest = find_weights(PORT, weights, SCRIPT)
    with torch.device("meta"):
        net = InceptionNet()
    net.to_empty(device="cpu")
    load_into(net, path, folded)
    return net, digest
