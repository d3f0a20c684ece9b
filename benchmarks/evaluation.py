"""Evaluation beside its peers: the Fréchet term, the way to the network, all of it, the manifold.

  python benchmarks/evaluation.py                      all four: some twenty minutes
  python benchmarks/evaluation.py frechet around       these

frechet    the square root's trace at d = 2048: scipy's sqrtm, torch-fidelity's eigenvalues
around     in-memory uint8 pictures to moments, the network left out: clean-fid's own loop
path       the same with the Inception graph and random weights: clean-fid, torch-fidelity
manifold   precision and recall of 10,000 against 10,000: torch-fidelity

Ours and theirs alternate in this one process on one thread; a figure is the median over rounds of
the ratio of CPU times. Peers that are not installed are named and left out:
pip install clean-fid torch-fidelity
"""

from __future__ import annotations

import functools
import gc
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_loops import BATCH, cleanfid_loop, cleanfid_port, fidelity_loop, peer, random_weights
from torch import Tensor

from flowkit.eval.frechet import FrechetMoments, frechet_parts
from flowkit.eval.speed import watch_memory

DIMENSION = 2048
CHUNK = 240  # pictures that are added to the moments at once
SCALING = {"scale": 1 / 128, "shift": -1.0}  # the network takes (levels - 128) / 128


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of one call, in all threads."""
    gc.collect()
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(title: str, ours: Callable[[], Any], rounds: int, **theirs: tuple[Any, str]) -> None:
    """Alternate; print each peer's time over ours, beside the wanted ratio.

    theirs: name -> (call, what its ratio should be, as text).
    """
    calls = {"": ours} | {name: work for name, (work, _) in theirs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            seconds[name].append(cpu_seconds(calls[name]))
    own = seconds.pop("")
    print(f"{title}: {statistics.median(own):.2f} s", flush=True)
    for name, (_, wanted) in theirs.items():
        ratios = [a / b for a, b in zip(seconds[name], own, strict=True)]
        middle, label = statistics.median(ratios), name.replace("_", " ")
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}; {wanted}"
        taken = statistics.median(seconds[name])
        print(f"    {label} {taken:.2f} s: {middle:.2f} times ({spread})", flush=True)


def frechet() -> None:
    """The whole distance of two sets of moments with full-rank covariances, N = 5,000 each."""
    from scipy import linalg

    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -2, DIMENSION, dtype=torch.float64)
    moments, statistics_ = [], []
    for shift in (0.0, 0.1):
        mixing = torch.randn(DIMENSION, DIMENSION, generator=generator).double() / DIMENSION**0.5
        rows = torch.randn(5000, DIMENSION, generator=generator).double() * scale
        found = FrechetMoments()
        found.update(rows @ mixing + shift)
        moments.append(found)
        statistics_.append({"mu": found.mean.numpy(), "sigma": found.cov.numpy()})
    values: dict[str, float] = {}

    def ours() -> None:
        values["ours"] = frechet_parts(*moments).value

    def theirs_sqrtm() -> None:
        (m1, s1), (m2, s2) = (s.values() for s in statistics_)
        root = linalg.sqrtm(s1 @ s2)
        gap = m1 - m2
        values["sqrtm"] = float(gap @ gap + np.trace(s1) + np.trace(s2) - 2 * np.trace(root.real))

    others: dict[str, Any] = {"sqrtm": (theirs_sqrtm, "at least 5")}
    fidelity = peer("torch_fidelity.metric_fid")
    if fidelity is not None:

        def theirs_eigenvalues() -> None:
            found = fidelity.fid_statistics_to_metric(*statistics_, verbose=False)
            values["eigvals"] = found["frechet_inception_distance"]

        others["torch_fidelity"] = (theirs_eigenvalues, "at least 2.5")
    compare(f"Fréchet distance, d = {DIMENSION}", ours, 2, **others)
    print("    values: " + ", ".join(f"{name} {value:.12g}" for name, value in values.items()))


def pictures(count: int, side: int) -> Tensor:
    """Smooth uint8 pictures (N, 3, side, side)."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255
    fine = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    return fine.round().clamp(0, 255).to(torch.uint8)


def thinned(resized: Tensor) -> Tensor:
    """A stand-in for the network that costs nothing: 2,048 of the pixels."""
    return resized[:, :, 5:293:9, 5:293:9].flatten(1)[:, :DIMENSION].contiguous()


def print_gaps(ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> None:
    """How far the moments are apart, to show that both did the same work."""
    gaps = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, theirs, strict=True)]
    print(f"    the moments differ by {gaps[0]:.1e} and {gaps[1]:.1e} of their greatest")


