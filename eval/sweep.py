"""Measure checkpoints x solvers x caches x numbers of evaluations, then build the leaderboard.

  accelerate launch eval/sweep.py --config digits/sweep.yaml
  python -m flowkit.eval.sweep --config digits/sweep.yaml nfe=[1,4] output_dir=runs/quick

Each combination runs as eval/fid.py would, with the options under `fid`. A sweep that was stopped
goes on where it was; what is finished is skipped, unless its options or files have changed. Writes
records/ and leaderboard/index.html under output_dir. With report_seed, whatever is on a Pareto
front is measured again on noise that had no part in choosing it, to report/.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowkit.config import option, parse, run_command
from flowkit.errors import FlowkitError
from flowkit.eval.settings import FidConfig
from flowkit.schema import to_dict

if TYPE_CHECKING:
    from flowkit.eval.records import Record

__all__ = ["Job", "SweepSettings", "jobs_of", "main", "run_sweep"]


@dataclass(kw_only=True)
class SweepSettings:
    """Options of the sweep."""

    models: dict[str, str] = option(help="name in the leaderboard: what fid's `model` takes")
    output_dir: Path = option(Path("runs/sweep"), "records/, leaderboard/, and the runs themselves")
    solvers: list[Any] = option(["abm"], "names, or {name: ..., its options}")
    nfe: list[int] = option([1, 2, 4, 8], "evaluations of the velocity", low=1)
    caches: list[Any] = option([None], "null, or as fid's `cache`: {name: ..., its options}")
    grids: list[Any] = option([], "as fid's `grid`; none: the one under fid")
    report_seed: int | None = option(
        None, "measure the rows on a front again with this seed of the noise; null: do not", low=0
    )
    published: list[Path] = option([], "files of published numbers for the leaderboard")
    metric: str | None = option(None, "what the leaderboard ranks by; null: the first there is")
    title: str = option("Leaderboard", "heading of the page")
    fid: FidConfig = option(help="what all runs have in common")


# What a run is given by the sweep.
_CHOSEN = (
    *("model", "pictures", "name", "output_dir", "records"),
    *("solver", "solver_options", "cache", "nfe"),
)


@dataclass(frozen=True)
class Job:
    """One run: a model with a solver, a grid and a cache, at several numbers of evaluations."""

    slug: str
    options: FidConfig


def jobs_of(settings: SweepSettings) -> tuple[list[Job], list[str]]:
    """The runs, and a line for each combination that its solver cannot do.

    FlowkitError: nothing to run, options that belong to the sweep given under `fid`, a solver that
    is neither a name nor a mapping with one.
    """
    given, default = to_dict(settings.fid), to_dict(FidConfig(reference=settings.fid.reference))
    own = (
        "model",
        "pictures",
        "name",
        "output_dir",
        "records",
        "solver",
        "solver_options",
        "cache",
    )
    for key in (*own, "nfe"):
        if given[key] != default[key]:
            raise FlowkitError(f"fid.{key} is the sweep's to choose, got {given[key]!r}; "
                               "give models, solvers, caches, nfe and output_dir")  # fmt: skip
    jobs: dict[str, Job] = {}
    impossible = []
    axes = (settings.models.items(), settings.solvers, settings.caches)
    for (name, model), solver, cache in itertools.product(*axes):
        solver_name, solver_options = _solver(solver)
        for grid in settings.grids or [settings.fid.grid]:
            options = replace(
                settings.fid, model=model, name=name, solver=solver_name,
                solver_options=solver_options, cache=cache, grid=grid,
                records=str(settings.output_dir / "records"),
            )  # fmt: skip
            options.nfe, reasons = _possible(options, settings.nfe)
            impossible += [f"{name}: {reason}" for reason in reasons]
            if options.nfe != []:
                job = _job(options, settings.output_dir)
                jobs[job.slug] = job
    if not jobs:
        raise FlowkitError(f"the sweep has nothing to run; {'; '.join(impossible[:1]) or 'none'}")
    return list(jobs.values()), impossible


def run_sweep(settings: SweepSettings) -> list[str]:
    """Run what is not finished and write the leaderboard; returns a line for each failed run.

    In a launch of several processes all call it; the main one writes.
    """
    from flowkit.processes import launched

    jobs, impossible = jobs_of(settings)
    launched()  # before anything asks for the processes' state, which is made once
    for line in impossible:
        _say(f"skipped {line}")
    failed = list(_run_all(jobs))
    files = _build(settings, settings.output_dir)
    if settings.report_seed is not None:
        chosen = list(_chosen(jobs, files, settings.output_dir / "report", settings.report_seed))
        failed += _run_all(chosen)
        _build(settings, settings.output_dir / "report")
    return failed


def _run_all(jobs: Sequence[Job]) -> Iterator[str]:
    """Run the jobs that are not finished; yields what went wrong."""
    from flowkit.eval.fid import run

    for place, job in enumerate(jobs, 1):
        if _finished(job):
            _say(f"[{place}/{len(jobs)}] {job.slug}: finished before")
            continue
        _say(f"[{place}/{len(jobs)}] {job.slug}")
        try:
            records = run(job.options)
        except FlowkitError as error:
            _say(f"failed: {error}")
            yield f"{job.slug}: {error}"
            continue
        if records:
            _mark(job, records)


def _solver(solver: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(solver, str):
        return solver, {}
    if isinstance(solver, Mapping) and isinstance(solver.get("name"), str):
        return solver["name"], {key: value for key, value in solver.items() if key != "name"}
    raise FlowkitError(f"a solver is a name or {{name: ..., options}}, got {solver!r}")


def _possible(options: FidConfig, wanted: Sequence[int]) -> tuple[list[int] | None, list[str]]:
    """The numbers of evaluations that the solver can spend, None if it chooses itself; and why
    not the others."""
    from flowkit.eval.sampling_plan import sampling_plans
    from flowkit.samplers.solve import find_solver, is_adaptive

    fixed = options.solver == "own" or options.solver.endswith(".json")
    if fixed or is_adaptive(find_solver(options.solver, options.solver_options)):
        return None, []
    kept, reasons = [], []
    for nfe in dict.fromkeys(wanted):
        try:
            sampling_plans(replace(options, nfe=[nfe]))
        except FlowkitError as error:
            reasons.append(f"{options.solver} with nfe={nfe}: {error}")
        else:
            kept.append(nfe)
    return kept, reasons


def _job(options: FidConfig, output_dir: Path) -> Job:
    """The run in a folder of its own, named by what it is and by its options and files."""
    from flowkit.eval.records import canonical_sha256

    told = {key: value for key, value in to_dict(options).items() if key not in _FREE}
    named = (options.model, options.reference, options.weights, options.solver, options.vae)
    files = [_stamp(name) for name in named]
    cache = "" if options.cache is None else f"-{options.cache.get('name')}"
    words = re.sub(r"[^\w.+-]+", "-", f"{options.name}-{Path(options.solver).stem}{cache}")
    slug = f"{words}-{canonical_sha256([told, files])[:8]}"
    return Job(slug, replace(options, output_dir=str(output_dir / "runs" / slug)))


_FREE = ("output_dir", "records", "progress")


def _stamp(name: str | None) -> Any:
    """Sizes and times of a path's files, None for what is no path: a changed model is a new run."""
    path = Path(name or "")
    if not name or not path.exists():
        return None
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def _marker(job: Job) -> Path:
    return Path(job.options.output_dir).parent.parent / "finished" / f"{job.slug}.json"


