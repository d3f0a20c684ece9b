"""Where EDM and score_sde keep each tensor of our networks, and which network a name list is.

EDM names a block by its resolution (`enc.32x32_block0.conv0.weight`) and keeps q, k, v in one
convolution, interleaved channel by channel.  score_sde numbers the modules in the order in which
they were made (`all_modules.7.Conv_0.weight`) and has linear maps with transposed weights (NIN).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.nets.adm import ADM
from flowkit.nets.ncsnpp import NCSNpp
from flowkit.nets.unet_blocks import ResBlock

__all__ = ["Source", "edm_config", "edm_sources", "score_sde_config", "score_sde_sources"]


@dataclass(frozen=True)
class Source:
    """The foreign tensor that becomes one of ours, and how."""

    key: str
    convert: Callable[[Tensor], Tensor] = lambda tensor: tensor


def _slice_qkv(index: int) -> Callable[[Tensor], Tensor]:
    """Row c of q, k or v is row 3 c + index of EDM's convolution, for any number of heads."""
    return lambda rows: rows.flatten(1)[index::3] if rows.ndim > 1 else rows[index::3]


def _transposed(rows: Tensor) -> Tensor:
    return rows.T


def _both(ours: str, theirs: str) -> dict[str, Source]:
    return {f"{ours}.{leaf}": Source(f"{theirs}.{leaf}") for leaf in ("weight", "bias")}


def _residual(block: ResBlock, ours: str, theirs: str, names: str) -> dict[str, Source]:
    """norm_1, conv_1, emb, norm_2, conv_2 and the shortcut, whose foreign names `names` lists."""
    parts = ["norm_1", "conv_1", "emb", "norm_2", "conv_2"]
    parts += ["shortcut"] if block.shortcut is not None else []
    table: dict[str, Source] = {}
    for part, name in zip(parts, names.split(), strict=False):
        table |= _both(f"{ours}.{part}", f"{theirs}.{name}")
    return table


def _numbered(net: NCSNpp | ADM, part: str) -> Iterator[tuple[str, ResBlock]]:
    for i, block in enumerate(getattr(net, part)):
        yield f"{part}.{i}", block


def _edm_block(block: ResBlock, ours: str, theirs: str) -> dict[str, Source]:
    table = _residual(block, ours, theirs, "norm0 conv0 affine norm1 conv1 skip")
    if block.attn is None:
        return table
    table |= _both(f"{ours}.norm_attn", f"{theirs}.norm2")
    for index, name in enumerate(("to_q", "to_k", "to_v")):
        for leaf in ("weight", "bias"):
            table[f"{ours}.attn.{name}.{leaf}"] = Source(f"{theirs}.qkv.{leaf}", _slice_qkv(index))
    out = f"{ours}.attn.to_out.0"
    table[f"{out}.weight"] = Source(f"{theirs}.proj.weight", lambda rows: rows.flatten(1))
    table[f"{out}.bias"] = Source(f"{theirs}.proj.bias")
    return table


def edm_sources(net: NCSNpp | ADM) -> dict[str, Source]:
    """By our name: the tensor of NVlabs/edm's SongUNet (for NCSNpp) or DhariwalUNet (for ADM)."""

    def place(side: str, level: int) -> str:
        size = net.config.sample_size >> level
        return f"{side}.{size}x{size}"

    table = _both("time_mlp.0", "map_layer0") | _both("time_mlp.2", "map_layer1")
    table |= _both("conv_in", f"{place('enc', 0)}_conv")
    table["labels.table.weight"] = Source("map_label.weight", _transposed)
    table["augment.weight"] = Source("map_augment.weight")
    table["fourier.freqs"] = Source("map_noise.freqs")
    for part, side in (("down_blocks", "enc"), ("up_blocks", "dec")):
        count: dict[int, int] = {}
        for ours, block in _numbered(net, part):
            index = count[block.level] = count.get(block.level, -1) + (not block.resampling)
            name = block.resampling or f"block{index}"
            table |= _edm_block(block, ours, f"{place(side, block.level)}_{name}")
    for i, (ours, block) in enumerate(_numbered(net, "mid_blocks")):
        table |= _edm_block(block, ours, f"{place('dec', block.level)}_in{i}")
    for i in range(len(net.pyramid)):
        table |= _both(f"pyramid.{i}.conv", f"{place('enc', i + 1)}_aux_residual")
    for level in range(len(net.heads)):
        head = "out" if isinstance(net, ADM) else f"{place('dec', level)}_aux"
        table |= _both(f"heads.{level}.norm", f"{head}_norm")
        table |= _both(f"heads.{level}.conv", f"{head}_conv")
    return {key: table[key] for key in net.state_dict()}


