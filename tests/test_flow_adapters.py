"""Flow networks of every sign and time scale, against the Gaussian closed form and pipelines."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn

from flowkit.adapters import (
    DiffusersFlowVelocity,
    FlowVelocity,
    FluxVelocity,
    ReversedFlowVelocity,
    from_description,
    from_diffusers,
)
from flowkit.errors import FlowkitError

MU, S = 0.7, 0.4  # data N(MU, S^2)


def gaussian_velocity(x, t):
    t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return MU + (t * S**2 - (1 - t)) * (x - t * MU) / (t**2 * S**2 + (1 - t) ** 2)


class Exact(nn.Module):
    """The exact flow in a foreign convention: time t = clock(network time), output sign * v."""

    def __init__(self, clock, sign):
        super().__init__()
        self.clock, self.sign = clock, sign
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, time):
        return self.gain * self.sign * gaussian_velocity(x, self.clock(time))


class ExactTransformer(Exact):
    """diffusers' calling convention: names, not positions; a tuple comes back."""

    def forward(self, hidden_states, encoder_hidden_states=None, timestep=None, **kwargs):
        return (super().forward(hidden_states, timestep),)


class ExactFlux(ExactTransformer):
    config = SimpleNamespace(in_channels=8, guidance_embeds=False)


ROWS = {
    "flowkit, SiT": lambda: FlowVelocity(Exact(lambda s: s, 1)),
    "RectifiedFlow": lambda: FlowVelocity(Exact(lambda s: s / 999, 1), time_scale=999.0),
    "1000 t": lambda: FlowVelocity(Exact(lambda s: s / 1000, 1), time_scale=1000.0),
    "REPA, RAE, rfpp": lambda: ReversedFlowVelocity(Exact(lambda s: 1 - s, -1)),
    "SD3": lambda: DiffusersFlowVelocity(ExactTransformer(lambda s: 1 - s / 1000, -1)),
    "Flux": lambda: FluxVelocity(ExactFlux(lambda s: 1 - s, -1)),
}
X = torch.linspace(-2, 2, 48, dtype=torch.float64).reshape(3, 2, 2, 4)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 1.0])
def test_equals_the_closed_form(row, t):
    model, expected = row(), gaussian_velocity(X, t)
    assert (model.t_min, model.t_max) == (0.0, 1.0)
    single = torch.tensor(t, dtype=torch.float64)
    for time in (t, single, single.expand(3)):
        torch.testing.assert_close(model(X, time), expected, rtol=0, atol=1e-12)
    v = model(X.float(), t)
    assert v.dtype == torch.float32
    torch.testing.assert_close(v.double(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_each_sample_has_its_own_time(row):
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(row()(X, t), gaussian_velocity(X, t), rtol=0, atol=1e-12)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_gradients_and_description(row):
    model = row()
    x = X.clone().requires_grad_()
    model(x, 0.3).square().mean().backward()
    assert x.grad.abs().sum() > 0 and model.net.gain.grad.abs() > 0
    again = from_description(model.net, model.description())
    assert type(again) is type(model) and again.description() == model.description()
    torch.testing.assert_close(again(X, 0.3), model(X, 0.3), rtol=0, atol=0)


def sd3():
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    ).eval()


def flux(guidance_embeds):
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance_embeds,
    ).eval()


def sana(**options):
    torch.manual_seed(0)
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
        **options,
    ).eval()


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TEXT = {"encoder_hidden_states": draw(2, 5, 8), "pooled_projections": draw(2, 8, seed=2)}


def euler(model, x, sigmas, **cond):
    """Euler over a scheduler's sigmas, 1 to 0, in flowkit's time."""
    times = [1 - float(sigma) for sigma in sigmas]
    for t, s in zip(times, times[1:], strict=False):
        x = x + (s - t) * model(x, t, **cond)
    return x


