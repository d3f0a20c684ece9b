"""What feature caches leave of a picture, and how fast, beside the caches of diffusers.

    python benchmarks/caches.py runs/cifar10-dit16/model       # of configs/cifar10/dit16-flow.yaml

Times are CPU seconds of one thread: all variants in turn, again and again, the least of each, since
other work on the machine only adds.
Errors are relative distances of the final pictures of 50 Euler steps: to the same run without a
cache, and to the true solution.  `uncached` is the default solver without a cache, in as many steps
as the cache has full passes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from cache_costs import STEPS, Scope, cpu_seconds, their_taylorseer, theirs
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch import Tensor

from flowkit.adapters import from_diffusers
from flowkit.nets import DiT
from flowkit.nets.dit import DiTBlock
from flowkit.noise import keyed_noise
from flowkit.samplers import cg_taylor, first_block_cache, grids, sample, taylorseer
from flowkit.velocity import Velocity

SAMPLES = 8
SEED = 1  # noise that no default was chosen on
INTERVALS = (2, 3, 4, 5, 6, 8, 12)
ORDERS = (0, 1, 2)


class CachedDiT(DiT, diffusers.CacheMixin):
    """Our DiT with the mixin that diffusers' caches need."""


TransformerBlockRegistry.register(
    DiTBlock,  # returns hidden states alone, and its first argument is what they are called
    TransformerBlockMetadata(
        return_hidden_states_index=0, _cached_parameter_indices={"hidden_states": 0}
    ),
)


@dataclass
class Variant:
    """A cache, and what its runs gave.  family: of caches that a threshold or interval tells apart.

    passes: computed in full.  error: to the run without a cache.  truth: to the true solution.
    """

    family: str
    setting: str
    scope: Scope
    diffusers: bool = False
    passes: int = 0
    error: float = math.nan
    truth: float = math.nan
    seconds: float = math.inf


