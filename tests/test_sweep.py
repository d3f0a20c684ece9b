"""Sweeps: what is run, what is skipped, what a restart does, and the leaderboard at the end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowkit.config import parse, save
from flowkit.errors import FlowkitError
from flowkit.eval.fid import run as run_fid
from flowkit.eval.leaderboard import read_folder
from flowkit.eval.settings import FidConfig
from flowkit.eval.sweep import SweepSettings, jobs_of, run_sweep

SCRIPT = Path(__file__).parents[1] / "eval" / "sweep.py"
MODULE = '''
"""Velocities of the straight flow to a Gaussian of the given deviation, per pixel."""
def gaussian(deviation):
    def velocity(x, t):
        variance = (1 - t) ** 2 + (t * deviation) ** 2
        return (t * deviation**2 - (1 - t)) / variance * x
    return velocity
narrow, wide = gaussian(0.2), gaussian(0.6)
def broken(x, t):
    return x * float("nan")
def partly(x, t):
    return broken(x, t) if len(x) == 3 else narrow(x, t)
'''


def settings(folder: Path, **changes) -> SweepSettings:
    fid = FidConfig(
        reference="digits-test",
        features="pixels",
        metrics=["fid"],
        num_samples=60,
        chunk_size=30,
        shape=[1, 8, 8],
        straightness_samples=0,
        progress=False,
        reference_dir=str(folder / "references"),
    )
    fid = replace(fid, **changes.pop("fid", {}))
    models = {"narrow": "sweep_flows:narrow", "wide": "sweep_flows:wide"}
    base = SweepSettings(models=models, output_dir=folder / "sweep", solvers=["euler"], fid=fid)
    return replace(base, **{"nfe": [1, 2], **changes})


@pytest.fixture
def flows(tmp_path: Path, monkeypatch) -> Path:
    (tmp_path / "sweep_flows.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_every_combination_is_one_run(tmp_path: Path) -> None:
    solvers = ["euler", {"name": "rf_solver"}, "heun"]
    caches = [None, {"name": "encoder", "steps": 2}]
    grids = [{"name": "uniform"}, {"name": "power", "exponent": 2.0}]
    jobs, impossible = jobs_of(settings(tmp_path, solvers=solvers, caches=caches, grids=grids))
    assert len(jobs) == len({job.slug for job in jobs}) == 2 * 3 * 2 * 2
    found = {
        (o.name, o.model, o.solver, str(o.cache), str(o.grid))
        for o in (job.options for job in jobs)
    }
    assert len(found) == len(jobs)
    assert {job.options.num_samples for job in jobs} == {60}
    assert len({job.options.output_dir for job in jobs}) == len(jobs)
    assert len({job.options.records for job in jobs}) == 1
    heun = [job.options.nfe for job in jobs if job.options.solver == "heun"]
    assert all(nfe == [2] for nfe in heun)  # one evaluation is not enough for it
    assert any("narrow: heun with nfe=1" in line for line in impossible)


def test_a_solver_that_chooses_its_steps_is_not_told_them(tmp_path: Path) -> None:
    [job, _], impossible = jobs_of(settings(tmp_path, solvers=["dopri5"]))
    assert job.options.nfe is None and not impossible


def test_a_changed_model_is_a_new_run(tmp_path: Path) -> None:
    weights = tmp_path / "model"
    weights.mkdir()
    (weights / "a.bin").write_text("one")
    slugs = []
    for text in ("one", "another"):
        (weights / "a.bin").write_text(text)
        slugs += [job.slug for job in jobs_of(settings(tmp_path, models={"m": str(weights)}))[0]]
    assert len(set(slugs)) == 2


def test_a_changed_schedule_or_decoder_is_a_new_run(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    slugs = []
    for number in range(3):
        (tmp_path / "vae.bin").write_text("x" * max(number, 1))
        path.write_text("{}" + " " * min(number, 1))
        changes = {"solvers": [str(path)], "fid": {"vae": str(tmp_path / "vae.bin")}}
        slugs += [job.slug for job in jobs_of(settings(tmp_path, **changes))[0]]
    assert len(set(slugs)) == 6


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fid": {"solver": "heun"}}, "fid.solver is the sweep's to choose"),
        ({"fid": {"model": "m"}}, "fid.model is the sweep's to choose"),
        ({"solvers": [3]}, "a solver is a name"),
        ({"solvers": ["eulr"]}, "did you mean 'euler'"),
        ({"solvers": ["heun"], "nfe": [1]}, "nothing to run; narrow: heun with nfe=1"),
        ({"models": {}}, "nothing to run"),
        ({"grids": [{"name": "unifrm"}]}, "did you mean 'uniform'"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is(tmp_path, changes, message) -> None:
    with pytest.raises(FlowkitError, match=message):
        jobs_of(settings(tmp_path, **changes))
    assert not list(tmp_path.iterdir())


def _times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}


def test_a_sweep_makes_a_leaderboard_and_goes_on_where_it_was(flows: Path) -> None:
    first = settings(flows)
    assert run_sweep(first) == []
    folder = first.output_dir
    records = read_folder(folder / "records")
    assert len(records) == 4 and {one.nfe for one in records.values()} == {1, 2}
    lines = (folder / "leaderboard/leaderboard.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["rank"] for row in rows] == [1, 2, 3, 3]  # one Euler step: the mean, for both
    assert (folder / "leaderboard/index.html").is_file()

    before = _times(folder / "records")
    next(iter(records)).unlink()  # one of its run's two records is lost
    assert run_sweep(replace(first, solvers=["euler", "ab2"])) == []
    after = _times(folder / "records")
    untouched = [name for name in before if after[name] == before[name]]
    assert len(after) == 8 and len(untouched) == 2  # the whole run only; the other is not redone


def test_a_failed_run_does_not_stop_the_others(flows: Path) -> None:
    models = {"broken": "sweep_flows:broken", "wide": "sweep_flows:wide"}
    tried = settings(flows, models=models, nfe=[1])
    for _ in range(2):  # it is tried again
        [line] = run_sweep(tried)
        assert line.startswith("broken-euler-") and "finite" in line
        assert len(read_folder(tried.output_dir / "records")) == 1


def test_two_processes_go_on_together_when_one_of_them_fails(flows: Path) -> None:
    """A folder that the main process refuses, and a chunk of samples that one of them cannot do.

    Of the third run one process has left every other chunk: two give the same bits.
    """
    models = {"narrow": "sweep_flows:narrow", "wide": "sweep_flows:wide"}
    models["partly"] = "sweep_flows:partly"
    fid = {"num_samples": 71, "chunk_size": 4, "features": "digits"}
    tried = settings(flows, models=models, solvers=["heun"], nfe=[2, 4], fid=fid)
    jobs = {job.options.name: job for job in jobs_of(tried)[0]}
    folder = Path(jobs["narrow"].options.output_dir)
    folder.mkdir(parents=True)
    (folder / "letter.txt").write_text("mine")
    alone = {one.nfe: one for one in run_fid(jobs["wide"].options)}
    shutil.rmtree(str(jobs["wide"].options.records))
    lost = sorted(Path(jobs["wide"].options.output_dir).rglob("chunk-*.safetensors"))[::2]
    for path in lost:
        path.unlink()
    save(tried, flows / "sweep.yaml")
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        + [str(SCRIPT), "--config", str(flows / "sweep.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "2 of the sweep's runs failed; first narrow-heun" in launched.stderr
    assert "is not empty and holds no run" in launched.stderr
    assert "samples 68 to 70 with nfe-0002" in launched.stderr
    assert all(path.is_file() for path in lost) and len(lost) == 18
    records = read_folder(tried.output_dir / "records").values()
    assert [one.name for one in records] == ["wide heun nfe-0002", "wide heun nfe-0004"]
    for one in records:
        assert one.samples_sha256 == alone[one.nfe].samples_sha256
        assert one.metrics["fid"] == pytest.approx(alone[one.nfe].metrics["fid"], rel=1e-12)
        assert one.errors == alone[one.nfe].errors
    assert (tried.output_dir / "leaderboard/index.html").is_file()


def test_the_front_is_measured_again_on_noise_that_did_not_choose_it(flows: Path) -> None:
    tried = settings(flows, nfe=[2, 512], report_seed=77)
    assert run_sweep(tried) == []
    chosen = read_folder(tried.output_dir / "records")
    report = read_folder(tried.output_dir / "report/records")
    lines = (tried.output_dir / "leaderboard/leaderboard.jsonl").read_text().splitlines()
    on_front = [row for row in map(json.loads, lines) if row["pareto"] or row["rank"] == 1]
    assert {one.seed for one in chosen.values()} == {0}
    assert {one.seed for one in report.values()} == {77}
    names = {one.name for one in report.values()}
    assert names == {row["name"] for row in on_front}
    assert "wide euler nfe-0002" in names  # two steps from the Gaussian are better than 512 here,
    assert not any(name.endswith("0512") for name in names)  # which are dearer as well
    assert (tried.output_dir / "report/leaderboard/index.html").is_file()


def test_the_packaged_sweep_reads() -> None:
    found = parse(SweepSettings, ["--config", "digits/sweep.yaml"], doc="")
    jobs, _ = jobs_of(found)
    assert len(jobs) == len(found.models) * len(found.solvers)
    assert found.fid.reference == "digits-test" and torch.tensor(found.nfe).min() == 1
