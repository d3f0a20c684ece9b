"""Options of a command: a dataclass is the schema, YAML files and `key=value` fill it in.

Files are read over the schema's defaults, later ones over earlier ones, and `key=value` comes last.
A mapping that is one option, `loss={name: huber}`, is replaced whole; `loss.delta=1` changes it.
They hold numbers, text, lists and mappings; nothing in them is evaluated. Nothing here needs torch.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import flowkit
from flowkit.errors import FlowkitError
from flowkit.files import atomic_file
from flowkit.schema import (
    Part,
    alternatives,
    build,
    check,
    describe,
    group_of,
    is_text,
    leaves,
    merge,
    show,
    to_dict,
    walk,
)

__all__ = [
    "check_folder",
    "first_difference",
    "load",
    "option",
    "parse",
    "run_command",
    "save",
    "to_dict",
]

T = TypeVar("T")
_OVERRIDE = re.compile(r"[A-Za-z_][\w.\-]*=")
_USAGE = """Arguments: [--config FILE ...] [key=value ...] [--help]
Options, as key=value or as lines `key: value` of a YAML file; shown with their defaults:"""


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    low: float = -math.inf,
    high: float = math.inf,
) -> Any:
    """A field of a schema with its help text; without a default the option must be given.

    default: a list, mapping or dataclass is copied for each instance.
    low, high: the range of a number, or of each number of a list, ends included.
    """
    metadata = {"help": help, "range": (low, high)}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)


def parse(
    schema: type[T],
    argv: Sequence[str] | None = None,
    *,
    doc: str,
    defaults: str | Path | None = None,
) -> T:
    """A `schema` filled from the command line `[--config FILE ...] [key=value ...] [--help]`.

    schema: a dataclass as flowkit/schema.py describes; the fields are declared with `option`.
    argv: the arguments, sys.argv[1:] if None.  doc: the text above the options in `--help`.
    defaults: the file that is read when no `--config` is given; paths are looked up in the working
        folder, then among the packaged configs (`digits/reflow.yaml`).
    Raises FlowkitError for what is unknown, ill-typed or missing; SystemExit(0) after `--help`.
    """
    files, overrides, wants_help = _split(sys.argv[1:] if argv is None else argv)
    if not files and defaults is not None:
        files = [str(defaults)]
    values = Part()
    for file in files:
        values = merge(values, _read(schema, file))
    if wants_help:
        print(f"{doc.strip()}\n\n{_USAGE}\n{_options(schema, values)}")
        raise SystemExit(0)
    for override in overrides:
        values = merge(values, _override(schema, override))
    return build(schema, values)


def save(config: Any, path: str | os.PathLike[str]) -> None:
    """Write the whole configuration, defaults included, as a YAML file that `--config` reads."""
    with atomic_file(path) as temporary:
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))), encoding="utf-8")


def load(schema: type[T], path: str | os.PathLike[str]) -> T:
    """The configuration written by `save`; raises FlowkitError when it does not fit the schema."""
    return build(schema, _read(schema, path))


def first_difference(config: Any, other: Any, *, ignore: Collection[str] = ()) -> str | None:
    """The first option in which two configurations differ, as `'lr' is 0.1, not 0.2`, or None.

    ignore: dotted names of options, or of groups of options, that may differ.
    """
    ours, theirs = dict(leaves(to_dict(config))), dict(leaves(to_dict(other)))
    for name in dict.fromkeys([*ours, *theirs]):
        if any(name == skip or name.startswith(f"{skip}.") for skip in ignore):
            continue
        mine, yours = (show(v[name]) if name in v else "absent" for v in (ours, theirs))
        if mine != yours:
            return f"{name!r} is {mine}, not {yours}"
    return None


def check_folder(
    config: Any,
    folder: Path,
    *,
    ignore: Collection[str] = (),
    kind: str = "command",
    holds: str = "a run with other options",
) -> None:
    """Refuse a folder with anything but a run of the same options, which folder/config.yaml tells.

    ignore: as of `first_difference`.  kind, holds: the errors' words for a program like this one,
    and for what it left there with other options.
    FlowkitError: a run of another program or with other options, or files without a run.
    """
    file, advice = folder / "config.yaml", "choose another output_dir"
    if not file.is_file():
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise FlowkitError(f"{folder} is not empty and holds no run of this {kind}; {advice}")
        return
    try:
        stored = load(type(config), file)
    except FlowkitError:
        raise FlowkitError(f"{folder} holds a run of another {kind}; {advice}") from None
    if difference := first_difference(config, stored, ignore=ignore):
        raise FlowkitError(
            f"{folder} holds {holds}: {difference}; give the same options to resume it, or "
            "another output_dir"
        )


def run_command(main: Callable[[], None]) -> None:
    """Run a script's main: what the user can mend ends in one line on stderr and exit code 1.

    FlowkitError and OSError (missing file, full disk) count as such; Ctrl-C exits with 130; any
    other exception is a defect and keeps its stack.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (FlowkitError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename is not None:
            text = f"{error.strerror}: {error.filename}"
        print("error:", " ".join(text.split()) or type(error).__name__, file=sys.stderr)
        raise SystemExit(1) from None


def _split(argv: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """Config files, overrides, and whether help is asked for."""
    files: list[str] = []
    overrides: list[str] = []
    expects_file = takes_files = wants_help = False
    for word in argv:
        if word in ("-h", "--help"):
            wants_help = True
        elif word == "--config":
            expects_file = takes_files = True
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        elif expects_file or (
            takes_files and not word.startswith("-") and not _OVERRIDE.match(word)
        ):
            files.append(word)
            expects_file = False
        elif _OVERRIDE.match(word):
            overrides.append(word)
            takes_files = False
        else:
            hint = word.lstrip("-") if "=" in word else f"{word.lstrip('-') or 'key'}=VALUE"
            raise FlowkitError(f"unknown argument {word!r}; options are written {hint}, see --help")
    if expects_file and not wants_help:
        raise FlowkitError("--config needs the name of a YAML file")
    return files, overrides, wants_help


def _read(schema: type, file: str | os.PathLike[str]) -> Part:
    """The options that a YAML file sets, checked."""
    path = _find(file)
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise FlowkitError(f"{path}, line {line}: not valid YAML: {error.problem}") from None
    except OmegaConfBaseException:
        raise FlowkitError(f"{path}: interpolation (${{...}}) is not supported") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FlowkitError(f"{path}: not a YAML text: {' '.join(str(error).split())}") from None
    except OSError as error:
        if error.strerror:
            raise
        values = None
    if not isinstance(values, dict):
        raise FlowkitError(f"{path}: expected lines `key: value`, got one value or a list")
    checked = Part()
    try:
        for name, value in values.items():
            checked = merge(checked, check(schema, _nested(str(name), value)))
    except FlowkitError as error:
        raise FlowkitError(f"{path}: {error}") from None
    return checked


def _find(file: str | os.PathLike[str]) -> Path:
    """The file itself, or the packaged config of that name."""
    folders = [Path(root) / "configs" for root in flowkit.__path__]
    for path in (Path(file), *(folder / file for folder in folders)):
        if path.is_file():
            return path
    known = [p.relative_to(folder).as_posix() for folder in folders for p in folder.rglob("*.yaml")]
    near = get_close_matches(str(file), known, n=1, cutoff=0.5)
    also = f"did you mean the packaged {near[0]!r}?" if near else "give a path or a packaged name"
    raise FlowkitError(f"no config file {str(file)!r}; {also}")


def _override(schema: type, text: str) -> Part:
    """The one option that `key=value` sets, checked; what is to be text is taken as it stands."""
    name, _, written = text.partition("=")
    hint = next((hint for known, hint, _, _ in walk(schema) if known == name), None)
    accepted = alternatives(hint)
    value: Any = written
    if written == "null" and type(None) in accepted:
        value = None
    elif not all(is_text(choice) or choice is type(None) for choice in accepted):
        try:
            parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={written}"]))
            value = parsed["value"]
        except (yaml.YAMLError, OmegaConfBaseException):
            raise FlowkitError(f"option {name!r}: cannot read {written!r}") from None
    return check(schema, _nested(name, value))


def _nested(name: str, value: Any) -> Part:
    """The mapping in which a dotted name leads to the value."""
    first, _, rest = name.partition(".")
    return Part({first: _nested(rest, value) if rest else value})


def _options(schema: type, values: dict[str, Any]) -> str:
    """The option table of `--help`, as wide as the terminal up to 100 columns."""
    width = min(max(shutil.get_terminal_size().columns, 70), 100)
    lines: list[str] = []
    for name, hint, text, value in walk(schema, values):
        if group := group_of(hint):
            text = text or (group.__doc__ or "").partition("\n")[0]
            note = " (off unless one of these is given)" if value is None else ""
            lines += ["", *textwrap.wrap(f"{name}: {text}{note}".rstrip(": "), width)]
            continue
        required = value is dataclasses.MISSING
        left = f"  {name}=" + ("..." if required else show(value))
        kind = f"({describe(hint)}{', required' if required else ''})"
        right = textwrap.wrap(f"{kind} {text}", width - 34, break_on_hyphens=False)
        if len(left) > 32:
            lines.append(left)
        else:
            right[0] = f"{left:<34}{right[0]}"
        lines += [line if line.startswith("  ") else " " * 34 + line for line in right]
    return "\n".join(lines)