class Trial:
    """A trained network, its double for diffusers' caches, and the runs of one sampler."""

    def __init__(self, folder: str) -> None:
        model = from_diffusers(folder)
        self.net: Any = model.net
        self.other: Any = CachedDiT.from_config(self.net.config)
        self.other.load_state_dict(self.net.state_dict())
        self.ours = model
        self.theirs = from_diffusers(self.other.eval())
        size = self.net.config.sample_size
        self.noise = keyed_noise(SEED, range(SAMPLES), (self.net.config.in_channels, size, size))
        self.true = sample(self.ours, self.noise, grids.power(200), "rk4").x
        self.whole = self.euler(self.ours)
        self.ran = 0
        middle = self.other.blocks[len(self.other.blocks) // 2]
        middle.attn.to_q.register_forward_hook(self._count)
        self._uncached: dict[int, float] = {}

    def _count(self, *_: Any) -> None:
        self.ran += 1

    def euler(self, velocity: Velocity) -> Tensor:
        return sample(velocity, self.noise, grids.uniform(STEPS), "euler").x

    def uncached(self, steps: int) -> float:
        """Error of the default solver without a cache."""
        if steps not in self._uncached:
            x = sample(self.ours, self.noise, grids.power(steps)).x
            self._uncached[steps] = distance(x, self.true)
        return self._uncached[steps]

    def run(self, variant: Variant) -> None:
        """Once more; the first run of a variant measures its errors."""
        self.ran, start = 0, time.process_time()
        with variant.scope() as cache:
            x = self.euler(self.theirs if variant.diffusers else self.ours)
            seconds = time.process_time() - start
            passes = cache.stats.computed if cache is not None else self.ran
        variant.seconds = min(variant.seconds, seconds)
        variant.passes = passes
        variant.error, variant.truth = distance(x, self.whole), distance(x, self.true)

    def calibrated(self) -> list[float]:
        """MagCache's ratios, which diffusers prints at the end of a run."""
        said, config = io.StringIO(), MagCacheConfig(num_inference_steps=STEPS, calibrate=True)
        with contextlib.redirect_stdout(said), theirs(self.other, config)():
            self.euler(self.theirs)
        row = said.getvalue().strip().splitlines()[-1]
        return [float(ratio) for ratio in row.strip("[]").split(",")]


def distance(x: Tensor, reference: Tensor) -> float:
    return ((x - reference).norm() / reference.norm()).item()


def variants(trial: Trial) -> list[Variant]:
    """Ours and theirs in turn."""
    net, other = trial.net, trial.other
    ours: list[Variant] = [
        Variant(
            f"taylorseer, order {order}, {level}",
            f"interval {interval}",
            lambda i=interval, o=order, v=level: taylorseer(net, interval=i, order=o, level=v),
        )
        for interval in INTERVALS
        for order in ORDERS
        for level in ("block", "module")
    ]
    for e in (0.001, 0.002, 0.004, 0.008, 0.015, 0.03):
        ours.append(Variant("cg_taylor", f"{e}", lambda e=e: cg_taylor(net, threshold=e)))
    for e in (0.01, 0.02, 0.05, 0.1, 0.2):
        for order in (0, 2):
            scope = lambda e=e, o=order: first_block_cache(  # noqa: E731
                net, threshold=e, order=o, warmup=max(1, o)
            )
            ours.append(Variant(f"first_block_cache, order {order}", f"{e}", scope))
    peers: list[tuple[str, str, Any]] = [
        (f"TaylorSeer, order {order}", f"interval {interval}", their_steps(interval, order))
        for interval in INTERVALS
        for order in ORDERS
    ]
    for e in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2):
        peers.append(("FirstBlockCache", f"{e}", FirstBlockCacheConfig(threshold=e)))
    shared = {"num_inference_steps": STEPS, "mag_ratios": trial.calibrated()}
    for kept in (0.2, 0.04):  # the default, and the first two steps
        for e in (0.005, 0.01, 0.02, 0.06, 0.12, 0.24):
            config = MagCacheConfig(
                threshold=e, retention_ratio=kept, max_skip_steps=3 if e < 0.1 else 6, **shared
            )
            peers.append((f"MagCache, retention {kept}", f"{e}", config))
    named = [
        Variant(f"diffusers {family}", setting, theirs(other, config), diffusers=True)
        for family, setting, config in peers
    ]
    return [variant for pair in spread(ours, named) for variant in pair]


