"""Latency, throughput and peak memory of a model with a solver and a cache."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowkit.errors import FlowkitError
from flowkit.eval.caches import CachedRun, cached
from flowkit.samplers.evaluations import Solver
from flowkit.samplers.solve import DEFAULT_SOLVER, Result, sample
from flowkit.velocity import Velocity

__all__ = ["Memory", "Speed", "Timing", "measure_speed", "timed", "watch_memory"]

MIN_WARMUP, MIN_REPEATS = 3, 10


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and 90th percentile over `repeats`.  first: the very first call,
    which compiles, picks algorithms and fills caches."""

    median: float
    p90: float
    repeats: int
    first: float


@dataclass
class Memory:
    """Peak bytes, filled in when the watch ends; kind says of what.

    "cuda": allocated, and reserved by torch's allocator.  "resident": of the process, weights and
    libraries included; "resident, whole process" where the system cannot restart the count.
    """

    kind: str
    peak: int | None = None
    reserved: int | None = None


@dataclass(frozen=True)
class Speed:
    """How fast `batch` pictures are made.

    steps: of the solver.  nfe: evaluations of the velocity.  nfe_with_guidance: calls of the
    network, None when it was not given; of both, those that a cache had computed in full.
    sampling, decoding: decoding is None without a decoder, and not part of sampling.
    images_per_second: of sampling alone, by the median.  memory: of both.
    """

    batch: int
    steps: int
    nfe: float
    nfe_with_guidance: float | None
    sampling: Timing
    decoding: Timing | None
    images_per_second: float
    memory: Memory


@torch.no_grad()
def measure_speed(
    velocity: Velocity,
    noise: Tensor,
    times: Sequence[float],
    solver: str | Solver = DEFAULT_SOLVER,
    *,
    cache: Mapping[str, Any] | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    network: nn.Module | None = None,
    warmup: int = MIN_WARMUP,
    repeats: int = MIN_REPEATS,
    **options: Any,
) -> Speed:
    """Time runs of `solver` from `noise` (B, *), on the noise's device, and watch their memory.

    velocity: for those B samples, conditioning fixed.  cache: as of flowkit.eval.caches.cached.
    decode: states to pictures; one that gives back its argument is none.  network: whose calls are
    counted.  options: the solver's.
    FlowkitError: fewer than 3 warm-ups or 10 repeats, and what the solver and the cache refuse.
    """
    device = noise.device
    run = CachedRun(velocity, noise, times, solver, options)
    with watch_memory(device) as memory, cached(run, cache) as quick:

        def once() -> Result:
            return sample(quick.velocity, noise, times, solver, **options)

        sampling = timed(once, device, warmup=warmup, repeats=repeats)
        with _counted(network) as calls:
            made = once()
        nfe, with_guidance = quick.computed(made.nfe), quick.computed(len(calls))
        decoding = None
        if decode is not None and decode(made.x) is not made.x:
            decoding = timed(partial(decode, made.x), device, warmup=warmup, repeats=repeats)
    return Speed(
        batch=len(noise),
        steps=len(times) - 1,
        nfe=nfe,
        nfe_with_guidance=with_guidance if network is not None else None,
        sampling=sampling,
        decoding=decoding,
        images_per_second=len(noise) / sampling.median,
        memory=memory,
    )


@contextmanager
def _counted(network: nn.Module | None) -> Iterator[list[int]]:
    """A list that grows with every call of the network."""
    calls: list[int] = []
    if network is None:
        yield calls
        return
    hook = network.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        hook.remove()


def timed(
    work: Callable[[], object],
    device: torch.device | str = "cpu",
    *,
    warmup: int = MIN_WARMUP,
    repeats: int = MIN_REPEATS,
) -> Timing:
    """Time calls of `work`, after warm-up calls, each until the device is done.

    On CUDA by events of the stream.  FlowkitError: fewer than 3 warm-ups or 10 repeats.
    """
    if warmup < MIN_WARMUP or repeats < MIN_REPEATS:
        raise FlowkitError(
            f"a timing takes {MIN_WARMUP} warm-ups and {MIN_REPEATS} repeats or more, "
            f"got {warmup} and {repeats}"
        )
    device = torch.device(device)
    clock = _event_seconds if device.type == "cuda" else _wall_seconds
    first = _wall_seconds(work, device)
    for _ in range(warmup - 1):
        work()
    seconds = [clock(work, device) for _ in range(repeats)]
    median, p90 = np.percentile(seconds, [50, 90])
    return Timing(float(median), float(p90), repeats, first)


def _wall_seconds(work: Callable[[], object], device: torch.device) -> float:
    _synchronise(device)
    start = time.perf_counter()
    work()
    _synchronise(device)
    return time.perf_counter() - start


def _event_seconds(work: Callable[[], object], device: torch.device) -> float:
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def watch_memory(device: torch.device | str) -> Iterator[Memory]:
    """The peak memory of what runs inside, known when it is left."""
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        memory = Memory("cuda")
        yield memory
        memory.peak = torch.cuda.max_memory_allocated(device)
        memory.reserved = torch.cuda.max_memory_reserved(device)
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what an earlier run freed
    memory = Memory("resident" if _restart_peak() else "resident, whole process")
    yield memory
    memory.peak = _resident_peak()


def _restart_peak() -> bool:
    """Let Linux count the peak of resident memory anew; elsewhere it cannot be."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_peak() -> int | None:
    """Bytes, None on Windows."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
