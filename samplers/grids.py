"""Time grids for sampling: n + 1 increasing Python floats for n steps, the last of them 1."""

from __future__ import annotations

from flowkit.errors import FlowkitError

__all__ = ["edm", "from_start", "shifted", "uniform"]


def uniform(num_steps: int) -> list[float]:
    """Steps of one length, from 0 to 1."""
    return from_start(0.0, num_steps)


def from_start(start: float, num_steps: int) -> list[float]:
    """Steps of one length, from `start` in [0, 1) to 1."""
    _check_steps(num_steps)
    if not 0 <= start < 1:
        raise FlowkitError(f"a grid starts in [0, 1), got {start}")
    return [start + (1 - start) * (i / num_steps) for i in range(num_steps)] + [1.0]


def shifted(num_steps: int, shift: float) -> list[float]:
    """The uniform grid under t -> t / (t + shift (1 - t)), from 0 to 1.

    shift > 1 spends more steps near the noise; it is diffusers' `shift` (Esser et al., 2024,
    arXiv:2403.03206, eq. 23).
    """
    if not shift > 0:
        raise FlowkitError(f"shift must be positive, got {shift}; 1 leaves the grid uniform")
    return [t / (t + shift * (1 - t)) for t in uniform(num_steps)]


def edm(
    num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> list[float]:
    """Karras et al., 2022, arXiv:2206.00364, eq. 5, at t = 1 / (1 + sigma).

    num_steps values of sigma from sigma_max to sigma_min, then 0: the grid begins at
    1 / (1 + sigma_max), where the state is (1 - t) * noise.
    """
    _check_steps(num_steps)
    if not 0 < sigma_min < sigma_max:
        raise FlowkitError(f"edm needs 0 < sigma_min < sigma_max, got {sigma_min}, {sigma_max}")
    if not rho > 0:
        raise FlowkitError(f"rho must be positive, got {rho}")
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = [(high + i / max(num_steps - 1, 1) * (low - high)) ** rho for i in range(num_steps)]
    return [1 / (1 + sigma) for sigma in sigmas] + [1.0]


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise FlowkitError(f"a grid has at least one step, got num_steps={num_steps}")
