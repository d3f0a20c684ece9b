"""The pair store: the same bytes from any number of processes, and nothing damaged is ever read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flowkit import pairs
from flowkit.errors import FlowkitError
from flowkit.noise import keyed_noise
from flowkit.pairs import PairIndex, PairStore, TensorSpec

INDEX = PairIndex(
    shape=(2, 4, 4),
    num_pairs=150,  # 8 shards, the last of 10 pairs; chunks of 8, 8, 4
    seed=7,
    shard_size=20,
    chunk_size=8,
    cond={"class_labels": TensorSpec("int64"), "embedding": TensorSpec("float16", (3,))},
    source={"solver": "euler", "times": (0.0, 0.5, 1.0), "model": {"sha256": "ab"}},
)

# A teacher whose result depends on every pair's noise; also the body of the worker processes.
TEACHER = """
import os, signal, sys, time
import torch
from flowkit import pairs

def teacher(indices, noise):
    rows = torch.tensor(list(indices))
    data = torch.tanh(noise.flatten(1) @ torch.linspace(-1, 1, 32 * 32).reshape(32, 32))
    return {
        "data": data.reshape(noise.shape),
        "class_labels": rows % 10,
        "embedding": torch.stack([rows, rows / 2, -rows], dim=1).float(),
    }

def generate(path, rank=0, world=1, delay=0.0):
    def slow(indices, noise):
        time.sleep(delay)
        return teacher(indices, noise)

    for shard in pairs.missing_shards(path, rank=rank, world=world):
        pairs.write_shard(path, shard, slow)
"""
HERE: dict = {}
exec(TEACHER, HERE)
teacher, generate = HERE["teacher"], HERE["generate"]


def start(call: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", f"{TEACHER}\ntorch.set_num_threads(1)\n{call}"])


def make(path, index=INDEX, compute=teacher) -> str:
    pairs.create(path, index)
    for shard in pairs.missing_shards(path):
        pairs.write_shard(path, shard, compute)
    return path


def hashes(path: Path) -> dict[str, str]:
    """sha256 of every file but temporary ones."""
    files = (file for file in Path(path).iterdir() if not file.name.startswith(".tmp-"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A finished store; read only."""
    return make(tmp_path_factory.mktemp("pairs") / "made")


def test_rows_are_the_teachers_and_noise_comes_back_from_its_key(made):
    store = PairStore(made, shape=(2, 4, 4))
    assert len(store) == 150 and store.shape == (2, 4, 4) and store.index == INDEX
    rows = store.fetch([149, 0, 20, 19, 20])
    noise = keyed_noise(7, [149, 0, 20, 19, 20], (2, 4, 4))
    assert rows.keys() == {"noise", "data", "class_labels", "embedding"}
    assert torch.equal(rows["noise"], noise)
    assert rows["data"].dtype == torch.float32
    torch.testing.assert_close(rows["data"], teacher([149, 0, 20, 19, 20], noise)["data"])
    assert rows["class_labels"].tolist() == [9, 0, 0, 9, 0]
    assert rows["embedding"].dtype == torch.float16
    assert rows["embedding"][0].tolist() == [149, 74.5, -149]


def test_chunks_are_those_of_the_index(tmp_path):
    seen = []

    def compute(indices, noise):
        seen.append(indices)
        assert torch.equal(noise, keyed_noise(7, indices, (2, 4, 4)))
        return teacher(indices, noise)

    pairs.create(tmp_path, INDEX)
    pairs.write_shard(tmp_path, 1, compute)
    pairs.write_shard(tmp_path, 7, compute)
    assert seen == [range(20, 28), range(28, 36), range(36, 40), range(140, 148), range(148, 150)]


def test_preloaded_and_pickled_stores_read_the_same(made):
    store, rows = PairStore(made), torch.randperm(150)
    expected = store.fetch(rows)
    assert len(pickle.dumps(store)) < expected["data"].nbytes  # maps stay behind
    in_memory = PairStore(made).preload()
    assert store.nbytes == sum(t.nbytes for t in in_memory._memory.values())
    with multiprocessing.get_context("fork").Pool(1) as pool:  # as a DataLoader worker does
        elsewhere = pool.apply(store.fetch, (rows.tolist(),))
    for found in (in_memory.fetch(rows.tolist()), elsewhere):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_fetched_batch_may_be_changed(made):
    for store in (PairStore(made), PairStore(made).preload()):
        before = hashes(made)
        store.fetch(range(20))["data"].zero_()
        assert store.fetch(range(20))["data"].abs().sum() > 1 and hashes(made) == before


@pytest.mark.parametrize("indices", [[150], [-1], torch.tensor([0, 1000])])
def test_index_out_of_range(made, indices):
    with pytest.raises(IndexError, match=r"0\.\.149"):
        PairStore(made).fetch(indices)


def test_float16_data(tmp_path):
    index = PairIndex(shape=(5,), num_pairs=12, shard_size=12, chunk_size=5, dtype="float16")
    make(tmp_path, index, lambda rows, noise: {"data": 3 * noise})
    rows = PairStore(tmp_path).fetch(range(12))
    assert torch.equal(rows["data"], (3 * rows["noise"]).half().float())
    with pytest.raises(FlowkitError, match="overflows float16"):
        pairs.write_shard(tmp_path, 0, lambda rows, noise: {"data": 1e5 * noise})


def inverted(indices, noise):
    """Noise as a tensor, whitened unevenly as inversion does, for smooth data."""
    assert noise is None
    rows = torch.tensor(list(indices)).reshape(-1, 1, 1, 1)
    noise = 0.95 * keyed_noise(1, indices, (1, 8, 8)) + 0.05
    ramp = torch.linspace(-1, 0.5, 8).expand(1, 8, 8)
    return {"noise": noise, "data": ramp * (1 + rows % 3) / 3}


