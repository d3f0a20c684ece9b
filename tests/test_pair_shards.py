"""A shard that is truncated, altered or foreign is named and made again, never read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import uuid
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from flowkit import pairs
from flowkit.errors import FlowkitError
from flowkit.noise import keyed_noise
from flowkit.pairs import PairIndex, PairStore

INDEX = PairIndex(shape=(2, 4, 4), num_pairs=150, seed=7, shard_size=20, chunk_size=8)
TENSOR_INDEX = PairIndex(
    shape=(1, 8, 8), num_pairs=64, shard_size=32, chunk_size=32, noise="tensor"
)


def teacher(indices, noise):
    return {"data": torch.tanh(3 * noise)}


def make(path, index=INDEX, compute=teacher) -> str:
    pairs.create(path, index)
    for shard in pairs.missing_shards(path):
        pairs.write_shard(path, shard, compute)
    return path


def hashes(path: Path) -> dict[str, str]:
    """sha256 of every file but temporary ones."""
    files = (file for file in Path(path).iterdir() if not file.name.startswith(".tmp-"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def inverted(indices, noise):
    """Noise as a tensor, whitened unevenly as inversion does, for smooth data."""
    assert noise is None
    rows = torch.tensor(list(indices)).reshape(-1, 1, 1, 1)
    noise = 0.95 * keyed_noise(1, indices, (1, 8, 8)) + 0.05
    ramp = torch.linspace(-1, 0.5, 8).expand(1, 8, 8)
    return {"noise": noise, "data": ramp * (1 + rows % 3) / 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A finished store; read only."""
    return make(tmp_path_factory.mktemp("pairs") / "made")


@pytest.fixture
def store_copy(made, tmp_path) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in made.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def edit_json(file: Path, **change) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-50] ^= 1
    file.write_bytes(content)


def test_opening_another_shape_or_convention(store_copy):
    with pytest.raises(FlowkitError, match=r"shape \(2, 4, 4\), expected \(3, 4, 4\)"):
        PairStore(store_copy, shape=(3, 4, 4))
    edit_json(store_copy / "index.json", shape=[4, 2, 4])
    with pytest.raises(FlowkitError, match="not written for its index.json"):
        PairStore(store_copy)
    edit_json(store_copy / "index.json", convention=2)
    with pytest.raises(FlowkitError, match="convention must be 1"):
        PairStore(store_copy)
    (store_copy / "index.json").write_text("{")
    with pytest.raises(FlowkitError, match="not the index of a pair store"):
        PairStore(store_copy)
    with pytest.raises(FlowkitError, match="no pair store at"):
        PairStore(store_copy / "nothing")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_damaged_shards_are_named_and_only_they_are_made_again(store_copy, made, damage):
    damage(store_copy / "shard-000003.safetensors")
    (store_copy / "shard-000005.json").write_text("")
    with pytest.raises(FlowkitError, match="2 of 8 shards are damaged.*") as error:
        PairStore(store_copy)
    assert "shard-000003.safetensors" in str(error.value) and "shard-000005" in str(error.value)
    assert "\n" not in str(error.value)
    untouched = (store_copy / "shard-000002.safetensors").stat().st_mtime_ns
    assert pairs.repair(store_copy) == [3, 5]
    assert pairs.missing_shards(store_copy) == [3, 5]
    make(store_copy)
    assert hashes(store_copy) == hashes(made)
    assert (store_copy / "shard-000002.safetensors").stat().st_mtime_ns == untouched
    assert pairs.repair(store_copy) == []


def test_sizes_alone_show_truncation(store_copy):
    assert len(PairStore(store_copy, verify="size")) == 150
    truncate(store_copy / "shard-000006.safetensors")
    with pytest.raises(FlowkitError, match="shard-000006.safetensors is truncated"):
        PairStore(store_copy, verify="size")


def test_record_of_another_shard_is_refused(store_copy):
    for kind in ("json", "safetensors"):
        content = (store_copy / f"shard-000001.{kind}").read_bytes()
        (store_copy / f"shard-000002.{kind}").write_bytes(content)
    with pytest.raises(FlowkitError, match="shard-000002.json"):
        PairStore(store_copy)
    assert pairs.repair(store_copy) == [2]


def test_noise_of_another_generator_is_refused(store_copy):
    edit_json(store_copy / "shard-000000.json", noise_sha256="0" * 64)
    with pytest.raises(FlowkitError, match="numpy draws other noise"):
        PairStore(store_copy)


def rewrite(path: Path, change) -> None:
    """Alter the tensors of a store together with its records, as a foreign tool would."""
    for file in Path(path).glob("*.safetensors"):
        save_file(change(load_file(file)), file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        edit_json(file.with_suffix(".json"), sha256=digest, bytes=file.stat().st_size)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: {"noise": t["data"], "data": t["noise"]}, "noise and data are swapped"),
        (lambda t: {"noise": 2 * t["noise"], "data": t["data"]}, "not standard normal.*variance"),
        (lambda t: {"noise": t["noise"] + 0.5, "data": t["data"]}, "not standard normal: mean 0.5"),
        (lambda t: {"noise": t["noise"][:, :, :4].contiguous(), "data": t["data"]}, "holds"),
        (lambda t: {"data": t["data"]}, "holds"),
    ],
)
def test_noise_must_be_noise(tmp_path, change, message):
    make(tmp_path, TENSOR_INDEX, inverted)
    rewrite(tmp_path, change)
    with pytest.raises(FlowkitError, match=message):
        PairStore(tmp_path)


@pytest.fixture
def url():
    url = f"memory://{uuid.uuid4().hex}/pairs"
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


def test_remote_store(url, made, tmp_path):
    make(url)
    memory = fsspec.filesystem("memory")
    remote = {Path(name).name: memory.cat_file(name) for name in memory.ls(url, detail=False)}
    assert remote == {file.name: file.read_bytes() for file in made.iterdir()}
    rows = torch.randperm(150)
    expected = PairStore(made).fetch(rows)
    for verify in ("size", "hash", "hash"):  # lazily, at once, from the cache
        found = PairStore(url, verify=verify, cache=tmp_path).fetch(rows)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(FlowkitError, match="seed: 7 != 8"):
        pairs.create(url, dataclasses.replace(INDEX, seed=8))


def test_damaged_remote_shard_is_never_read(url, tmp_path):
    make(url)
    memory = fsspec.filesystem("memory")
    content = bytearray(memory.cat_file(f"{url}/shard-000004.safetensors"))
    content[-1] ^= 1
    memory.pipe_file(f"{url}/shard-000004.safetensors", bytes(content))
    lazy = PairStore(url, verify="size", cache=tmp_path)
    assert len(lazy.fetch(range(80))["data"]) == 80
    with pytest.raises(FlowkitError, match="shard-000004.safetensors is damaged"):
        lazy.fetch([80])
    with pytest.raises(FlowkitError, match="1 of 8 shards are damaged"):
        PairStore(url, cache=tmp_path)
    assert pairs.repair(url, cache=tmp_path) == [4]
    make(url)
    assert len(PairStore(url, cache=tmp_path)) == 150
