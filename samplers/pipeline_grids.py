"""The time grid that a diffusers pipeline asks its scheduler for, in flowkit's t.

Flow models: sigma = 1 - t.  A pipeline hands over unshifted sigmas, or none; the shift of the
scheduler's config, or mu, is applied to them once.  VP models: positions of the noise table.
The last time is always 1, the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from flowkit.errors import FlowkitError
from flowkit.pipelines import FlowLatents, VPLatents
from flowkit.samplers import grids

__all__ = ["flow_times", "own_times", "vp_times"]


def flow_times(
    latents: FlowLatents,
    config: Mapping[str, Any],
    num_steps: int | None,
    sigmas: Sequence[float] | None,
    mu: float | None,
    timesteps: Sequence[float] | None,
) -> list[float]:
    """The grid of a flow model.

    Without sigmas: sigma = (1 - i / num_steps) ** grid_power, shifted.  sigmas: shifted, unless
    the config says `sigmas_are_final`.  timesteps: what the network is to see, so never shifted.
    Raises FlowkitError when dynamic shifting lacks mu, and for sigmas that do not fall within
    (0, 1].
    """
    if timesteps is not None:
        given = [float(1 - latents.time(torch.tensor(float(t)).double())) for t in timesteps]
        return _to_data("timesteps", num_steps, given)
    if sigmas is not None:
        falling = _to_data("sigmas", num_steps, [float(s) for s in sigmas])
        if config["sigmas_are_final"]:
            return falling
        # In float32, as diffusers computes it: the same grid as with its Euler, to the last bit.
        unshifted = np.array(sigmas, dtype=np.float32)
    else:
        n = _count(num_steps)
        unshifted = (1 - np.arange(n) / n) ** config["grid_power"]
    with np.errstate(all="ignore"):  # what is not finite is refused below
        shifted = _shift(unshifted, config, mu)
        if terminal := config["shift_terminal"]:
            shifted = 1 - (1 - shifted) / ((1 - shifted[-1]) / (1 - terminal))
    times = [*(1 - shifted.astype(np.float64)).tolist(), 1.0]
    if not (times[0] >= 0 and all(t < s for t, s in pairwise(times))):
        names = ("grid_power", "shift", "flow_shift", "shift_terminal", "time_shift_type")
        raise FlowkitError(
            "sigmas must fall within [0, 1], these do not: "
            + ", ".join(f"{name}={config[name]!r}" for name in names)
            + f", mu={mu!r}, {len(times) - 1} steps"
        )
    return times


def own_times(
    times: Sequence[float],
    num_steps: int | None,
    sigmas: Sequence[float] | None,
    timesteps: Sequence[float] | None,
) -> list[float]:
    """The scheduler's own grid, for a pipeline that asks for as many steps; FlowkitError else."""
    given = sigmas if sigmas is not None else timesteps
    asked = num_steps if given is None else len(given)
    if asked != len(times) - 1:
        raise FlowkitError(
            f"this scheduler has its own times, of {len(times) - 1} steps, and the pipeline asked "
            f"for {asked}; pass num_inference_steps={len(times) - 1}"
        )
    return [float(t) for t in times]


def _shift(sigmas: np.ndarray, config: Mapping[str, Any], mu: float | None) -> np.ndarray:
    """Esser et al., 2024, arXiv:2403.03206, eq. 23, by the number that the config names."""
    if not config["use_dynamic_shifting"]:
        shift = config["flow_shift"] if config["use_flow_sigmas"] else config["shift"]
        return shift * sigmas / (1 + (shift - 1) * sigmas)
    if not isinstance(mu, int | float) or not abs(mu) < 500:
        raise FlowkitError(
            f"use_dynamic_shifting is set, but set_timesteps() got mu={mu!r}; pass a number, or "
            "make the scheduler with use_dynamic_shifting=False and a shift"
        )
    shift = math.exp(mu) if config["time_shift_type"] == "exponential" else mu
    return shift / (shift + (1 / sigmas - 1))


def vp_times(
    latents: VPLatents,
    config: Mapping[str, Any],
    num_steps: int | None,
    sigmas: Sequence[float] | None,
    timesteps: Sequence[float] | None,
) -> list[float]:
    """The grid of a VP model, spaced over its table as `timestep_spacing` says.

    sigmas are noise-to-signal ratios, timesteps positions in the table: both are taken as given.
    Positions need not be whole numbers: the network takes fractions.
    """
    if sigmas is not None:
        times = latents.time_of_sigma(torch.tensor([float(s) for s in sigmas]).double())
    else:
        given, last = timesteps is not None, latents.path.ends[0]
        wanted = timesteps if timesteps is not None else _positions(config, _count(num_steps))
        if wanted and not all(0 <= float(t) <= last for t in wanted):
            raise FlowkitError(
                f"timesteps must lie in [0, {last:g}], the noise table, got "
                f"{float(max(wanted)):g} to {float(min(wanted)):g}"
            )
        times = latents.time(torch.tensor([float(t) for t in wanted]).double())
        if config["use_karras_sigmas"] and not given:
            most, least = (float(latents.sigma(t)) for t in (times[0], times[-1]))
            return grids.edm(_count(num_steps), sigma_max=most, sigma_min=least)
    return _to_data("sigmas or timesteps", num_steps, (1 - times).tolist())


def _positions(config: Mapping[str, Any], n: int) -> list[float]:
    """Lin et al., 2023, arXiv:2305.08891, table 2, in fractions of an index."""
    size, offset = config["num_train_timesteps"], config["steps_offset"]
    if n > size:
        raise FlowkitError(f"num_inference_steps must be at most {size}, got {n}")
    spacing = config["timestep_spacing"]
    if spacing == "linspace":
        return [(size - 1) * (1 - i / max(n - 1, 1)) for i in range(n)]
    if spacing == "leading":
        return [(n - 1 - i) * (size // n) + offset for i in range(n)]
    if spacing == "trailing":
        return [size * (1 - i / n) - 1 for i in range(n)]
    raise FlowkitError(
        f"timestep_spacing must be 'linspace', 'leading' or 'trailing', got {spacing!r}"
    )


def _to_data(name: str, num_steps: int | None, sigmas: list[float]) -> list[float]:
    """The times 1 - sigma, with the end added."""
    times = [1 - sigma for sigma in sigmas]
    if not (times and 0 <= times[0] and times[-1] < 1 and all(t < s for t, s in pairwise(times))):
        raise FlowkitError(
            f"{name} must fall from noise to data and stop before its end, which is added, got "
            f"{len(sigmas)} that mean t from {times[0] if times else math.nan:.4g} to "
            f"{times[-1] if times else math.nan:.4g}"
        )
    if num_steps is not None and num_steps != len(sigmas):
        raise FlowkitError(f"num_inference_steps={num_steps}, but {len(sigmas)} {name} were given")
    return [*times, 1.0]


def _count(num_steps: int | None) -> int:
    if not isinstance(num_steps, int | np.integer) or num_steps < 1:
        raise FlowkitError(
            "set_timesteps() needs sigmas, timesteps or a whole number of num_inference_steps of "
            f"at least 1, got num_inference_steps={num_steps!r}"
        )
    return int(num_steps)
