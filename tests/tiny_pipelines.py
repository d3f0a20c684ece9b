"""Real diffusers pipelines with tiny random networks, built offline in a fraction of a second.

    pipe = flux()
    latents = generate(pipe, num_inference_steps=4)       # what the pipeline ends with, as latents
    pipe(**arguments(pipe, num_inference_steps=4, output_type="pt"))

There are no text encoders and tokenizers: the prompt is a random embedding.  Schedulers are
configured as those of the published models.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor, nn

CHANNELS = 4  # of latents
SIDE = 8  # of latents
WIDTH = 8  # of a prompt's embeddings
TOKENS = 5  # of a prompt
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flux(**config: Any) -> diffusers.FluxPipeline:
    """FLUX.1-dev: embedded guidance; the pipeline passes sigmas and mu.  config: scheduler's."""
    net = diffusers.FluxTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    dev = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    lengths = {"base_image_seq_len": 256, "max_image_seq_len": 4096}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**dev | lengths | config)
    nothing = _without("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return diffusers.FluxPipeline(
        scheduler, _vae(shift_factor=0.1), transformer=_random(net), **nothing
    )


def flux_img2img(**config: Any) -> diffusers.FluxImg2ImgPipeline:
    """As `flux`, from an image on."""
    return diffusers.FluxImg2ImgPipeline(**flux(**config).components)


def flux_inpaint(**config: Any) -> diffusers.FluxInpaintPipeline:
    """As `flux`, inside a mask."""
    return diffusers.FluxInpaintPipeline(**flux(**config).components)


def sd3(**config: Any) -> diffusers.StableDiffusion3Pipeline:
    """Stable Diffusion 3: shift 3; the pipeline passes sigmas only when its caller does."""
    net = diffusers.SD3Transformer2DModel(
        sample_size=SIDE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=SIDE,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | config)
    nothing = _without("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    nothing |= _without("text_encoder_3", "tokenizer_3")
    return diffusers.StableDiffusion3Pipeline(_random(net), scheduler, _vae(), **nothing)


def sd15(prediction_type: str = "epsilon", **config: Any) -> diffusers.StableDiffusionPipeline:
    """Stable Diffusion 1.5, or 2 with "v_prediction".  config: the scheduler's."""
    scheduler = diffusers.PNDMScheduler(
        prediction_type=prediction_type,
        **BETAS | {"steps_offset": 1, "skip_prk_steps": True, "set_alpha_to_one": False} | config,
    )
    return diffusers.StableDiffusionPipeline(
        vae=_vae(),
        unet=_unet(),
        scheduler=scheduler,
        requires_safety_checker=False,
        **_without("text_encoder", "tokenizer", "safety_checker", "feature_extractor"),
    )


def sd15_img2img(**config: Any) -> diffusers.StableDiffusionImg2ImgPipeline:
    """As `sd15`, from an image on."""
    components = sd15(**config).components
    return diffusers.StableDiffusionImg2ImgPipeline(**components, requires_safety_checker=False)


def sdxl(prediction_type: str = "epsilon", **config: Any) -> diffusers.StableDiffusionXLPipeline:
    """Stable Diffusion XL, with sizes and a pooled prompt as further conditions."""
    leading = {"timestep_spacing": "leading", "steps_offset": 1}
    scheduler = diffusers.EulerDiscreteScheduler(
        prediction_type=prediction_type, **BETAS | leading | config
    )
    time_ids, each = 6, 4
    net = _unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=each,
        projection_class_embeddings_input_dim=WIDTH + time_ids * each,
    )
    nothing = _without("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    return diffusers.StableDiffusionXLPipeline(vae=_vae(), unet=net, scheduler=scheduler, **nothing)


def dit(**config: Any) -> diffusers.DiTPipeline:
    """DiT, with its learned variance and linear betas."""
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=1,
        sample_size=SIDE,
        norm_num_groups=1,
    )
    scheduler = diffusers.DDIMScheduler(**{"clip_sample": False} | config)
    return diffusers.DiTPipeline(_random(net), _vae(), scheduler)


def sana(**config: Any) -> diffusers.SanaPipeline:
    """Sana: a flow, sampled with DPM-Solver++ at flow_shift 3."""
    net = diffusers.SanaTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=SIDE,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(**FLOW | config)
    return diffusers.SanaPipeline(None, None, None, _random(net), scheduler)


