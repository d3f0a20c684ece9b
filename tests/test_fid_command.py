"""The command: the same pictures and numbers on any number of processes, killed or not, whatever
is measured; and one clear line for what cannot be measured."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import small_networks
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from tiny_pipelines import dit, sd3

from flowkit.adapters import FlowVelocity, from_diffusers
from flowkit.checkpoint import export_model
from flowkit.data import load_data
from flowkit.errors import FlowkitError
from flowkit.eval import fid
from flowkit.eval.features import load_extractor
from flowkit.eval.frechet import frechet_distance
from flowkit.eval.kernel import kernel_distance
from flowkit.eval.model_source import class_labels
from flowkit.eval.records import read_record
from flowkit.eval.reference import make_reference
from flowkit.eval.sampling_plan import sampling_plans
from flowkit.eval.settings import FidConfig, GuidanceOptions, ReferenceConfig
from flowkit.nets.mlp import MLP
from flowkit.noise import keyed_noise
from flowkit.pictures import to_uint8
from flowkit.samplers import sample
from flowkit.samplers.grids import uniform
from flowkit.samplers.schedule_file import Schedule

SCRIPT = Path(__file__).parents[1] / "eval" / "fid.py"
SAMPLES = 60
FOLDERS = count()


def tiny(folder, **config):
    """A network with weights that do something, as a trainer exports it."""
    torch.manual_seed(0)
    net = MLP(shape=[1, 8, 8], width=32, num_blocks=1, **config)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    classes = config.get("num_classes")
    export_model(FlowVelocity(net, time_scale=1.0), folder, shape=[1, 8, 8], num_classes=classes)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("tiny") / "plain")


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("tiny") / "classes", num_classes=10, label_dropout=0.1)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return str(tmp_path_factory.mktemp("references"))


@pytest.fixture
def options(model, references, tmp_path):
    return FidConfig(
        reference="digits-test", model=model, features="digits", nfe=[2], solver="euler",
        grid={"name": "uniform"}, num_samples=SAMPLES, chunk_size=16, straightness_samples=0,
        reference_dir=references, output_dir=str(tmp_path / "run"), progress=False,
    )  # fmt: skip


@pytest.fixture
def measure(options, tmp_path):
    """Run in this process, by default in a folder of its own."""

    def run(**changes):
        changes.setdefault("output_dir", str(tmp_path / f"run-{next(FOLDERS)}"))
        return fid.run(replace(options, **changes))

    return run


def refusal(measure, **changes):
    with pytest.raises(FlowkitError) as caught:
        measure(**changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shown(folder, plan="nfe-0002"):
    """The pictures that the chunks keep, in order."""
    parts = []
    for path in sorted((Path(folder) / "chunks" / plan).iterdir()):
        with safe_open(path, framework="pt") as chunk:
            parts.append(chunk.get_tensor("pictures"))
    return torch.cat(parts)


def by_hand(model, solver="euler", num_steps=2, samples=SAMPLES):
    """The pictures, sampled without the harness."""
    noise = keyed_noise(0, range(samples), (1, 8, 8))
    velocity = from_diffusers(model).eval()
    with torch.no_grad():
        return to_uint8(sample(velocity, noise, uniform(num_steps), solver=solver).x)


def digits():
    return to_uint8(load_data("digits", "test").fetch(range(500))["data"])


def test_numbers_are_those_of_the_definition(measure, model):
    [record] = measure(metrics=["fid", "kid"])
    extractor = load_extractor("digits")
    made, real = extractor(by_hand(model)), extractor(digits())
    assert record.metrics["fid"] == pytest.approx(frechet_distance(made, real), rel=1e-5)
    assert record.metrics["kid"] == pytest.approx(kernel_distance(made, real), rel=1e-5)


def test_the_record_says_how_it_was_made(measure, options, tmp_path):
    changes = {"nfe": [4], "solver": "heun", "straightness_samples": 40, "chunk_size": 12}
    [record] = measure(**changes, output_dir=str(tmp_path / "run"), name="tiny")
    assert (record.nfe, record.nfe_with_guidance, record.steps) == (4, 4, 2)
    assert (record.num_samples, record.seeds, record.chunk_size) == (SAMPLES, [0, SAMPLES], 12)
    assert record.reference["name"] == "digits-test" and record.reference["n"] == 500
    assert record.model["parameters"] == sum(
        p.numel() for p in from_diffusers(options.model).parameters()
    )
    assert record.config["nfe"] == [4] and record.convention == "none"
    assert record.straightness["per_dim"] == pytest.approx(record.straightness["total"] / 64)
    assert record.images_per_second > 0 and record.peak_memory > 1e6
    assert record.errors["fid"]["jackknife"] > 0 and record.errors["fid"]["groups"] == 5
    folder = tmp_path / "run" / "records"
    [path] = folder.glob("*.json")
    assert read_record(path) == record and path.name.startswith("tiny-heun-nfe-0004-")
    assert Image.open(folder / record.grid_png).width > 8 * 32
    assert f"| {record.metrics['fid']:.4g} ±" in (tmp_path / "run" / "table.md").read_text()


def test_every_nfe_starts_from_the_same_noise(measure, model, tmp_path):
    both = measure(nfe=[1, 2], output_dir=str(tmp_path / "both"))
    alone = measure(nfe=[1]) + measure(nfe=[2])
    assert [r.samples_sha256 for r in both] == [r.samples_sha256 for r in alone]
    assert [r.metrics for r in both] == [r.metrics for r in alone]
    assert torch.equal(shown(tmp_path / "both", "nfe-0001"), by_hand(model, num_steps=1))


def test_chunk_size_moves_next_to_nothing(measure, tmp_path):
    seven, all_at_once = (
        measure(chunk_size=size, output_dir=str(tmp_path / str(size)))[0] for size in (7, 64)
    )
    gap = (shown(tmp_path / "7").int() - shown(tmp_path / "64").int()).abs()
    assert gap.max() <= 1 and (gap > 0).double().mean() <= 1e-4
    assert seven.metrics["fid"] == pytest.approx(all_at_once.metrics["fid"], rel=1e-6)


MANY = {"num_samples": 1000, "nfe": [8, 4], "solver": "heun", "chunk_size": 16}


def two_processes(options, folder):
    """The command line of MANY, launched on two processes."""
    arguments = [
        *("reference=digits-test", f"model={options.model}", "features=digits", "solver=heun"),
        *("grid={name: uniform}", "nfe=[8,4]", "num_samples=1000", "chunk_size=16"),
        *(f"output_dir={folder}", f"reference_dir={options.reference_dir}"),
        *("straightness_samples=0", "progress=false"),
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        + [str(SCRIPT), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a kill takes the workers too
    )


def same_results(folder, fresh):
    records = {r.nfe: r for r in map(read_record, (Path(folder) / "records").glob("*.json"))}
    for one in fresh:
        other = records[one.nfe]
        assert other.samples_sha256 == one.samples_sha256
        assert other.metrics["fid"] == pytest.approx(one.metrics["fid"], rel=1e-12)
        assert other.errors == one.errors


@pytest.mark.slow  # a launch of the sweep checks the same every day
def test_two_processes_fill_the_gaps_with_the_same_bits(measure, options, tmp_path):
    """Half of the chunks from one process, the rest from two, against one alone."""
    folder = tmp_path / "run"
    fresh = measure(**MANY, output_dir=str(folder))
    shutil.rmtree(folder / "records")
    lost = sorted(stamps(folder))[::2]
    for path in lost:
        path.unlink()
    launched = two_processes(options, folder)
    assert launched.wait(timeout=300) == 0, launched.stderr.read()[-2000:]
    assert all(path.is_file() for path in lost) and len(lost) == 63
    same_results(folder, fresh)


@pytest.mark.slow
def test_two_processes_killed_and_resumed_give_the_same_bits(measure, options, tmp_path):
    folder = tmp_path / "two"
    killed, deadline = two_processes(options, folder), time.monotonic() + 120
    while killed.poll() is None and time.monotonic() < deadline and len(stamps(folder)) < 3:
        time.sleep(0.005)
    assert killed.poll() is None, killed.stderr.read()[-2000:]
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert 3 <= len(stamps(folder)) < 126 and not (folder / "records").exists()
    resumed = two_processes(options, folder)
    assert resumed.wait(timeout=300) == 0, resumed.stderr.read()[-2000:]
    same_results(folder, measure(**MANY))


def stamps(folder):
    return {p: p.stat().st_mtime_ns for p in Path(folder).rglob("chunk-*.safetensors")}


def test_finished_chunks_serve_again(measure, tmp_path):
    """Other metrics, more evaluations and more samples compute only what is missing."""
    folder = str(tmp_path / "run")
    [first] = measure(num_samples=32, output_dir=folder)
    before = stamps(folder)
    [again] = measure(num_samples=32, metrics=["fid", "density_coverage"], output_dir=folder)
    assert stamps(folder) == before and again.metrics["fid"] == first.metrics["fid"]
    measure(nfe=[2, 4], num_samples=SAMPLES, output_dir=folder)
    after = stamps(folder)
    assert all(after[path] == before[path] for path in before) and len(after) == 2 * 4


def test_seed_ranges_are_disjoint_and_summed_up(measure):
    [record] = measure(num_samples=20, repeats=3, chunk_size=20)
    found = record.errors["fid"]
    assert record.seeds == [0, 60] and record.num_samples == 20 and len(set(found["values"])) == 3
    assert record.metrics["fid"] == pytest.approx(np.mean(found["values"]))
    assert found["std"] == pytest.approx(np.std(found["values"], ddof=1))
    assert found["min"] == min(found["values"])
    [alone] = measure(num_samples=20, chunk_size=20)
    assert alone.metrics["fid"] == found["values"][0]


def test_every_measure_comes_from_one_pass(measure, tmp_path):
    """Each with its rule; the chunks are those of the Fréchet distance alone, with logits."""
    names = ["fid", "kid", "is", "precision_recall", "density_coverage", "fid_infinity"]
    names += ["mind", "vendi", "cmmd", "authenticity"]
    [record] = measure(metrics=names, metric_options={"precision_recall": {"k": 4}})
    wanted = {*names, "precision", "recall", "density", "coverage"}
    assert record.metrics.keys() == wanted - {"precision_recall", "density_coverage"}
    assert record.parts.keys() == record.metrics.keys()
    assert all(part["rule"] for part in record.parts.values())
    assert record.parts["recall"]["rule"] == "k=4, <=, 500 real and 60 generated"
    assert 1 <= record.metrics["is"] <= 10 and 1 <= record.metrics["vendi"] <= SAMPLES


def test_classes_depend_on_seed_and_index_alone():
    assert class_labels("balanced", 0, range(8, 13), 10).tolist() == [8, 9, 0, 1, 2]
    drawn = class_labels("random", 0, range(1000), 10)
    assert torch.equal(drawn[300:310], class_labels("random", 0, range(300, 310), 10))
    assert not torch.equal(drawn, class_labels("random", 1, range(1000), 10))
    assert drawn.bincount(minlength=10).min() > 60


def test_guidance_is_counted_and_changes_the_pictures(measure, conditional):
    plain, none, double = (
        measure(model=conditional, guidance=GuidanceOptions(**given))[0]
        for given in ({}, {"scale": 1.0, "rescale": 0.5}, {"scale": 2.0})
    )
    assert (plain.nfe, plain.nfe_with_guidance) == (2, 2) and plain.guidance is None
    assert (double.nfe, double.nfe_with_guidance) == (2, 4) and double.guidance["scale"] == 2
    assert none.samples_sha256 == plain.samples_sha256 != double.samples_sha256
    assert plain.labels == "balanced"
    inside = GuidanceOptions(scale=2.0, interval=(0.3, 0.9))  # Euler evaluates at 0 and 1/2
    [half] = measure(model=conditional, guidance=inside)
    assert half.nfe_with_guidance == 3


def test_draws_of_a_stochastic_solver_are_the_samples_own(measure, tmp_path):
    for size in (7, 64):
        measure(solver="sde", nfe=[3], chunk_size=size, output_dir=str(tmp_path / str(size)))
    one, other = (shown(tmp_path / str(size), "nfe-0003").int() for size in (7, 64))
    assert (one - other).abs().max() <= 1 and (one != other).double().mean() <= 1e-3


def test_a_cache_is_counted_by_what_it_had_computed(measure, tmp_path):
    folder = tmp_path / "dit"
    export_model(FlowVelocity(small_networks.dit()), folder, shape=[1, 8, 8], num_classes=None)
    cache = {"name": "taylorseer", "interval": 3, "warmup": 2, "order": 1}
    [record] = measure(model=str(folder), nfe=[8], num_samples=20, cache=cache)
    assert (record.nfe, record.nfe_with_guidance, record.steps) == (4, 4, 8)  # 0, 1, 4, 7


def test_adaptive_solvers_count_what_they_spend(measure):
    [record] = measure(solver="dopri5", nfe=None, solver_options={"rtol": 0.1, "atol": 0.1})
    assert record.nfe >= 7 and record.grid == "free"
    assert "say nfe=null" in refusal(measure, solver="dopri5", nfe=[4])


def test_a_searched_schedule_is_a_solver(measure, model, tmp_path):
    Schedule(times=(0.0, 0.2, 1.0), solver="euler").save(tmp_path / "schedule.json")
    [record] = measure(solver=str(tmp_path / "schedule.json"), nfe=None)
    assert (record.nfe, record.solver, record.steps) == (2, "euler", 2)


def test_a_replaced_schedule_is_another(measure, tmp_path):
    """Same file, same number of evaluations, other times: neither its samples nor its record."""
    path, folder = tmp_path / "schedule.json", str(tmp_path / "run")
    Schedule(times=(0.0, 0.2, 1.0), solver="euler").save(path)
    asked = {"solver": str(path), "nfe": None}
    [first] = measure(**asked, output_dir=folder)
    Schedule(times=(0.0, 0.4, 1.0), solver="euler").save(path)
    assert "another run: plan nfe-0002 was" in refusal(measure, **asked, output_dir=folder)
    [second] = measure(**asked)
    assert first.config_sha256 != second.config_sha256
    Schedule(times=(0.0, 0.2, 0.4, 1.0), solver="euler").save(path)
    [third] = measure(**asked, output_dir=folder)  # of another name: beside the first one's
    assert third.nfe == 3
    Schedule(times=(0.0, 0.2, 1.0), solver="euler").save(path)
    assert measure(**asked, output_dir=folder)[0].samples_sha256 == first.samples_sha256


@pytest.mark.parametrize(
    "solver, grid, nfe, steps",
    [("heun", "uniform", 6, 3), ("edm_heun", "edm", 35, 18), ("abm", "power", 5, 5)],
)
def test_evaluations_become_steps(solver, grid, nfe, steps):
    given = FidConfig(reference="x", solver=solver, grid={"name": grid}, nfe=[nfe])
    [plan] = sampling_plans(given)
    assert len(plan.times) - 1 == steps
    [late] = sampling_plans(given, start=0.1)
    assert late.times[0] == pytest.approx(0.1) and len(late.times) - 1 == steps


def test_saved_pictures_measure_like_the_model(measure, tmp_path):
    """As a folder, and as an array, but for the batches in which features are computed."""
    folder = tmp_path / "saved"
    [record] = measure(save_pictures=True, output_dir=str(folder))
    pictures = folder / "pictures" / "nfe-0002"
    levels = np.stack([np.asarray(Image.open(path)) for path in sorted(pictures.iterdir())])
    np.savez(tmp_path / "set.npz", levels)
    for source in (pictures, tmp_path / "set.npz"):
        [other] = measure(model=None, pictures=str(source), num_samples=None)
        assert other.metrics["fid"] == pytest.approx(record.metrics["fid"], rel=1e-5)
        assert other.num_samples == SAMPLES and other.model is None and other.nfe is None


def test_parts_of_a_folder_are_disjoint_draws(measure):
    [record] = measure(model=None, pictures="digits-train", num_samples=100, repeats=3)
    assert record.seeds == [0, 300] and len(set(record.errors["fid"]["values"])) == 3
    assert "has 1297 pictures, 1500 were asked" in refusal(
        measure, model=None, pictures="digits-train", num_samples=500, repeats=3
    )


def test_statistics_stand_for_their_pictures(measure, references, tmp_path):
    out = str(tmp_path / "digits.npz")
    make_reference(
        ReferenceConfig(
            data="digits-test", out=out, features="digits", chunk_size=16,
            output_dir=references, progress=False,
        )
    )  # fmt: skip
    [one], [other] = measure(), measure(reference=out)
    assert one.metrics["fid"] == pytest.approx(other.metrics["fid"], rel=1e-9)
    assert one.reference == other.reference
    text = refusal(measure, reference=out, metrics=["kid"])
    assert "holds statistics, and a metric needs features" in text


def test_what_a_reference_lacks_is_said_before_sampling(measure, references, tmp_path):
    """Every refusal with num_samples that would take hours, and before any chunk is written."""
    kept = {"features": "digits", "output_dir": references, "progress": False}
    out = str(tmp_path / "plain.npz")
    make_reference(ReferenceConfig(data="digits-test", out=out, **kept))
    wide = tmp_path / "wide.npy"
    np.save(wide, np.random.default_rng(0).integers(0, 256, (9, 6, 6), dtype=np.uint8))
    subsets, k = {"kid": {"subsets": 9, "subset_size": 501}}, {"precision_recall": {"k": 500}}
    for changes, message in (
        ({"metrics": ["kid"], "reference": out}, "a metric needs features"),
        ({"features": "pixels", "reference": str(wide)}, "has 36 features a picture and this run"),
        ({"metrics": ["kid"], "metric_options": subsets}, "subsets of 501 cannot be drawn"),
        ({"metrics": ["kid"], "metric_options": {"kid": {"block_size": 9}}}, "in a block of 9"),
        ({"metrics": ["precision_recall"], "metric_options": k}, "k=500 neighbours need more"),
    ):
        run = {"num_samples": 10**7, "output_dir": str(tmp_path / "refused")} | changes
        assert message in refusal(measure, **run)
        assert not (tmp_path / "refused" / "chunks").exists()
        shutil.rmtree(tmp_path / "refused")
    text = refusal(measure, model=None, pictures="digits-train", features="pixels",
                   reference=str(wide), output_dir=str(tmp_path / "refused"))  # fmt: skip
    assert "has 36 features" in text and not (tmp_path / "refused").exists()


def test_a_diffusers_pipeline_with_its_decoder(measure, tmp_path):
    dit().save_pretrained(tmp_path / "dit")
    [record] = measure(
        model=str(tmp_path / "dit"), features="pixels", num_samples=4, chunk_size=2,
        reference=_colours(tmp_path), guidance=GuidanceOptions(scale=4.0),
    )  # fmt: skip
    assert record.labels == "balanced" and record.nfe_with_guidance == 4
    run = {"model": str(tmp_path / "dit"), "features": "pixels", "num_samples": 4}
    run |= {"reference": str(tmp_path / "colours.npy"), "output_dir": str(tmp_path / "latents")}
    [first] = measure(**run)
    vae = AutoencoderKL.from_pretrained(tmp_path / "dit" / "vae")
    torch.nn.init.normal_(vae.decoder.conv_out.weight)
    vae.save_pretrained(tmp_path / "dit" / "vae")
    assert "chunks of another run: vae was" in refusal(measure, **run)
    [second] = measure(**run | {"output_dir": str(tmp_path / "again")})
    assert second.config_sha256 != first.config_sha256
    assert "takes prompts" in refusal(measure, model=_saved(sd3(), tmp_path / "sd3"))


def _saved(pipeline, folder):
    pipeline.save_pretrained(folder)
    return str(folder)


def _colours(folder):
    """Random pictures of the pipeline's size."""
    rng = np.random.default_rng(0)
    np.save(folder / "colours.npy", rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8))
    return str(folder / "colours.npy")


