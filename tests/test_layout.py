"""The repository as a whole: who imports whom, what the wheel holds, what the README promises."""

from __future__ import annotations

import ast
import importlib.metadata as metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import flowkit

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FLOORS = ["flowkit", "samplers", "eval", "trainers"]  # each imports those before it only
SOURCES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
SCRIPTS = [
    p
    for p in SOURCES
    if p.parent.name in ("eval", "trainers")
    and all(text in p.read_text() for text in ("__main__", "run_command("))
]
README = (ROOT / "README.md").read_text()


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(absolute dotted module, whether at the top of the file) of everything a file imports."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", top) for alias in node.names)


def floor_of(module: str) -> int:
    part = (module.split(".") + [""])[1]
    return FLOORS.index(part) if part in FLOORS else 0


def in_subprocess(code: str, *argv: str, cwd: Path, path: str = "") -> str:
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_are_absolute_and_never_upwards(path):
    own = FLOORS.index(path.relative_to(ROOT).parts[0])
    for module, _ in imports(path):
        assert module.split(".")[0] not in {*FLOORS[1:], "configs", "tests"}, module
        if module.startswith("flowkit."):
            assert floor_of(module) <= own, f"{relative(path)} imports {module}"


@cache
def installed_modules() -> dict[str, set[str]]:
    """The top-level modules of every installed distribution."""
    modules: dict[str, set[str]] = defaultdict(set)
    for module, owners in metadata.packages_distributions().items():
        for owner in owners:
            modules[canonicalize_name(owner)].add(module)
    return modules


def import_names(requirements: list[str], seen: set[str], *, recurse: bool) -> set[str]:
    """The top-level modules of distributions, if wanted with all they need in turn."""
    names: set[str] = set()
    for requirement in map(Requirement, requirements):
        name = canonicalize_name(requirement.name)
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        names |= {name.replace("-", "_")} | installed_modules().get(name, set())
        if recurse:
            try:
                below = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue
            names |= import_names(below, seen, recurse=True)
    return names


EXTRAS = [line for lines in PROJECT["project"]["optional-dependencies"].values() for line in lines]


def test_every_import_is_declared():
    required = import_names(PROJECT["project"]["dependencies"], set(), recurse=False)
    optional = required | import_names(EXTRAS, set(), recurse=False)
    optional |= {"huggingface_hub"}  # diffusers' own, always there with it
    for path in SOURCES:
        for module, top in imports(path):
            name = module.split(".")[0]
            if name not in sys.stdlib_module_names and name != "flowkit":
                declared = required if top else optional
                assert name in declared, f"{relative(path)} imports {name}, see pyproject.toml"


def test_no_script_folder_shadows_a_module():
    """Running a file puts its folder first on the path: a neighbour may not be called `lpips`."""
    taken = set(sys.stdlib_module_names) | {"flowkit"}
    taken |= import_names(PROJECT["project"]["dependencies"] + EXTRAS, set(), recurse=True)
    for folder in [*FLOORS[1:], "benchmarks"]:
        for path in (ROOT / folder).iterdir():
            assert path.stem not in taken, f"{relative(path)} hides the module {path.stem}"


@pytest.mark.parametrize("package", PROJECT["tool"]["setuptools"]["packages"])
def test_no_module_hides_a_public_name_of_its_package(package):
    folder = folder_of(package)
    modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    source = folder / "__init__.py"
    for node in ast.walk(ast.parse(source.read_text() if source.exists() else "")):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert node.name not in modules
        elif isinstance(node, ast.ImportFrom) and node.module != package:
            for alias in node.names:
                assert (alias.asname or alias.name) not in modules, f"{package}: {alias.name}"


def folder_of(package: str) -> Path:
    mapped = PROJECT["tool"]["setuptools"]["package-dir"].get(package)
    return ROOT / (mapped or package.replace(".", "/"))


