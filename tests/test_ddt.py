"""The decoupled diffusion transformer: its formulas, its sizes, and its state."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from flowkit.adapters import from_diffusers
from flowkit.errors import FlowkitError
from flowkit.nets import DDT, PRESETS
from flowkit.nets.ddt import DDT_SIZES, DDTBlock, rotate, rotation

TINY = {
    "sample_size": 8,
    "in_channels": 3,
    "hidden_size": 16,
    "num_encoder_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 2,
}
CLASSES = {"num_classes": 5, "label_dropout": 0.3}


def build(*, alive=True, **options):
    """A small network; alive: with random weights, as the initial output is zero."""
    torch.manual_seed(0)
    net = DDT(**(TINY | options))
    if alive:
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


def inputs(n=3, channels=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, channels, 8, 8, generator=generator)
    return x, torch.rand(n, generator=generator), torch.arange(n) % 5


# Sizes: MCG-NJU/DDT with 1000 classes and the null class, 32 x 32 x 4 latents, patch 2.
PUBLISHED = {"B": 130_262_800, "L": 457_648_144, "XL": 674_646_352}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_counts(size):
    preset = dict(PRESETS[f"ddt-{size.lower()}2"])
    assert preset.pop("class") == "DDT"
    assert DDT_SIZES[size].items() <= preset.items()
    with torch.device("meta"):
        for net in (DDT(**preset), DDT(**DDT_SIZES[size], num_classes=1000)):
            assert net.num_parameters() == PUBLISHED[size]


# The parts, against their formulas.


def test_rotation_turns_neighbouring_channels_as_complex_numbers():
    """Angles of column, row, column, row, ..., with positions from 0 to 16."""
    dim, height, width = 8, 3, 5
    x = torch.randn(2, height * width, 4, dim, generator=torch.Generator().manual_seed(2)).double()
    turned = rotate(x, rotation(dim, height, width, x))
    for row, column in itertools.product(range(height), range(width)):
        place = 16 * column / (width - 1), 16 * row / (height - 1)
        angle = torch.tensor([place[i % 2] * 10000.0 ** (-4 * (i // 2) / dim) for i in range(4)])
        token = torch.view_as_complex(x[:, row * width + column].unflatten(-1, (-1, 2)))
        want = torch.view_as_real(token * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
        torch.testing.assert_close(turned[:, row * width + column].float(), want.float())


def test_rotation_makes_attention_a_function_of_the_offset():
    dim, side = 12, 4
    generator = torch.Generator().manual_seed(2)
    query, key = torch.randn(2, dim, generator=generator).double()
    by = rotation(dim, side, side, query)
    rows = [rotate(v.expand(1, side * side, 1, dim), by)[0, :, 0] for v in (query, key)]
    scores = (rows[0] @ rows[1].T).view(side, side, side, side)  # of rows, columns; both twice
    torch.testing.assert_close(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1])
    assert not torch.allclose(scores[0, 0, 1, 0], scores[0, 0, 0, 1])
    assert torch.equal(rotation(dim, 1, 1, query)[0], torch.ones(1, 1, dim // 2).double())


def rms(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def test_block_is_its_formula():
    torch.manual_seed(0)
    dim, heads, tokens = 24, 2, 6
    block = DDTBlock(dim, heads, 4.0).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    h, c = torch.randn(2, 2, tokens, dim, dtype=torch.double).unbind()
    by = rotation(dim // heads, 2, 3, h)
    weight = dict(block.named_parameters())
    assert weight["mlp.gate.weight"].shape == (2 * 4 * dim // 3, dim)
    rows = c @ weight["modulation.weight"].T + weight["modulation.bias"]
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = rows.split(dim, -1)

    inner = rms(h, weight["norm_1.weight"]) * (1 + scale_1) + shift_1
    q, k, v = ((inner @ weight[f"attn.to_{n}.weight"].T).unflatten(-1, (heads, -1)) for n in "qkv")
    q = rotate(rms(q, weight["attn.norm_q.weight"]), by)
    k = rotate(rms(k, weight["attn.norm_k.weight"]), by)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / (dim // heads) ** 0.5
    out = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).flatten(2)
    out = out @ weight["attn.to_out.0.weight"].T + weight["attn.to_out.0.bias"]
    want = h + gate_1 * out
    inner = rms(want, weight["norm_2.weight"]) * (1 + scale_2) + shift_2
    glu = F.silu(inner @ weight["mlp.gate.weight"].T) * (inner @ weight["mlp.proj_in.weight"].T)
    want = want + gate_2 * (glu @ weight["mlp.proj_out.weight"].T)
    torch.testing.assert_close(block(h, c, by), want)


def test_state_is_made_of_time_and_what_the_encoder_gave():
    x, t, y = inputs()
    net = build(**CLASSES)
    out = net(x, t, y)
    angle = t[:, None] * 10.0 ** (-torch.arange(128) / 128)
    time = net.time_mlp(torch.cat((angle.cos(), angle.sin()), dim=1))
    torch.testing.assert_close(out.state, F.silu(time[:, None] + out.encoded))
    assert out.state.shape == (3, 16, 16)


def test_patches_are_cut_and_put_together_alike():
    """As torch.nn.functional.unfold cuts them, so that published weights fit."""
    net = build()
    x, t, _ = inputs()
    assert torch.equal(
        F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2),
        F.unfold(x, 2, stride=2).transpose(1, 2),
    )
    seen = []
    hook = net.proj_out.register_forward_hook(lambda m, args, out: seen.append(out))
    out = net(x, t).sample
    hook.remove()
    torch.testing.assert_close(F.fold(seen[0].transpose(1, 2), (8, 8), 2, stride=2), out)


# How it starts.


def test_output_is_zero_at_first_and_blocks_are_not_the_identity():
    x, t, y = inputs()
    net = build(alive=False, **CLASSES)
    assert torch.equal(net(x, t, y).sample, torch.zeros_like(x))
    h = torch.randn(2, 16, 16)
    moved = net.decoder_blocks[0](h, torch.randn(2, 16, 16), rotation(8, 4, 4, h))
    assert (moved - h).abs().max() > 0.1


def test_initialisation():
    net = build(alive=False, hidden_size=64, **CLASSES)
    bound = (6 / (64 + 12)) ** 0.5  # Xavier's
    for embed in (net.encoder_embed, net.decoder_embed):
        assert 0.95 * bound < embed.weight.abs().max() <= bound
        assert not embed.bias.any()
    for weight in (net.time_mlp[0].weight, net.time_mlp[2].weight, net.labels.table.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert net.labels.table.num_embeddings == 6
    assert build(num_classes=5, label_dropout=0.0).labels.table.num_embeddings == 5


# The state: what an encoder made can be used again.


@pytest.mark.parametrize("name", ["state", "encoded"])
def test_its_own_state_changes_nothing(name):
    x, t, y = inputs()
    net = build(**CLASSES)
    out = net(x, t, y)
    again = net(x, t, y, **{name: getattr(out, name)})
    assert torch.equal(again.sample, out.sample) and torch.equal(again.state, out.state)


def test_a_stale_state_spares_the_encoder_and_hides_time_and_class():
    x, t, y = inputs()
    net = build(**CLASSES)
    old = net(x, t, y)
    calls = []
    for block in net.encoder_blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    new = net(0.5 * x, 0.9, y.flip(0), state=old.state)
    assert not calls and new.encoded is None and torch.equal(new.state, old.state)
    assert torch.equal(net(0.5 * x, 0.1, state=old.state).sample, new.sample)
    assert not torch.allclose(net(0.5 * x, 0.9, y.flip(0)).sample, new.sample, atol=1e-4)


def test_what_the_encoder_gave_leaves_the_decoder_the_time_it_is_at():
    x, t, y = inputs()
    net = build(**CLASSES)
    old = net(x, t, y)
    new = net(0.5 * x, 0.9, y, encoded=old.encoded)
    assert not torch.allclose(new.state, old.state, atol=1e-3)
    assert not torch.allclose(net(0.5 * x, 0.1, y, encoded=old.encoded).sample, new.sample)
    assert torch.equal(net(0.5 * x, 0.9, state=new.state).sample, new.sample)


def test_state_goes_through_the_adapter():
    x, t, y = inputs()
    net = build(**CLASSES)
    velocity = from_diffusers(net)
    out = net(x, t, y)
    assert torch.equal(velocity(x, t, class_labels=y), out.sample)
    assert torch.equal(velocity(x, t, state=out.state), out.sample)


# What every network here does.


@pytest.mark.parametrize("n", [1, 3])
def test_shapes_and_times(n):
    x, _, y = inputs(n)
    net = build(**CLASSES)
    out = net(x, torch.full((n,), 0.3), y).sample
    assert out.shape == x.shape and out.isfinite().all() and out.std() > 1e-3
    torch.testing.assert_close(net(x, 0.3, y).sample, out, atol=1e-5, rtol=1e-4)
    assert torch.equal(net(x, torch.full((n,), 0.3), y, return_dict=False)[0], out)
    assert not torch.allclose(net(x, 0.8, y).sample, out, atol=1e-4)


def test_samples_do_not_mix():
    x, t, y = inputs()
    net = build(**CLASSES)
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1], y[i : i + 1]).sample for i in range(3)])
    torch.testing.assert_close(net(x, t, y).sample, alone, atol=1e-5, rtol=1e-4)


def test_saved_and_loaded_is_bit_equal(tmp_path):
    x, t, y = inputs()
    net = build(**CLASSES)
    net.save_pretrained(tmp_path)
    want = net(x, t, y).sample
    assert torch.equal(DDT.from_pretrained(tmp_path)(x, t, y).sample, want)
    assert torch.equal(from_diffusers(tmp_path)(x, t, class_labels=y), want)


def test_gradient_checkpointing_changes_nothing():
    x, t, y = inputs()
    net = build(**CLASSES).train()

    def gradients():
        torch.manual_seed(3)
        net.zero_grad()
        net(x, t, y).sample.square().mean().backward()
        return {key: p.grad.clone() for key, p in net.named_parameters()}

    plain = gradients()
    net.enable_gradient_checkpointing()
    saved = gradients()
    for key in plain:
        torch.testing.assert_close(saved[key], plain[key])


def test_classes():
    x, t, y = inputs()
    net = build(**CLASSES)
    out = net(x, t, y).sample
    assert not torch.allclose(net(x, t, (y + 1) % 5).sample, out, atol=1e-4)
    null = net(x, t, torch.full((3,), 5)).sample
    torch.testing.assert_close(net(x, t).sample, null, atol=1e-5, rtol=1e-4)
    with pytest.raises(FlowkitError, match="no null class"):
        build(num_classes=5, label_dropout=0.0)(x, t)
    with pytest.raises(FlowkitError, match="without classes"):
        build()(x, t, y)


def test_fused_attention_is_the_same():
    x, t, _ = inputs()
    net = build()
    want = net(x, t).sample
    net.fuse_qkv_projections()
    assert net.encoder_blocks[0].attn.fused_projections
    torch.testing.assert_close(net(x, t).sample, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype, within", [(torch.bfloat16, 0.1), (torch.float64, 1e-5)])
def test_other_dtypes_run(dtype, within):
    x, t, y = inputs()
    net = build(**CLASSES)
    want = net(x, t, y).sample
    got = net.to(dtype)(x.to(dtype), t, y)
    assert got.sample.dtype == got.state.dtype == dtype
    assert (got.sample.float() - want).norm() < within * want.norm()


def test_other_sizes_that_patches_divide():
    net, t = build(), torch.tensor(0.5)
    x = torch.randn(2, 3, 6, 10)
    wide = build(sample_size=(6, 10))
    assert torch.equal(wide(x, t).sample, net(x, t).sample)
    with pytest.raises(FlowkitError, match="7 x 8"):
        net(torch.randn(2, 3, 7, 8), t)
    with pytest.raises(FlowkitError, match="multiples of the patch"):
        build(sample_size=9)
    for heads in (3, 8):
        with pytest.raises(FlowkitError, match="4 times its number of heads"):
            build(num_heads=heads)
