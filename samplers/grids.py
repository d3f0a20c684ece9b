"""Time grids for sampling: n + 1 increasing Python floats for n steps, the last of them 1.

x_t = (1 - t) * noise + t * data        flow models' sigma = 1 - t        EDM's sigma = (1 - t) / t
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from scipy.special import betaincinv

from flowkit.errors import FlowkitError
from flowkit.samplers.time_density import TimeDensity

__all__ = [
    "beta",
    "cosine",
    "dynamic",
    "edm",
    "from_list",
    "from_start",
    "karras",
    "log_snr",
    "mu_of_tokens",
    "power",
    "quantiles",
    "shift_of_dimension",
    "shifted",
    "uniform",
    "unshifted",
]


def uniform(num_steps: int) -> list[float]:
    """Steps of one length, from 0 to 1."""
    return from_start(0.0, num_steps)


def power(num_steps: int, exponent: float = 1.5) -> list[float]:
    """1 - t = (1 - i / num_steps)^exponent, from 0 to 1: steps that shorten towards the data.

    1 is uniform; 1.5 suits the default solver, "abm", on flows that are not straight.
    """
    if not exponent > 0:
        raise FlowkitError(f"exponent must be positive, got {exponent}; 1 is the uniform grid")
    return _distinct([1 - (1 - u) ** exponent for u in _shares(num_steps)])


def from_start(start: float, num_steps: int) -> list[float]:
    """Steps of one length, from `start` in [0, 1) to 1."""
    if not 0 <= start < 1:
        raise FlowkitError(f"a grid starts in [0, 1), got {start}")
    return [start + (1 - start) * u for u in _shares(num_steps)[:-1]] + [1.0]


def from_list(times: Sequence[float]) -> list[float]:
    """Your own increasing times in [0, 1], as floats; 1 is appended where it is missing.

    The first time stays as it is: the state there is (1 - t) * noise for a start from noise.
    """
    grid = [float(t) for t in times]
    if grid and grid[-1] < 1:
        grid.append(1.0)
    falling = len(grid) > 1 and grid[0] > grid[1]
    hint = "; these fall like sigmas: give 1 - sigma" if falling else ""
    if len(grid) < 2 or not (grid[0] >= 0 and grid[-1] == 1):
        raise FlowkitError(f"a grid is one or more times in [0, 1) and 1, got {list(times)}{hint}")
    for i, (t, s) in enumerate(pairwise(grid)):
        if not t < s:
            raise FlowkitError(
                f"times must increase, got {t:.6g} then {s:.6g} at places {i} and {i + 1}{hint}"
            )
    return grid


def shifted(num_steps: int, shift: float) -> list[float]:
    """The uniform grid under t -> t / (t + shift (1 - t)), from 0 to 1.

    shift > 1 spends more steps near the noise; it is diffusers' `shift` (Esser et al., 2024,
    arXiv:2403.03206, eq. 23).
    """
    return _distinct([_shift(t, shift) for t in _shares(num_steps)])


def dynamic(num_steps: int, mu: float) -> list[float]:
    """shifted(num_steps, e^mu), from 0 to 1: Flux's shift, diffusers' `use_dynamic_shifting`.

    In sigma = 1 - t it reads e^mu / (e^mu + 1/sigma - 1).  mu: see `mu_of_tokens`.
    """
    if not isinstance(mu, int | float) or not abs(mu) < 500:
        raise FlowkitError(f"mu must be a number of the order of 1, got {mu!r}; see mu_of_tokens")
    return shifted(num_steps, math.exp(mu))


def mu_of_tokens(
    tokens: int, *, low: tuple[int, float] = (256, 0.5), high: tuple[int, float] = (4096, 1.15)
) -> float:
    """The mu of a picture of so many tokens, on the line through the (tokens, mu) `low` and `high`.

    The defaults are Flux's: 4,096 tokens are 1024 x 1024 pixels (black-forest-labs/flux).
    """
    (x, y), (x_high, y_high) = low, high
    return y + (y_high - y) * (tokens - x) / (x_high - x)


def shift_of_dimension(dimension: int, *, base: int = 4096) -> float:
    """sqrt(dimension / base): the shift for data of so many numbers, C * H * W.

    Zheng et al., 2025, arXiv:2510.11690; for grids and for the density of t in training alike.
    """
    if dimension < 1 or base < 1:
        raise FlowkitError(f"dimension and base must be positive, got {dimension} and {base}")
    return math.sqrt(dimension / base)


def unshifted(times: Sequence[float], shift: float) -> list[float]:
    """The times that `shift` maps to `times`: t -> shift t / (1 - t + shift t).

    diffusers' FlowMatchEulerDiscreteScheduler shifts the sigmas that it is given once more.
    set_timesteps(sigmas=[1 - t for t in unshifted(times, shift)[:-1]]) leaves it with `times`;
    with use_dynamic_shifting and mu, shift is e^mu (mu itself if time_shift_type is "linear").
    """
    if not all(0 <= t <= 1 for t in times):
        raise FlowkitError(f"times must lie in [0, 1], got {list(times)}")
    if not shift > 0:
        raise FlowkitError(f"shift must be positive, got {shift}; 1 changes nothing")
    return [_shift(t, 1 / shift) for t in times]


def edm(
    num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> list[float]:
    """Karras et al., 2022, arXiv:2206.00364, eq. 5, at t = 1 / (1 + sigma).

    num_steps values of EDM's sigma, uniform in sigma^(1/rho) from sigma_max to sigma_min, then 0:
    the grid begins at 1 / (1 + sigma_max), where the state is (1 - t) * noise.
    """
    sigmas = _karras_sigmas(num_steps, sigma_min, sigma_max, rho)
    return _distinct([1 / (1 + sigma) for sigma in sigmas] + [1.0])


def karras(
    num_steps: int, *, sigma_min: float = 0.001, sigma_max: float = 1.0, rho: float = 7.0
) -> list[float]:
    """The same rule in a flow model's own sigma = 1 - t, from 1 - sigma_max.

    That is what `use_karras_sigmas` of diffusers' FlowMatchEulerDiscreteScheduler means; nearly all
    of its steps are next to the data.
    """
    if sigma_max > 1:
        raise FlowkitError(f"sigma = 1 - t is at most 1, got sigma_max={sigma_max}; or use edm()")
    sigmas = _karras_sigmas(num_steps, sigma_min, sigma_max, rho)
    return _distinct([1 - sigma for sigma in sigmas] + [1.0])


def log_snr(
    num_steps: int, *, low: float = -3.0, high: float = 3.0, from_zero: bool = True
) -> list[float]:
    """Times uniform in log(t / (1 - t)) from `low` to `high`, then 1: DPM-Solver's grid.

    from_zero: begin at 0, with num_steps - 1 times between the ends; otherwise at
    1 / (1 + e^-low), as for a model that knows no purer noise (Lu et al., 2022, arXiv:2206.00927).
    """
    if not -math.inf < low < high < math.inf:
        raise FlowkitError(f"log_snr needs low < high, both finite, got {low} and {high}")
    _check_steps(num_steps)
    count = num_steps - from_zero
    step = (high - low) / max(count - 1, 1)
    first = low if count > 1 or not from_zero else 0.5 * (low + high)
    inner = [1 / (1 + math.exp(-(first + i * step))) for i in range(count)]
    return _distinct([0.0] * from_zero + inner + [1.0])


def cosine(num_steps: int) -> list[float]:
    """t = sin^2(pi/2 i/n), from 0 to 1: dense at both ends, the extrema of Chebyshev's polynomial.

    These are beta(num_steps, alpha=0.5, beta=0.5).  The grid of the cosine noise schedule (Nichol &
    Dhariwal, 2021, arXiv:2102.09672) is another, dense in the middle: quantiles(n, CosMap()).
    """
    return [math.sin(0.5 * math.pi * u) ** 2 for u in _shares(num_steps)]


def beta(num_steps: int, *, alpha: float = 0.6, beta: float = 0.6) -> list[float]:
    """Quantiles of Beta(alpha, beta), from 0 to 1 (Lee et al., 2024, arXiv:2407.12173).

    alpha, beta < 1 make the grid dense near the noise and near the data.  The defaults are those of
    diffusers' `use_beta_sigmas`, whose `alpha` belongs to the data's end.
    """
    if not (alpha > 0 and beta > 0):
        raise FlowkitError(f"alpha and beta must be positive, got {alpha} and {beta}")
    return _distinct(betaincinv(alpha, beta, _shares(num_steps)).tolist())


def quantiles(num_steps: int, density: TimeDensity) -> list[float]:
    """0, the n - 1 quantiles of `density`, and 1: sample as densely as the training drew times."""
    shares = torch.tensor(_shares(num_steps), dtype=torch.float64)
    return _distinct([0.0, *density.quantile(shares)[1:-1].tolist(), 1.0])


def _shift(t: float, shift: float) -> float:
    if not isinstance(shift, int | float) or not 0 < shift < math.inf:
        raise FlowkitError(f"shift must be positive, got {shift!r}; 1 leaves the grid uniform")
    return t / (t + shift * (1 - t))


def _karras_sigmas(n: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """n values from sigma_max to sigma_min, uniform in sigma^(1/rho)."""
    _check_steps(n)
    if not 0 < sigma_min < sigma_max:
        raise FlowkitError(f"a grid needs 0 < sigma_min < sigma_max, got {sigma_min}, {sigma_max}")
    if not rho > 0:
        raise FlowkitError(f"rho must be positive, got {rho}")
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(high + i / max(n - 1, 1) * (low - high)) ** rho for i in range(n)]


def _shares(num_steps: int) -> list[float]:
    """0, 1/n, ..., 1."""
    _check_steps(num_steps)
    return [i / num_steps for i in range(num_steps)] + [1.0]


def _check_steps(num_steps: int) -> None:
    if not isinstance(num_steps, int) or num_steps < 1:
        raise FlowkitError(
            f"a grid has a whole number of steps, at least one, got num_steps={num_steps!r}"
        )


def _distinct(times: list[float]) -> list[float]:
    """The times, if float64 can still tell them apart."""
    if not all(t < s for t, s in pairwise(times)):
        raise FlowkitError(
            f"{len(times) - 1} steps of this grid lie too close together for float64; "
            "take fewer steps or milder options"
        )
    return times
