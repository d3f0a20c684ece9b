"""Feature extractors: pictures to features (B, d), behind one interface, for set distances.

inception             Inception of 2015, 2048 numbers, resized by clean-fid's rule; for the older
                      rules inception:legacy_pytorch and inception:legacy_tensorflow
dinov2-vitl14         DINOv2's class token, 1024 numbers (also -vits14, -vitb14, -vitg14)
clip-vitl14-336       CLIP's picture embedding, 768 numbers (also -vitl14, -vitb16, -vitb32)
                      these two by Pillow's 8-bit resize; dinov2-vitl14:clean is on floats
lpips-alex            features at 64x64 whose squared distance is LPIPS (also -vgg, -squeeze)
digits                the small network shipped in eval/weights, for 8x8 digits: 64 numbers
cifar-resnet20        a CIFAR-10 classifier's mean activations after each stage: 112 numbers, at
                      any size (also cifar-resnet56)
pixels                the pictures themselves
module:name           any callable or nn.Module of yours
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from flowkit.errors import FlowkitError
from flowkit.eval.classifiers import DigitsNet, ResNet20, ResNet56
from flowkit.eval.own_code import NO_SOURCE, own_sha256
from flowkit.eval.recipes import DIGITS_WEIGHTS, Recipe, Weights, full_name, make_recipe
from flowkit.eval.resize import exact_float32
from flowkit.pictures import to_uint8
from flowkit.registry import import_named

__all__ = [
    "DIGITS_WEIGHTS",
    "DigitsNet",
    "Extractor",
    "Recipe",
    "ResNet20",
    "ResNet56",
    "load_extractor",
]


class Extractor:
    """A frozen network that turns pictures into features, in batches, without gradients.

    id: what it is, the beginning of weights_sha256 included, for records; "(no source)" for code
    of your own that cannot be read, which has no hash.
    preprocessing: the named rule by which pictures reach the network's size ("none": they stay).
    weights_sha256: of the weights' file, or of your own code and weights; "" where there is none.
    dim: d, None before the first pictures of a network of any size.  net: (B, C, H, W) in [-1, 1]
    -> (B, d); its method `parts`, if any, gives a dict with features and more.

    Floats in [-1, 1] and uint8 levels give the same features wherever pictures are resized: floats
    are rounded to levels first.  Elsewhere levels become x / 127.5 - 1 and floats stay what they
    are.  Networks of colour see a grey picture (1 channel) as three equal ones.  All arithmetic is
    float32, without TF32 or autocast.
    """

    def __init__(
        self,
        id: str,
        net: Callable[[Tensor], Tensor] | Recipe,
        device: torch.device | str,
    ) -> None:
        recipe = net if isinstance(net, Recipe) else Recipe(net)
        self.id, self.device, self.net = id, torch.device(device), recipe.net
        self.preprocessing, self.weights_sha256 = recipe.preprocessing, recipe.sha256
        self.dim, self.recipe = recipe.dim, recipe
        if isinstance(self.net, nn.Module):
            self.net = self.net.to(self.device).eval().requires_grad_(False)
        self._format = torch.contiguous_format
        if recipe.channels_last and self.device.type == "cpu":
            self._format = torch.channels_last
            cast(nn.Module, self.net).to(memory_format=self._format)

    @property
    def reusable(self) -> bool:
        """Whether its id tells it from another, so that kept features may serve again."""
        return not self.id.endswith(NO_SOURCE)

    def __call__(self, pictures: Tensor) -> Tensor:
        """(B, C, H, W), uint8 or floats in [-1, 1] -> (B, d) float32, on the extractor's device.

        FlowkitError: the network does not take such pictures, or they are not finite.
        """
        return self.parts(pictures)["features"]

    @torch.no_grad()
    def parts(self, pictures: Tensor) -> dict[str, Tensor]:
        """All that one pass gives, each (B, ...) float32: features, and where the net has them
        logits (of the Inception nets (B, 1008), without bias) and spatial (B, 2023).

        FlowkitError: as above.
        """
        self._check(pictures)
        try:
            with exact_float32(), torch.autocast(self.device.type, enabled=False):
                found = [self._run(part) for part in pictures.split(self.recipe.batch)]
        except (torch.OutOfMemoryError, FlowkitError):
            raise
        except RuntimeError as error:
            raise FlowkitError(
                f"features {self.id!r} do not take pictures of shape {tuple(pictures.shape[1:])} "
                f"({str(error).splitlines()[0]}); choose others with features=NAME "
                "(evaluate.features of a trainer)"
            ) from error
        joined = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        self.dim = joined["features"].shape[1]
        return joined

    def _run(self, pictures: Tensor) -> dict[str, Tensor]:
        pictures, prepare = pictures.to(self.device), self.recipe.prepare
        if prepare is None:
            x = pictures.float()
            x = x / 127.5 - 1 if pictures.dtype == torch.uint8 else x
        else:
            levels = pictures if pictures.dtype == torch.uint8 else to_uint8(pictures)
            x = prepare(levels.expand(-1, 3, -1, -1)).contiguous(memory_format=self._format)
        parts = getattr(self.net, "parts", None)
        found = parts(x) if callable(parts) else {"features": self.net(x)}
        if found["features"].ndim != 2 or len(found["features"]) != len(pictures):
            raise FlowkitError(
                f"features {self.id!r} turned {tuple(pictures.shape)} into "
                f"{tuple(found['features'].shape)}; expected (B, d), B being {len(pictures)}"
            )
        return {name: value.float() for name, value in found.items()}

    def _check(self, pictures: Tensor) -> None:
        shape = tuple(pictures.shape)
        if pictures.dtype != torch.uint8 and not pictures.is_floating_point():
            raise FlowkitError(
                f"features {self.id!r} take floats in [-1, 1] or uint8 levels, "
                f"got {pictures.dtype} pictures"
            )
        if len(shape) == 4 and shape[1] == 4:
            raise FlowkitError(
                f"features {self.id!r} take no RGBA pictures, got {shape}; "
                "put them on a background of your choice first"
            )
        if self.recipe.prepare is None:
            return
        if len(shape) != 4 or shape[1] not in (1, 3):
            raise FlowkitError(f"features {self.id!r} take pictures (B, 1 or 3, H, W), got {shape}")


def load_extractor(
    name: str, weights: Weights = None, device: torch.device | str = "cpu"
) -> Extractor:
    """The extractor of that name, ready to use.

    weights: a file (for DINOv2 and CLIP a folder of transformers) to read instead of the usual
    one, which "auto" is too.  FlowkitError: no such extractor, or its weights are not there and
    cannot be fetched (which file, with which hash, belongs where), or not readable.
    """
    full = full_name(name)
    if weights is not None and full in (None, "pixels"):
        raise FlowkitError(f"features {name!r} read no weights, got {os.fspath(weights)!r}")
    recipe = _own(name) if full is None else make_recipe(full, weights)
    digest = recipe.sha256[:12]
    told = NO_SOURCE if full is None and not digest else digest and f"@{digest}"
    return Extractor(f"{full or name}{told}", recipe, device)


def _own(name: str) -> Recipe:
    """With a hash of the code and the weights: an untrained network differs from run to run."""
    found = import_named("features", name)
    net = found() if isinstance(found, type) else found
    return Recipe(net, own_sha256(name, net) or "")
