"""Feature extractors: pictures (B, C, H, W) in [-1, 1] to features (B, d), for set distances.

digits           the small network shipped in eval/weights, for 8x8 digits: 64 numbers
cifar-resnet20   a CIFAR-10 classifier's mean activations after each stage: 112 numbers, at any size
pixels           the pictures themselves
module:name      any callable or nn.Module of yours
"""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from flowkit.data import data_folder
from flowkit.errors import FlowkitError
from flowkit.registry import look_up

__all__ = ["DigitsNet", "Extractor", "ResNet20", "load_extractor"]

DIGITS_WEIGHTS = Path(__file__).parent / "weights" / "digits.safetensors"
RESNET20_SHA256 = "12fca82f"  # how the hash of akamaster's resnet20 file begins
BATCH = 500


class Extractor:
    """A frozen network that turns pictures into features, in batches of 500, without gradients.

    id: what it is, weights included, for records.  net: (B, C, H, W) in [-1, 1] -> (B, d).
    """

    def __init__(
        self, id: str, net: Callable[[Tensor], Tensor], device: torch.device | str
    ) -> None:
        self.id, self.device = id, torch.device(device)
        self.net = net
        if isinstance(net, nn.Module):
            self.net = net.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] of any float dtype -> (B, d) float32, on the extractor's device.

        FlowkitError: the network does not take pictures of this shape.
        """
        if not pictures.is_floating_point():
            raise FlowkitError(
                f"features {self.id!r} take floats in [-1, 1], got {pictures.dtype} pictures; "
                "map levels 0..255 by x / 127.5 - 1"
            )
        parts = pictures.split(BATCH)
        try:
            rows = [self.net(part.to(self.device, torch.float32)).float() for part in parts]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise FlowkitError(
                f"features {self.id!r} do not take pictures of shape {tuple(pictures.shape[1:])} "
                f"({str(error).splitlines()[0]}); choose others with evaluate.features"
            ) from error
        return torch.cat(rows)


class DigitsNet(nn.Module):
    """A classifier of 8x8 digits; its features are the 64 numbers before the last layer.

    Trained by eval/train_digits_features.py.  With the shipped weights the Fréchet distance of the
    1,297 training pictures to the 500 held-out ones is 5.1, of a Gaussian fitted to the training
    pictures 181, of clipped normal noise 300.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(1024, 64), nn.ReLU()),
        )
        self.classifier = nn.Linear(64, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 1, 8, 8) in [-1, 1] -> (B, 64)."""
        return self.features(pictures)


class ResNet20(nn.Module):
    """The CIFAR ResNet-20 with parameter-free shortcuts (He et al., 2015, arXiv:1512.03385, 4.2).

    Module names follow akamaster/pytorch_resnet_cifar10, whose weights it takes.  On JPEG copies
    of CIFAR-10, the Fréchet distance of 2,000 training to 2,000 test pictures is 0.13 at 32x32
    (uniform noise 63, accuracy 0.81), and 0.25 at 16x16 (noise 52, accuracy 0.64): the smaller
    size works, as a scale of its own.
    """

    mean: Tensor
    std: Tensor
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16)
        self.layer2 = _stage(16, 32)
        self.layer3 = _stage(32, 64)
        self.linear = nn.Linear(64, 10)
        self.register_buffer("mean", torch.tensor(self.MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(self.STD)[:, None, None], persistent=False)

    def stages(self, pictures: Tensor) -> list[Tensor]:
        """Mean activations after each stage: (B, 16), (B, 32), (B, 64)."""
        x = ((pictures + 1) / 2 - self.mean) / self.std
        h, means = F.relu(self.bn1(self.conv1(x))), []
        for stage in (self.layer1, self.layer2, self.layer3):
            h = stage(h)
            means.append(h.mean((2, 3)))
        return means

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 112)."""
        return torch.cat(self.stages(pictures), 1)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.extra = outputs // inputs, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        short = x[:, :, :: self.stride, :: self.stride]
        return F.relu(h + F.pad(short, (0, 0, 0, 0, self.extra // 2, self.extra // 2)))


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        _Block(inputs, outputs), _Block(outputs, outputs), _Block(outputs, outputs)
    )


def load_extractor(
    name: str, weights: str | os.PathLike[str] | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """The extractor of that name, ready to use.

    weights: a file to read instead of the usual one.  FlowkitError: no such extractor, or its
    weights are not there (which file, with which hash, belongs where) or not readable.
    """
    if weights is not None and (":" in name or name == "pixels"):
        raise FlowkitError(f"features {name!r} read no weights, got {os.fspath(weights)!r}")
    if ":" in name:
        return Extractor(name, _from_module(name), device)
    net, digest = look_up("features", name, _BUILDERS)(None if weights is None else Path(weights))
    return Extractor(f"{name}{digest and '@' + digest}", net, device)


def _pixels(weights: Path | None) -> tuple[nn.Module, str]:
    return nn.Flatten(), ""


def _digits(weights: Path | None) -> tuple[nn.Module, str]:
    path = weights or DIGITS_WEIGHTS
    digest = _sha256(path, "digits.safetensors, which eval/train_digits_features.py makes,")
    net = DigitsNet()
    _load(net, path, load_file)
    return net, digest


def _resnet20(weights: Path | None) -> tuple[nn.Module, str]:
    path = weights or data_folder() / "weights" / "resnet20-12fca82f.th"
    source = "akamaster/pytorch_resnet_cifar10"
    what = f"{source}'s resnet20-{RESNET20_SHA256}.th (sha256 {RESNET20_SHA256}...)"
    digest = _sha256(path, what)
    if weights is None and not digest.startswith(RESNET20_SHA256):
        raise FlowkitError(
            f"{path} has sha256 {digest}..., expected {RESNET20_SHA256}...; fetch it again"
        )
    net = ResNet20()
    _load(net, path, _read_checkpoint)
    return net, digest


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    state = loaded.get("state_dict", loaded)
    return {name.removeprefix("module."): value for name, value in state.items()}


# What reading raises on damaged files, then on sound ones that hold something else.
_UNREADABLE = (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError)
_UNSUITED = (KeyError, AttributeError, TypeError)


def _load(net: nn.Module, path: Path, read: Callable[[Path], dict[str, Tensor]]) -> None:
    try:
        net.load_state_dict(read(path))
    except (*_UNREADABLE, *_UNSUITED) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise FlowkitError(f"{path} does not hold a {type(net).__name__}: {reason}") from None


def _sha256(path: Path, what: str) -> str:
    """The first 12 digits of a file's hash."""
    if not path.is_file():
        raise FlowkitError(
            f"no feature weights at {path}; put {what} there, or set evaluate.weights"
        )
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _from_module(name: str) -> Callable[[Tensor], Tensor]:
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # a script's own folder stands there in its place
        sys.path.append(os.getcwd())
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise FlowkitError(f"features {name!r}: {error}; expected module:attribute") from None
    if not callable(found):
        raise FlowkitError(
            f"features {name!r} are a {type(found).__name__}; "
            "expected a function of pictures, an nn.Module or its class"
        )
    return found() if isinstance(found, type) else found


_BUILDERS: dict[str, Callable[[Path | None], tuple[nn.Module, str]]] = {
    "digits": _digits,
    "cifar-resnet20": _resnet20,
    "pixels": _pixels,
}
