"""The command line: what is read, what is refused and in which words."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from flowkit import config
from flowkit.config import (
    check_folder,
    first_difference,
    load,
    option,
    parse,
    run_command,
    save,
    to_dict,
)
from flowkit.errors import FlowkitError


@dataclass
class Teacher:
    steps: int = option(100, "optimizer steps")
    path: str | None = option(None, "a folder, or null to train one")
    rates: list[float] = option([1e-3, 1e-4], "one per stage")


@dataclass
class Extra:
    share: float = option(0.5, "how much")


@dataclass
class Options:
    seed: int = option(0, "starts every random stream")
    lr: float = option(1e-3, "learning rate")
    compile: bool = option(False, "compile the net")
    name: str = option("run", "what to call it")
    output_dir: Path = option(Path("runs/x"), "where results go")
    metric: Literal["squared", "huber", "no"] = option("squared", "how errors are weighed")
    nfe: list[int] = option([1, 2, 4], "evaluations")
    window: tuple[float, float] = option((0.0, 1.0), "times")
    sizes: tuple[int, ...] = option((8,), "any number of sizes")
    net: dict[str, Any] = option({"width": 8, "depth": 2}, "arguments of the net")
    size: int | Literal["auto"] = option("auto", "pixels or auto")
    limit: float | None = option(None, "a number or null")
    teacher: Teacher = option(Teacher(steps=50), "how the teacher is trained")
    extra: Extra | None = option(None, "a stage that may be left out")


@dataclass
class Required:
    data: Path = option(help="the folder of pictures")
    seed: int = option(0, "seed")


def read(*argv: str, schema: type = Options, **options: Any) -> Any:
    return parse(schema, argv, doc="A command.", **options)


def refuse(*argv: str) -> str:
    with pytest.raises(FlowkitError) as caught:
        read(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_defaults_are_the_schemas():
    assert read() == Options()
    read().nfe.append(8)
    assert read().nfe == [1, 2, 4]


@pytest.mark.parametrize(
    "argument, name, value",
    [
        ("seed=-3", "seed", -3),
        ("seed=1e5", "seed", 100_000),
        ("lr=1e-4", "lr", 1e-4),
        ("lr=2", "lr", 2.0),
        ("compile=true", "compile", True),
        ("name=007", "name", "007"),
        ("name=a=b: [c", "name", "a=b: [c"),
        ("name=", "name", ""),
        ("output_dir=runs/1", "output_dir", Path("runs/1")),
        ("metric=no", "metric", "no"),
        ("nfe=[1, 8]", "nfe", [1, 8]),
        ("window=[0.1,1]", "window", (0.1, 1.0)),
        ("sizes=[]", "sizes", ()),
        ("net.width=64", "net", {"width": 64, "depth": 2}),
        ("net={act: relu}", "net", {"act": "relu"}),
        ("net.act.slope=0.1", "net", {"width": 8, "depth": 2, "act": {"slope": 0.1}}),
        ("size=32", "size", 32),
        ("size=auto", "size", "auto"),
        ("limit=3", "limit", 3.0),
        ("limit=null", "limit", None),
        ("extra.share=0.25", "extra", Extra(0.25)),
        ("extra=null", "extra", None),
    ],
)
def test_override(argument, name, value):
    got = getattr(read(argument), name)
    assert got == value and type(got) is type(value)


def test_nested_override_keeps_the_groups_own_defaults():
    assert read("teacher.path=x").teacher == Teacher(steps=50, path="x")
    assert read("teacher.path=null").teacher.path is None


def test_files_merge_left_to_right_and_overrides_win(tmp_path):
    first = write(
        tmp_path / "a.yaml", "seed: 1\nlr: 1e-2\nteacher:\n  steps: 5\nnet:\n  width: 1\n"
    )
    second = write(tmp_path / "b.yaml", "lr: 0.5\nteacher.path: t\nnet.depth: 9\n")
    got = read("--config", first, second, "seed=3", "seed=4")
    assert (got.seed, got.lr, got.net) == (4, 0.5, {"width": 1, "depth": 9})
    assert got.teacher == Teacher(steps=5, path="t")
    assert read("seed=4", f"--config={first}", "--config", second) == got


def test_a_mapping_is_replaced_whole_and_changed_by_dotted_names(tmp_path):
    file = write(tmp_path / "a.yaml", "net: {kind: dit, heads: 2}\n")
    assert read("--config", file).net == {"kind": "dit", "heads": 2}
    assert read("--config", file, "net.heads=4").net == {"kind": "dit", "heads": 4}
    assert read("--config", file, "net.heads=4", "net={kind: mlp}").net == {"kind": "mlp"}


def test_default_file_gives_way_to_config(tmp_path):
    default = write(tmp_path / "a.yaml", "seed: 1\nlr: 0.25\n")
    other = write(tmp_path / "b.yaml", "seed: 2\n")
    assert read(defaults=default).lr == 0.25
    assert read("--config", other, defaults=default) == read("seed=2")
    assert read("--config", write(tmp_path / "empty.yaml", "")) == Options()


def test_packaged_file_is_found_from_any_folder(tmp_path, monkeypatch):
    write(tmp_path / "package/configs/digits/fit.yaml", "seed: 7\n")
    monkeypatch.setattr(config.flowkit, "__path__", [str(tmp_path / "package")])
    assert read("--config", "digits/fit.yaml").seed == 7
    assert "did you mean the packaged 'digits/fit.yaml'?" in refuse("--config", "digits/fits.yml")


@pytest.mark.parametrize(
    "argument, words",
    [
        ("teacher.step=1", ["'teacher.step'", "did you mean 'teacher.steps'?"]),
        ("steps=1", ["'steps'", "did you mean 'teacher.steps'?"]),
        ("teachr.steps=1", ["'teachr.steps'", "did you mean 'teacher.steps'?"]),
        ("Output-dir=x", ["'Output-dir'", "did you mean 'output_dir'?"]),
        ("qqqq=1", ["'qqqq'", "--help"]),
        ("seed=x", ["'seed'", "int", "'x'"]),
        ("seed=1.5", ["'seed'", "int", "1.5"]),
        ("seed=true", ["'seed'", "int", "True"]),
        ("seed=", ["'seed'", "int", "None"]),
        ("seed.x=1", ["'seed'", "int"]),
        ("lr=fast", ["'lr'", "float", "'fast'"]),
        ("compile=1", ["'compile'", "true|false", "1"]),
        ("metric=cube", ["'metric'", "squared|huber|no", "'cube'"]),
        ("nfe=[1,x]", ["'nfe'", "[int]", "'x'"]),
        ("nfe=4", ["'nfe'", "[int]", "4"]),
        ("nfe=[1", ["'nfe'", "cannot read '[1'"]),
        ("window=[1]", ["'window'", "[float, float]"]),
        ("net=3", ["'net'", "{text: any}", "3"]),
        ("size=big", ["'size'", "int or auto", "'big'"]),
        ("teacher=3", ["'teacher'", "steps, path, rates", "3"]),
        ("name=${seed}", ["'name'", "interpolation"]),
        ("nfe=${seed", ["'nfe'"]),
        ("--seed=1", ["'--seed=1'", "seed=1"]),
        ("--seed", ["'--seed'", "seed=VALUE"]),
        ("seed", ["'seed'", "seed=VALUE"]),
        ("--config", ["--config", "YAML"]),
    ],
)
def test_bad_argument_is_named(argument, words):
    message = refuse(argument)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "text, words",
    [
        ("teacher:\n  step: 1\n", ["'teacher.step'", "did you mean 'teacher.steps'?"]),
        ("name: 7\n", ["'name'", "text", "7"]),
        ("metric: no\n", ["'metric'", "False"]),
        ("seed: [1\n", ["line 2", "not valid YAML"]),
        ("seed: 1\nseed: 2\n", ["line 2", "duplicate"]),
        ("name: ${seed}\n", ["interpolation"]),
        ("name: ${seed\n", ["interpolation"]),
        ("name: !!python/object/apply:os.getcwd []\n", ["line 1", "not valid YAML"]),
        ("- 1\n", ["key: value"]),
        ("5\n", ["key: value"]),
        ("1: 2\n", ["'1'"]),
        ("\x00", ["not a YAML text"]),
    ],
)
def test_bad_file_is_named(tmp_path, text, words):
    message = refuse("--config", write(tmp_path / "c.yaml", text))
    assert all(word in message for word in ["c.yaml", *words]), message


def test_missing_file_is_named():
    assert "'nowhere/x.yaml'" in refuse("--config", "nowhere/x.yaml")


def test_required_option():
    with pytest.raises(FlowkitError, match=r"'data' must be given \(path\)"):
        read(schema=Required)
    assert read("data=x", schema=Required) == Required(Path("x"))


def test_help_lists_every_option(capsys, tmp_path):
    file = write(tmp_path / "a.yaml", "lr: 0.25\n")
    with pytest.raises(SystemExit) as caught:
        parse(Options, ["--config", file, "--help"], doc="Fits a flow.\n")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("Fits a flow.\n")
    for part in (
        "seed=0", "(int) starts every random stream", "lr=0.25", "compile=false", "(true|false)",
        "teacher: how the teacher is trained", "teacher.steps=50", "teacher.path=null",
        "(text or null)", "teacher.rates=[0.001,0.0001]", "metric=squared", "(squared|huber|no)",
        "extra.share=0.5", "off unless", "net={width: 8, depth: 2}", "window=[0.0,1.0]",
    ):  # fmt: skip
        assert part in text, part
    assert max(map(len, text.splitlines())) <= 100


def test_help_shows_what_must_be_given(capsys):
    with pytest.raises(SystemExit):
        read("-h", schema=Required)
    assert "data=..." in (text := capsys.readouterr().out) and "(path, required)" in text


def test_saved_file_reads_back(tmp_path):
    first = read(
        "lr=3.1234567890123e-07", "name=1e-4", "limit=-0.1", "extra.share=1", "compile=true",
        "output_dir=007", "net={a: [1, {b: null}], c: 'no'}", "sizes=[1,2]",
    )  # fmt: skip
    save(first, tmp_path / "new/config.yaml")
    assert load(Options, tmp_path / "new/config.yaml") == first
    assert read("--config", str(tmp_path / "new/config.yaml")) == first
    assert to_dict(first)["output_dir"] == "007" and to_dict(first)["sizes"] == [1, 2]


def test_first_difference():
    assert first_difference(read(), read()) is None
    message = first_difference(read("teacher.steps=7"), read())
    assert message is not None and "'teacher.steps'" in message
    assert "7" in message and "50" in message
    ours, theirs = read("seed=1", "net.width=9"), read("net.depth=9")
    assert "'seed'" in (first_difference(ours, theirs) or "")
    assert "'net.width'" in (first_difference(ours, theirs, ignore=["seed"]) or "")
    assert first_difference(ours, theirs, ignore=["seed", "net"]) is None
    assert "absent" in (first_difference(read("net.new=1"), read()) or "")


def test_a_folder_goes_on_with_its_own_run_only(tmp_path):
    folder = tmp_path / "run"
    check_folder(read(), folder)
    folder.mkdir()
    (folder / ".hidden").touch()
    check_folder(read(), folder)
    (folder / "notes.txt").touch()
    with pytest.raises(FlowkitError, match="is not empty and holds no run of this trainer"):
        check_folder(read(), folder, kind="trainer")
    save(read("seed=1"), folder / "config.yaml")
    check_folder(read("seed=1"), folder)
    check_folder(read(), folder, ignore=["seed"])
    with pytest.raises(FlowkitError, match="holds samples of another run: 'seed' is .* resume it"):
        check_folder(read(), folder, holds="samples of another run")
    (folder / "config.yaml").write_text("other: 1\n")
    with pytest.raises(FlowkitError, match="holds a run of another command; choose another"):
        check_folder(read(), folder)


def raises(error: BaseException) -> Any:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    "error, code, line",
    [
        (FlowkitError("seed is\n odd"), 1, "error: seed is odd"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a/b"),
            1,
            "No space left on device: a/b",
        ),
        (OSError("plain"), 1, "error: plain"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_run_command_ends_in_one_line(error, code, line, capsys):
    with pytest.raises(SystemExit) as caught:
        run_command(raises(error))
    shown = capsys.readouterr().err
    assert caught.value.code == code and line in shown and shown.count("\n") == 1


def test_run_command_lets_defects_through(capsys):
    with pytest.raises(KeyError):
        run_command(raises(KeyError("x")))
    run_command(lambda: None)
    assert capsys.readouterr().err == ""


def test_config_needs_no_torch():
    code = "import sys, flowkit.config; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"
