"""The critic of distribution matching: a score network of the student, and a head that tells its
pictures from real ones by a network's inner features.

Yin et al., 2024, arXiv:2405.14867: features of the fake-score network, which the head's loss
trains too, or of the frozen teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from flowkit.errors import FlowkitError
from flowkit.velocity import VelocityModel

__all__ = ["Critic", "Features", "Head", "Points", "check_layers", "middle_layers"]


class Points(NamedTuple):
    """Where networks are asked: x_t (B, *), t (B,), and conditioning, name -> (B, ...)."""

    x_t: Tensor
    t: Tensor
    cond: dict[str, Tensor]

    def join(self, other: Points) -> Points:
        """Both, one after the other."""
        cond = {name: torch.cat([self.cond[name], other.cond[name]]) for name in self.cond}
        return Points(torch.cat([self.x_t, other.x_t]), torch.cat([self.t, other.t]), cond)


class Features:
    """What named layers of a network put out in its last forward pass."""

    def __init__(self, net: nn.Module, layers: Sequence[str]) -> None:
        check_layers(net, layers)
        self._found: dict[str, Tensor] = {}
        self.layers = list(layers)
        for name in layers:
            net.get_submodule(name).register_forward_hook(self._keeper(name))

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            self._found[name] = output[0] if isinstance(output, tuple) else output

        return keep

    def take(self) -> list[Tensor]:
        """The outputs, (B, C, H, W), (B, N, C) or (B, C) each, forgotten here."""
        found = [self._found.pop(name) for name in self.layers]
        return [feature.float() for feature in found]


def check_layers(net: nn.Module, layers: Sequence[str]) -> None:
    """FlowkitError for a layer that the network has not."""
    known = [name for name, _ in net.named_modules() if name]
    for name in layers:
        if name not in known:
            near = ", ".join(n for n in known if n.count(".") < 2) or "none"
            raise FlowkitError(
                f"gan.layers: {type(net).__name__} has no layer {name!r}; its layers: {near}"
            )


def middle_layers(net: nn.Module) -> list[str]:
    """The layer whose features a discriminator reads: a U-Net's bottleneck, else the middle block.

    Raises FlowkitError for a network without any of the usual names.
    """
    parts = dict(net.named_children())
    if "mid_block" in parts:
        return ["mid_block"]
    for name in ("mid_blocks", "blocks", "transformer_blocks"):
        blocks = parts.get(name)
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            place = len(blocks) - 1 if name == "mid_blocks" else len(blocks) // 2
            return [f"{name}.{place}"]
    raise FlowkitError(
        f"{type(net).__name__} has no bottleneck or list of blocks to read features from; "
        f"name layers in gan.layers, such as {', '.join(parts) or 'none: it has no layers'}"
    )


class Head(nn.Module):
    """Features of one layer to one logit a sample, large for real pictures.

    Maps (B, C, H, W) of at least 2 x 2: DMD2's 4 x 4 convolutions with strides 2 and 4, shorter
    where the map is smaller.  Tokens (B, N, C) and vectors (B, C): the same as an MLP, averaged.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.is_map = len(shape) == 4 and min(shape[2:]) >= 2
        channels = shape[1] if len(shape) == 4 else shape[-1]
        groups = _groups(channels)
        layers: list[nn.Module]
        if self.is_map:
            second = min(4, min(shape[2:]) // 2)
            layers = [
                nn.Conv2d(channels, channels, 4, stride=2, padding=1),
                nn.Conv2d(channels, channels, second, stride=second),
                nn.Conv2d(channels, 1, 1),
            ]
        else:
            layers = [nn.Linear(channels, channels), nn.Linear(channels, channels)]
            layers += [nn.Linear(channels, 1)]
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.GroupNorm(groups, channels) for _ in range(2))

    def forward(self, feature: Tensor) -> Tensor:
        """feature: as built for.  Returns (B, 1)."""
        if feature.ndim == 4 and not self.is_map:
            feature = feature.flatten(2).transpose(1, 2)
        count = len(feature)
        h = feature if self.is_map else feature.reshape(-1, feature.shape[-1])
        for layer, norm in zip(self.layers, self.norms, strict=False):
            h = nn.functional.silu(norm(layer(h)))
        return self.layers[-1](h).reshape(count, -1).mean(1, keepdim=True)


def _groups(channels: int) -> int:
    """32 groups as DMD2, or fewer: a group of few numbers is normalised to next to nothing."""
    fits = (g for g in (32, 16, 8, 4, 2) if channels % g == 0 and channels // g >= 8)
    return next(fits, 1)


class Critic(nn.Module):
    """The fake-score network, and with it the discriminator where there is one.

    fake: a trainable copy of the teacher.  teacher: read for features of "teacher", never trained
    and no part of the state.  layers: names of the layers that are read, [] for no discriminator.
    shape: (C, H, W) of a picture.  cond: conditioning of one, to try the network with.
    """

    def __init__(
        self,
        fake: VelocityModel,
        teacher: VelocityModel,
        *,
        layers: Sequence[str],
        features: Literal["fake", "teacher"],
        shape: Sequence[int],
        cond: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.fake = fake
        self._read = [fake if features == "fake" else teacher]  # in a list: not registered
        self.heads = nn.ModuleList()
        self.features = Features(self._read[0].net, layers) if layers else None
        if self.features is not None:
            parameter = next(self._read[0].parameters())
            picture = torch.zeros(1, *shape, device=parameter.device)
            with torch.no_grad():
                self._read[0](picture, 0.5, **(cond or {}))
            self.heads.extend(Head(feature.shape) for feature in self.features.take())

    @property
    def net(self) -> nn.Module:
        """The fake-score network's own, which options such as dropout and compile are for."""
        return self.fake.net

    def forward(
        self, asked: Points | None, judged: Points | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(velocity at `asked`, logits (B, heads) at `judged`); one pass where both are the same.

        Everything goes through this one call, as a distributed wrapper wants it.
        """
        if judged is None or self.features is None:
            return (None if asked is None else self._ask(self.fake, asked)), None
        if asked is None:
            self._ask(self._read[0], judged)
            return None, self._judge()
        if self._read[0] is not self.fake:
            velocity = self._ask(self.fake, asked)
            self._ask(self._read[0], judged)
            return velocity, self._judge()
        together = asked if asked is judged else asked.join(judged)
        velocity, logits = self._ask(self.fake, together), self._judge()
        return velocity[: len(asked.t)], logits[-len(judged.t) :]

    def _ask(self, model: VelocityModel, points: Points) -> Tensor:
        return model(points.x_t, points.t, **points.cond)

    def _judge(self) -> Tensor:
        features = self.features.take() if self.features is not None else []
        logits = [head(feature) for head, feature in zip(self.heads, features, strict=True)]
        return torch.cat(logits, 1)
