"""A folder given by a path or an fsspec URL, whose files appear whole or not at all.

On a local disk a file is written under a temporary name, synced and renamed; on an object store
one PUT is atomic.  Either way a reader never sees half a file, and a killed writer leaves at most
temporary files.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from flowkit.errors import FlowkitError
from flowkit.files import atomic_file

__all__ = ["Folder", "file_sha256"]

_STALE_SECONDS = 3600.0  # far longer than writing one file takes


class Folder:
    """Flat folder of files, named by a path or URL ("pairs/", "s3://bucket/pairs", "memory://x").

    Holds no open connection: fsspec finds the file system again by URL, so a Folder may be
    pickled and may cross a fork.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        try:
            fs, root = fsspec.core.url_to_fs(os.fspath(url))
        except (ImportError, ValueError) as error:  # no driver for s3://, or no such protocol
            raise FlowkitError(f"cannot open {url}: {error}") from error
        self.is_local = isinstance(fs, LocalFileSystem)
        self.root = root.rstrip("/")
        self.url = self.root if self.is_local else os.fspath(url)

    def __str__(self) -> str:
        return self.url

    @property
    def _fs(self) -> fsspec.AbstractFileSystem:
        return fsspec.core.url_to_fs(self.url)[0]

    def path(self, name: str) -> str:
        """The file's name within its file system, without a protocol."""
        return f"{self.root}/{name}"

    def sizes(self) -> dict[str, int]:
        """Bytes of every file by name, from one listing; empty when the folder does not exist."""
        self._fs.invalidate_cache()
        try:
            entries = self._fs.ls(self.root, detail=True)
        except FileNotFoundError:
            return {}
        return {e["name"].rpartition("/")[2]: e["size"] for e in entries if e["type"] == "file"}

    def read(self, names: Iterable[str]) -> dict[str, bytes]:
        """Contents of those files that exist, by name; fetched at once where the store can."""
        paths = {self.path(name): name for name in names}
        if self.is_local:  # cat() would take a bracket in a folder's name for a pattern
            files = {name: Path(path) for path, name in paths.items()}
            return {name: file.read_bytes() for name, file in files.items() if file.exists()}
        found = self._fs.cat(list(paths), on_error="return") if paths else {}
        for content in found.values():
            if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                raise content
        return {paths[path]: content for path, content in found.items() if type(content) is bytes}

    def write(self, name: str, content: bytes) -> None:
        """Publish a file, in place of an older one if any; FlowkitError when the store refuses."""
        with _clear_errors(self, name):
            if self.is_local:
                with atomic_file(self.path(name)) as temporary:
                    temporary.write_bytes(content)
            else:
                self._fs.pipe_file(self.path(name), content)

    def write_new(self, name: str, content: bytes) -> None:
        """Publish a file unless one of that name exists; safe in several processes at once."""
        with _clear_errors(self, name), suppress(FileExistsError):
            if self.is_local:
                _write_exclusive(Path(self.path(name)), content)
            elif not self._fs.exists(self.path(name)):
                self._fs.pipe_file(self.path(name), content, mode="create")

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        with _clear_errors(self, name), suppress(FileNotFoundError):
            self._fs.rm_file(self.path(name))

    def remove_stale(self) -> None:
        """Remove the temporary files that killed writers left more than an hour ago."""
        for file in Path(self.root).glob(".tmp-*") if self.is_local else ():
            with suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > _STALE_SECONDS:
                    file.unlink()

    def local_copy(self, name: str, sha256: str, cache: Path, *, verify: bool) -> Path:
        """A file of this machine with the content of `name`: itself, or a copy in `cache`.

        Copies are named by their hash, so that stores never mix and processes share them.
        verify: hash a copy that was there already, and fetch it again when it is damaged.
        FlowkitError when a fresh copy has another hash.
        """
        if self.is_local:
            return Path(self.path(name))
        copy = cache / f"{sha256}{Path(name).suffix}"
        if not copy.exists() or (verify and file_sha256(copy) != sha256):
            with atomic_file(copy) as temporary:
                self._fs.get_file(self.path(name), os.fspath(temporary))
                if file_sha256(temporary) != sha256:
                    raise FlowkitError(
                        f"{self}/{name} is damaged: its sha256 is not the recorded one"
                    )
        return copy


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file of this machine."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write_exclusive(target: Path, content: bytes) -> None:
    """Publish whole and only once: link() fails when the name is taken, rename() would replace."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{target.name}")
    try:
        with open(temporary, "xb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        try:
            os.link(temporary, target)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if not target.exists():
                os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _clear_errors(folder: Folder, name: str) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise FlowkitError(
            f"cannot write {folder}/{name}: {reason}; what existed is intact"
        ) from error
