"""Latency, throughput and peak memory of a model, for every solver, cache, NFE and batch size.

  python -m flowkit.eval.bench model=runs/flow/model solver=[abm,heun] nfe=[2,4,8] batch=[1,64]
  python -m flowkit.eval.bench model=runs/ddt/model cache=[{name: none},{name: encoder, steps: 2}]

Prints a table and writes `output`, a JSON file. Times are medians over repeats after warm-ups,
decoding apart; loading and first calls, which compile, are told apart too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from flowkit.config import option, parse, run_command
from flowkit.eval.settings import GuidanceOptions

__all__ = ["BenchConfig", "main"]


@dataclass
class BenchConfig:
    """Options of eval/bench.py."""

    model: str = option(
        help="a folder of trainers/*.py, a diffusers pipeline or model (folder or hub id), or "
        "module:attribute, a velocity (x_t, t) -> v"
    )
    solver: str | list[str] = option(
        "abm", "any solvers of flowkit.samplers, or searched schedules.json"
    )
    solver_options: dict[str, Any] = option({}, "their options")
    cache: dict[str, Any] | list[dict[str, Any]] = option(
        {"name": "none"}, "caches, e.g. [{name: none},{name: encoder, steps: 2}]"
    )
    nfe: list[int] = option(
        [1, 4, 8],
        "evaluations of the velocity; solvers that choose theirs and schedules are timed once",
        low=1,
    )
    batch: list[int] = option([1, 64], "pictures at once; 1 gives the latency", low=1)
    grid: dict[str, Any] = option(
        {"name": "power", "exponent": 1.5},
        "times: power, uniform, shifted, dynamic, edm, karras, log_snr, cosine or beta",
    )
    output: str = option("runs/bench.json", "the JSON file to write")

    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "of the model's weights")
    compile: bool = option(False, "compile the network with torch.compile")
    device: str | None = option(None, "cpu, cuda, cuda:1, mps; null: the accelerator, if any")
    warmup: int = option(3, "calls before the timed ones", low=3)
    repeats: int = option(10, "timed calls", low=10)
    seed: int = option(0, "of the noise", low=0)

    num_classes: int | None = option(None, "of a model that does not say it", low=1)
    shape: list[int] | None = option(
        None, "(C, H, W) of a sample of a model that does not say it", low=1
    )
    vae: str | None = option(None, "decoder of a latent model; null: the one it names")
    guidance: GuidanceOptions = field(default_factory=GuidanceOptions)


def main() -> None:
    """The command: parse, measure, print, write."""

    def command() -> None:
        config = parse(BenchConfig, doc=__doc__ or "")
        from flowkit.eval.speed_report import speed_report, speed_table
        from flowkit.files import write_json

        report = speed_report(config)
        write_json(config.output, report)
        print(f"\n{speed_table(report)}\n\nwritten to {config.output}")

    run_command(command)


if __name__ == "__main__":
    from flowkit.eval import bench

    bench.main()
