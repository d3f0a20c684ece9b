"""DINOv2 (Oquab et al., 2023, arXiv:2304.07193): a vision transformer whose class token serves as
features, in the network of the Fréchet distance FD-DINOv2 (Stein et al., 2023, arXiv:2306.04675).

It takes the published state dicts (dinov2_vitl14_pretrain.pth) and transformers' files of the same
weights (facebook/dinov2-large).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowkit.eval.weights_files import WeightsFile, find_weights, load_into
from flowkit.registry import look_up

__all__ = ["SIZES", "DinoV2Net", "load_dinov2"]

_PATCH, _GRID = 14, 16  # 224 pixels
_OFFSET = 0.1  # patches, which the authors' code adds to the new grid's size

# width, depth, heads, gated feed-forward, transformers' name
SIZES: dict[str, tuple[int, int, int, bool, str]] = {
    "vits14": (384, 12, 6, False, "small"),
    "vitb14": (768, 12, 12, False, "base"),
    "vitl14": (1024, 24, 16, False, "large"),
    "vitg14": (1536, 40, 24, True, "giant"),
}


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, width = x.shape
        shaped = self.qkv(x).reshape(count, tokens, 3, self.heads, width // self.heads)
        q, k, v = shaped.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(count, tokens, width))


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Gated(nn.Module):
    """SwiGLU (Shazeer, 2020, arXiv:2002.05202), two thirds as wide, in multiples of 8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = (4 * width * 2 // 3 + 7) // 8 * 8
        self.w12, self.w3 = nn.Linear(width, 2 * inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class _LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, gated: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = _Attention(width, heads)
        self.ls1, self.ls2 = _LayerScale(width), _LayerScale(width)
        self.mlp = _Gated(width) if gated else _Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DinoV2Net(nn.Module):
    """Pictures (B, 3, 224, 224) of ImageNet's mean and deviation to class tokens (B, width).

    The places' embeddings are those of this size, which `convert` makes.
    """

    def __init__(self, width: int, depth: int, heads: int, gated: bool = False) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, _PATCH, _PATCH)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + _GRID**2, width))
        self.blocks = nn.ModuleList(_Block(width, heads, gated) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])


def load_dinov2(
    size: str, weights: str | os.PathLike[str] | None = None
) -> tuple[DinoV2Net, str, int]:
    """The network, the sha256 of its file and its width; weights: a file of either kind, or a
    folder of transformers.

    FlowkitError: no such size, no file, or one that holds something else.
    """
    width, depth, heads, gated, name = look_up("DINOv2 size", size, SIZES)
    title = f"dinov2_{size}"
    url = f"https://dl.fbaipublicfiles.com/dinov2/{title}/{title}_pretrain.pth"
    file = WeightsFile(f"{title}_pretrain.pth", "", url, hub=f"facebook/dinov2-{name}")
    path, digest = find_weights(file, weights)
    with torch.device("meta"):
        net = DinoV2Net(width, depth, heads, gated)
    net.to_empty(device="cpu")
    load_into(net, path, convert)
    return net, digest, width


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by either file's names, to the network's, with places of 224x224 pictures."""
    if "embeddings.cls_token" in state:
        state = _from_transformers(state)
    state = {name: value for name, value in state.items() if name != "mask_token"}
    state["pos_embed"] = _places(state["pos_embed"])
    return state


def _places(embedding: Tensor) -> Tensor:
    """The square grid of embeddings at 16x16, as the authors' code interpolates it."""
    side = round((embedding.shape[1] - 1) ** 0.5)
    if side == _GRID:
        return embedding
    grid = embedding[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scale = (_GRID + _OFFSET) / side
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([embedding[:, :1], grid.flatten(2).transpose(1, 2)], 1)


_NAMES = (  # transformers' parts of names, and the authors'
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("encoder.layer.", "blocks."),
    ("attention.output.dense", "attn.proj"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("mlp.weights_in", "mlp.w12"),
    ("mlp.weights_out", "mlp.w3"),
    ("layernorm.", "norm."),
)


def _from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for name, value in state.items():
        if ".attention.attention." in name:
            if ".query." not in name:
                continue
            kinds = [name.replace(".query.", f".{kind}.") for kind in ("query", "key", "value")]
            value = torch.cat([state[kind] for kind in kinds])
            name = name.replace("attention.attention.query", "attn.qkv")
        for theirs, ours in _NAMES:
            name = name.replace(theirs, ours)
        result[name] = value
    return result