def run(pipe, latents, **options):
    """A pipeline's own latents, from given noise and text, without text encoders or VAE."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=TEXT["encoder_hidden_states"],
        pooled_prompt_embeds=TEXT["pooled_projections"],
        latents=latents,
        output_type="latent",
        num_inference_steps=3,
        **options,
    ).images


@torch.no_grad()
def test_sd3_pipeline_is_euler_on_our_velocity():
    net, scheduler = sd3(), FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = StableDiffusion3Pipeline(net, scheduler, *[None] * 7)
    model, noise = from_diffusers(pipe), draw(2, 4, 8, 8)
    assert isinstance(model, DiffusersFlowVelocity) and model.net is net
    theirs = run(pipe, noise, height=64, width=64, guidance_scale=1.0)
    torch.testing.assert_close(
        euler(model, noise, scheduler.sigmas, **TEXT), theirs, rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_flux_pipeline_is_euler_on_our_velocity(guidance_embeds):
    net, scheduler = flux(guidance_embeds), FlowMatchEulerDiscreteScheduler()
    pipe = FluxPipeline(scheduler, None, None, None, None, None, net)
    model, noise = from_diffusers(pipe), draw(2, 4, 8, 12)
    packed = FluxPipeline._pack_latents(noise, 2, 4, 8, 12)
    theirs = run(pipe, packed, height=64, width=96, guidance_scale=2.5)
    cond = TEXT | ({"guidance": 2.5} if guidance_embeds else {})
    ours = euler(model, noise, scheduler.sigmas, **cond)
    theirs = FluxPipeline._unpack_latents(theirs, 64, 96, 8)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_flux_packs_as_its_pipeline_and_takes_guidance_per_sample():
    model, x = FluxVelocity(flux(True), guidance=2.0), draw(2, 4, 8, 12)
    seen = {}
    model.net.register_forward_pre_hook(
        lambda net, args, kwargs: seen.update(kwargs, x=args[0]), with_kwargs=True
    )
    v = model(x, 0.25, **TEXT)
    assert torch.equal(seen["x"], FluxPipeline._pack_latents(x, 2, 4, 8, 12))
    ids = FluxPipeline._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32)
    assert torch.equal(seen["img_ids"], ids)
    assert torch.equal(seen["txt_ids"], torch.zeros(5, 3))
    assert torch.equal(seen["timestep"], torch.full((2,), 0.75))
    assert torch.equal(seen["guidance"], torch.full((2,), 2.0))
    both = model(x, 0.25, guidance=torch.tensor([2.0, 7.0]), **TEXT)
    torch.testing.assert_close(both[0], v[0])
    assert not torch.allclose(both[1], v[1])


@pytest.mark.parametrize("shape", [(1, 4, 7, 8), (1, 16, 8, 8), (1, 4, 8)])
def test_flux_refuses_latents_that_it_cannot_pack(shape):
    with pytest.raises(FlowkitError, match=r"\(B, 4, H, W\) with even H and W"):
        FluxVelocity(flux(False))(torch.zeros(shape), 0.5, **TEXT)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.001])
def test_sana_is_called_as_its_pipeline_does(scale):
    net, x = sana(timestep_scale=scale), draw(2, 4, 8, 8)
    text = {"encoder_hidden_states": draw(2, 5, 8)}
    output = net(x, timestep=torch.full((2,), 250.0) * scale, **text, return_dict=False)[0]
    torch.testing.assert_close(from_diffusers(net)(x, 0.75, **text), -output)


def test_sana_sprint_is_refused():
    with pytest.raises(FlowkitError, match="consistency"):
        from_diffusers(sana(guidance_embeds=True))


@pytest.mark.parametrize("build", [sd3, lambda: flux(True)], ids=["sd3", "flux"])
def test_bfloat16_transformer_keeps_a_float32_state(build):
    net = build()
    with torch.no_grad():
        exact = from_diffusers(net)(draw(2, 4, 8, 8), 0.6, **TEXT)
    v = from_diffusers(net.bfloat16())(draw(2, 4, 8, 8), 0.6, **TEXT)
    assert v.dtype == torch.float32
    torch.testing.assert_close(v, exact, rtol=0.1, atol=0.05)
    v.square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
