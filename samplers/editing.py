"""RF-Edit: a real picture is turned to noise under its own prompt, and back under another.

    images = edit(pipe, image, "a cat on a sofa", "a dog on a sofa").images

RF-Solver inverts the picture; the attention values of the steps next to the noise are kept and
replayed when sampling passes the same steps, which preserves the picture's layout (Wang et al.,
2024, arXiv:2411.04746).  They hold back what another prompt and guidance change; what is left of
an unguided reconstruction's error is the solver's, and takes more steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from flowkit.adapters import from_diffusers
from flowkit.errors import FlowkitError
from flowkit.flow_adapters import FluxVelocity
from flowkit.samplers.evaluations import Solver
from flowkit.samplers.replay import recording, replaying
from flowkit.samplers.solve import invert, sample
from flowkit.samplers.value_sharing import share_values
from flowkit.velocity import Velocity, VelocityModel, bind, guided

__all__ = ["Edited", "edit", "edit_latents", "pipeline_times", "reconstruct"]

Prompt = str | Sequence[str] | Mapping[str, Tensor]
"""A text, a text a picture, or {"prompt_embeds": (B or 1, N, D), "pooled_prompt_embeds": (...)}."""


@dataclass(frozen=True)
class Edited:
    """What an edit gives.

    x: (B, *), the edited latents.  noise: (B, *), what the inversion found.  nfe: evaluations of
    both runs.  nbytes: of the attention values that were kept.  images: x decoded, from a pipeline.
    """

    x: Tensor
    noise: Tensor
    nfe: int
    nbytes: int
    images: tuple[Image.Image, ...] = ()


@torch.no_grad()
def edit_latents(
    source: Velocity,
    target: Velocity,
    data: Tensor,
    times: Sequence[float],
    *,
    model: nn.Module,
    inject: int | None = None,
    solver: str | Solver = "rf_solver",
    blocks: Iterable[int] | None = None,
    image_tokens_only: bool = False,
    device: torch.device | str | None = None,
    progress: bool = False,
    **options: Any,
) -> Edited:
    """Invert `data` with `source`, then sample with `target` on the values of the inversion.

    source, target: conditionings of `model`, as bind(velocity, class_labels=y).  source must not be
    guided: inversion is true to the data only along the flow that made it.  target may be; then
    both of its branches get the values, so that guidance amplifies what the prompts change and
    not what the values keep.
    data: (B, *), clean.  times: the grid, increasing from noise to data.
    inject: in how many steps next to the noise values are replayed; None for 4 of 5, the authors'
    20 of 25 (their examples take 2 or 3, which changes more); 0 for none.
    solver: any of fixed steps; a state that its inversion leaves is handed on.  options: its own.
    model, blocks, image_tokens_only, device: where values are shared; see `share_values`.
    """
    steps = round(0.8 * (len(times) - 1)) if inject is None else inject
    back = [float(t) for t in reversed(times)]
    shared = {"blocks": blocks, "image_tokens_only": image_tokens_only, "device": device}
    with share_values(model, **shared) as values:  # type: ignore[arg-type]  # of three types
        kept = recording(source, values, solver, back, steps=steps, **options)
        inverse = invert(kept, data, times, solver, progress=progress, **options)
        if inverse.state is not None:
            options = options | {"state": inverse.state}
        replayed = replaying(target, values, solver, times, **options)
        run = sample(replayed, inverse.x, times, solver, progress=progress, **options)
        return Edited(run.x, inverse.x, inverse.nfe + run.nfe, values.nbytes)


@torch.no_grad()
def edit(
    pipe: Any,
    image: Any,
    source_prompt: Prompt,
    target_prompt: Prompt,
    *,
    num_steps: int = 25,
    guidance: float | None = None,
    negative_prompt: Prompt = "",
    times: Sequence[float] | None = None,
    inject: int | None = None,
    progress: bool = True,
    **options: Any,
) -> Edited:
    """Edit pictures with a diffusers pipeline of Flux or Stable Diffusion 3.

    image: a PIL picture, a list of them, or (B, 3, H, W) in [0, 1]; its size, cut to what the model
    takes, is the result's.  source_prompt: what the pictures show.  target_prompt: what they shall.
    num_steps: of the pipeline's own grid, shifts included; `times` is another grid instead.
    guidance: of the target only; the inversion has 1.  Embedded in Flux-dev, else classifier-free
    against negative_prompt.  None: the authors' 5, and 1 for a Flux without embedded guidance.
    inject, options (solver, blocks, image_tokens_only, device): see `edit_latents`.

    The state is float32 whatever the pipeline's dtype; nothing is random.
    Raises FlowkitError for another pipeline, and for embeddings that do not fit.
    """
    velocity = _velocity(pipe)
    if guidance is None:
        guidance = 1.0 if isinstance(velocity, FluxVelocity) and not _embedded(pipe) else 5.0
    try:
        data = _encode(pipe, image)
        edited = edit_latents(
            _conditioned(pipe, source_prompt, data, 1.0, ""),
            _conditioned(pipe, target_prompt, data, guidance, negative_prompt),
            data,
            pipeline_times(pipe, num_steps, data) if times is None else times,
            model=velocity,
            inject=inject,
            progress=progress,
            **options,
        )
        return replace(edited, images=tuple(_decode(pipe, edited.x)))
    finally:
        pipe.maybe_free_model_hooks()  # of model offloading


def reconstruct(pipe: Any, image: Any, prompt: Prompt, **options: Any) -> Edited:
    """Invert pictures and sample them again with the same prompt, unguided both ways.

    What differs from `image` is the solver's error and the VAE's.  options: those of `edit`.
    """
    return edit(pipe, image, prompt, prompt, **{"guidance": 1.0} | options)


def pipeline_times(pipe: Any, num_steps: int, latents: Tensor) -> list[float]:
    """The grid on which a Flux or SD3 pipeline samples `latents` (B, C, H, W), as times.

    That of its scheduler, with the static shift, or the dynamic one for this number of tokens.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    from flowkit.samplers.scheduler import FlowScheduler

    config, scheduler = pipe.scheduler.config, pipe.scheduler
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    else:
        scheduler = FlowScheduler.from_config(config, solver="euler", invert=False)
    given: dict[str, Any] = {"num_inference_steps": num_steps}
    if isinstance(_velocity(pipe), FluxVelocity) and not config.get("use_flow_sigmas"):
        given = {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps)}  # what its pipeline passes
    if config.get("use_dynamic_shifting"):
        given["mu"] = _mu(config, latents.shape[-2] * latents.shape[-1] // _PATCH**2)
    scheduler.set_timesteps(**given)
    return [1 - sigma for sigma in scheduler.sigmas.double().tolist()]


def _mu(config: Mapping[str, Any], tokens: int) -> float:
    """Linear in the number of tokens, as diffusers' pipelines have it."""
    fewest, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return low + (high - low) * (tokens - fewest) / (most - fewest)


_PATCH = 2  # latents a token, in each direction: Flux packs them, SD3 has patch_size 2


def _velocity(pipe: Any) -> VelocityModel:
    """The pipeline's transformer as a velocity."""
    net = getattr(pipe, "transformer", None)
    names = {cls.__name__ for cls in type(getattr(net, "_orig_mod", net)).__mro__}
    if not names & {"FluxTransformer2DModel", "SD3Transformer2DModel"}:
        raise FlowkitError(
            f"edit() takes a diffusers pipeline of Flux or Stable Diffusion 3, got a "
            f"{type(pipe).__name__}; edit_latents() takes any velocities"
        )
    return from_diffusers(pipe)


def _embedded(pipe: Any) -> bool:
    """Whether guidance is an input of the network, as in Flux-dev."""
    return bool(getattr(pipe.transformer.config, "guidance_embeds", False))


def _conditioned(
    pipe: Any, prompt: Prompt, data: Tensor, guidance: float, negative: Prompt
) -> Velocity:
    """The pipeline's velocity under a prompt, guided in the way of its network."""
    model, cond = _velocity(pipe), _condition(pipe, prompt, data)
    if _embedded(pipe):
        return bind(model, guidance=guidance, **cond)
    if guidance == 1:
        return bind(model, **cond)
    without = _condition(pipe, negative, data)
    return guided(bind(model, **cond), bind(model, **without), guidance)


def _encode(pipe: Any, image: Any) -> Tensor:
    """Pictures to latents (B, C, H, W), as the flow sees them; float32."""
    multiple = pipe.vae_scale_factor * _PATCH
    one = image[0] if isinstance(image, list | tuple) else image
    size = pipe.image_processor.get_default_height_width(one)
    height, width = (side - side % multiple for side in size)
    if not height or not width:
        raise FlowkitError(f"pictures must be at least {multiple} pixels a side, got {size}")
    pixels = pipe.image_processor.preprocess(image, height, width)
    pixels = pixels.to(pipe._execution_device, pipe.vae.dtype)
    latents = pipe.vae.encode(pixels).latent_dist.mode().float()
    config = pipe.vae.config
    return (latents - (config.shift_factor or 0.0)) * config.scaling_factor


def _decode(pipe: Any, latents: Tensor) -> list[Image.Image]:
    config = pipe.vae.config
    latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
    pixels = pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]
    return pipe.image_processor.postprocess(pixels.float(), output_type="pil")


