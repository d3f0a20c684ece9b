"""What feature caches cost, beside diffusers' TaylorSeer, and what they leave of a picture.

    python benchmarks/caches.py                   # costs on a DiT-S/2 with random weights
    python benchmarks/caches.py runs/dit/model    # and errors on a trained network, 50 steps

Costs are CPU seconds of one thread: all variants in turn, again and again, the least of each, since
other work on the machine only adds.
Errors are relative distances of the final pictures, to the same run without a cache and to the true
solution; `uncached` takes as many steps as the cache has full passes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers.hooks import TaylorSeerCacheConfig
from torch import Tensor

from flowkit.adapters import from_diffusers
from flowkit.noise import keyed_noise
from flowkit.samplers import grids, sample
from flowkit.samplers.gated import cg_taylor, first_block_cache
from flowkit.samplers.taylor import taylorseer
from flowkit.velocity import Velocity, bind

LEVELS = ("block", "each", "module")
ROUNDS = 9
STEPS = 50
SAMPLES = 32
RUNS = {"euler": grids.uniform, "ab2": grids.uniform, "abm": grids.power}  # solver: its grid


class CachedDiT(diffusers.DiTTransformer2DModel, diffusers.CacheMixin):
    """diffusers' DiT with the mixin that its caches need."""


def dit_s(kind: type[Any] = diffusers.DiTTransformer2DModel) -> Any:
    """DiT-S/2: 12 layers, 6 heads of 64, for latents 4 x 32 x 32."""
    torch.manual_seed(0)
    shape = {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 12}
    return kind(sample_size=32, in_channels=4, **shape).eval()


def cpu_ms(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return 1e3 * (time.process_time() - start)


def forward(net: Any, step: int) -> Callable[[], Any]:
    """One pass of batch 4 at a step."""
    x, labels = keyed_noise(0, range(4), (4, 32, 32)), torch.arange(4)
    t = torch.full((4,), 1000.0 - 20 * step)
    return lambda: net(x, timestep=t, class_labels=labels)


@contextmanager
def theirs(net: Any) -> Iterator[None]:
    """diffusers' TaylorSeer on attention and MLP, in float32: computes steps 0, 1, 2 and 4."""
    parts = [r"transformer_blocks\.\d+\.(attn1|ff)"]
    net.enable_cache(
        TaylorSeerCacheConfig(
            cache_interval=STEPS,
            disable_cache_before_step=3,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=parts,
        )
    )
    with net.cache_context("only"):
        yield
    net.disable_cache()


def print_costs() -> None:
    """Of a step that is computed and of one that is skipped, over a step without a cache."""
    net, other = dit_s(), dit_s(CachedDiT)
    variants: dict[str, Callable[[], Any]] = {
        level: lambda level=level: taylorseer(net, interval=STEPS, warmup=3, level=level)
        for level in LEVELS
    } | {"diffusers": lambda: theirs(other)}
    plain: list[float] = []
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    forward(net, 0)()
    for _ in range(ROUNDS):
        for name, cached in variants.items():
            plain.append(cpu_ms(forward(net, 0)))
            model = other if name == "diffusers" else net
            with cached():
                for step in (0, 1):
                    forward(model, step)()
                computed = cpu_ms(forward(model, 2))
                for step in (3, 4):  # looks once whether the output is covered
                    forward(model, step)()
                costs[name].append((computed, cpu_ms(forward(model, 5))))
    whole = min(plain)
    print(f"\nDiT-S/2, batch 4, order 1, over a step without a cache ({whole:.0f} CPU-ms)\n")
    print("| cache | computed | skipped |\n|---|---|---|")
    for name, pairs in costs.items():
        computed, skipped = (min(column) for column in zip(*pairs, strict=True))
        print(f"| {name} | {computed / whole:.3f} | {skipped / whole:.3f} ({skipped:.1f} ms) |")


def distance(x: Tensor, reference: Tensor) -> float:
    return ((x - reference).norm() / reference.norm()).item()


def print_errors(folder: str) -> None:
    """By solver, interval and order."""
    model = from_diffusers(folder)
    net: Any = model.net
    size = net.config.sample_size
    velocity: Velocity = model
    if net.config.num_classes:
        velocity = bind(model, class_labels=torch.arange(SAMPLES) % net.config.num_classes)
    noise = keyed_noise(0, range(SAMPLES), (net.config.in_channels, size, size))
    true = sample(velocity, noise, grids.power(200), "rk4").x
    for solver, grid in RUNS.items():
        whole = sample(velocity, noise, grid(STEPS), solver).x
        print(f"\n{solver}, {STEPS} steps: {distance(whole, true):.4f} from the true solution\n")
        print("| cache | full passes | to the run without | to the truth | uncached |")
        print("|---|---|---|---|---|")
        caches: dict[str, Callable[[], Any]] = {
            f"every {interval}, order {order}, {level}": lambda o=order, i=interval, v=level: (
                taylorseer(net, interval=i, order=o, level=v)
            )
            for interval in (2, 3, 4, 6)
            for order in (0, 1, 2, 3)
            for level in ("block", "module")
        }
        for e in (0.003, 0.01, 0.03):
            caches[f"cg_taylor {e}"] = lambda e=e: cg_taylor(net, threshold=e)
        for e in (0.02, 0.05, 0.1):
            caches[f"first_block_cache {e}"] = lambda e=e: first_block_cache(net, threshold=e)
        for name, cached in caches.items():
            with cached() as cache:
                x = sample(velocity, noise, grid(STEPS), solver).x
            passes = cache.stats.computed
            uncached = sample(velocity, noise, grid(passes), solver).x
            errors = " | ".join(f"{distance(*p):.4f}" for p in ((x, whole), (x, true)))
            print(f"| {name} | {passes} | {errors} | {distance(uncached, true):.4f} |", flush=True)


def main() -> None:
    """Print the costs, then the errors on a trained flow if given."""
    torch.set_num_threads(1)
    with torch.no_grad():
        print_costs()
        for folder in sys.argv[1:]:
            print_errors(folder)


if __name__ == "__main__":
    main()