def test_pixels_that_are_not_finite_fail_the_run(measure, tmp_path, monkeypatch):
    (tmp_path / "broken_flow.py").write_text(
        "import torch\n"
        "def flow(x_t, t):\n"
        "    return torch.where(torch.arange(len(x_t))[:, None, None, None] == 7, torch.inf, x_t)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = refusal(measure, model="broken_flow:flow", shape=[1, 8, 8])
    assert "samples 0 to 15 with nfe-0002: 64 of 1024 pixel values are not finite" in text


def test_leftovers_of_other_runs_are_refused(measure, conditional, tmp_path):
    folder = tmp_path / "used"
    folder.mkdir()
    (folder / "0.png").write_bytes(b"x")
    assert "not empty and holds no run" in refusal(measure, output_dir=str(folder))
    folder = str(tmp_path / "run")
    measure(output_dir=folder)
    for changes in ({"seed": 1}, {"solver": "heun"}, {"chunk_size": 8}, {"model": conditional}):
        assert "samples of another run: '" in refusal(measure, output_dir=folder, **changes)


def test_samples_of_other_weights_are_refused(measure, tmp_path):
    path, folder = tiny(tmp_path / "model"), str(tmp_path / "run")
    measure(model=path, output_dir=folder)
    tiny(tmp_path / "model", label_dropout=0.1, num_classes=10)
    assert "chunks of another run: model was" in refusal(measure, model=path, output_dir=folder)


def edited(folder, monkeypatch, scale):
    """A flow and features of one's own, freshly imported."""
    (folder / "edited_flow.py").write_text(
        f"def flow(x_t, t):\n    return -{scale} * x_t\n"
        f"def features(x):\n    return {scale} * x.flatten(1)[:, :8]\n"
    )
    monkeypatch.delitem(sys.modules, "edited_flow", raising=False)
    importlib.invalidate_caches()


def test_what_edited_code_made_is_not_used_again(measure, options, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    run = {"model": "edited_flow:flow", "shape": [1, 8, 8], "output_dir": str(tmp_path / "own")}
    edited(tmp_path, monkeypatch, 0.5)
    [first] = measure(**run)
    [seen] = measure(features="edited_flow:features")
    edited(tmp_path, monkeypatch, 0.25)
    assert "chunks of another run: model was" in refusal(measure, **run)
    [second] = measure(**run | {"output_dir": str(tmp_path / "other")})
    assert first.model["sha256"] != second.model["sha256"]
    [again] = measure(features="edited_flow:features")  # the reference's features are made anew
    assert again.metrics["fid"] == pytest.approx(seen.metrics["fid"] / 4, rel=1e-4)


def test_what_has_no_source_is_computed_anew(measure, tmp_path, monkeypatch):
    module = types.ModuleType("typed_flow")
    monkeypatch.setitem(sys.modules, "typed_flow", module)
    module.flow, module.features = lambda x, t: -0.5 * x, lambda x: x.flatten(1)[:, :8]
    run = {"model": "typed_flow:flow", "shape": [1, 8, 8], "output_dir": str(tmp_path / "typed")}
    assert measure(**run)[0].model["path"] == "typed_flow:flow (no source)"
    assert "'typed_flow:flow' has no source" in refusal(measure, **run)
    [first] = measure(features="typed_flow:features")
    module.features = lambda x: 2 * x.flatten(1)[:, :8]
    [second] = measure(features="typed_flow:features")
    assert second.metrics["fid"] == pytest.approx(4 * first.metrics["fid"], rel=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pictures": "digits-train"}, "either model=... or pictures=..."),
        ({"model": None}, "either model=... or pictures=..."),
        ({"metrics": ["fdi"]}, "unknown metric 'fdi', did you mean 'fid'?"),
        ({"metrics": ["sfid"]}, "but no spatial, which a metric needs"),
        ({"metric_options": {"kid": {"subset": 3}}}, "no option 'subset', did you mean 'subsets'"),
        ({"solver": "heun", "nfe": [3]}, "cannot take 3 evaluations; near it are 2 and 4"),
        ({"solver": "heum"}, "did you mean 'heun'"),
        ({"solver_options": {"order": 2}}, "has no option 'order'"),
        ({"grid": {"name": "powr"}}, "unknown grid 'powr', did you mean 'power'?"),
        ({"grid": {"name": "power", "rho": 7}}, "has no option 'rho'"),
        ({"cache": {"name": "nothing"}}, "unknown cache 'nothing'"),
        ({"guidance": GuidanceOptions(scale=2.0)}, "needs a class-conditional model"),
        ({"model": "no/such/folder"}, "no such folder"),
        ({"reference": "no/such/folder"}, "no folder or zip of pictures"),
        ({"reference": "cifar10-tset"}, "unknown data set"),
        ({"features": "resnet20"}, "unknown features"),
        ({"nfe": [2, 2]}, "names 2 twice"),
        ({"model": None, "pictures": "digits-test", "num_samples": 501}, "501 were asked for"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(changes, message, measure):
    text = refusal(measure, **changes)
    assert any(part in text for part in message.split("|")), text


def test_the_command_tells_mistakes_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fid.py", "model=x", "refrence=digits"])
    with pytest.raises(SystemExit):
        fid.main()
    assert capsys.readouterr().err == (
        "error: unknown option 'refrence'; did you mean 'reference'?\n"
    )


def test_help_teaches(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fid.py", "--help"])
    with pytest.raises(SystemExit):
        fid.main()
    text = capsys.readouterr().out
    assert "accelerate launch eval/fid.py model=" in text
    assert all(name in text for name in ("output_dir=", "seed=", "guidance.scale=", "rules.crop="))
