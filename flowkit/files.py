"""Files and folders that appear whole or not at all: written elsewhere, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["atomic_file", "atomic_folder", "publish_folder", "read_json", "write_json"]

# safetensors makes its files readable by their owner alone, whatever the umask says.
_UMASK = os.umask(0o022)
os.umask(_UMASK)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path`, else it is removed."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{target.name}")
    try:
        yield temporary
        temporary.chmod(0o666 & ~_UMASK)
        _sync(temporary)
        os.replace(temporary, target)
    except OSError as error:
        if error.errno and error.filename is None:  # a full disk does not say which file
            raise OSError(error.errno, error.strerror, os.fspath(target)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the place of `path`, if any."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{target.name}")
    temporary.mkdir()
    try:
        yield temporary
        publish_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, target: Path) -> None:
    """Rename a finished folder to `target`, on the same disk, in the place of what was there.

    Replacing takes two renames; a kill between them leaves the old folder as `.old-NAME`.
    """
    old = target.with_name(f".old-{target.name}")
    for file in [*temporary.rglob("*"), temporary]:
        if file.is_file():
            file.chmod(0o666 & ~_UMASK)
        _sync(file)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    os.replace(temporary, target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value of a JSON file; raises OSError or json.JSONDecodeError."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
