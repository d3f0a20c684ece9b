"""A folder by path or URL: files appear whole, once, and are read as they were written."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import time
import uuid
from pathlib import Path

import fsspec
import pytest

from flowkit.errors import FlowkitError
from flowkit.storage import Folder, file_sha256


@pytest.fixture(params=["path", "file", "memory"])
def folder(request, tmp_path):
    if request.param == "memory":
        url = f"memory://{uuid.uuid4().hex}/x"
        yield Folder(url)
        if fsspec.filesystem("memory").exists(url):
            fsspec.filesystem("memory").rm(url, recursive=True)
    else:
        path = tmp_path / "a [b] * folder"  # no character of a name is a pattern
        yield Folder(path if request.param == "path" else f"file://{path}")


def test_round_trip(folder):
    assert folder.sizes() == {} and folder.read(["x.json"]) == {}
    folder.write("x.json", b"first")
    folder.write("x.json", b"second")
    folder.write("y.bin", b"")
    assert folder.sizes() == {"x.json": 6, "y.bin": 0}
    assert folder.read(["x.json", "nothing", "y.bin"]) == {"x.json": b"second", "y.bin": b""}
    folder.remove("x.json")
    folder.remove("x.json")
    assert folder.sizes() == {"y.bin": 0} and folder.read([]) == {}


def test_write_new_keeps_the_first(folder):
    folder.write_new("index.json", b"first")
    folder.write_new("index.json", b"second")
    assert folder.read(["index.json"]) == {"index.json": b"first"}
    assert folder.sizes() == {"index.json": 5}


def test_local_copy(folder, tmp_path):
    folder.write("x.bin", b"content")
    good, cache = hashlib.sha256(b"content").hexdigest(), tmp_path / "cache"
    copy = folder.local_copy("x.bin", good, cache, verify=True)
    assert copy.read_bytes() == b"content" and file_sha256(copy) == good
    if folder.is_local:
        assert copy == Path(folder.path("x.bin")) and not cache.exists()
        return
    copy.write_bytes(b"damaged")
    assert folder.local_copy("x.bin", good, cache, verify=True).read_bytes() == b"content"
    folder.remove("x.bin")
    assert folder.local_copy("x.bin", good, cache, verify=True) == copy  # found in the cache
    folder.write("x.bin", b"other")
    with pytest.raises(FlowkitError, match="x.bin is damaged"):
        folder.local_copy("x.bin", hashlib.sha256(b"third").hexdigest(), cache, verify=False)
    assert [file.name for file in cache.iterdir()] == [copy.name]


def test_relative_path_survives_a_change_of_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Folder("here")
    folder.write("x", b"1")
    monkeypatch.chdir("/")
    assert folder.read(["x"]) == {"x": b"1"} and str(folder) == str(tmp_path / "here")


def test_stale_temporary_files_are_removed_and_fresh_ones_kept(tmp_path):
    stale, fresh = tmp_path / ".tmp-0-shard", tmp_path / ".tmp-1-shard"
    stale.touch()
    fresh.touch()
    os.utime(stale, (time.time() - 7200,) * 2)
    Folder(tmp_path).remove_stale()
    assert not stale.exists() and fresh.exists()


def write_under_a_limit(path: str) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # the disk refuses after 1000 bytes
    try:
        Folder(path).write("x.bin", bytes(5000))
    except FlowkitError as error:
        return str(error)
    return "written"


def test_disk_that_refuses_leaves_the_old_file(tmp_path):
    folder = Folder(tmp_path)
    folder.write("x.bin", b"old")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        message = pool.apply(write_under_a_limit, (str(tmp_path),))
    assert message == f"cannot write {tmp_path}/x.bin: File too large; what existed is intact"
    assert folder.read(["x.bin"]) == {"x.bin": b"old"} and folder.sizes() == {"x.bin": 3}


@pytest.mark.parametrize("write", [Folder.write, Folder.write_new])
def test_impossible_folder_is_one_clear_line(tmp_path, write):
    (tmp_path / "file").touch()
    with pytest.raises(FlowkitError, match="cannot write .*x: Not a directory"):
        write(Folder(tmp_path / "file" / "pairs"), "x", b"1")


def test_missing_driver_is_named():
    with pytest.raises(FlowkitError, match="nosuch"):
        Folder("nosuch://bucket/pairs")
