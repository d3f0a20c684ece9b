from __future__ import annotations

import json
import pickle
from dataclasses import asdict

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn
from torch.nn import functional as F

import flowkit.latents
from flowkit.data import ImageData, load_data
from flowkit.errors import FlowkitError
from flowkit.latents import LatentData, Latents, decode_latents, encode_latents, vae_identity
from flowkit.noise import keyed_noise


def tiny_kl(seed=0):
    torch.manual_seed(seed)
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=3,
    )


@pytest.fixture(scope="module")
def vae():
    return tiny_kl().eval()


@pytest.fixture(scope="module")
def digits():
    data = load_data("digits", "test")
    return ImageData("some digits", "test", data.pictures[:50], data.labels[:50], 10, data.peak)


def posterior_draws(vae, data, seed):
    """The latents, one picture at a time, straight from diffusers."""
    with torch.no_grad():
        posterior = vae.encode(data.fetch(range(len(data)))["data"]).latent_dist
    return posterior.mean + posterior.std * keyed_noise(seed, range(len(data)), (3, 4, 4))


@pytest.mark.parametrize("rows_per_file", [8192, 16])
def test_latents_are_the_posterior_normalised(tmp_path, vae, digits, rows_per_file, monkeypatch):
    monkeypatch.setattr(flowkit.latents, "_SHARD", rows_per_file)
    cache = encode_latents(digits, vae, tmp_path / "cache", batch_size=7, seed=3)
    expected = posterior_draws(vae, digits, 3)
    wide = expected.double().transpose(0, 1).flatten(1)
    assert torch.allclose(torch.tensor(cache.latents.mean).double(), wide.mean(1), atol=1e-6)
    std = wide.std(1, correction=0)
    assert torch.allclose(torch.tensor(cache.latents.std).double(), std, rtol=1e-5)
    order = torch.randperm(50)
    rows = cache.fetch(order)
    assert rows["data"].dtype == torch.float32
    assert torch.allclose(cache.latents.denormalise(rows["data"]), expected[order], atol=1e-5)
    assert torch.equal(rows["class_labels"], digits.labels[order])
    assert (cache.shape, len(cache), cache.num_classes) == ((3, 4, 4), 50, 10)
    normal = cache.fetch(range(50))["data"].double().transpose(0, 1).flatten(1)
    assert normal.mean(1).abs().max() < 1e-5
    assert (normal.std(1, correction=0) - 1).abs().max() < 1e-5


def test_scale_is_the_deviation_of_what_is_fetched(tmp_path, vae, digits):
    cache = encode_latents(digits, vae, tmp_path / "cache", scale=0.5)
    assert cache.fetch(range(50))["data"].std().item() == pytest.approx(0.5, rel=0.01)
    assert encode_latents(digits, vae, tmp_path / "cache").latents.scale == 1.0


def test_normalise_and_denormalise_are_inverse():
    latents = Latents((1.0, -20.0), (0.1, 30.0), scale=0.5)
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    assert torch.allclose(latents.denormalise(latents.normalise(x)), x)
    assert torch.allclose(latents.normalise(x)[:, 1], (x[:, 1] + 20) / 30 * 0.5)
    assert Latents(**json.loads(json.dumps(asdict(latents)))) == latents


def test_impossible_statistics():
    with pytest.raises(FlowkitError, match="all above 0"):
        Latents((0.0,), (0.0,))
    with pytest.raises(FlowkitError, match=r"as many stds as means \(2\)"):
        Latents((0.0, 0.0), (1.0,))
    with pytest.raises(FlowkitError, match="latents have 4 channels, their statistics 1"):
        Latents((0.0,), (1.0,)).normalise(torch.zeros(1, 4, 2, 2))


def test_a_cache_is_reused_and_the_file_kept(tmp_path, vae, digits):
    first = encode_latents(digits, vae, tmp_path / "cache")
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    again = encode_latents(digits, tiny_kl(), tmp_path / "cache", batch_size=3)
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    assert again.fingerprint() == first.fingerprint()
    copy = pickle.loads(pickle.dumps(LatentData(tmp_path / "cache", scale=0.5)))
    assert torch.equal(copy.fetch([4])["data"], first.fetch([4])["data"] * 0.5)


def test_a_cache_of_something_else_is_refused(tmp_path, vae, digits):
    path = tmp_path / "cache"
    encode_latents(digits, vae, path)
    other = tiny_kl(seed=1)
    with pytest.raises(FlowkitError) as caught:
        encode_latents(digits, other, path)
    for one in (vae, other):
        assert vae_identity(one).split()[1][:8] in str(caught.value)
    with pytest.raises(FlowkitError, match=r"of 'some digits' .* asked for 'digits' \(train, 1297"):
        encode_latents(load_data("digits"), vae, path)
    with pytest.raises(FlowkitError, match="seed 0; asked for .* seed 1"):
        encode_latents(digits, vae, path, seed=1)
    assert len(LatentData(path)) == 50


