"""What tells versions of the user's own code apart: of a model or an extractor by module:attribute.

The hash covers the source of the module that is named and of the one where the thing is made; what
these import or read from files is not in it.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from functools import cache
from typing import Any

from torch import nn

from flowkit.eval.weights_files import state_sha256

__all__ = ["NO_SOURCE", "own_sha256"]

NO_SOURCE = " (no source)"  # after a name: what was computed with it is not used again


def own_sha256(name: str, found: Any) -> str | None:
    """Of the code of what `import_named` gave, and of its weights if it is a network; None where
    the module's source cannot be had."""
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