def spread(*groups: list[Variant]) -> Iterator[list[Variant]]:
    """The groups interleaved, each evenly over the whole."""
    most = max(map(len, groups))
    for i in range(most):
        yield [v for g in groups for v in g[i * len(g) // most : (i + 1) * len(g) // most]]


def their_steps(interval: int, order: int) -> TaylorSeerCacheConfig:
    """Computes steps 0, 1, 3, 3 + interval, ...: with 2 steps first it does best."""
    return their_taylorseer(
        [r"blocks\.\d+\.(attn|mlp)"],
        cache_interval=interval,
        disable_cache_before_step=2,
        max_order=order,
    )


def print_errors(folder: str, rounds: int) -> None:
    """The sweep, and what it says."""
    trial = Trial(folder)
    runs = variants(trial)
    whole = math.inf
    for _ in range(rounds):
        whole = min(whole, cpu_seconds(lambda: trial.euler(trial.ours)))
        whole = min(whole, cpu_seconds(lambda: trial.euler(trial.theirs)))
        for variant in runs:
            trial.run(variant)
    gap = distance(trial.whole, trial.true)
    print(
        f"\n{STEPS} Euler steps, {SAMPLES} pictures: {whole:.2f} CPU-s without a cache, "
        f"{gap:.4f} from the true solution\n"
    )
    print("| cache | setting | full passes | time | to the run without | to the truth | uncached |")
    print("|---|---|---|---|---|---|---|")
    for v in sorted(runs, key=lambda v: (v.diffusers, v.family)):
        print(
            f"| {v.family} | {v.setting} | {v.passes} | {v.seconds / whole:.3f} | {v.error:.4f} "
            f"| {v.truth:.4f} | {trial.uncached(v.passes):.4f} |"
        )
    print_same_passes(trial, runs)
    print_speed(runs, whole)


def print_same_passes(trial: Trial, runs: list[Variant]) -> None:
    """Our default beside diffusers' TaylorSeer: by interval, and in exactly their steps."""
    print("\nErrors to the run without a cache; in brackets the full passes\n")
    print("| interval | ours | ours, their steps | theirs, order 1 | their best order | ", end="")
    print("ours / best | their steps / best |\n|---|---|---|---|---|---|---|")
    ratios: dict[int, list[float]] = {}
    for interval in INTERVALS:
        setting, full = f"interval {interval}", {0, 1, *range(3, STEPS, interval)}
        peers = [v for v in runs if v.setting == setting and "TaylorSeer" in v.family]
        usual = next(v for v in peers if v.family.endswith("order 1"))
        best = min(peers, key=lambda v: v.error)
        own = Variant("own", "", lambda i=interval: taylorseer(trial.net, interval=i))
        same = Variant("same", "", lambda full=full: taylorseer(trial.net, steps=full))
        for variant in (own, same):
            trial.run(variant)
        ratios[interval] = [e / best.error for e in (own.error, same.error)]
        cells = " | ".join(f"{v.error:.4f} ({v.passes})" for v in (own, same, usual, best))
        over = " | ".join(f"{r:.2f}" for r in ratios[interval])
        print(f"| {interval} | {cells} | {over} |")
    for top in (6, max(INTERVALS)):
        rows = [row for interval, row in ratios.items() if interval <= top]
        own_most, same_most = (max(column) for column in zip(*rows, strict=True))
        print(
            f"\nIntervals to {top}: at most {own_most:.2f} times the error of their best order, "
            f"{same_most:.2f} in their steps (wanted: 1)"
        )


def seconds_at(runs: Iterable[Variant], error: float) -> float:
    """CPU seconds of the fastest run with that error, log-linear between the best of the runs.

    Infinite where none is as exact; the fastest run's where all are.
    """
    front: list[Variant] = []
    for v in sorted(runs, key=lambda v: v.seconds):  # each more exact than all faster ones
        if not front or v.error < front[-1].error:
            front.append(v)
    after = next((i for i, v in enumerate(front) if v.error <= error), None)
    if after is None:
        return math.inf
    b, a = front[after], front[max(after - 1, 0)]
    if a is b:
        return b.seconds
    share = math.log(a.error / error) / math.log(a.error / max(b.error, 1e-9))
    return a.seconds * (b.seconds / a.seconds) ** share


def print_speed(runs: list[Variant], whole: float) -> None:
    """Speed-ups at equal error, of each family and of the best of theirs."""
    default = "taylorseer, order 2, block"
    families = Counter(v.family for v in runs)
    print("\nSpeed-up over the run without a cache, at an error to it of\n")
    print("| cache | 1 % | 5 % |\n|---|---|---|")
    groups = {f: [v for v in runs if v.family == f] for f in families}
    groups |= {"best of diffusers": [v for v in runs if v.diffusers]}
    speeds = {
        name: [whole / seconds_at(group, error) for error in (0.01, 0.05)]
        for name, group in groups.items()
    }
    for name, row in sorted(speeds.items(), key=lambda item: -item[1][0]):
        print(f"| {name} | " + " | ".join(f"{s:.2f}" if s else "not reached" for s in row) + " |")
    ratios = [a / b for a, b in zip(speeds[default], speeds["best of diffusers"], strict=True)]
    verdict = "kept" if min(ratios) >= 1.15 else "MISSED"
    print(
        f"\nOurs over the best of theirs: {ratios[0]:.2f} at 1 %, {ratios[1]:.2f} at 5 %: "
        f"{verdict} (>= 1.15)"
    )


def main() -> None:
    """Print errors and times on trained, unconditional DiTs of flowkit."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        for folder in options.folders:
            print_errors(folder, options.rounds)


if __name__ == "__main__":
    main()
