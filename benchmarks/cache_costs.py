"""What a step of a feature cache costs, computed and skipped, beside diffusers' TaylorSeer.

    python benchmarks/cache_costs.py

Networks with random weights.  Times are CPU seconds of one thread: all variants in turn, again and
again, the least of each, since other work on the machine only adds.  Freed memory stays with the
process: else page faults, some 50 ms of a step or none by chance, hide what a cache costs.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.hooks import TaylorSeerCacheConfig
from torch import Tensor

from flowkit.noise import keyed_noise
from flowkit.samplers import taylorseer

STEPS = 50
ROUNDS = 8
LEVELS = ("block", "each", "module")
PARTS = r"transformer_blocks\.\d+\.(attn|attn1|ff|ff_context)"
SINGLE = r"single_transformer_blocks\.\d+\."

Scope = Callable[[], AbstractContextManager[Any]]


class CachedDiffusersDiT(diffusers.DiTTransformer2DModel, diffusers.CacheMixin):
    """diffusers' DiT, which lacks it."""


class CachedSD3(diffusers.SD3Transformer2DModel, diffusers.CacheMixin):
    """Stable Diffusion 3's, which lacks it."""


def theirs(net: Any, config: Any) -> Scope:
    """A cache of diffusers on a network with CacheMixin."""

    @contextmanager
    def scope() -> Iterator[None]:
        net.enable_cache(config)
        try:
            with net.cache_context("only"):
                yield
        finally:
            net.disable_cache()

    return scope


def their_taylorseer(parts: list[str], skip: list[str] | None = None, **options: Any) -> Any:
    """diffusers' TaylorSeer as in the paper, on attention and MLP, its factors in float32."""
    return TaylorSeerCacheConfig(
        taylor_factors_dtype=torch.float32,
        cache_identifiers=parts,
        skip_predict_identifiers=skip,
        **options,
    )


def cpu_seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


@dataclass
class Network:
    """A network, its double for diffusers' caches, its inputs but for the time, their settings."""

    name: str
    net: Any
    other: Any
    inputs: dict[str, Any]
    time: Callable[[int], Tensor]
    parts: list[str]
    skip: list[str] | None = None

    def forward(self, net: Any, step: int) -> Callable[[], Any]:
        return lambda: net(**self.inputs, timestep=self.time(step))


def networks() -> Iterator[Network]:
    """DiT-S/2, and small ones of the kinds of Flux and Stable Diffusion 3, random weights."""

    def build(kind: type[Any], **config: Any) -> Any:
        torch.manual_seed(0)
        return kind(**config).eval()

    x = keyed_noise(0, range(4), (4, 32, 32))
    heads = {"num_attention_heads": 6, "attention_head_dim": 64}
    shape = heads | {"num_layers": 12, "sample_size": 32, "in_channels": 4}
    yield Network(
        "DiT-S/2, batch 4",
        build(diffusers.DiTTransformer2DModel, **shape),
        build(CachedDiffusersDiT, **shape),
        {"hidden_states": x, "class_labels": torch.arange(4)},
        lambda step: torch.full((4,), 1000.0 - 20 * step),
        [PARTS],
    )
    shape = heads | {"num_layers": 4, "num_single_layers": 8, "in_channels": 64}
    shape |= {"joint_attention_dim": 256, "pooled_projection_dim": 128, "guidance_embeds": True}
    flux = build(diffusers.FluxTransformer2DModel, axes_dims_rope=(16, 24, 24), **shape)
    yield Network(
        "Flux, 4 + 8 blocks, 256 + 64 tokens",
        flux,
        flux,
        {"hidden_states": keyed_noise(0, range(1), (256, 64))}
        | {"encoder_hidden_states": keyed_noise(1, range(1), (64, 256))}
        | {"pooled_projections": keyed_noise(2, range(1), (128,)), "guidance": torch.ones(1)}
        | {"img_ids": torch.zeros(256, 3), "txt_ids": torch.zeros(64, 3)},
        lambda step: torch.full((1,), 1 - step / STEPS),
        [PARTS, rf"{SINGLE}proj_out"],
        [rf"{SINGLE}(attn|proj_mlp)"],
    )
    shape = heads | {"num_layers": 8, "sample_size": 32, "in_channels": 16, "out_channels": 16}
    shape |= {"joint_attention_dim": 256, "caption_projection_dim": 384}
    shape |= {"pooled_projection_dim": 128, "pos_embed_max_size": 32}
    yield Network(
        "Stable Diffusion 3, 8 blocks, 256 + 64 tokens",
        build(diffusers.SD3Transformer2DModel, **shape),
        build(CachedSD3, **shape),
        {"hidden_states": keyed_noise(0, range(1), (16, 32, 32))}
        | {"encoder_hidden_states": keyed_noise(1, range(1), (64, 256))}
        | {"pooled_projections": keyed_noise(2, range(1), (128,))},
        lambda step: torch.full((1,), 1000.0 - 20 * step),
        [PARTS],
    )


def print_costs(rounds: int) -> None:
    """Of a step that is computed and of one that is skipped, over a step without a cache."""
    print("\n| network | cache, order 1 | computed | skipped | ms |\n|---|---|---|---|---|")
    for network in networks():
        # Computes steps 0 to 4 and 6 and forecasts from then on; ours forecasts from 5 on.
        config = their_taylorseer(
            network.parts, network.skip, cache_interval=STEPS, disable_cache_before_step=5
        )
        scopes: dict[str, Scope] = {
            level: lambda net=network.net, level=level: taylorseer(
                net, interval=STEPS, warmup=5, order=1, level=level
            )
            for level in LEVELS
        } | {"diffusers": theirs(network.other, config)}
        whole: list[float] = []
        costs: dict[str, list[tuple[float, float]]] = {name: [] for name in scopes}
        network.forward(network.net, 0)()
        for _ in range(rounds):
            for name, scope in scopes.items():
                net = network.other if name == "diffusers" else network.net
                whole.append(cpu_seconds(network.forward(net, 2)))
                with scope():
                    for step in (0, 1):
                        network.forward(net, step)()
                    computed = [cpu_seconds(network.forward(net, s)) for s in (2, 3, 4)]
                    for step in (5, 6):  # ours looks once whether the output is covered
                        network.forward(net, step)()
                    skipped = [cpu_seconds(network.forward(net, s)) for s in range(7, 27)]
                    costs[name].append((min(computed), min(skipped)))
        least = min(whole)
        print(f"| {network.name} | none | 1 | | {1e3 * least:.1f} |")
        for name, pairs in costs.items():
            computed, skip = (min(column) for column in zip(*pairs, strict=True))
            print(f"| | {name} | {computed / least:.3f} | {skip / least:.3f} | {1e3 * skip:.1f} |")


def keep_freed_memory() -> None:
    """Have glibc give no memory back to the system; elsewhere nothing is done."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        library.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, the largest it takes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    torch.set_num_threads(1)
    keep_freed_memory()
    with torch.no_grad():
        print_costs(parser.parse_args().rounds)


if __name__ == "__main__":
    main()
