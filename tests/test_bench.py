"""Speed: what is timed, counted and watched, and the command that sweeps over it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import dit, draw
from torch import Tensor, nn

from flowkit.analytic import Gaussian, normal_quantiles
from flowkit.checkpoint import export_model
from flowkit.errors import FlowkitError
from flowkit.eval import bench
from flowkit.eval.bench import BenchConfig
from flowkit.eval.caches import CACHES, CachedRun, cached
from flowkit.eval.speed import measure_speed, timed, watch_memory
from flowkit.eval.speed_report import speed_report, speed_table
from flowkit.files import read_json
from flowkit.flow_adapters import FlowVelocity
from flowkit.nets import DDT, MLP
from flowkit.samplers import sample, shared_encoder
from flowkit.samplers.grids import uniform
from flowkit.samplers.schedule_file import Schedule, Step
from flowkit.velocity import VelocityModel, bind, guided

ROOT = Path(__file__).resolve().parent.parent


def test_calls_are_warm_ups_then_repeats() -> None:
    calls: list[int] = []
    timing = timed(lambda: calls.append(1), warmup=4, repeats=11)
    assert len(calls) == 15 and timing.repeats == 11
    assert 0 < timing.median <= timing.p90


def test_the_first_call_is_told_apart() -> None:
    waits = [0.2]

    def work() -> None:
        time.sleep(waits.pop() if waits else 0.002)

    timing = timed(work)
    assert timing.first >= 0.2 > timing.median >= 0.002


def test_percentiles_of_known_times() -> None:
    """The 10 timed calls sleep 10, 20, ..., 100 ms at least: p90 lies between the 9th and 10th."""
    waits = [0.0, 0.0, 0.0, *(0.01 * i for i in range(1, 11))]
    timing = timed(lambda: time.sleep(waits.pop(0)))
    assert timing.median >= 0.055 - 1e-9 and timing.p90 >= 0.091 - 1e-9
    assert timing.median < timing.p90 and timing.first < timing.median


@pytest.mark.parametrize("warmup, repeats", [(2, 10), (3, 9)])
def test_too_few_calls_are_no_timing(warmup: int, repeats: int) -> None:
    with pytest.raises(FlowkitError, match="3 warm-ups and 10 repeats or more"):
        timed(lambda: None, warmup=warmup, repeats=repeats)


def test_memory_is_watched_anew_each_time() -> None:
    with watch_memory("cpu") as before:
        pass
    with watch_memory("cpu") as watched:
        torch.ones(64 << 20, dtype=torch.uint8).sum()
    if watched.kind != "resident":
        pytest.skip("this system cannot count the peak of resident memory anew")
    with watch_memory("cpu") as after:
        pass
    assert watched.peak - before.peak > 60 << 20  # type: ignore[operator]
    assert watched.peak - after.peak > 60 << 20  # type: ignore[operator]


def test_speed_of_a_run() -> None:
    noise = normal_quantiles(64, (16, 4))
    found = measure_speed(Gaussian(), noise, uniform(3), "heun")
    assert (found.batch, found.steps, found.nfe) == (16, 3, 6)
    assert found.nfe_with_guidance is None and found.decoding is None
    assert found.images_per_second == pytest.approx(16 / found.sampling.median)


def test_decoding_is_timed_apart() -> None:
    shapes = []

    def decode(x: Tensor) -> Tensor:
        shapes.append(x.shape)
        time.sleep(0.01)
        return x + 0

    found = measure_speed(Gaussian(), normal_quantiles(), uniform(2), "euler", decode=decode)
    assert found.decoding is not None and found.decoding.median >= 0.01
    assert set(shapes) == {torch.Size((1, 4, 4, 4))} and len(shapes) == 3 + 10 + 1
    found = measure_speed(Gaussian(), normal_quantiles(), uniform(2), "euler", decode=lambda x: x)
    assert found.decoding is None


def _ddt(layers: int = 2) -> VelocityModel:
    torch.manual_seed(0)
    net = DDT(
        sample_size=4, patch_size=2, in_channels=1, hidden_size=16, num_encoder_layers=layers,
        num_decoder_layers=1, num_heads=2, num_classes=3,
    )  # fmt: skip
    for parameter in net.parameters():  # its zero layers would hide what a cache changes
        nn.init.normal_(parameter, std=0.1)
    return FlowVelocity(net.eval())


def test_guidance_doubles_the_calls_and_not_the_nfe() -> None:
    model, labels = _ddt(), torch.tensor([0, 1])
    both = guided(bind(model, class_labels=labels), bind(model, class_labels=labels + 1), 2.0)
    noise = normal_quantiles(32, (2, 1, 4, 4)).float()
    found = measure_speed(both, noise, uniform(3), "euler", network=model)
    assert (found.nfe, found.nfe_with_guidance) == (3, 6)


def _run(solver: str = "euler", steps: int = 4) -> CachedRun:
    velocity = bind(_ddt(), class_labels=torch.tensor([0, 1]))
    return CachedRun(
        velocity, normal_quantiles(32, (2, 1, 4, 4)).float(), uniform(steps), solver, {}
    )


@torch.no_grad()
def test_a_cache_by_name_is_the_function() -> None:
    run = _run()
    with shared_encoder(run.velocity, run.times, "euler", steps=[0, 2], order=1) as shared:
        by_hand = sample(shared, run.noise, run.times, "euler").x
    with cached(run, {"name": "encoder", "steps": [0, 2], "order": 1}) as made:
        first, again = (sample(made.velocity, run.noise, run.times, "euler").x for _ in range(2))
    assert torch.equal(first, by_hand) and torch.equal(again, by_hand)
    for none in (None, {"name": "none"}):
        with cached(run, none) as made:
            plain = sample(made.velocity, run.noise, run.times, "euler").x
        assert torch.equal(plain, sample(run.velocity, run.noise, run.times, "euler").x)
    assert not torch.equal(plain, by_hand)


@torch.no_grad()
def test_a_number_of_cached_steps_is_placed() -> None:
    run = _run()
    with cached(run, {"name": "encoder", "steps": 2}) as made:
        sample(made.velocity, run.noise, run.times, "euler")
        assert made.velocity.encoder_calls == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "cache, full",
    [
        ({"name": "none"}, 8),
        ({"name": "encoder", "steps": [0, 4]}, 8),  # the decoder runs every time
        ({"name": "taylorseer", "interval": 3, "warmup": 2, "order": 1}, 4),  # 0, 1, 4, 7
        ({"name": "first_block_cache", "threshold": 1e9, "warmup": 1}, 1),
        ({"name": "cg_taylor", "threshold": 0.0, "order": 1}, 8),
    ],
)
def test_only_what_a_cache_had_computed_is_counted(cache: dict[str, Any], full: int) -> None:
    """Of 8 evaluations of two branches, `full` computed all blocks; however often it is run."""
    encoder = cache["name"] == "encoder"
    model = _ddt() if encoder else FlowVelocity(dit(num_classes=3))
    labels, side = torch.tensor([0, 1]), 4 if encoder else 8
    both = guided(bind(model, class_labels=labels), bind(model, class_labels=labels + 1), 2.0)
    noise = draw(2, 1, side, side)
    found = measure_speed(both, noise, uniform(8), "euler", cache=cache, network=model)
    assert (found.steps, found.nfe, found.nfe_with_guidance) == (8, full, 2 * full)


@pytest.mark.parametrize(
    "cache, words",
    [
        ({"name": "encodr"}, "did you mean 'encoder'"),
        ({"name": "none", "steps": 2}, "no option 'steps'"),
        ({"name": "taylorseer", "threshold": 1}, "no option 'threshold'; it takes interval, order"),
        ({"name": "cg_taylor", "order": 1.5}, "takes int as order, got 1.5"),
        ({"name": "encoder"}, "needs the option 'steps'"),
        ({"steps": 2}, "name"),
    ],
)
def test_caches_that_are_not(cache: dict[str, Any], words: str) -> None:
    with pytest.raises(FlowkitError, match=words):
        cached(_run(), cache)
    assert "none" in CACHES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bench") / "model"
    export_model(FlowVelocity(MLP(shape=(1, 4, 4), width=8)), folder, shape=(1, 4, 4))
    return str(folder)


def test_the_command_measures_every_case(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "bench.json"
    words = ["solver=[euler,heun]", "nfe=[1,2]", "batch=[4,1]", "device=cpu", f"output={file}"]
    monkeypatch.setattr(sys, "argv", ["bench", f"model={model}", *words])
    bench.main()
    report, printed = read_json(file), capsys.readouterr().out
    cases = [(row["solver"], row["nfe"], row["batch"]) for row in report["results"]]
    assert cases == [
        (s, n, b) for s, n in (("euler", 1), ("euler", 2), ("heun", 2)) for b in (1, 4)
    ]
    assert [(one["solver"], one["nfe"]) for one in report["skipped"]] == [("heun", 1)]
    assert "Left out: heun" in printed and str(file) in printed
    for one in report["summary"]:
        rows = [
            r for r in report["results"] if (r["solver"], r["nfe"]) == (one["solver"], one["nfe"])
        ]
        assert one["latency"] == rows[0]["sampling"]["median"]
        assert one["throughput"] == max(row["images_per_second"] for row in rows)
        assert {row["nfe_with_guidance"] for row in rows} == {one["nfe"]}
    table = [line for line in printed.splitlines() if line.startswith("| ")][1:]
    assert len(table) == len(cases) and sum("*" in line for line in table) == 3
    assert report["model"]["parameters"] > 0 and report["load_seconds"] > 0


def test_solvers_that_know_their_evaluations_are_timed_once(model: str, tmp_path: Path) -> None:
    """Whatever nfe says to the others: an adaptive solver, and a schedule by its file."""
    file = tmp_path / "searched.json"
    Schedule(times=(0.0, 0.4, 1.0), steps=(Step(), Step())).save(file)
    solvers = ["dopri5", str(file), "euler"]
    config = BenchConfig(model, solver=solvers, nfe=[1, 4], batch=[1, 3], device="cpu")
    report = speed_report(config)
    assert [(row["solver"], row["asked"], row["batch"]) for row in report["results"]] == [
        *(("dopri5", None, 1), ("dopri5", None, 3), (str(file), 2, 1), (str(file), 2, 3)),
        *(("euler", 1, 1), ("euler", 1, 3), ("euler", 4, 1), ("euler", 4, 3)),
    ]
    assert [one["asked"] for one in report["summary"]] == [None, 2, 1, 4]
    assert all(one["latency"] for one in report["summary"]) and not report["skipped"]
    assert report["results"][0]["nfe"] > 4
    stars = [line for line in speed_table(report).splitlines() if "*" in line]
    assert len(stars) == 4


def test_the_table_says_which_cache(model: str) -> None:
    report = speed_report(BenchConfig(model, nfe=[2], batch=[2], device="cpu"))
    assert report["summary"][0]["latency"] is None  # batch 1 was not asked for
    report["results"][0]["cache"] = {"name": "encoder", "steps": 2}
    report["summary"][0]["cache"] = {"name": "encoder", "steps": 2}
    assert "| abm | encoder(steps=2) | 2 |" in speed_table(report)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"solver": "heun", "nfe": [1]}, "cannot take 1"),
        ({"solver": []}, "nothing to measure"),
        ({"solver": "eulr", "nfe": [1]}, "did you mean 'euler'"),
        ({"cache": {"name": "encoder", "steps": 1}}, "no encoder state"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
        ({"model": "flowkit.analytic:normal_quantiles", "shape": [1], "compile": True}, "function"),
    ],
)
def test_what_cannot_be_measured(model: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(FlowkitError, match=words):
        speed_report(BenchConfig(**{"model": model, "batch": [1], "device": "cpu"} | options))
