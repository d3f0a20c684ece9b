"""A dataclass as the schema of nested options: check plain values against it and fill it with them.

A field that is itself a dataclass is a group; an option's name is the dotted path to it, such as
`teacher.steps`. Types: int, float, bool, str, Path, Literal, list, tuple, dict, Any, and unions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from flowkit.errors import FlowkitError

__all__ = [
    "Part",
    "alternatives",
    "build",
    "check",
    "describe",
    "group_of",
    "is_text",
    "leaves",
    "merge",
    "show",
    "to_dict",
    "walk",
]

T = TypeVar("T")
M = TypeVar("M", bound=dict[str, Any])
_TYPE_NAMES = {Any: "any", str: "text", Path: "path", bool: "true|false", type(None): "null"}


class Part(dict[str, Any]):
    """Some entries of a mapping, to be laid over the rest; a plain dict is a whole mapping."""


def check(schema: type, values: dict[str, Any], prefix: str = "", root: type | None = None) -> Part:
    """The given values as the types the schema wants; groups are Parts with what is given.

    prefix, root: the dotted name so far and the outermost schema, for messages.
    Raises FlowkitError for an unknown option, with the nearest known one, and for a wrong type.
    """
    root = root or schema
    hints = typing.get_type_hints(schema)
    fields = {field.name: field for field in dataclasses.fields(schema)}
    checked = Part()
    for key, value in values.items():
        name = f"{prefix}{key}"
        hint = hints.get(key)
        if hint is None:
            raise _unknown(name, value, root)
        group = group_of(hint)
        if group is not None and isinstance(value, dict):
            checked[key] = check(group, value, f"{name}.", root)
            continue
        if "${" in str(value):
            raise FlowkitError(f"option {name!r}: interpolation (${{...}}) is not supported")
        try:
            checked[key] = _fit(hint, value)
        except _Misfit:
            message = f"option {name!r} expects {describe(hint)}, got {value!r}"
            raise FlowkitError(message) from None
        _check_range(name, checked[key], *fields[key].metadata.get("range", ()))
    return checked


def _check_range(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    if (low, high) == (-math.inf, math.inf):
        return
    numbers = value if isinstance(value, list | tuple) else [value]
    if not numbers or any(n is not None and not low <= n <= high for n in numbers):
        wanted = f"at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
        raise FlowkitError(f"option {name!r} must be {wanted}, got {value}")


def _unknown(name: str, value: Any, root: type) -> FlowkitError:
    while isinstance(value, dict) and len(value) == 1:
        key, value = next(iter(value.items()))
        name = f"{name}.{key}"
    known = [known for known, _, _, _ in walk(root)]
    last = name.rpartition(".")[2]

    def likeness(other: str) -> float:
        same_leaf = SequenceMatcher(None, last, other.rpartition(".")[2]).ratio()
        return max(SequenceMatcher(None, name, other).ratio(), 0.9 * same_leaf)

    near = max(known, key=likeness)
    hint = f"did you mean {near!r}?" if likeness(near) > 0.6 else "--help lists all options"
    return FlowkitError(f"unknown option {name!r}; {hint}")


class _Misfit(Exception):
    """A value is not of the type wanted."""


def _fit(hint: Any, value: Any) -> Any:
    """The value as type `hint`; raises _Misfit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _fit_first(arguments, value)
    if origin is Literal and any(type(c) is type(value) and c == value for c in arguments):
        return value
    if hint in (bool, str, type(None)) and type(value) is hint:
        return value
    if hint is int and type(value) in (int, float) and value == value // 1:
        return int(value)
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if origin is list and isinstance(value, list):
        return [_fit(arguments[0], item) for item in value]
    if origin is tuple and isinstance(value, list):
        wanted = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(wanted) == len(value):
            return tuple(_fit(item, entry) for item, entry in zip(wanted, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return type(value)({_fit(arguments[0], k): _fit(arguments[1], value[k]) for k in value})
    raise _Misfit


def _fit_first(hints: Sequence[Any], value: Any) -> Any:
    for hint in sorted(hints, key=lambda hint: hint is not type(value)):
        with contextlib.suppress(_Misfit):
            return _fit(hint, value)
    raise _Misfit


def build(schema: type[T], values: dict[str, Any], base: Any = None, prefix: str = "") -> T:
    """The schema's instance: checked values over those of `base`, or over the schema's defaults.

    Raises FlowkitError for an option without a value.
    """
    arguments: dict[str, Any] = {}
    for field, hint in _fields(schema):
        default = _default(field, base)
        value = values.get(field.name, default)
        group = group_of(hint)
        if group is not None and (isinstance(value, dict) or value is dataclasses.MISSING):
            below = default if dataclasses.is_dataclass(default) else None
            given = value if isinstance(value, dict) else {}
            value = build(group, given, below, f"{prefix}{field.name}.")
        elif isinstance(value, Part):
            value = merge(default if isinstance(default, dict) else {}, value)
        if value is dataclasses.MISSING:
            raise FlowkitError(f"option '{prefix}{field.name}' must be given ({describe(hint)})")
        arguments[field.name] = value
    return schema(**arguments)


def walk(
    schema: type, values: dict[str, Any] | None = None, base: Any = None, prefix: str = ""
) -> Iterator[tuple[str, Any, str, Any]]:
    """Every option as (dotted name, type, help, value): plain ones first, then group after group.

    values, base: as in `build`; the value of an option that must be given is dataclasses.MISSING.
    """
    values = values or {}
    for field, hint in sorted(_fields(schema), key=lambda pair: group_of(pair[1]) is not None):
        name = f"{prefix}{field.name}"
        default = _default(field, base)
        value = values.get(field.name, default)
        yield name, hint, field.metadata.get("help", ""), value
        if group := group_of(hint):
            given = value if isinstance(value, dict) else {}
            below = default if dataclasses.is_dataclass(default) else None
            yield from walk(group, given, below, f"{name}.")


def _fields(schema: Any) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(schema)
    return [(field, hints[field.name]) for field in dataclasses.fields(schema)]


def _default(field: dataclasses.Field[Any], base: Any) -> Any:
    if base is not None:
        return getattr(base, field.name)
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    union = typing.get_origin(hint) in (Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def group_of(hint: Any) -> type | None:
    """The dataclass that an option is made of, None for a plain option."""
    kinds = (kind for kind in alternatives(hint) if isinstance(kind, type))
    return next(filter(dataclasses.is_dataclass, kinds), None)


def is_text(hint: Any) -> bool:
    """Whether every value of the type is written as text: str, Path, or a choice of words."""
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    return hint in (str, Path) or (bool(choices) and all(isinstance(c, str) for c in choices))


def merge(below: M, above: dict[str, Any]) -> M:
    """`above` laid over `below`: a Part goes into the dict it meets, all else takes its place."""
    parts = {key for key in below.keys() & above if isinstance(above[key], Part)}
    inner = {k: merge(below[k], above[k]) for k in parts if isinstance(below[k], dict)}
    return type(below)(below | above | inner)


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in nested dicts."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_dict(config: Any) -> dict[str, Any]:
    """A filled schema as nested dicts, lists, text and numbers, fit for YAML and JSON."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def show(value: Any) -> str:
    """A value as one writes it after `key=`."""
    value = _plain(value)
    if isinstance(value, list):
        return f"[{','.join(map(show, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {show(item)}' for key, item in value.items())}}}"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def describe(hint: Any) -> str:
    """A type in the words of `--help`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (list, tuple):
        return f"[{', '.join('...' if a is ... else describe(a) for a in arguments)}]"
    if origin is dict:
        return f"{{{describe(arguments[0])}: {describe(arguments[1])}}}"
    if dataclasses.is_dataclass(hint):
        return f"options below it ({', '.join(f.name for f in dataclasses.fields(hint))})"
    return _TYPE_NAMES.get(hint, getattr(hint, "__name__", str(hint)))
