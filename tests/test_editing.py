"""RF-Edit: against the authors' loop, and against what the pipelines themselves sample."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image
from tiny_pipelines import TOKENS, WIDTH, draw
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from flowkit.adapters import FlowVelocity, from_diffusers
from flowkit.errors import FlowkitError
from flowkit.nets import DiT
from flowkit.samplers import grids, invert, sample
from flowkit.samplers.editing import edit, edit_latents, pipeline_times, reconstruct
from flowkit.samplers.named_schedulers import RFSolverScheduler
from flowkit.velocity import bind, guided

PIPELINES = {"flux": tiny_pipelines.flux, "sd3": tiny_pipelines.sd3}


def prompt(seed, tokens=TOKENS, count=1):
    return {
        "prompt_embeds": draw(count, tokens, WIDTH, seed=seed),
        "pooled_prompt_embeds": draw(count, WIDTH, seed=seed + 100),
    }


def picture(seed=0, width=16, height=16):
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


@pytest.fixture(params=PIPELINES)
def pipe(request):
    return PIPELINES[request.param]()


def options(**given):
    return {
        "num_steps": 4,
        "negative_prompt": prompt(5),
        "progress": False,
        "solver": "euler",
    } | given


# Without a pipeline.


def authors_flux():
    net = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    for i, weight in enumerate(net.parameters()):
        weight.data = draw(*weight.shape, seed=i) * weight[0].numel() ** -0.5
    return from_diffusers(net.eval().double().requires_grad_(False))


def authors_loop(velocity, source, target, data, times, inject, blocks):
    """RF-Edit as its authors run it: sigma from 1 to 0, values by upper sigma and "is midpoint"."""
    sigmas, store, now = [1 - t for t in times], {}, {}
    projections = [velocity.net.single_transformer_blocks[i].attn.to_v for i in blocks]

    def hook(i):
        def share(module, args, out):
            key = (now["upper"], now["middle"], i)
            if not now["inject"]:
                return out
            if now["inverse"]:
                store[key] = out
            return store[key]

        return share

    def run(x, cond, pairs, inverse):
        for k, (here, there) in enumerate(pairs):
            near_noise = k >= len(pairs) - inject if inverse else k < inject
            now.update(upper=max(here, there), inverse=inverse, inject=near_noise)
            now["middle"] = False
            u = -velocity(x, 1 - here, **cond)
            now["middle"] = True
            middle = x + 0.5 * (there - here) * u
            half = -velocity(middle, 1 - 0.5 * (here + there), **cond)
            slope = (half - u) / (0.5 * (there - here))
            x = x + (there - here) * u + 0.5 * (there - here) ** 2 * slope
        return x

    handles = [p.register_forward_hook(hook(i)) for i, p in enumerate(projections)]
    pairs = list(zip(sigmas, sigmas[1:], strict=False))
    backwards = [(low, high) for high, low in reversed(pairs)]
    noise = run(data, source, backwards, True)
    edited = run(noise, target, pairs, False)
    for handle in handles:
        handle.remove()
    return noise, edited


@pytest.mark.parametrize("inject", [0, 1, 3, 5])
def test_equals_the_authors_loop(inject):
    velocity = authors_flux()
    source, target = (
        {
            "encoder_hidden_states": draw(2, TOKENS, WIDTH, seed=seed).double(),
            "pooled_projections": draw(2, WIDTH, seed=seed + 1).double(),
            "guidance": guidance,
        }
        for seed, guidance in ((1, 1.0), (3, 5.0))
    )
    data, times = draw(2, 4, 8, 8, seed=9).double(), grids.shifted(5, 3.0)
    noise, edited = authors_loop(velocity, source, target, data, times, inject, [1, 2])
    ours = edit_latents(
        bind(velocity, **source), bind(velocity, **target), data, times,
        model=velocity, inject=inject, blocks=[1, 2],
    )  # fmt: skip
    torch.testing.assert_close(ours.noise, noise, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.x, edited, rtol=1e-9, atol=1e-9)
    assert ours.nfe == 20
    tokens, width, bytes_each = 2 * (TOKENS + 16), 32, 8
    assert ours.nbytes == inject * 2 * 2 * tokens * width * bytes_each


def classes():
    """A small DiT whose values matter, and its conditionings on two classes."""
    net = DiT(
        sample_size=8, in_channels=1, hidden_size=32, num_layers=2, num_heads=2, num_classes=4
    )
    for i, weight in enumerate(net.parameters()):
        weight.data = 0.5 * draw(*weight.shape, seed=i) * weight[0].numel() ** -0.5
    velocity = FlowVelocity(net.eval().requires_grad_(False))
    bound = [bind(velocity, class_labels=torch.full((3,), y)) for y in range(5)]
    return velocity, bound, draw(3, 1, 8, 8, seed=9)


def test_nothing_injected_is_inversion_and_sampling_bit_for_bit():
    velocity, bound, data = classes()
    times = grids.uniform(4)
    target = guided(bound[1], bound[4], 2.0)
    edited = edit_latents(bound[0], target, data, times, model=velocity, inject=0)
    noise = invert(bound[0], data, times, "midpoint").x
    assert torch.equal(edited.noise, noise)
    assert torch.equal(edited.x, sample(target, noise, times, "midpoint").x)
    assert edited.nbytes == 0 and edited.images == ()


def test_four_of_five_steps_are_injected():
    velocity, bound, data = classes()
    times = grids.uniform(10)
    runs = {
        inject: edit_latents(bound[0], bound[1], data, times, model=velocity, inject=inject)
        for inject in (None, 7, 8)
    }
    assert torch.equal(runs[None].x, runs[8].x) and runs[None].nbytes == runs[8].nbytes
    assert not torch.equal(runs[None].x, runs[7].x)


def test_the_state_of_the_inversion_is_handed_on():
    velocity, bound, data = classes()
    times = grids.uniform(6)
    again = edit_latents(bound[0], bound[0], data, times, model=velocity, inject=0, solver="bdia")
    torch.testing.assert_close(again.x, data, rtol=0, atol=1e-4)  # BDIA needs both of its states
    edited = edit_latents(bound[0], bound[1], data, times, model=velocity, solver="bdia")
    assert (edited.x - data).abs().max() > 1e-2


# With pipelines.


def test_the_grid_is_the_pipelines(pipe):
    latents = draw(1, 4, 8, 8)
    for steps in (1, 5):
        tiny_pipelines.generate(pipe, num_inference_steps=steps)
        theirs = [1 - s for s in pipe.scheduler.sigmas.tolist()]
        assert pipeline_times(pipe, steps, latents) == pytest.approx(theirs, abs=1e-7)


def test_a_dynamic_shift_follows_the_number_of_tokens():
    pipe = tiny_pipelines.sd3(use_dynamic_shifting=True)
    small, large = (pipeline_times(pipe, 4, draw(1, 4, n, n)) for n in (8, 64))
    assert all(a > b for a, b in zip(small[1:-1], large[1:-1], strict=True))
    tiny_pipelines.generate(pipe, num_inference_steps=4)
    assert small == pytest.approx([1 - s for s in pipe.scheduler.sigmas.tolist()], abs=1e-7)


def test_the_grid_is_that_of_a_scheduler_of_ours(pipe):
    latents = draw(1, 4, 8, 8)
    pipe.scheduler = RFSolverScheduler.from_config(pipe.scheduler.config)
    tiny_pipelines.generate(pipe, num_inference_steps=5)
    theirs = [1 - s for s in pipe.scheduler.sigmas.tolist()]
    assert pipeline_times(pipe, 5, latents) == pytest.approx(theirs[::2], abs=1e-6)


def with_text_encoders(pipe):
    """The pipeline, able to read "a", "cat" and "dog"."""

    def tokenizer():
        words = {"[PAD]": 0, "[UNK]": 1, "a": 2, "cat": 3, "dog": 4, "</s>": 5}
        table = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        table.pre_tokenizer = pre_tokenizers.Whitespace()
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "</s>"}
        return PreTrainedTokenizerFast(tokenizer_object=table, model_max_length=8, **special)

    def clip(kind, width):
        sizes = {"hidden_size": width, "projection_dim": width, "intermediate_size": 8}
        layers = {"num_hidden_layers": 2, "num_attention_heads": 1, "max_position_embeddings": 8}
        ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 5}
        return kind(CLIPTextConfig(vocab_size=8, **sizes, **layers, **ends)).eval()

    def t5():
        sizes = {"d_model": WIDTH, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
        return T5EncoderModel(T5Config(vocab_size=8, **sizes)).eval()

    torch.manual_seed(0)
    if isinstance(pipe, FluxPipeline):
        encoders = [clip(CLIPTextModel, WIDTH), t5()]
    else:
        encoders = [clip(CLIPTextModelWithProjection, WIDTH // 2) for _ in range(2)] + [t5()]
    parts = dict(pipe.components)
    for number, encoder in zip(("", "_2", "_3"), encoders, strict=False):
        parts |= {f"text_encoder{number}": encoder, f"tokenizer{number}": tokenizer()}
    return type(pipe)(**parts)


@pytest.mark.parametrize("texts", [False, True])
def test_sampling_is_what_the_pipeline_samples(pipe, texts):
    flux = isinstance(pipe, FluxPipeline)
    source, target, negative = prompt(1), prompt(2), prompt(5)
    given = dict(target)
    if texts:
        pipe = with_text_encoders(pipe)
        source, target, negative = "a cat", "a dog", ""
        given = {"prompt": target, "prompt_embeds": None, "pooled_prompt_embeds": None}
    elif not flux:
        given |= {f"negative_{name}": x for name, x in negative.items()}
    guidance = {"inject": 0, "guidance": 4.0, "negative_prompt": negative}
    edited = edit(pipe, picture(), source, target, **options(**guidance))
    latents = edited.noise
    if flux:
        latents = FluxPipeline._pack_latents(latents, *latents.shape)
    theirs = tiny_pipelines.generate(
        pipe, batch=1, latents=latents, num_inference_steps=4, guidance_scale=4.0, **given
    )
    if flux:
        theirs = FluxPipeline._unpack_latents(theirs, 16, 16, pipe.vae_scale_factor)
    torch.testing.assert_close(edited.x, theirs, rtol=1e-4, atol=1e-4)


def test_each_picture_may_have_its_text(pipe):
    pipe = with_text_encoders(pipe)
    both = edit(pipe, [picture()] * 2, ["a cat", "a dog"], "dog", **options(negative_prompt=""))
    for i, text in enumerate(("a cat", "a dog")):
        alone = edit(pipe, picture(), text, "dog", **options(negative_prompt=""))
        torch.testing.assert_close(both.x[i : i + 1], alone.x, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both.x[0], both.x[1], atol=1e-3)


def test_inversion_starts_at_the_vaes_latents_and_runs_unguided(pipe):
    edited = edit(pipe, picture(), prompt(1), prompt(2), **options(guidance=7.0))
    pixels = pipe.image_processor.preprocess(picture())
    config = pipe.vae.config
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mean
        latents = (latents - (config.shift_factor or 0)) * config.scaling_factor
        cond = {
            "encoder_hidden_states": prompt(1)["prompt_embeds"],
            "pooled_projections": prompt(1)["pooled_prompt_embeds"],
        }
        if isinstance(pipe, FluxPipeline):
            cond["guidance"] = 1.0
        times = pipeline_times(pipe, 4, latents)
        noise = invert(bind(from_diffusers(pipe), **cond), latents, times, "euler").x
    torch.testing.assert_close(edited.noise, noise, rtol=1e-5, atol=1e-5)


def test_pictures_come_back_decoded(pipe):
    same = [picture(0), picture(1)]
    edited = edit(pipe, same, prompt(1), prompt(2), **options())
    config = pipe.vae.config
    latents = edited.x / config.scaling_factor + (config.shift_factor or 0)
    with torch.no_grad():
        pixels = pipe.vae.decode(latents).sample
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    for image, levels in zip(edited.images, expected, strict=True):
        assert isinstance(image, Image.Image) and image.size == (16, 16)
        np.testing.assert_allclose(np.asarray(image, dtype=float), levels.numpy(), atol=1)


def test_a_batch_is_its_pictures(pipe):
    pictures = [picture(0), picture(1)]
    batch = edit(pipe, pictures, prompt(1, count=2), prompt(3), **options())
    for i, image in enumerate(pictures):
        rows = {name: x[i : i + 1] for name, x in prompt(1, count=2).items()}
        alone = edit(pipe, image, rows, prompt(3), **options())
        torch.testing.assert_close(batch.x[i : i + 1], alone.x, rtol=1e-4, atol=1e-4)
    tensor = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255 for p in pictures])
    again = edit(pipe, tensor, prompt(1, count=2), prompt(3), **options())
    torch.testing.assert_close(batch.x, again.x, rtol=1e-4, atol=1e-4)


def test_sizes_are_cut_to_what_the_model_takes(pipe):
    edited = edit(pipe, picture(width=22, height=13), prompt(1), prompt(2), **options())
    assert edited.images[0].size == (20, 12)
    with pytest.raises(FlowkitError, match="at least 4 pixels"):
        edit(pipe, picture(width=3, height=9), prompt(1), prompt(2), **options())


def test_reconstruction_is_the_edit_to_the_same_prompt_unguided(pipe):
    again = reconstruct(pipe, picture(), prompt(1), num_steps=4, progress=False)
    same = edit(pipe, picture(), prompt(1), prompt(1), num_steps=4, guidance=1.0, progress=False)
    assert torch.equal(again.x, same.x) and again.nfe == 16
    other = edit(pipe, picture(), prompt(1), prompt(1), **options(guidance=3.0))
    assert not torch.allclose(again.x, other.x)


def test_bf16_pipelines_keep_the_state_in_float32(pipe):
    wide = edit(pipe, picture(), prompt(1), prompt(2), **options())
    narrow = edit(pipe.to(torch.bfloat16), picture(), prompt(1), prompt(2), **options())
    assert narrow.x.dtype == narrow.noise.dtype == torch.float32
    assert narrow.nbytes == wide.nbytes / 2
    assert not torch.equal(narrow.x, narrow.x.bfloat16().float())


def test_the_pipeline_is_left_as_it_was(pipe):
    before = tiny_pipelines.generate(pipe)
    scheduler, processors = pipe.scheduler, pipe.transformer.attn_processors
    edit(pipe, picture(), prompt(1), prompt(2), **options())
    with pytest.raises(FlowkitError, match="ran none|0 to 4"):
        edit(pipe, picture(), prompt(1), prompt(2), **options(inject=9))
    assert pipe.scheduler is scheduler and pipe.transformer.attn_processors == processors
    assert torch.equal(tiny_pipelines.generate(pipe), before)


def test_mistakes_are_named(pipe):
    with pytest.raises(FlowkitError, match="prompt_embeds and pooled_prompt_embeds, got prompt"):
        edit(pipe, picture(), {"prompt": prompt(1)["prompt_embeds"]}, prompt(2), **options())
    with pytest.raises(FlowkitError, match="1 pictures take 1 or 1 prompts, got .2."):
        edit(pipe, picture(), prompt(1), prompt(2, count=2), **options())
    with pytest.raises(FlowkitError, match="no option 'gamma'"):
        edit(pipe, picture(), prompt(1), prompt(2), **options(gamma=1.0))
    with pytest.raises(FlowkitError, match="Flux or Stable Diffusion 3, got a StableDiffusionP"):
        edit(tiny_pipelines.sd15(), picture(), "a", "b")
