"""A model or an extractor of the user's, by module:attribute, and what tells its versions apart.

The hash covers the source of the module that is named and of the one where the thing is made; what
these import or read from files is not in it.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

from flowkit.errors import FlowkitError
from flowkit.eval.weights_files import state_sha256

__all__ = ["NO_SOURCE", "load_own", "own_sha256"]

NO_SOURCE = " (no source)"  # after a name: what was computed with it is not used again


def load_own(kind: str, name: str) -> Callable[..., Any]:
    """What is called `name`, module:attribute; FlowkitError, which says it is a `kind`: nothing
    there, or not callable."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # a script's own folder stands there in its place
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise FlowkitError(f"{kind} {name!r}: {error}; expected module:attribute") from None
    if not callable(found):
        raise FlowkitError(
            f"{kind} {name!r}: a {type(found).__name__}; "
            "expected a function, an nn.Module or its class"
        )
    return found


def own_sha256(name: str, found: Any) -> str | None:
    """Of the code of what `load_own` gave, and of its weights if it is a network; None where the
    module's source cannot be had."""
    code = inspect.isroutine(found) or inspect.isclass(found)
    maker = getattr(found if code else type(found), "__module__", None) or ""
    named = name.partition(":")[0]
    others = {maker} - {named} if _is_own(maker) else set()
    texts = [_source(module) for module in (named, *sorted(others))]
    if texts[0] is None:
        return None
    digest = hashlib.sha256("\0".join(text or "" for text in texts).encode())
    if isinstance(found, nn.Module):
        digest.update(state_sha256(found).encode())
    return digest.hexdigest()


def _is_own(module: str) -> bool:
    """Whether a module is neither Python's nor PyTorch's, which records name by version."""
    root = module.partition(".")[0]
    return root in sys.modules and root not in {*sys.stdlib_module_names, "torch"}


def _source(module: str) -> str | None:
    return _text(sys.modules[module]) if module in sys.modules else None


@cache  # as it was imported, were the file edited later
def _text(module: Any) -> str | None:
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):
        return None