def around() -> None:
    """Resize, conversion and moments, from 32 and from 512 pixels a side."""
    from flowkit.eval.resize import resize

    for side, count in ((32, 60 * BATCH), (512, 20 * BATCH)):
        levels = pictures(count, side)

        def ours(levels: Tensor = levels) -> tuple[Any, Any]:
            moments = FrechetMoments()
            for chunk in levels.split(CHUNK):
                parts = [resize(part, 299, "clean", **SCALING) for part in chunk.split(BATCH)]
                moments.update(torch.cat([thinned(part) for part in parts]))
            return moments.mean.numpy(), moments.cov.numpy()

        loop = cleanfid_loop(lambda x: thinned((x - 128) / 128), levels)
        others = {} if loop is None else {"clean_fid": (loop, "at least 3")}
        compare(f"around the network, {count} pictures {side} -> 299", ours, 5, **others)
        if loop is not None:
            print_gaps(ours(), loop())


def path() -> None:
    """In-memory pictures of 32 pixels to moments, through the same network in float32."""
    from flowkit.eval.features import load_extractor

    levels = pictures(2 * BATCH, 32)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "random.pth"
        torch.save(random_weights(), weights)

        def ours(convention: str) -> Callable[[], tuple[Any, Any]]:
            extractor = load_extractor(f"inception:{convention}", weights=weights)

            def run() -> tuple[Any, Any]:
                moments = FrechetMoments()
                for chunk in levels.split(CHUNK):
                    moments.update(extractor(chunk))
                return moments.mean.numpy(), moments.cov.numpy()

            return run

        own = {name: ours(name) for name in ("clean", "legacy_pytorch", "legacy_tensorflow")}
        net = load_extractor("inception:clean", weights=weights).net
        port, wanted = cleanfid_port(weights), "at least 1"
        loops: dict[str, dict[str, Any]] = {name: {} for name in own}
        if port is not None:
            loops["clean"] = {
                "clean_fid": cleanfid_loop(
                    lambda x: port(x * 255 / 256), levels
                ),  # (x - 128) / 128
                "clean_fid_with_our_network": cleanfid_loop(lambda x: net(x / 128 - 1), levels),
            }
            loops["legacy_pytorch"] = {"clean_fid": cleanfid_loop(port, levels, "legacy_pytorch")}
        if (loop := fidelity_loop(weights, levels)) is not None:
            loops["legacy_tensorflow"] = {"torch_fidelity": loop}
    for convention, others in loops.items():
        title = f"whole path, {convention}, {len(levels)} pictures"
        compare(title, own[convention], 5, **{name: (f, wanted) for name, f in others.items()})
        for loop in others.values():
            print_gaps(own[convention](), loop())


def manifold(count: int = 10_000) -> None:
    """Precision and recall at k = 3, with the peak of resident memory above the features."""
    from flowkit.eval.manifold import precision_recall

    real, generated = activations(count)
    results: dict[str, Any] = {}
    peaks: dict[str, int] = {}

    def watched(name: str, work: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            before = resident()
            with watch_memory("cpu") as memory:
                results[name] = work()
            peaks[name] = (memory.peak or 0) - before

        return run

    others = {}
    module = peer("torch_fidelity.metric_prc")
    if module is not None:
        for name, function in (
            ("torch_fidelity", module.calculate_precision_recall_full),
            ("torch_fidelity_saving_memory", module.calculate_precision_recall_part),
        ):
            call = functools.partial(function, generated, real)
            others[name] = (watched(name, call), "at least 2")
    ours = watched("ours", lambda: precision_recall(real, generated, k=3))
    compare(f"precision and recall, {count} x {count}, d = {DIMENSION}", ours, 1, **others)
    naive = 4 * count**2
    for name, peak in peaks.items():
        print(f"    {name}: {results[name]}, {peak / 2**20:.0f} MiB, {peak / naive:.2f} of N x N")


def activations(count: int) -> tuple[Tensor, Tensor]:
    """Two sets like a network's activations: not negative, of few directions that matter."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0, -2, 64).exp()
    mixing = torch.randn(64, DIMENSION, generator=generator) * scale[:, None]
    sets = []
    for shrink in (1.0, 0.8):
        latent = shrink * torch.randn(count, 64, generator=generator)
        noise = 0.3 * torch.randn(count, DIMENSION, generator=generator)
        sets.append((latent @ mixing + noise).relu_())
    return sets[0], sets[1]


def resident() -> int:
    """Bytes of memory that the process holds now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


PARTS = {"frechet": frechet, "around": around, "path": path, "manifold": manifold}


@torch.no_grad()
def main() -> None:
    """Run the parts that are named, all of them without a name."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    chosen = sys.argv[1:] or list(PARTS)
    if unknown := set(chosen) - PARTS.keys():
        sys.exit(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    for name in chosen:
        PARTS[name]()


if __name__ == "__main__":
    main()
