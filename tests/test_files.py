"""Files and folders appear whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flowkit.files import atomic_file, atomic_folder, read_json, write_json


class Broken(Exception):
    pass


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_file_appears_with_its_folder_only_at_the_end(tmp_path):
    target = tmp_path / "new" / "file.txt"
    with atomic_file(target) as temporary:
        temporary.write_text("new")
        assert temporary.parent == target.parent  # else the rename would not be atomic
        assert not target.exists()
    assert target.read_text() == "new" and names(target.parent) == ["file.txt"]


def test_failed_file_leaves_the_old_one(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(Broken), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise Broken
    assert target.read_text() == "old" and names(tmp_path) == ["file.txt"]


def test_failed_folder_leaves_the_old_one(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "weights").write_text("old")
    with pytest.raises(Broken), atomic_folder(target) as temporary:
        (temporary / "weights").write_text("half")
        raise Broken
    assert (target / "weights").read_text() == "old" and names(tmp_path) == ["folder"]


def test_folder_is_replaced_not_merged(tmp_path):
    target = tmp_path / "a" / "folder"
    with atomic_folder(target) as temporary:
        (temporary / "first").write_text("1")
    with atomic_folder(target) as temporary:
        (temporary / "nested").mkdir()
        (temporary / "nested" / "second").write_text("2")
    assert names(target) == ["nested"] and names(target.parent) == ["folder"]
    assert (target / "nested" / "second").read_text() == "2"


KILLED = """
import os, signal, sys
from flowkit.files import atomic_file, atomic_folder
with atomic_file(sys.argv[1]) as file, atomic_folder(sys.argv[2]) as folder:
    file.write_text("half")
    (folder / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_leaves_the_old_ones_and_the_next_write_succeeds(tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("old")
    folder.mkdir()
    (folder / "weights").write_text("old")
    command = [sys.executable, "-c", KILLED, os.fspath(file), os.fspath(folder)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert file.read_text() == "old" and (folder / "weights").read_text() == "old"
    with atomic_file(file) as temporary:
        temporary.write_text("new")
    assert file.read_text() == "new"


def test_json_round_trip(tmp_path):
    value = {"a": [1, 2.5, None], "seed": 2**63 + 1, "name": "é"}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value


def test_unserialisable_json_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", object())
    assert read_json(tmp_path / "x.json") == 1 and names(tmp_path) == ["x.json"]


def test_torn_json_is_an_error(tmp_path):
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(json.JSONDecodeError):
        read_json(tmp_path / "x.json")