def _shape(state: Mapping[str, Tensor], key: str, what: str) -> tuple[int, ...]:
    if key not in state:
        raise FlowkitError(
            f"this is not a state dict of {what}: it has no {key}; its names begin with "
            f"{', '.join(sorted(state)[:3])}"
        )
    return tuple(state[key].shape)


def edm_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Class and constructor arguments of the network that an EDM state dict belongs to."""
    what = "an EDM network"
    found = {int(m[1]) for key in state if (m := re.match(r"enc\.(\d+)x\1_block0\.", key))}
    sizes = sorted(found, reverse=True)
    size = sizes[0] if sizes else 0
    adm = "out_norm.weight" in state
    stem, in_channels = _shape(state, f"enc.{size}x{size}_conv.weight", what)[:2]
    width = stem if not adm else _shape(state, "map_layer0.weight", what)[1]
    head = "out_conv" if adm else f"dec.{size}x{size}_aux_conv"
    blocks = [_shape(state, f"enc.{n}x{n}_block0.conv0.weight", what)[0] for n in sizes]
    config: dict[str, Any] = {
        "class": "ADM" if adm else "NCSNpp",
        "sample_size": size,
        "in_channels": in_channels,
        "out_channels": _shape(state, f"{head}.weight", what)[0],
        "model_channels": width,
        "channel_mult": tuple(channels // width for channels in blocks),
        "num_blocks": sum(f"enc.{size}x{size}_block{i}.norm0.weight" in state for i in range(99)),
        "attention_resolutions": tuple(
            n for n in sizes if f"enc.{n}x{n}_block0.qkv.weight" in state
        ),
        "num_classes": state["map_label.weight"].shape[1] if "map_label.weight" in state else None,
        "augment_dim": state["map_augment.weight"].shape[1] if "map_augment.weight" in state else 0,
    }
    if adm:
        return config
    filters = [value for key, value in state.items() if key.endswith("resample_filter")]
    heads = sum(key.endswith("aux_conv.weight") for key in state)
    return config | {
        "embedding": "fourier" if "map_noise.freqs" in state else "positional",
        "encoder": "residual" if any("aux_residual" in key for key in state) else "standard",
        "decoder": "skip" if heads > 1 else "standard",
        "resample_filter": (1, 3, 3, 1) if any(f.shape[-1] == 4 for f in filters) else (1, 1),
    }


def score_sde_sources(net: NCSNpp) -> dict[str, Source]:
    """By our name: the tensor of yang-song/score_sde_pytorch's NCSNpp."""
    table: dict[str, Source] = {}
    number = iter(range(10**6))

    def place() -> str:
        return f"all_modules.{next(number)}"

    def add(block: ResBlock, ours: str) -> None:
        names = "GroupNorm_0 Conv_0 Dense_0 GroupNorm_1 Conv_1 Conv_2"
        table.update(_residual(block, ours, place(), names))
        if block.attn is not None:
            theirs = place()
            table.update(_both(f"{ours}.norm_attn", f"{theirs}.GroupNorm_0"))
            for i, name in enumerate(("to_q", "to_k", "to_v", "to_out.0")):
                key = f"{theirs}.NIN_{i}"
                table[f"{ours}.attn.{name}.weight"] = Source(f"{key}.W", _transposed)
                table[f"{ours}.attn.{name}.bias"] = Source(f"{key}.b")

    def add_head(level: int) -> None:
        table.update(_both(f"heads.{level}.norm", place()))
        table.update(_both(f"heads.{level}.conv", place()))

    if net.config.embedding == "fourier":
        table["fourier.freqs"] = Source(f"{place()}.W")
    for ours in ("time_mlp.0", "time_mlp.2", "conv_in"):
        table |= _both(ours, place())
    for ours, block in _numbered(net, "down_blocks"):
        add(block, ours)
        if block.resampling and len(net.pyramid):
            pyramid = f"pyramid.{block.level - 1}.conv"
            table |= _both(pyramid, f"{place()}.Conv2d_0")
    for ours, block in _numbered(net, "mid_blocks"):
        add(block, ours)
    for ours, block in _numbered(net, "up_blocks"):
        if block.resampling and block.level + 1 < len(net.heads):
            add_head(block.level + 1)
        add(block, ours)
    add_head(0)
    return table


