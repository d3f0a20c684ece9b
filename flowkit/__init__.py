"""flowkit: few-step generation with diffusion and rectified-flow models.

In a checkout, samplers/, eval/ and trainers/ lie beside this folder and are part of the package;
an installed wheel has them inside.
"""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent.parent
if (_root / "samplers").is_dir() and (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))
