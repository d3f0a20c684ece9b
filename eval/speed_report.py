"""The speed of a model with every solver, cache, NFE and batch size that a configuration names."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby, product
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from flowkit.errors import FlowkitError
from flowkit.eval.bench import BenchConfig
from flowkit.eval.feature_pass import device_name
from flowkit.eval.model_source import ModelSource
from flowkit.eval.provenance import versions
from flowkit.eval.sampling_plan import Plan, sampling_plans
from flowkit.eval.settings import FidConfig
from flowkit.eval.speed import measure_speed
from flowkit.registry import look_up
from flowkit.samplers.solve import SOLVERS, is_adaptive
from flowkit.schema import to_dict
from flowkit.velocity import VelocityModel

__all__ = ["speed_report", "speed_table"]

SCHEMA = 1


def speed_report(config: BenchConfig) -> dict[str, Any]:
    """Measure, with a progress bar; what the file of eval/bench.py holds.

    {"schema", "model", "device", "threads", "versions", "config", "load_seconds", "results",
    "summary", "skipped"}.  results: solver as it was named, asked (its NFE; None of an adaptive
    one, where each batch has its own), cache and the fields of flowkit.eval.speed.Speed, times in
    seconds, memory in bytes.  summary: of each solver, cache and NFE asked the latency, which is
    the median of batch 1 (None if that was not measured), and the throughput and NFE of the best
    batch, in pictures a second.  skipped: {"solver", "nfe", "reason"}, what a solver cannot spend.
    FlowkitError: an option that fits nothing, or nothing is left to measure.
    """
    solvers = [config.solver] if isinstance(config.solver, str) else config.solver
    caches = [config.cache] if isinstance(config.cache, dict) else config.cache
    device = _device(config.device)
    start = time.perf_counter()
    source = ModelSource(_sampling(config, solvers[0] if solvers else "", config.nfe), device)
    load_seconds = time.perf_counter() - start
    skipped: list[dict[str, Any]] = []
    plans = list(_plans(config, solvers, source.start, skipped))
    if not plans or not caches or not config.batch:
        reason = skipped[0]["reason"] if skipped else "give solver, nfe, cache and batch"
        raise FlowkitError(f"there is nothing to measure: {reason}")
    if config.compile:
        _compile(source)
    cases = list(product(plans, caches, sorted(config.batch)))
    with tqdm(cases, desc="bench", unit="case") as bar:
        results = [_measure(config, source, *case) for case in bar]
    return {
        "schema": SCHEMA,
        "model": source.identity,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "config": to_dict(config),
        "load_seconds": load_seconds,
        "results": results,
        "summary": _summary(results),
        "skipped": skipped,
    }


def _sampling(config: BenchConfig, solver: str, nfe: list[int] | None) -> FidConfig:
    """The options of the harness that say how to sample."""
    same = "model solver_options grid dtype seed num_classes shape vae guidance"
    given = {name: getattr(config, name) for name in same.split()}
    return FidConfig(reference="none", solver=solver, nfe=nfe, **given)


def _plans(
    config: BenchConfig, solvers: list[str], start: float, skipped: list[dict[str, Any]]
) -> Iterator[tuple[str, Plan]]:
    """Each solver, as it was named, with its plans."""
    asked: list[tuple[str, int | None]] = []
    for solver in solvers:
        free = solver.endswith(".json") or is_adaptive(look_up("solver", solver, SOLVERS))
        asked += [(solver, nfe) for nfe in ([None] if free and config.nfe else config.nfe)]
    for solver, nfe in asked:
        try:
            options = _sampling(config, solver, None if nfe is None else [nfe])
            yield from ((solver, plan) for plan in sampling_plans(options, start))
        except FlowkitError as error:
            if len(asked) == 1:
                raise
            skipped.append({"solver": solver, "nfe": nfe, "reason": str(error)})


def _measure(
    config: BenchConfig,
    source: ModelSource,
    named: tuple[str, Plan],
    cache: dict[str, Any],
    batch: int,
) -> dict[str, Any]:
    solver, plan = named
    indices = range(batch)
    noise = (1 - plan.times[0]) * source.noise(indices)
    found = measure_speed(
        source.velocity(indices),
        noise,
        plan.times,
        plan.solver,
        cache=cache,
        decode=source.parts.decode,
        network=source.model if isinstance(source.model, nn.Module) else None,
        warmup=config.warmup,
        repeats=config.repeats,
        **plan.options,
    )
    return {"solver": solver, "asked": plan.nfe, "cache": cache, **asdict(found)}


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise FlowkitError(f"device {name!r}: {str(error).splitlines()[0]}") from None


def _compile(source: ModelSource) -> None:
    if not isinstance(source.model, nn.Module):
        raise FlowkitError(f"compile=true takes a network, {source.name} is a function")
    if isinstance(source.model, VelocityModel):
        source.model.net.compile()
    else:
        source.model.compile()


def _summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for _, group in groupby(results, key=_run_of):
        rows = list(group)
        best = max(rows, key=lambda row: row["images_per_second"])
        alone = next((row["sampling"]["median"] for row in rows if row["batch"] == 1), None)
        names = ("solver", "asked", "cache", "nfe", "nfe_with_guidance")
        same = {name: best[name] for name in names}
        rate = {"throughput": best["images_per_second"], "throughput_batch": best["batch"]}
        found.append({**same, "latency": alone, **rate})
    return found


def _run_of(row: dict[str, Any]) -> tuple[str, str, int | None]:
    return row["solver"], _brief(row["cache"]), row["asked"]


def _brief(cache: dict[str, Any]) -> str:
    options = ", ".join(f"{name}={value}" for name, value in cache.items() if name != "name")
    return f"{cache['name']}({options})" if options else str(cache["name"])


def speed_table(report: dict[str, Any]) -> str:
    """The report as a markdown table; `*`: the best batch of its solver, cache and NFE."""
    best = {(*_run_of(row), row["throughput_batch"]) for row in report["summary"]}
    lines = [
        f"{report['model']['path']} on {report['device']}, {report['config']['dtype']}, "
        f"{report['threads']} threads; loading took {report['load_seconds']:.2f} s",
        "",
        "| solver | cache | NFE | calls | batch | median ms | p90 ms | first ms | decode ms "
        "| pictures/s | peak MiB |",
        "|---|---|" + "---:|" * 9,
    ]
    for row in report["results"]:
        taken, decoding = row["sampling"], row["decoding"]
        milliseconds = [taken["median"], taken["p90"], taken["first"]]
        milliseconds += [decoding["median"]] if decoding else []
        counts = [row["nfe"], row["nfe_with_guidance"]]
        cells = [row["solver"], _brief(row["cache"])]
        cells += ["-" if count is None else f"{count:.4g}" for count in counts]
        cells += [row["batch"], *(f"{1000 * seconds:.2f}" for seconds in milliseconds)]
        cells += [] if decoding else ["-"]
        mark = "*" if (*_run_of(row), row["batch"]) in best else ""
        peak = row["memory"]["peak"]
        rate = row["images_per_second"]
        cells += [f"{rate:,.{0 if rate >= 100 else 2}f}{mark}", "-" if peak is None else peak >> 20]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    kinds = {row["memory"]["kind"] for row in report["results"]}
    lines += ["", f"Peak memory: {', '.join(sorted(kinds))}."]
    lines += [f"Left out: {one['solver']}: {one['reason']}" for one in report["skipped"]]
    return "\n".join(lines)
