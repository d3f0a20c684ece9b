"""from_diffusers: what it recognises, from where, and one clear line for what it does not."""

from __future__ import annotations

import json

import huggingface_hub.constants
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn

from flowkit.adapters import ADAPTERS, FlowVelocity, from_description, from_diffusers
from flowkit.errors import FlowkitError
from flowkit.nets import MLP, DiT, NCSNpp
from flowkit.velocity import bind, guided, to_data, to_noise


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet(**options):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        **options,
    ).eval()


def text_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def dit(out_channels=8):
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=out_channels,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()


def vae():
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)


STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
}
SCHEDULERS = {
    "epsilon": STABLE_DIFFUSION,
    "v_prediction": STABLE_DIFFUSION | {"prediction_type": "v_prediction"},
    "sample": STABLE_DIFFUSION | {"prediction_type": "sample"},
    "zero snr": STABLE_DIFFUSION
    | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}


def ddim_step(model, y, alpha_bar, alpha_bar_next, **cond):
    """DDIM without noise, in flowkit's frame: hold the data and the noise, change their share."""
    a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    t = a / (a + b)
    x_t = y / (a + b)
    v = model(x_t, t, **cond)
    data, noise = to_data(x_t, v, t), to_noise(x_t, v, t)
    return alpha_bar_next.sqrt() * data + (1 - alpha_bar_next).sqrt() * noise


@torch.no_grad()
@pytest.mark.parametrize("options", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("index", [900, 400, 100])
def test_text_unet_repeats_its_scheduler_s_ddim_step(options, index):
    net, scheduler = text_unet(), DDIMScheduler(**options)
    scheduler.set_timesteps(10)
    y, text = draw(2, 4, 8, 8), {"encoder_hidden_states": draw(2, 5, 8, seed=2)}
    output = net(y, torch.tensor(index), **text).sample
    theirs = scheduler.step(output, index, y).prev_sample
    model = from_diffusers(net, scheduler)
    table = scheduler.alphas_cumprod
    ours = ddim_step(model, y, table[index], table[index - 100], **text)
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


@torch.no_grad()
def test_the_network_gets_the_scheduler_s_index_and_its_fractions():
    scheduler = DDPMScheduler()
    model = from_diffusers(unet(), scheduler)
    seen = []
    model.net.register_forward_pre_hook(lambda net, args: seen.append(args[1]))
    ratio = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).double().sqrt()
    times = 1 / (1 + ratio)
    for t in (times[700], times[300], (times[300] * times[301]).sqrt(), times[999] / 2):
        model(draw(1, 3, 8, 8).double(), t)
    whole, other, between, outside = (float(s[0]) for s in seen)
    assert (whole, other) == (pytest.approx(700, abs=1e-3), pytest.approx(300, abs=1e-3))
    assert 300.3 < between < 300.7
    assert outside == pytest.approx(999, abs=1e-3)


@torch.no_grad()
def test_dit_drops_its_variance_and_knows_no_class():
    net, scheduler = dit(), DDIMScheduler(clip_sample=False)
    pipe = DiTPipeline(net, vae(), scheduler)
    model, y = from_diffusers(pipe), draw(2, 4, 8, 8)
    assert model.null_class == 10
    scheduler.set_timesteps(10)
    labels, table = torch.tensor([1, 7]), scheduler.alphas_cumprod
    for cond, used in (({"class_labels": labels}, labels), ({}, torch.tensor([10, 10]))):
        output = net(y, torch.tensor([500, 500]), class_labels=used).sample[:, :4]
        theirs = scheduler.step(output, 500, y).prev_sample
        ours = ddim_step(model, y, table[500], table[400], **cond)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_guidance_on_a_dit_is_guidance_on_its_epsilon():
    net, scheduler, x_t, t = dit(), DDIMScheduler(), draw(2, 4, 8, 8), 0.4
    model = from_diffusers(net, scheduler)
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    conditional = bind(model, class_labels=torch.tensor([1, 7]))
    v = guided(conditional, model, 4.0)(x_t, t)
    assert len(calls) == 2
    noise = [to_noise(x_t, f(x_t, t), t) for f in (conditional, model)]
    expected = noise[1] + 4.0 * (noise[0] - noise[1])
    torch.testing.assert_close(to_noise(x_t, v, t), expected, rtol=1e-4, atol=1e-4)
    calls.clear()
    guided(conditional, model, 1.0)(x_t, t)
    assert len(calls) == 1