_EMBEDDINGS = {
    "prompt_embeds": "encoder_hidden_states",
    "pooled_prompt_embeds": "pooled_projections",
}


def _condition(pipe: Any, prompt: Prompt, data: Tensor) -> dict[str, Any]:
    """What the transformer is given for a prompt, one row for each of `data`."""
    if not isinstance(prompt, Mapping):
        prompt = _embeddings(pipe, [prompt] if isinstance(prompt, str) else list(prompt))
    if prompt.keys() != _EMBEDDINGS.keys():
        raise FlowkitError(
            f"a prompt's embeddings are {' and '.join(_EMBEDDINGS)}, got {', '.join(prompt)}"
        )
    rows = {len(x) for x in prompt.values()}
    if not rows <= {1, len(data)}:
        raise FlowkitError(
            f"{len(data)} pictures take 1 or {len(data)} prompts, got {sorted(rows)}"
        )
    return {
        _EMBEDDINGS[name]: x.to(data.device).expand(len(data), *x.shape[1:])
        for name, x in prompt.items()
    }


def _embeddings(pipe: Any, texts: list[str]) -> dict[str, Tensor]:
    device = pipe._execution_device
    if isinstance(_velocity(pipe), FluxVelocity):
        embeds, pooled, _ = pipe.encode_prompt(prompt=texts, prompt_2=None, device=device)
    else:
        embeds, _, pooled, _ = pipe.encode_prompt(
            texts, None, None, device=device, do_classifier_free_guidance=False
        )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