def test_a_folder_that_is_no_cache_is_left_alone(tmp_path, vae, digits):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FlowkitError, match="is not a folder of latents: no readable latents.json"):
        encode_latents(digits, vae, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_broken_files_and_other_versions(tmp_path, vae, digits):
    encode_latents(digits, vae, tmp_path / "cache")
    file = tmp_path / "cache" / "latents-00000.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(FlowkitError, match="latents-00000.safetensors is missing or broken"):
        LatentData(tmp_path / "cache")
    file.unlink()
    with pytest.raises(FlowkitError, match="latents-00000.safetensors is missing or broken"):
        encode_latents(digits, vae, tmp_path / "cache")
    file.write_bytes(whole)
    record = json.loads((tmp_path / "cache" / "latents.json").read_text())
    (tmp_path / "cache" / "latents.json").write_text(json.dumps({**record, "convention": 0}))
    with pytest.raises(FlowkitError, match="of convention 0, this flowkit reads 1"):
        LatentData(tmp_path / "cache")


def test_indices_outside_the_cache(tmp_path, vae, digits):
    cache = encode_latents(digits, vae, tmp_path / "cache")
    with pytest.raises(IndexError, match=r"\[0, 50\)"):
        cache.fetch([50])


def test_a_failed_encoding_leaves_nothing(tmp_path, digits):
    broken = tiny_kl()
    nn.init.constant_(broken.quant_conv.weight, float("inf"))
    with pytest.raises(FlowkitError, match="pictures 0 to 49 are not finite in torch.float32"):
        encode_latents(digits, broken, tmp_path / "cache")
    assert not any(tmp_path.iterdir())


def test_colour_vae_and_grey_pictures(tmp_path, digits):
    with pytest.raises(FlowkitError, match="takes pictures of 3 channels, 'some digits' has 1"):
        encode_latents(digits, AutoencoderTiny(), tmp_path / "cache")


def test_identity_depends_on_weights_and_configuration():
    assert vae_identity(tiny_kl()) == vae_identity(tiny_kl())
    half = tiny_kl().to(torch.bfloat16)
    rescaled = tiny_kl()
    rescaled.register_to_config(scaling_factor=2.0)
    names = {vae_identity(v) for v in (tiny_kl(), tiny_kl(1), half, rescaled)}
    assert len(names) == 4


def test_deterministic_encoder_of_diffusers(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        upsampling_scaling_factor=2,
    )
    pictures = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    data = ImageData("noise", "train", pictures)
    cache = encode_latents(data, vae, tmp_path / "cache")
    rows = cache.fetch(range(6))
    with torch.no_grad():
        latents = vae.encode(data.fetch(range(6))["data"]).latents
        decoded = vae.decode(latents).sample.clamp(-1, 1)
    assert torch.allclose(cache.latents.denormalise(rows["data"]), latents, atol=1e-5)
    assert torch.allclose(decode_latents(rows["data"], vae, cache.latents), decoded, atol=1e-5)
    assert "class_labels" not in rows and cache.num_classes is None


def test_a_constant_channel_becomes_zero(tmp_path):
    class Half(nn.Module):
        def encode(self, pictures):
            return torch.cat([pictures, torch.full_like(pictures, 0.3)], 1)

    data = load_data("digits", "test")
    cache = encode_latents(data, Half(), tmp_path / "cache", batch_size=100)
    fetched = cache.fetch(range(500))["data"]
    assert fetched[:, 1].abs().max() < 1e-6 and fetched[:, 0].std() > 0.9


class Block(nn.Module):
    """relu(conv-relu-conv-relu-conv + x), after a pooled residual at the lowest resolution."""

    def __init__(self, pool=False):
        super().__init__()
        convs = [m for _ in range(3) for m in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())]
        self.conv = nn.Sequential(*convs[:-1])
        if pool:
            up, down = nn.Conv2d(64, 256, 1, bias=False), nn.Conv2d(256, 64, 1, bias=False)
            self.pool = nn.Sequential(up, nn.GroupNorm(4, 256), nn.ReLU(), down)

    def forward(self, x):
        x = x + self.pool(x) if hasattr(self, "pool") else x
        return F.relu(self.conv(x) + x)


class Taef2(nn.Module):
    """madebyollin/taesd's tiny FLUX.2 autoencoder, with pictures in [-1, 1]."""

    def __init__(self, folder):
        super().__init__()

        def down():
            return nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False)

        def up():
            return [nn.Upsample(scale_factor=2), nn.Conv2d(64, 64, 3, padding=1, bias=False)]

        def blocks(n, pool=False):
            return [Block(pool) for _ in range(n)]

        first, last = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 32, 3, padding=1)
        stages = [*blocks(1), down(), *blocks(3), down(), *blocks(3), down(), *blocks(3, True)]
        self.encoder = nn.Sequential(first, *stages, last)
        first, last = nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 3, 3, padding=1)
        stages = [*blocks(3, True), *up(), *blocks(3), *up(), *blocks(3), *up(), *blocks(1)]
        self.decoder = nn.Sequential(nn.Identity(), first, nn.ReLU(), *stages, last)
        for name in ("encoder", "decoder"):
            file = folder / "weights" / f"taef2_{name}.pth"
            getattr(self, name).load_state_dict(torch.load(file, "cpu", weights_only=True))

    def encode(self, pictures):
        return self.encoder((pictures + 1) / 2)

    def decode(self, latents):
        return self.decoder((latents / 3).tanh() * 3) * 2 - 1


def test_round_trip_through_a_real_vae(tmp_path, data_root):
    data = load_data("cifar10-jpeg", "test", root=data_root)
    levels = F.interpolate(data.pictures[:64].float(), (64, 64), mode="bicubic", antialias=True)
    data = ImageData("large", "test", levels.round().clamp(0, 255).to(torch.uint8))
    vae = Taef2(data_root)
    cache = encode_latents(data, vae, tmp_path / "cache", batch_size=16)
    assert cache.shape == (32, 8, 8)
    decoded = decode_latents(cache.fetch(range(64))["data"], vae, cache.latents)
    error = (decoded - data.fetch(range(64))["data"]).square().flatten(1).mean(1)
    psnr = (10 * torch.log10(4 / error)).mean().item()
    assert psnr == pytest.approx(31.3, abs=1.0)