def test_every_package_is_listed():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    folders = {path.parent for path in SOURCES}
    assert {folder_of(package) for package in listed - {"flowkit.configs"}} == folders
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_type_checkers_find_the_packages():
    for floor in FLOORS[1:]:
        link = ROOT / ".typings/flowkit" / floor
        assert link.is_symlink() and link.resolve() == ROOT / floor


def test_versions_agree():
    assert PROJECT["project"]["version"] == flowkit.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {flowkit.__version__}" in changelog
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    [ruff] = [line for line in EXTRAS if line.startswith("ruff==")]
    assert f"rev: v{ruff.removeprefix('ruff==')}" in hooks


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built offline from a copy, and unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    skip = shutil.ignore_patterns("__pycache__", "runs")
    for name in [*FLOORS, "configs", "tests"]:
        shutil.copytree(ROOT / name, copy / name, ignore=skip)
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, copy)
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    in_subprocess(code, str(folder), cwd=copy)
    [built] = folder.glob("*.whl")
    zipfile.ZipFile(built).extractall(folder / "site")
    return folder / "site"


def test_wheel_holds_the_package_and_nothing_else(wheel):
    expected = {"flowkit/py.typed"}
    for floor in [*FLOORS, "configs"]:
        for path in (ROOT / floor).rglob("*"):
            if path.suffix in {".py", ".yaml", ".css", ".js"} or path.parent.name == "weights":
                inside = path.relative_to(ROOT).as_posix()
                expected.add(inside if floor == "flowkit" else f"flowkit/{inside}")
    files = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    info = {name for name in files if ".dist-info/" in name}
    assert files - info == expected
    assert any(name.endswith("licenses/LICENSE") for name in info)
    assert any(name.endswith(".yaml") for name in expected)


def test_wheel_works_in_a_folder_with_its_own_trainers(wheel, tmp_path):
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers/__init__.py").write_text("raise RuntimeError('the wrong one')")
    code = "import flowkit.trainers, sys; print(flowkit.trainers.__file__, *flowkit.__path__)"
    file, *folders = in_subprocess(code, cwd=tmp_path, path=str(wheel)).split()
    assert Path(file) == wheel / "flowkit/trainers/__init__.py"
    assert folders == [str(wheel / "flowkit")]
    config = min(p.relative_to(ROOT / "configs") for p in (ROOT / "configs").rglob("reflow.yaml"))
    code = "import runpy; runpy.run_module('flowkit.trainers.reflow', run_name='__main__')"
    argv = ["--config", config.as_posix(), "--help"]
    assert "output_dir=" in in_subprocess(code, *argv, cwd=tmp_path, path=str(wheel))


WITHOUT_TORCH = """
import runpy, sys
sys.modules |= dict.fromkeys(["torch", "diffusers", "accelerate", "transformers"])
if sys.argv[1] == "-":
    import flowkit, flowkit.config
else:
    sys.argv.pop(0)
    sys.path[0] = sys.argv[0].rpartition("/")[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_import_needs_no_torch(tmp_path):
    in_subprocess(WITHOUT_TORCH, "-", cwd=tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=relative)
def test_help_needs_no_torch_and_names_the_options(script, tmp_path):
    text = in_subprocess(WITHOUT_TORCH, str(script), "--help", cwd=tmp_path)
    wanted = ["seed=", "output_dir="] if script.parent.name == "trainers" else ["--config", "="]
    assert all(option in text for option in wanted)
    assert not list(tmp_path.iterdir())


def blocks(language: str, mark: str) -> list[str]:
    """The README's code blocks under an HTML comment."""
    return re.findall(rf"<!-- {mark} -->\s*```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks("python", "run"))))
def test_readme_code_runs(number, tmp_path):
    in_subprocess(blocks("python", "run")[number], cwd=tmp_path)


def test_readme_has_the_two_commands():
    assert blocks("bash", "test-command") == ['pip install -e ".[dev]" && pytest\n']
    assert "\npip install -e . && accelerate launch trainers/reflow.py\n" in README
    assert os.access(ROOT / ".ci/run", os.X_OK)


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed")
@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_lint(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
