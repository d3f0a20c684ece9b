"""Names to things: look one up, import one, check the options given for it; errors that help."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, TypeVar

from flowkit.errors import FlowkitError

__all__ = ["check_options", "import_named", "look_up"]

T = TypeVar("T")

# Annotations of options that are told apart, as postponed evaluation leaves them.
_KINDS: dict[Any, tuple[type, ...]] = {
    "float": (Real,),
    "int": (Integral,),
    "str": (str,),
    "bool": (bool,),
}


def look_up(kind: str, name: str, table: Mapping[str, T]) -> T:
    """table[name], or a FlowkitError that shows the nearest name and all of them."""
    if name not in table:
        known = ", ".join(table)
        raise FlowkitError(f"unknown {kind} {name!r}{_nearest(name, table)}; known: {known}")
    return table[name]


def import_named(kind: str, name: str) -> Callable[..., Any]:
    """What `name`, module:attribute, names; modules of the working folder are found too.

    kind: what it is to be, for errors.  FlowkitError: nothing there, or not to be called.
    """
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


def check_options(
    subject: str, function: Callable[..., Any], options: Mapping[str, Any], *, skip: int = 0
) -> None:
    """FlowkitError unless the parameters of `function` after the first `skip` fit the options."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    signature = list(inspect.signature(function).parameters.items())[skip:]
    parameters = {name: parameter for name, parameter in signature if parameter.kind in named}
    for name, value in options.items():
        if name not in parameters:
            takes = f"it takes {', '.join(parameters)}" if parameters else "it takes none"
            raise FlowkitError(
                f"{subject} has no option {name!r}{_nearest(name, parameters)}; {takes}"
            )
        kinds = _KINDS.get(parameters[name].annotation)
        if kinds and (
            not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        ):
            raise FlowkitError(
                f"{subject} takes {parameters[name].annotation} as {name}, got {value!r}"
            )
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in options:
            raise FlowkitError(f"{subject} needs the option {name!r}")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""