TENSOR_INDEX = PairIndex(
    shape=(1, 8, 8), num_pairs=64, shard_size=32, chunk_size=32, noise="tensor"
)


def test_noise_as_a_tensor(tmp_path):
    make(tmp_path, TENSOR_INDEX, inverted)
    rows, expected = PairStore(tmp_path).fetch([40, 3]), inverted([40, 3], None)
    assert torch.equal(rows["noise"], expected["noise"])
    assert torch.equal(rows["data"], expected["data"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data": torch.zeros(8, 2, 4)}, r"data has shape \(8, 2, 4\), not \(8, 2, 4, 4\)"),
        ({"data": torch.full((8, 2, 4, 4), torch.nan)}, "data has values that are not finite"),
        ({"embedding": torch.full((8, 3), torch.inf)}, "embedding has values that are not finite"),
        ({"class_labels": torch.zeros(8, dtype=torch.int32)}, "class_labels is torch.int32"),
        ({"class_labels": torch.zeros(8)}, "class_labels is torch.float32"),
        ({"prompt": torch.zeros(8)}, "expected tensors .* got .*prompt"),
    ],
)
def test_bad_chunks_are_named_and_not_written(tmp_path, change, message):
    pairs.create(tmp_path, INDEX)
    with pytest.raises(FlowkitError, match=r"pairs 40\.\.47: " + message):
        pairs.write_shard(tmp_path, 2, lambda rows, noise: teacher(rows, noise) | change)
    assert pairs.missing_shards(tmp_path) == list(range(8))
    with pytest.raises(FlowkitError, match=r"shard must lie in \[0, 8\)"):
        pairs.write_shard(tmp_path, 8, teacher)


def test_three_processes_write_the_same_bytes(made, tmp_path):
    call = f"pairs.create({str(tmp_path)!r}, pairs.PairIndex.from_json({INDEX.to_json()!r}))\n"
    call += f"generate({str(tmp_path)!r}, rank=%d, world=3)"
    workers = [start(call % rank) for rank in range(3)]
    assert [worker.wait(120) for worker in workers] == [0, 0, 0]
    assert hashes(tmp_path) == hashes(made)


def test_killed_and_restarted_writes_the_same_bytes(made, tmp_path):
    path = str(tmp_path)
    pairs.create(path, INDEX)
    worker = start(f"generate({path!r}, delay=0.02)")
    while len(pairs.missing_shards(path)) > 6 and worker.poll() is None:
        time.sleep(0.005)
    worker.kill()
    assert worker.wait(30) == -signal.SIGKILL
    assert 0 < len(pairs.missing_shards(path)) <= 6
    # what kills inside a write leave: a temporary file, tensors without their record
    torn = pairs.missing_shards(path)[0]
    (tmp_path / ".tmp-12345678-shard-000007.safetensors").write_bytes(b"half")
    (tmp_path / f"shard-{torn:06d}.safetensors").write_bytes(b"half")
    with pytest.raises(FlowkitError, match="shards are missing.*run the generation again"):
        PairStore(path)
    for rank in range(2):  # restarted on two processes
        generate(path, rank, 2)
    assert hashes(tmp_path) == hashes(made)


def test_kill_within_a_shard_leaves_no_trace_of_it(tmp_path):
    pairs.create(tmp_path, INDEX)
    worker = start(
        "def suicide(indices, noise):\n"
        "    if 28 in indices: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return teacher(indices, noise)\n"
        f"pairs.write_shard({str(tmp_path)!r}, 0, suicide)\n"
        f"pairs.write_shard({str(tmp_path)!r}, 1, suicide)\n"
    )
    assert worker.wait(60) == -signal.SIGKILL
    assert pairs.missing_shards(tmp_path) == [1, 2, 3, 4, 5, 6, 7]


def test_work_is_divided_without_gaps(tmp_path):
    pairs.create(tmp_path, INDEX)
    pairs.write_shard(tmp_path, 4, teacher)
    parts = [pairs.missing_shards(tmp_path, rank=rank, world=3) for rank in range(3)]
    assert parts == [[0, 3, 6], [1, 7], [2, 5]]
    with pytest.raises(FlowkitError, match="rank 3 of world 3"):
        pairs.missing_shards(tmp_path, rank=3, world=3)


def create_one(path: str, seed: int) -> bool:
    try:
        pairs.create(path, dataclasses.replace(INDEX, seed=seed))
    except FlowkitError:
        return False
    return True


def test_only_one_of_several_creators_wins(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        for trial in range(20):
            path = str(tmp_path / str(trial))
            won = pool.starmap(create_one, [(path, seed) for seed in range(4)])
            assert sum(won) == 1
            there = json.loads((Path(path) / "index.json").read_text())
            assert won[there["seed"]]
            assert [file.name for file in Path(path).iterdir()] == ["index.json"]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"shape": (1, 4, 4)}, r"shape: \[2, 4, 4\] != \[1, 4, 4\]"),
        ({"seed": 8}, "seed: 7 != 8"),
        ({"source": {"solver": "heun"}}, "source.model"),
        ({"cond": {}}, "cond"),
    ],
)
def test_another_index_is_refused_by_name(made, change, named):
    before = hashes(made)
    with pytest.raises(FlowkitError, match=named):
        pairs.create(made, dataclasses.replace(INDEX, **change))
    pairs.create(made, INDEX)
    assert hashes(made) == before