def wan(**config: Any) -> diffusers.WanPipeline:
    """Wan 2.1, a video: a flow, sampled with UniPC at flow_shift 3; it reads scheduler.sigmas."""
    net = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=16,
    )
    scheduler = diffusers.UniPCMultistepScheduler(**FLOW | config)
    return diffusers.WanPipeline(None, None, None, scheduler, _random(net))


PIPELINES = {build.__name__: build for build in (flux, sd3, sd15, sdxl, dit, sana, wan)}


def arguments(
    pipe: Any, *, batch: int = 2, guided: bool = False, **overrides: Any
) -> dict[str, Any]:
    """What to call a pipeline with.  overrides: other arguments, or other values of these.

    guided: with classifier-free guidance, in the pipelines that do that in their loop.
    """
    pipe.set_progress_bar_config(disable=True)
    given = {
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": 3,
        "guidance_scale": 4.0 if guided else 1.0,
    }
    if isinstance(pipe, diffusers.DiTPipeline):
        return given | {"class_labels": list(range(batch)), "output_type": "pt"} | overrides
    given |= {"output_type": "latent"} | _prompts(pipe, batch, guided) | _pictures(pipe, batch)
    if isinstance(pipe, diffusers.SanaPipeline):
        given["use_resolution_binning"] = False
    return given | overrides


def generate(pipe: Any, **options: Any) -> Tensor:
    """The latents that a pipeline ends with.  options: those of `arguments`."""
    if not isinstance(pipe, diffusers.DiTPipeline):
        return pipe(**arguments(pipe, **options), return_dict=False)[0]
    # DiT's pipeline always decodes: these are the latents on their way into the VAE.
    latents = []
    entry = pipe.vae.post_quant_conv
    hook = entry.register_forward_pre_hook(lambda _, inputs: latents.append(inputs[0]))
    try:
        pipe(**arguments(pipe, **options))
    finally:
        hook.remove()
    return latents[0] * pipe.vae.config.scaling_factor


def denoiser(pipe: Any) -> Any:
    """The pipeline's transformer or U-Net."""
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def _prompts(pipe: Any, batch: int, guided: bool) -> dict[str, Any]:
    """Embeddings in place of texts, as many as the pipeline takes."""
    dtype = denoiser(pipe).dtype
    given = {"prompt_embeds": draw(batch, TOKENS, WIDTH, seed=1).to(dtype)}
    if isinstance(pipe, _POOLED):
        given["pooled_prompt_embeds"] = draw(batch, WIDTH, seed=2).to(dtype)
    if isinstance(pipe, diffusers.SanaPipeline):
        given["prompt_attention_mask"] = torch.ones(batch, TOKENS)
    if guided and not isinstance(pipe, _FLUX):
        given |= {f"negative_{name}": x.flip(0) for name, x in given.items()}
        if isinstance(pipe, diffusers.SanaPipeline):
            given["negative_prompt"] = None  # its default is a text
    return given


def _pictures(pipe: Any, batch: int) -> dict[str, Any]:
    """The sizes; the image and the mask of its right half, where the pipeline takes them."""
    if isinstance(pipe, diffusers.WanPipeline):
        return {"height": 8 * SIDE, "width": 8 * SIDE, "num_frames": 5}
    side = pipe.vae_scale_factor * SIDE
    given = {} if isinstance(pipe, _SD_IMAGE) else {"height": side, "width": side}
    if isinstance(pipe, (*_FLUX[1:], _SD_IMAGE)):
        given |= {"image": draw(batch, 3, side, side, seed=3).sigmoid(), "strength": 0.6}
    if isinstance(pipe, diffusers.FluxInpaintPipeline):
        given["mask_image"] = (torch.arange(side) >= side // 2).float().expand(1, 1, side, side)
    return given


_FLUX = diffusers.FluxPipeline, diffusers.FluxImg2ImgPipeline, diffusers.FluxInpaintPipeline
_POOLED = *_FLUX, diffusers.StableDiffusion3Pipeline, diffusers.StableDiffusionXLPipeline
_SD_IMAGE = diffusers.StableDiffusionImg2ImgPipeline


def _unet(**options: Any) -> nn.Module:
    net = diffusers.UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        **options,
    )
    return _random(net)


def _vae(**options: Any) -> nn.Module:
    net = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=2 * SIDE,
        **options,
    )
    return _random(net)


def _random(net: nn.Module) -> nn.Module:
    """Random weights also where training starts from zeros: all inputs count."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in net.named_parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5, generator=generator)
        else:
            nn.init.normal_(weight, 0 if name.endswith("bias") else 1, 0.1, generator=generator)
    return net.eval()


def _without(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)
