"""Where the weights of feature extractors lie: found by name, checked by hash, fetched if asked.

Looked for in $FLOWKIT_WEIGHTS, the data folder's weights/, torch hub's checkpoints ($TORCH_HOME),
the temporary folder (where clean-fid keeps its own), ~/.cache/dnnlib (edm's).  With
FLOWKIT_OFFLINE=1 or HF_HUB_OFFLINE=1 no connection is opened.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flowkit.data import data_folder
from flowkit.errors import FlowkitError
from flowkit.files import atomic_file

__all__ = [
    "OPTION_HINT",
    "WeightsFile",
    "file_sha256",
    "find_weights",
    "load_into",
    "offline",
    "state_sha256",
]

OPTION_HINT = "give weights=PATH (evaluate.weights of a trainer)"  # how errors end
_TIMEOUT = 10.0  # seconds to find out that there is no network
_PIECE = 1 << 20


@dataclass(frozen=True)
class WeightsFile:
    """A file of published weights: its name, how its sha256 begins, and where it comes from.

    sha256: "" when only a network knows it.  aliases: other names under which the same bytes are
    kept.  url: None when it is not fetched.  hub: a repository of the Hugging Face hub whose
    cached model.safetensors does as well.
    """

    name: str
    sha256: str
    url: str | None = None
    aliases: tuple[str, ...] = ()
    hub: str | None = None


def find_weights(
    file: WeightsFile, given: str | os.PathLike[str] | None = None, *others: WeightsFile
) -> tuple[Path, str]:
    """(path, sha256) of weights: the `given` file whatever its hash, else the first of `file` and
    `others` that lies in one of the usual places with the right hash, else `file` is fetched.

    FlowkitError: no such file (which, with which hash, belongs where), or one of another hash.
    """
    if given is not None and os.fspath(given) != "auto":
        path = Path(given).expanduser()
        path = path / "model.safetensors" if path.is_dir() else path
        if not path.is_file():
            raise FlowkitError(f"no feature weights at {path}; expected {_title(file)}")
        return path, file_sha256(path)
    for wanted in (file, *others):
        for path in _candidates(wanted):
            if path.is_file():
                return path, _checked(path, wanted)
    path = _fetched(file)
    return path, _checked(path, file)


def offline() -> bool:
    """Whether the environment forbids connections."""
    names = ("FLOWKIT_OFFLINE", "HF_HUB_OFFLINE")
    return any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in names)


def file_sha256(path: Path) -> str:
    """The hash of a file, 64 hexadecimal digits; computed once for a file that stays the same."""
    state = path.stat()
    return _hash(path, state.st_mtime_ns, state.st_size)


def state_sha256(net: nn.Module) -> str:
    """Of a network's tensors by name, "" without any."""
    state, digest = net.state_dict(), hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest() if state else ""


def load_into(
    net: nn.Module,
    path: Path,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> None:
    """Put the tensors of a safetensors file, a state dict or a TorchScript archive into a network.

    convert: from the file's names to the network's.  Nothing is unpickled but tensors and plain
    containers.  FlowkitError: the file is damaged, or holds something else.
    """
    try:
        net.load_state_dict(convert(_read(path)))
    except _UNREADABLE as error:
        raise FlowkitError(
            f"{path} does not hold a {type(net).__name__}: {_reason(error)}"
        ) from None


# What reading raises on damaged files, and on sound ones that hold something else.
_UNREADABLE = (
    *(SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError),
    *(KeyError, AttributeError, TypeError),
)


def _read(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # after the length of its header
        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                with warnings.catch_warnings():  # it is said to be deprecated, the file is not
                    warnings.simplefilter("ignore")
                    return torch.jit.load(path, map_location="cpu").state_dict()
    loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    state = loaded.get("state_dict", loaded)
    return {name.removeprefix("module."): value for name, value in state.items()}


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _folders() -> Iterator[Path]:
    if os.environ.get("FLOWKIT_WEIGHTS"):
        yield Path(os.environ["FLOWKIT_WEIGHTS"]).expanduser()
    yield data_folder() / "weights"
    yield _hub()
    yield Path(tempfile.gettempdir())
    yield Path("~/.cache/dnnlib").expanduser()


def _hub() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _candidates(file: WeightsFile) -> Iterator[Path]:
    for folder in _folders():
        for name in (file.name, *file.aliases):
            yield folder / name
    if file.hub:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(file.hub, "model.safetensors")
        if isinstance(cached, str):
            yield Path(cached)


def _checked(path: Path, file: WeightsFile) -> str:
    digest = file_sha256(path)
    if not digest.startswith(file.sha256):
        raise FlowkitError(
            f"{path} has sha256 {digest}, expected {_hash_text(file)}; fetch it again, or "
            f"{OPTION_HINT}"
        )
    return digest


def _title(file: WeightsFile) -> str:
    return f"{file.name} (sha256 {_hash_text(file)})" if file.sha256 else file.name


def _hash_text(file: WeightsFile) -> str:
    """All that is known of the hash."""
    return file.sha256 if len(file.sha256) == 64 else f"{file.sha256}..."


def _fetched(file: WeightsFile) -> Path:
    target = Path(os.environ.get("FLOWKIT_WEIGHTS") or _hub()).expanduser() / file.name
    source = f", from {file.url}," if file.url else ""
    missing = f"no feature weights at {target}; put {_title(file)}{source} there"
    missing += f", or {OPTION_HINT}"
    if file.url is None or offline():
        raise FlowkitError(missing)
    try:
        with atomic_file(target) as temporary:
            digest = hashlib.sha256()
            with (
                urllib.request.urlopen(file.url, timeout=_TIMEOUT) as answer,
                temporary.open("wb") as out,
            ):
                while piece := answer.read(_PIECE):
                    digest.update(piece)
                    out.write(piece)
            if not digest.hexdigest().startswith(file.sha256):
                raise FlowkitError(
                    f"{file.url} has sha256 {digest.hexdigest()}, expected {_hash_text(file)}; "
                    "not kept"
                )
    except OSError as error:
        raise FlowkitError(f"{missing} (fetching it failed: {_reason(error)})") from None
    return target


@lru_cache(maxsize=64)
def _hash(path: Path, changed: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
