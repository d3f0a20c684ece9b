"""What the config of a diffusers scheduler says about the model that it samples."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from flowkit.adapters import alphas_cumprod
from flowkit.errors import FlowkitError
from flowkit.pipelines import FlowLatents, VPLatents

__all__ = ["complete", "find_latents"]


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with what its own scheduler takes for granted.

    config: of any scheduler of diffusers, or of ours, in memory or as saved.
    Raises FlowkitError for the scheduler of a model whose path is not known here.
    """
    found = dict(config)
    found.pop("_use_default_values", None)
    name = found.get("_class_name", "the scheduler")
    origin = getattr(diffusers, str(found.get("_class_name")), None)
    if inspect.isclass(origin):
        parameters = inspect.signature(origin.__init__).parameters.values()
        found = {p.name: p.default for p in parameters if p.default is not p.empty} | found
    if "prediction_type" not in found and "beta_start" in found:
        found["prediction_type"] = "epsilon"  # what schedulers mean that do not say
    if "sigma_data" in found or found.get("timestep_type") == "continuous":
        raise FlowkitError(
            f"{name} is of a network on EDM's path, which this scheduler does not drive; use "
            "flowkit.samplers.sample with flowkit.adapters.from_diffusers"
        )
    known = found.keys() & {"solver", "shift", "prediction_type"}
    if "snr_shift_scale" in found or (found and not known):
        raise FlowkitError(
            f"{name} samples a model whose path is not known here; known are flow models "
            "(FlowMatch schedulers) and VP models with betas and a prediction_type"
        )
    return found


def find_latents(config: Mapping[str, Any]) -> FlowLatents | VPLatents:
    """How the latents of the pipeline are x_t, from a scheduler's complete config.

    Raises FlowkitError for an option that cannot be honoured.
    """
    flow = config["use_flow_sigmas"] or config["prediction_type"] in (None, "flow_prediction")
    refused = [
        "use_exponential_sigmas",
        "use_beta_sigmas",
        *(["use_karras_sigmas"] if flow else []),
    ]
    for name in refused:
        if config[name]:
            raise FlowkitError(
                f"{name}=True is not supported here; make the scheduler with {name}=False and "
                "give the pipeline sigmas of flowkit.samplers.grids"
            )
    if config["invert_sigmas"]:
        raise FlowkitError("invert_sigmas=True (Mochi), time reversed, is not supported here")
    if config["time_shift_type"] not in ("exponential", "linear"):
        raise FlowkitError(
            f"time_shift_type must be 'exponential' or 'linear', got {config['time_shift_type']!r}"
        )
    if not isinstance(size := config["num_train_timesteps"], int) or size < 1:
        raise FlowkitError(f"num_train_timesteps must be a positive whole number, got {size!r}")
    if flow:
        return FlowLatents(size)
    try:
        return VPLatents(alphas_cumprod(config), config["prediction_type"])
    except NotImplementedError as error:  # diffusers' word for an unknown beta_schedule
        raise FlowkitError(f"beta_schedule={config['beta_schedule']!r}: {error}") from None
