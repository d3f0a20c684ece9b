"""The networks: exact initial behaviour, and what every one of them must do."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from flowkit.errors import FlowkitError
from flowkit.nets import ADM, MLP, DiT, NCSNpp
from flowkit.nets.dit import patchify, sincos_2d, unpatchify
from flowkit.nets.embeddings import LabelEmbedding, frequencies, sinusoidal
from flowkit.nets.unet_blocks import Resample

CLASSES = {"num_classes": 5, "label_dropout": 0.3}
DIT = {"sample_size": 8, "in_channels": 3, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
UNET = {
    "sample_size": 8,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attention_resolutions": (4,),
    "augment_dim": 9,
}
NCSNPP = {"embedding": "fourier", "encoder": "residual", "resample_filter": (1, 3, 3, 1)}
NETS = {
    "mlp": (MLP, {"shape": (3, 8, 8), "width": 16, "num_blocks": 2}),
    "dit": (DiT, DIT),
    "ddpmpp": (NCSNpp, UNET),
    "ncsnpp": (NCSNpp, UNET | NCSNPP | {"decoder": "skip"}),
    "adm": (ADM, UNET),
}


def build(name, *, alive=True, **options):
    """A small network; alive: with random weights, as the initial output is zero or nearly so."""
    torch.manual_seed(0)
    kind, arguments = NETS[name]
    net = kind(**(arguments | options))
    if alive:
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


def inputs(n=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, 8, 8, generator=generator)
    return x, torch.rand(n, generator=generator), torch.arange(n) % 5


@pytest.mark.parametrize("name", ["mlp", "dit", "adm"])
def test_output_is_zero_at_first(name):
    x, t, y = inputs()
    assert torch.equal(build(name, alive=False, **CLASSES)(x, t, y).sample, torch.zeros_like(x))


def test_ncsnpp_is_nearly_zero_at_first():
    x, t, _ = inputs()
    assert 0 < build("ncsnpp", alive=False)(x, t).sample.abs().max() < 1e-3


def test_dit_blocks_are_the_identity_at_first():
    h, c = torch.randn(2, 5, 16), torch.randn(2, 16)
    for block in build("dit", alive=False).blocks:
        assert torch.equal(block(h, c), h)


def test_dit_initialisation():
    net = build("dit", alive=False, hidden_size=64, **CLASSES)
    bound = (6 / (64 + 3 * 64)) ** 0.5  # of the fused (D, 3D) matrix
    for proj in (net.blocks[0].attn.to_q, net.blocks[1].attn.to_v):
        assert 0.95 * bound < proj.weight.abs().max() <= bound
    bound = (6 / (64 + 3 * 4)) ** 0.5  # of the flattened patch
    assert 0.95 * bound < net.patch_embed.weight.abs().max() <= bound
    for weight in (net.time_mlp[0].weight, net.time_mlp[2].weight, net.labels.table.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.15)


def test_label_table_rows():
    """One more than the classes only when labels are dropped."""
    assert build("dit", num_classes=5, label_dropout=0.0).labels.table.num_embeddings == 5
    assert build("dit", num_classes=5, label_dropout=0.1).labels.table.num_embeddings == 6


def test_time_embedding_values():
    emb = sinusoidal(torch.tensor([0.3]), frequencies(128))[0]
    expected = [0.955337, 0.961284, 0.999996, 1.0, 0.295520, 0.275559, 3.2238e-05]
    got = emb[[0, 1, 64, 127, 128, 129, 255]]
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-6, rtol=1e-4)


def test_position_values():
    """The first half of the channels codes the column."""
    table = sincos_2d(8, 3, 3)
    code = [0.84147, 0.01, 0.5403, 0.99995]
    none = [0.0, 0.0, 1.0, 1.0]
    torch.testing.assert_close(table[1], torch.tensor(code + none), atol=1e-5, rtol=0)
    torch.testing.assert_close(table[3], torch.tensor(none + code), atol=1e-5, rtol=0)


def test_unpatchify_inverts_patchify():
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(unpatchify(patchify(x, 2), 2, 4, 6), x)
    assert torch.equal(patchify(x, 2)[0, 1], x[0, :, :2, 2:4].permute(1, 2, 0).flatten())


def test_dit_takes_other_sizes_that_patches_divide():
    net, t = build("dit"), torch.tensor(0.5)
    assert net(torch.randn(2, 3, 6, 10), t).sample.shape == (2, 3, 6, 10)
    wide = build("dit", sample_size=(6, 10))
    wide.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 6, 10)
    assert torch.equal(wide(x, t).sample, net(x, t).sample)
    with pytest.raises(FlowkitError, match="7 x 8"):
        net(torch.randn(2, 3, 7, 8), t)
    with pytest.raises(FlowkitError, match="multiples of the patch"):
        DiT(sample_size=9)


def test_dit_fused_attention_is_the_same():
    x, t, _ = inputs()
    net = build("dit")
    want = net(x, t).sample
    net.fuse_qkv_projections()
    assert net.blocks[0].attn.fused_projections
    torch.testing.assert_close(net(x, t).sample, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("n", [1, 3])
def test_shapes_and_times(name, n):
    """One time for the batch is the same as that time for each sample; tuples on request."""
    x, _, y = inputs(n)
    net = build(name, **CLASSES)
    out = net(x, torch.full((n,), 0.3), y).sample
    assert out.shape == x.shape and out.isfinite().all() and out.std() > 1e-3
    torch.testing.assert_close(net(x, 0.3, y).sample, out, atol=1e-5, rtol=1e-4)
    assert torch.equal(net(x, torch.full((n,), 0.3), y, return_dict=False)[0], out)
    assert not torch.allclose(net(x, 0.8, y).sample, out, atol=1e-4)


@pytest.mark.parametrize("name", NETS)
def test_samples_do_not_mix(name):
    x, t, y = inputs()
    net = build(name, **CLASSES)
    together = net(x, t, y).sample
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1], y[i : i + 1]).sample for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NETS)
def test_saved_and_loaded_is_bit_equal(name, tmp_path):
    x, t, y = inputs()
    net = build(name, **CLASSES)
    net.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path)
    assert torch.equal(again(x, t, y).sample, net(x, t, y).sample)
    slow = type(net).from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert torch.equal(slow(x, t, y).sample, net(x, t, y).sample)


@pytest.mark.parametrize("name", NETS)
def test_gradient_checkpointing_changes_nothing(name):
    x, t, y = inputs()
    net = build(name, **CLASSES).train()

    def gradients():
        torch.manual_seed(3)
        net.zero_grad()
        net(x, t, y).sample.square().mean().backward()
        return {key: p.grad.clone() for key, p in net.named_parameters() if p.grad is not None}

    plain = gradients()
    net.enable_gradient_checkpointing()
    saved = gradients()
    assert plain.keys() == saved.keys() and len(plain) > 10
    for key in plain:
        torch.testing.assert_close(saved[key], plain[key])


@pytest.mark.parametrize("name", NETS)
def test_classes(name):
    """A class matters; the null class is the last row and what no label means."""
    x, t, y = inputs()
    net = build(name, **CLASSES)
    out = net(x, t, y).sample
    assert not torch.allclose(net(x, t, (y + 1) % 5).sample, out, atol=1e-4)
    null = net(x, t, torch.full((3,), 5)).sample
    torch.testing.assert_close(net(x, t).sample, null, atol=1e-5, rtol=1e-4)
    with pytest.raises(FlowkitError, match="no null class"):
        build(name, num_classes=5, label_dropout=0.0)(x, t)
    with pytest.raises(FlowkitError, match="without classes"):
        build(name)(x, t, y)


def test_labels_are_dropped_in_training_only():
    torch.manual_seed(0)
    labels = LabelEmbedding(5, 1, 0.3)
    torch.nn.init.zeros_(labels.table.weight)
    labels.table.weight.data[5] = 1.0
    y = torch.arange(20_000) % 5
    assert labels(y).mean().item() == pytest.approx(0.3, abs=0.015)
    assert not labels.eval()(y).any()


@pytest.mark.parametrize("name", ["ddpmpp", "adm"])
def test_augmentation_labels(name):
    x, t, _ = inputs()
    net = build(name)
    out = net(x, t).sample
    assert torch.equal(net(x, t, augment_labels=torch.zeros(3, 9)).sample, out)
    assert not torch.allclose(net(x, t, augment_labels=torch.ones(3, 9)).sample, out, atol=1e-4)
    with pytest.raises(FlowkitError, match="augment_dim"):
        build(name, augment_dim=0)(x, t, augment_labels=torch.zeros(3, 9))


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_resampling_keeps_constants(taps):
    """Away from the border, which is padded with zeros."""
    x = torch.full((2, 3, 8, 8), 0.7)
    edge = len(taps) // 2 - 1
    for up in (True, False):
        y = Resample(taps, up=up)(x)
        assert y.shape[-1] == (16 if up else 4)
        inner = y[..., edge : y.shape[-1] - edge, edge : y.shape[-1] - edge]
        torch.testing.assert_close(inner, torch.full_like(inner, 0.7))


def test_resampling_is_adjoint():
    """<up x, y> = 4 <x, down y>, exactly as the filters are each other's transpose."""
    for taps in ((1, 1), (1, 3, 3, 1)):
        x, y = torch.randn(1, 2, 4, 4).double(), torch.randn(1, 2, 8, 8).double()
        up, down = Resample(taps, up=True)(x), Resample(taps, up=False)(y)
        torch.testing.assert_close((up * y).sum(), 4 * (x * down).sum())
    box = Resample((1, 1), up=True)
    assert torch.equal(box(x), F.interpolate(x, scale_factor=2))


def test_unet_names_what_does_not_fit():
    x, t, _ = inputs()
    with pytest.raises(FlowkitError, match="multiples of 2"):
        build("ddpmpp")(x[..., :7], t)
    with pytest.raises(FlowkitError, match="embedding must be one of"):
        build("ddpmpp", embedding="learned")
    with pytest.raises(FlowkitError, match="groups"):
        build("adm", model_channels=3)
    with pytest.raises(FlowkitError, match="shape"):
        build("mlp")(x[..., :7], t)
    with pytest.raises(FlowkitError, match="2 for a batch of 3"):
        build("dit")(x, t[:2])
    with pytest.raises(FlowkitError, match="heads"):
        build("dit", num_heads=3)


@pytest.mark.parametrize("name", NETS)
def test_bfloat16_runs(name):
    x, t, y = inputs()
    net = build(name, **CLASSES)
    want = net(x, t, y).sample
    got = net.bfloat16()(x.bfloat16(), t, y).sample
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 0.1 * want.norm()
