"""Chunks: what a kill, another order or another number of processes must not change."""

from __future__ import annotations

import os

import pytest
import torch
from accelerate import Accelerator

from flowkit.errors import FlowkitError
from flowkit.eval.feature_pass import same_identity
from flowkit.eval.frechet import FrechetMoments
from flowkit.eval.streaming import Chunks, FeatureSet, chunk_ranges, share

ROWS = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)) * 3 + 100


@pytest.fixture
def chunks(tmp_path):
    return Chunks(tmp_path / "chunks", frozenset({"features"}))


def tensors(indices):
    hashes = torch.tensor([[i % 256] * 32 for i in indices], dtype=torch.uint8)
    return {"features": ROWS[indices.start : indices.stop], "hashes": hashes}


def fill(chunks, ranges, order=1):
    for indices in ranges[::order]:
        chunks.write(indices, tensors(indices), {"nfe": 2})
    return FeatureSet(chunks, ranges)


@pytest.mark.parametrize("start, end, size", [(0, 50, 7), (50, 100, 25), (0, 3, 10), (4, 5, 1)])
def test_ranges_cover_without_gap_or_overlap(start, end, size):
    ranges = chunk_ranges(start, end, size)
    assert [i for indices in ranges for i in indices] == list(range(start, end))
    assert all(len(indices) == size for indices in ranges[:-1])


def test_what_is_written_is_read_back(chunks):
    features = fill(chunks, chunk_ranges(0, 50, 7))
    assert torch.equal(features.rows(), ROWS) and len(features) == 50
    assert features.infos() == [{"nfe": 2}] * 8
    assert features.pictures() is None


def test_moments_are_those_of_all_rows(chunks):
    features = fill(chunks, chunk_ranges(0, 50, 7))
    whole = FrechetMoments()
    whole.update(ROWS)
    for moments in (features.moments(), *_merged(features)):
        assert moments.n == 50
        torch.testing.assert_close(moments.mean, whole.mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(moments.cov, whole.cov, rtol=1e-12, atol=1e-12)


def _merged(features):
    for count in (1, 3, 20):
        total, groups = FrechetMoments(), list(features.groups(count))
        assert len(groups) == min(count, 8)
        for group in groups:
            total.merge(group)
        yield total


def test_the_order_of_writing_leaves_no_trace(tmp_path):
    ranges = chunk_ranges(0, 50, 7)
    one = fill(Chunks(tmp_path / "a", frozenset({"features"})), ranges)
    other = fill(Chunks(tmp_path / "b", frozenset({"features"})), ranges, order=-1)
    assert torch.equal(one.moments().cov, other.moments().cov)
    assert one.sha256() == other.sha256()


def test_the_hash_of_the_pictures_does_not_know_the_chunks(tmp_path):
    sets = [
        fill(Chunks(tmp_path / str(size), frozenset({"features"})), chunk_ranges(0, 50, size))
        for size in (7, 50)
    ]
    assert sets[0].sha256() == sets[1].sha256()
    shorter = FeatureSet(sets[0].chunks, sets[0].ranges[:-1])
    assert shorter.sha256() != sets[0].sha256()


def test_gaps_overlaps_and_missing_chunks_are_refused(chunks):
    ranges = chunk_ranges(0, 50, 10)
    fill(chunks, ranges)
    for wrong in (ranges[:1] + ranges[2:], [ranges[0], *ranges]):
        with pytest.raises(FlowkitError, match="leave a gap or overlap"):
            FeatureSet(chunks, wrong)
    chunks.path(ranges[2]).unlink()
    with pytest.raises(FlowkitError, match="chunk-000000020-000000030.* is missing; run"):
        FeatureSet(chunks, ranges)


def test_a_damaged_chunk_is_named(chunks):
    [indices] = chunk_ranges(0, 10, 10)
    fill(chunks, [indices])
    path = chunks.path(indices)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(FlowkitError, match="chunk-0.* is missing or damaged .*delete it"):
        chunks.done(indices)


def test_a_chunk_without_a_part_is_computed_again(tmp_path):
    [indices] = chunk_ranges(0, 10, 10)
    fill(Chunks(tmp_path, frozenset({"features"})), [indices])
    assert Chunks(tmp_path, frozenset({"features"})).done(indices)
    assert not Chunks(tmp_path, frozenset({"features", "logits"})).done(indices)


def test_each_range_is_computed_once_and_a_killed_launch_goes_on(chunks, tmp_path):
    """The second launch takes what the first had claimed and not finished."""
    ranges, seen = chunk_ranges(0, 50, 10), []

    def compute(indices):
        seen.append(indices.start)
        if len(seen) == 3:
            raise KeyboardInterrupt
        chunks.write(indices, tensors(indices), {})

    options = {"folder": tmp_path, "accelerator": Accelerator(cpu=True), "title": "x"}
    with pytest.raises(KeyboardInterrupt):
        share(ranges, chunks.done, compute, **options, progress=False)
    [old] = tmp_path.glob(".claims-*")
    os.utime(old, (0, 0))
    (tmp_path / ".claims-running").mkdir()  # of another launch, which may be at work
    share(ranges, chunks.done, compute, **options, progress=False)
    assert seen == [0, 10, 20, 20, 30, 40]
    assert [path.name for path in tmp_path.glob(".claims-*")] == [".claims-running"]
    assert torch.equal(FeatureSet(chunks, ranges).rows(), ROWS)


def test_what_fails_in_a_process_is_said_and_leaves_nothing_taken(chunks, tmp_path):
    def compute(indices):
        raise FlowkitError("no such picture")

    options = {"folder": tmp_path, "accelerator": Accelerator(cpu=True), "title": "x"}
    with pytest.raises(FlowkitError, match="no such picture"):
        share([range(4)], chunks.done, compute, **options, progress=False)
    assert not list(tmp_path.glob(".claims-*"))


def test_chunks_of_another_run_are_refused(tmp_path):
    file = tmp_path / "identity.json"
    same_identity(file, {"model": "a", "shape": [1, 2]})
    same_identity(file, {"model": "a", "shape": (1, 2)})
    with pytest.raises(FlowkitError, match="chunks of another run: model was a, now b"):
        same_identity(file, {"model": "b", "shape": [1, 2]})
    file.write_text("{")
    with pytest.raises(FlowkitError, match="identity.json is damaged; delete"):
        same_identity(file, {"model": "a"})
