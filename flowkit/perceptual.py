"""Perceptual distances between pictures: LPIPS, or any feature network, frozen.

    distance(a, b) = sum over layers, mean over places, of sum_c w_c (f_c(a) - f_c(b))^2

with f a layer's features, of unit length along their channels at each place (Zhang et al., 2018,
arXiv:1801.03924).  The weights w come with the lpips package, the networks from torchvision.
"""

from __future__ import annotations

import copy
import os
import pickle
import urllib.request
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkit.errors import FlowkitError
from flowkit.registry import look_up

__all__ = ["LPIPS", "FeatureDistance"]

_URL = "https://download.pytorch.org/models/"
_FILES = {  # the digits are the beginning of the file's sha256
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
_SIZE = 224
_TIMEOUT = 10.0  # seconds to find out that there is no network


class FeatureDistance(nn.Module):
    """Distance of pictures in the features of any network; the network is copied and frozen.

    net: pictures (B, C, H, W) in [-1, 1] -> features (B, channels, ...), or a sequence of them.
    size: the pictures are resized to size x size first, bilinearly; None leaves them.
    Called with a, b: (B, C, H, W); returns (B,), float32.  Gradients reach both.
    """

    def __init__(self, net: nn.Module, *, size: int | None = None) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).requires_grad_(False).eval()
        self.size = size

    def train(self, mode: bool = True) -> FeatureDistance:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        found = zip(self._features(a), self._features(b), strict=True)
        return sum((_unlike(f, g).sum(1) for f, g in found), start=a.new_zeros(len(a)))

    def _features(self, pictures: Tensor) -> Sequence[Tensor]:
        found = self.net(_resize(pictures.float(), self.size))
        return [found] if isinstance(found, Tensor) else found


class LPIPS(nn.Module):
    """LPIPS v0.1 of the lpips package: the same numbers, without its NaN gradient where a place
    has no feature at all.

    net: "vgg", "alex" or "squeeze".  weights: torchvision's file of that network; default: the
    one in torch hub's folder, fetched when it is not there.
    pooling: "max", as lpips has it, or "average", as piq's LPIPS(replace_pooling=True), which rfpp
    trains with; the two differ.  size: pictures are resized to size x size; None leaves them.
    Called with a, b: (B, 1 or 3, H, W) in [-1, 1], not clamped; returns (B,), float32.
    Raises FlowkitError when the file is not there and cannot be fetched, or is another one.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: str = "vgg",
        *,
        weights: str | os.PathLike[str] | None = None,
        pooling: str = "max",
        size: int | None = _SIZE,
    ) -> None:
        super().__init__()
        file = look_up("LPIPS network", net, _FILES)
        if pooling not in ("max", "average"):
            raise FlowkitError(f"pooling must be 'max' or 'average', got {pooling!r}")
        self.size = size
        self.trunk, channel_weights = _trunk(net, _weights_file(file, weights))
        if pooling == "average":
            _average_pooling(self.trunk)
        for i, weight in enumerate(channel_weights):
            self.register_buffer(f"w{i}", weight, persistent=False)
        # ImageNet's mean and standard deviation, for pictures in [-1, 1]
        for name, value in ("mean", (-0.030, -0.088, -0.188)), ("std", (0.458, 0.448, 0.450)):
            self.register_buffer(name, torch.tensor(value).reshape(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        found = zip(self._features(a), self._features(b), strict=True)
        total = a.new_zeros(len(a), dtype=torch.float32)
        for i, (f, g) in enumerate(found):
            total = total + _unlike(f, g) @ self.get_buffer(f"w{i}")
        return total

    def _features(self, pictures: Tensor) -> Sequence[Tensor]:
        if pictures.ndim != 4 or pictures.shape[1] not in (1, 3):
            raise FlowkitError(
                f"LPIPS takes pictures (B, 1 or 3, H, W), got {tuple(pictures.shape)}; "
                "for anything else pass a feature network of your own"
            )
        pictures = _resize(pictures.float(), self.size)
        return self.trunk((pictures - self.mean) / self.std)


def _unlike(f: Tensor, g: Tensor) -> Tensor:
    """Squared difference of unit features, averaged over places: (B, c, *) twice -> (B, c)."""
    difference = F.normalize(f.float(), dim=1, eps=1e-10) - F.normalize(g.float(), dim=1, eps=1e-10)
    return difference.square().reshape(*f.shape[:2], -1).mean(2)


def _resize(pictures: Tensor, size: int | None) -> Tensor:
    if size is None:
        return pictures
    return F.interpolate(pictures, size=(size, size), mode="bilinear", align_corners=False)


def _weights_file(name: str, given: str | os.PathLike[str] | None) -> Path:
    """The file of torchvision's weights: what was given, or torch hub's, fetched if need be."""
    if given is not None:
        path = Path(given)
        if not path.is_file():
            raise FlowkitError(f"no LPIPS weights at {path}; expected torchvision's {name}")
        return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        digits = name.rpartition("-")[2].removesuffix(".pth")
        try:
            probe = urllib.request.Request(_URL + name, method="HEAD")
            urllib.request.urlopen(probe, timeout=_TIMEOUT).close()
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(_URL + name, str(path), hash_prefix=digits)
        except (OSError, RuntimeError) as error:  # RuntimeError: another hash
            raise FlowkitError(
                f"LPIPS needs {name} (sha256 {digits}...) and cannot fetch it ({error}); download "
                f"{_URL}{name} elsewhere and put it at {path}, or give weights=its path"
            ) from None
    return path


def _trunk(net: str, file: Path) -> tuple[nn.Module, list[Tensor]]:
    """The network with the weights of `file`, and lpips' channel weights, one (c,) a layer."""
    try:
        import lpips
    except ImportError as error:
        raise FlowkitError(f"LPIPS needs the lpips package ({error}); pip install lpips") from None
    networks = lpips.pretrained_networks
    build = {"vgg": networks.vgg16, "alex": networks.alexnet, "squeeze": networks.squeezenet}[net]
    with torch.device("meta"), warnings.catch_warnings():  # no random weights, which take seconds
        warnings.simplefilter("ignore")  # lpips calls torchvision in its old way
        trunk = build(pretrained=False)
    channel_weights = _load(Path(lpips.__path__[0]) / "weights" / "v0.1" / f"{net}.pth")
    state = _load(file)
    try:  # slice2.5.weight in lpips is features.5.weight in torchvision
        named = {name: state[f"features.{name.partition('.')[2]}"] for name in trunk.state_dict()}
        trunk.load_state_dict(named, assign=True)
    except (KeyError, RuntimeError):
        raise FlowkitError(f"{file} does not hold torchvision's {_FILES[net]}") from None
    order = sorted(channel_weights)  # lin0.model.1.weight, ...
    return trunk, [channel_weights[name].flatten().float() for name in order]


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FlowkitError(f"cannot read weights from {file}: {reason}") from None


def _average_pooling(trunk: nn.Module) -> None:
    """Put average pooling in the place of max pooling."""
    for part in list(trunk.modules()):
        for name, child in part.named_children():
            if isinstance(child, nn.MaxPool2d):
                options = (child.kernel_size, child.stride, child.padding, child.ceil_mode)
                setattr(part, name, nn.AvgPool2d(*options))
