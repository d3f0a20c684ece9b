"""Solvers, time grids and densities of t, and the driver that samples with them and inverts."""

from __future__ import annotations

from flowkit.samplers.solve import Result, Step, evaluation_times, invert, sample

__all__ = ["Result", "Step", "evaluation_times", "invert", "sample"]
