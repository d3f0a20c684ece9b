"""What a result was made with: versions of the libraries, and the commit of a checkout."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import flowkit

__all__ = ["versions"]

_PACKAGES = ("accelerate", "diffusers", "numpy", "pillow", "scipy", "torchvision")


def versions() -> dict[str, str]:
    """Name to version, of flowkit, Python and what computes."""
    found = {"flowkit": flowkit.__version__, "python": platform.python_version()}
    found |= {"torch": str(torch.__version__)}
    if torch.version.cuda:
        found["cuda"] = str(torch.version.cuda)
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if commit := _commit():
        found["commit"] = commit
    return found


def _commit() -> str | None:
    """The commit of the checkout that runs, marked when files differ from it; None for a wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "pyproject.toml").is_file():
        return None
    git = ["git", "-C", str(root)]
    quiet: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 10}
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], **quiet)
        status = subprocess.run([*git, "diff", "--quiet", "HEAD"], **quiet)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + "+" * (status.returncode == 1) if head.returncode == 0 else None