def _score_sde_kinds(state: Mapping[str, Tensor]) -> list[str]:
    """What each numbered module is, in order."""
    marks = {
        "NIN_0.W": "attention",
        "Conv_1.weight": "block",
        "Conv2d_0.weight": "pyramid",
        "W": "fourier",
    }
    plain = {4: "conv", 2: "linear", 1: "norm"}
    modules: dict[int, set[str]] = {}
    for key in state:
        if found := re.fullmatch(r"all_modules\.(\d+)\.(.+)", key):
            modules.setdefault(int(found[1]), set()).add(found[2])
    kinds: list[str] = []
    for number in range(max(modules, default=-1) + 1):
        leaves = modules.get(number, set())
        kind = next((kind for mark, kind in marks.items() if mark in leaves), None)
        weight = state.get(f"all_modules.{number}.weight")
        kind = kind or (plain.get(weight.ndim) if weight is not None else None)
        if kind is None:
            raise FlowkitError(
                f"module all_modules.{number} ({', '.join(sorted(leaves)) or 'missing'}) is of no "
                "kind that flowkit's NCSNpp has; it has BigGAN blocks, progressive_input none or "
                "residual, progressive none or output_skip"
            )
        kinds.append(kind)
    return kinds


def score_sde_config(state: Mapping[str, Tensor], sample_size: int) -> dict[str, Any]:
    """Constructor arguments of NCSNpp for a score_sde state dict."""
    kinds = _score_sde_kinds(state)
    fourier = kinds[:1] == ["fourier"]
    first = 2 + fourier
    what = "score_sde's NCSNpp"
    stem, in_channels = _shape(state, f"all_modules.{first}.weight", what)[:2]
    outputs = _shape(state, f"all_modules.{len(kinds) - 1}.weight", what)[0]
    levels = _score_sde_levels(state, kinds)
    widths = [_shape(state, f"all_modules.{level[0]}.Conv_0.weight", what)[0] for level in levels]
    blocks = len(levels[0]) if len(levels) > 1 else (len(levels[0]) - 3) // 2
    attended = [kinds[level[0] + 1] == "attention" for level in levels]
    return {
        "sample_size": sample_size,
        "in_channels": in_channels,
        "out_channels": outputs,
        "model_channels": stem,
        "channel_mult": tuple(width // stem for width in widths),
        "num_blocks": blocks,
        "attention_resolutions": tuple(sample_size >> i for i, a in enumerate(attended) if a),
        "embedding": "fourier" if fourier else "positional",
        "encoder": "residual" if "pyramid" in kinds else "standard",
        "decoder": "skip" if kinds.count("norm") > 1 else "standard",
        "resample_filter": (1, 3, 3, 1) if fourier else (1, 1),
    }


def _score_sde_levels(state: Mapping[str, Tensor], kinds: list[str]) -> list[list[int]]:
    """Numbers of the plain blocks of each level; the last also has all that follow it.

    A block that resamples keeps its channels and yet has a convolution on its shortcut.
    """
    levels: list[list[int]] = [[]]
    for number in (i for i, kind in enumerate(kinds) if kind == "block"):
        shape = _shape(state, f"all_modules.{number}.Conv_0.weight", "score_sde's NCSNpp")
        shortcut = f"all_modules.{number}.Conv_2.weight" in state
        if shortcut and shape[0] == shape[1]:
            levels.append([])
        else:
            levels[-1].append(number)
    if not all(levels):
        raise FlowkitError("this is not a state dict of score_sde's NCSNpp: a level has no blocks")
    return levels[: len(levels) // 2 + 1]