@torch.no_grad()
def test_unet_of_an_edm_scheduler_is_preconditioned():
    net, scheduler = unet(), EDMEulerScheduler()
    scheduler.set_timesteps(5)
    sigma, following = scheduler.sigmas[2], scheduler.sigmas[3]
    y = 5 * draw(2, 3, 8, 8)
    scaled = scheduler.scale_model_input(y, scheduler.timesteps[2])
    output = net(scaled, scheduler.timesteps[2]).sample
    theirs = scheduler.step(output, scheduler.timesteps[2], y).prev_sample
    model = from_diffusers(net, scheduler)
    data = model.denoise(y, sigma)
    ours = y + (following - sigma) * (y - data) / sigma
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    t = 1 / (1 + sigma)
    v = model(t * y, t)
    torch.testing.assert_close(to_data(t * y, v, t), data, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_unet_of_a_flow_scheduler_is_a_flow():
    net, scheduler = unet(), FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    x = draw(2, 3, 8, 8)
    for i, time in enumerate(scheduler.timesteps):
        t, s = (1 - float(sigma) for sigma in scheduler.sigmas[i : i + 2])
        theirs = scheduler.step(net(x, time).sample, time, x).prev_sample
        x = x + (s - t) * from_diffusers(net, scheduler)(x, t)
        torch.testing.assert_close(x, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("cls", [MLP, DiT], ids=["MLP", "DiT"])
def test_our_networks_are_native(cls, tmp_path):
    torch.manual_seed(0)
    options = {"shape": (1, 4, 4)} if cls is MLP else {"sample_size": 4, "in_channels": 1}
    if cls is DiT:
        options |= {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
    net = cls(num_classes=3, label_dropout=0.1, **options).eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)  # both start as the zero function
    x, labels = draw(2, 1, 4, 4), torch.tensor([0, 2])
    model = from_diffusers(net)
    assert isinstance(model, FlowVelocity) and from_diffusers(model) is model
    expected = net(x, torch.tensor(0.3), class_labels=labels).sample
    assert expected.abs().max() > 0
    torch.testing.assert_close(model(x, 0.3, class_labels=labels), expected)
    net.save_pretrained(tmp_path)
    again = from_diffusers(tmp_path).eval()
    torch.testing.assert_close(again(x, 0.3, class_labels=labels), expected)


@torch.no_grad()
def test_folder_with_a_description_is_rebuilt_from_it(tmp_path):
    net = unet()
    model = FlowVelocity(net, time_scale=999.0)
    net.save_pretrained(tmp_path)
    record = {
        "net": {"module": type(net).__module__, "class": "UNet2DModel"},
        "velocity": model.description(),
        "shape": [3, 8, 8],
    }
    (tmp_path / "flowkit.json").write_text(json.dumps(record), encoding="utf-8")
    x = draw(2, 3, 8, 8)
    torch.testing.assert_close(from_diffusers(tmp_path)(x, 0.3), model(x, 0.3))
    record["net"]["module"] = "os"
    (tmp_path / "flowkit.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(FlowkitError, match="os.UNet2DModel is not known"):
        from_diffusers(tmp_path)


@torch.no_grad()
def test_pipeline_folder_needs_only_its_network_and_scheduler(tmp_path):
    pipe = DDIMPipeline(unet(), DDIMScheduler(**SCHEDULERS["v_prediction"]))
    pipe.save_pretrained(tmp_path)
    x = draw(2, 3, 8, 8)
    loaded = from_diffusers(str(tmp_path), torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and loaded.prediction == "v_prediction"
    expected = from_diffusers(pipe)(x, 0.5)
    torch.testing.assert_close(from_diffusers(str(tmp_path)).eval()(x, 0.5), expected)
    part = from_diffusers(tmp_path / "unet", DDIMScheduler(**SCHEDULERS["v_prediction"]))
    torch.testing.assert_close(part(x, 0.5), expected)


def test_damaged_folders_are_named(tmp_path):
    unet().save_pretrained(tmp_path)
    record = tmp_path / "flowkit.json"
    record.write_text('{"net": {"module": "diffusers"}}', encoding="utf-8")
    assert "lacks 'class'" in one_line(lambda: from_diffusers(tmp_path))
    record.write_text("{", encoding="utf-8")
    assert "not JSON" in one_line(lambda: from_diffusers(tmp_path))
    record.unlink()
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    scheduler = DDPMScheduler()
    assert "cannot load its UNet2DModel" in one_line(lambda: from_diffusers(tmp_path, scheduler))


def test_description_is_json():
    model = from_diffusers(unet(), DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    text = json.dumps(model.description())
    again = from_description(model.net, json.loads(text))
    assert again.description() == model.description()
    assert again.alphas_cumprod == model.alphas_cumprod
    assert all(name == cls.adapter for name, cls in ADAPTERS.items())


def test_compiled_models_are_recognised():
    compiled = torch.compile(unet(), backend="eager")
    assert from_diffusers(compiled, DDPMScheduler()).net is compiled


class Plain(nn.Linear):
    pass


def one_line(call):
    with pytest.raises(FlowkitError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unknown_models_hear_what_is_supported():
    message = one_line(lambda: from_diffusers(Plain(2, 2)))
    for part in ("Plain", "diffusers.FluxTransformer2DModel", "FlowVelocity", "EDMVelocity"):
        assert part in message
    raw = NCSNpp(sample_size=4, model_channels=8, channel_mult=(1,), num_blocks=1)
    assert "NCSNpp is not a known model" in one_line(lambda: from_diffusers(raw))
    assert "off a dict" in one_line(lambda: from_diffusers({}))


def test_diffusion_model_without_a_schedule_asks_for_it():
    for net in (unet(), text_unet(), dit()):
        assert "scheduler=" in one_line(lambda net=net: from_diffusers(net))
    flow_only = {"_class_name": "KarrasVeScheduler", "sigma_min": 0.02}
    assert "KarrasVeScheduler has no betas" in one_line(lambda: from_diffusers(unet(), flow_only))
    assert "got int" in one_line(lambda: from_diffusers(unet(), 1000))


def test_bad_descriptions_are_named():
    net = nn.Identity()
    assert "'flux2'" in one_line(lambda: from_description(net, {"adapter": "flux2"}))
    assert "None" in one_line(lambda: from_description(net, {}))
    message = one_line(lambda: from_description(net, {"adapter": "edm", "sigma": 80}))
    assert "'edm'" in message and "sigma" in message


def test_missing_places_are_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for place in (tmp_path / "nothing", "someone/no-such-model", "runs/x/student"):
        message = one_line(lambda place=place: from_diffusers(place))
        assert str(place) in message and "no such folder" in message
    assert "model_index.json" in one_line(lambda: from_diffusers(tmp_path))