def _finished(job: Job) -> bool:
    """Whether the run's records are all there."""
    from flowkit.files import read_json

    marker, folder = _marker(job), Path(str(job.options.records))
    return marker.is_file() and all((folder / name).is_file() for name in read_json(marker))


def _mark(job: Job, records: Sequence[Record]) -> None:
    from flowkit.files import write_json

    folder = Path(str(job.options.records))
    names = [path.name for one in records for path in folder.glob(f"*-{one.fingerprint}.json")]
    write_json(_marker(job), sorted(names))


def _chosen(jobs: Sequence[Job], files: set[str], output: Path, seed: int) -> Iterator[Job]:
    """The runs of the rows on a front, with another seed and folder."""
    from flowkit.eval.records import read_record
    from flowkit.eval.sampling_plan import sampling_plans
    from flowkit.files import read_json

    for job in jobs:
        if not _finished(job):
            continue
        found = [
            read_record(Path(str(job.options.records)) / name)
            for name in read_json(_marker(job))
            if f"records/{name}" in files
        ]
        if found:
            nfe = job.options.nfe
            if nfe is not None:
                steps = {one.steps for one in found}  # what a cache leaves as it is, unlike the NFE
                plans = sampling_plans(job.options)
                nfe = sorted(plan.nfe or 0 for plan in plans if len(plan.times) - 1 in steps)
            options = replace(job.options, nfe=nfe, seed=seed, records=str(output / "records"))
            yield _job(options, output)


def _build(settings: SweepSettings, folder: Path) -> set[str]:
    """Write the leaderboard of a folder's records; returns the files of the rows on a front."""
    from flowkit.eval.feature_pass import main_only
    from flowkit.eval.leaderboard import LeaderboardSettings, read_folder, write_leaderboard
    from flowkit.eval.ranking import rank_records
    from flowkit.eval.rows import Entry
    from flowkit.processes import launched

    if not (folder / "records").is_dir():
        return set()
    page = LeaderboardSettings(
        records=folder / "records", output_dir=folder / "leaderboard",
        published=settings.published, metric=settings.metric, title=settings.title,
    )  # fmt: skip

    def write() -> None:
        groups = write_leaderboard(page)
        rows = sum(len(group.rows) for group in groups)
        _say(f"{rows} rows in {len(groups)} rankings: {folder / 'leaderboard' / 'index.html'}")

    main_only(launched(), write)
    found = read_folder(folder / "records")
    entries = [Entry(record, f"records/{path.name}") for path, record in found.items()]
    return {
        entry.file
        for group in rank_records(entries, settings.metric)
        for row in group.rows
        if row.front or row.rank == 1
        for entry in row.entries
    }


def _say(text: str) -> None:
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(text, file=sys.stderr, flush=True)


def main() -> None:
    """The command; fails at the end if a run has failed."""

    def command() -> None:
        failed = run_sweep(parse(SweepSettings, doc=__doc__ or ""))
        if failed:
            raise FlowkitError(f"{len(failed)} of the sweep's runs failed; first {failed[0]}")

    run_command(command)


if __name__ == "__main__":
    from flowkit.eval import sweep

    sweep.main()
