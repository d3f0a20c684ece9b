"""Converted weights compute what the published networks define.

The references are written from the papers: each asks a store for its weights by the official names,
which fixes names, shapes and arithmetic at once, and never touches flowkit's networks.
"""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from flowkit.adapters import from_diffusers
from flowkit.convert import load_edm, main
from flowkit.errors import FlowkitError
from flowkit.files import read_json
from flowkit.nets.adm import ADM
from flowkit.nets.ncsnpp import NCSNpp


class Store(dict):
    """Random weights, made in the order in which a network asks for them."""

    def get_or_make(self, name, *shape):
        if name not in self:
            scale = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.3
            self[name] = torch.randn(shape, dtype=torch.float32) * scale
        return self[name].double()

    def conv(self, name, h, out, size=3):
        weight = self.get_or_make(f"{name}.weight", out, h.shape[1], size, size)
        return F.conv2d(h, weight, self.get_or_make(f"{name}.bias", out), padding=size // 2)

    def linear(self, name, h, out, bias=True):
        weight = self.get_or_make(f"{name}.weight", out, h.shape[1])
        return F.linear(h, weight, self.get_or_make(f"{name}.bias", out) if bias else None)

    def norm(self, name, h, eps):
        c = h.shape[1]
        weight, bias = self.get_or_make(f"{name}.weight", c), self.get_or_make(f"{name}.bias", c)
        return F.group_norm(h, min(32, c // 4), weight, bias, eps)


def kernel(taps):
    line = torch.tensor(taps, dtype=torch.float64)
    return torch.outer(line, line) / line.sum() ** 2


def upsample(h, taps):
    """Zeros between the pixels, then the filter with gain 4."""
    b, c, height, width = h.shape
    wide = torch.zeros(b, c, 2 * height, 2 * width, dtype=h.dtype)
    wide[:, :, ::2, ::2] = h
    n = len(taps)
    wide = F.pad(wide, (n // 2, (n - 1) // 2) * 2)
    return 4 * F.conv2d(wide.flatten(0, 1)[:, None], kernel(taps)[None, None]).view(
        b, c, 2 * height, 2 * width
    )


def downsample(h, taps):
    b, c, height, width = h.shape
    h = F.pad(h, ((len(taps) - 1) // 2,) * 4)
    rows = F.conv2d(h.flatten(0, 1)[:, None], kernel(taps)[None, None])[:, :, ::2, ::2]
    return rows.view(b, c, height // 2, width // 2)


def attend(q, k, v):
    """q, k, v: (B, channels, tokens)."""
    weights = torch.einsum("bcq,bck->bqk", q, k / math.sqrt(q.shape[1])).softmax(dim=2)
    return torch.einsum("bqk,bck->bcq", weights, v)


def sines(c, num, endpoint):
    half = num // 2
    omega = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / (half - endpoint))
    angle = c[:, None] * omega
    return angle.sin(), angle.cos()


def edm_block(p, name, h, emb, out, *, adm, taps, mode=None, heads=0):
    eps, scale = (1e-5, 1.0) if adm else (1e-6, math.sqrt(0.5))
    change = {"up": upsample, "down": downsample, None: lambda h, _: h}[mode]
    if mode:
        for where in ("conv0", "skip"):
            p[f"{name}.{where}.resample_filter"] = kernel(taps).float()[None, None]
    branch = p.conv(f"{name}.conv0", change(F.silu(p.norm(f"{name}.norm0", h, eps)), taps), out)
    rows = p.linear(f"{name}.affine", emb, out * (1 + adm))[:, :, None, None]
    if adm:
        gain, shift = rows.chunk(2, 1)
        branch = F.silu(shift + p.norm(f"{name}.norm1", branch, eps) * (gain + 1))
    else:
        branch = F.silu(p.norm(f"{name}.norm1", branch + rows, eps))
    branch = p.conv(f"{name}.conv1", branch, out)
    skip = change(h, taps)
    if out != h.shape[1] or (mode and not adm):
        skip = p.conv(f"{name}.skip", skip, out, 1)
    h = (branch + skip) * scale
    if heads:
        qkv = p.conv(f"{name}.qkv", p.norm(f"{name}.norm2", h, eps), 3 * out, 1)
        q, k, v = qkv.reshape(len(h) * heads, out // heads, 3, -1).unbind(2)
        h = (h + p.conv(f"{name}.proj", attend(q, k, v).reshape(h.shape), out, 1)) * scale
    return h


def edm_song(p, x, c, y=None, *, mult, blocks, attended, residual, skip, taps, fourier, width=8):
    noise = 2 * width if fourier else width
    if fourier:
        freqs = p.get_or_make("map_noise.freqs", noise // 2)
        angle = c[:, None] * 2 * math.pi * freqs
        emb = torch.cat((angle.sin(), angle.cos()), 1)
    else:
        emb = torch.cat(sines(c, noise, True), 1)
    if y is not None:
        emb = emb + p.linear("map_label", y * math.sqrt(y.shape[1]), noise)
    p.get_or_make("map_augment.weight", noise, 9)
    emb = F.silu(p.linear("map_layer0", emb, 4 * width))
    emb = F.silu(p.linear("map_layer1", emb, 4 * width))

    def block(name, h, out, mode=None, heads=0):
        return edm_block(p, name, h, emb, out, adm=False, taps=taps, mode=mode, heads=heads)

    res, aux = x.shape[-1], x
    h = p.conv(f"enc.{res}x{res}_conv", x, width)
    skips = [h]
    for level, m in enumerate(mult):
        r = res >> level
        if level:
            h = block(f"enc.{r}x{r}_down", h, h.shape[1], "down")
            if residual:
                name = f"enc.{r}x{r}_aux_residual"
                p[f"{name}.resample_filter"] = kernel(taps).float()[None, None]
                # filter first, on a border wide enough for both: equal to any other order
                border = 1 + (len(taps) - 1) // 2
                weight = p.get_or_make(f"{name}.weight", h.shape[1], aux.shape[1], 3, 3)
                wide = F.pad(aux, (border,) * 4)
                rows = F.conv2d(wide.flatten(0, 1)[:, None], kernel(taps)[None, None])
                rows = rows.view(*aux.shape[:2], *rows.shape[-2:])
                aux = F.conv2d(rows, weight, p.get_or_make(f"{name}.bias", h.shape[1]), stride=2)
                h = aux = (h + aux) / math.sqrt(2)
            skips.append(h)
        for i in range(blocks):
            h = block(f"enc.{r}x{r}_block{i}", h, width * m, heads=int(r in attended))
            skips.append(h)
    h = block(f"dec.{r}x{r}_in0", h, h.shape[1], heads=1)
    h = block(f"dec.{r}x{r}_in1", h, h.shape[1])
    out = None
    for level, m in reversed(list(enumerate(mult))):
        r = res >> level
        if level < len(mult) - 1:
            h = block(f"dec.{r}x{r}_up", h, h.shape[1], "up")
        for i in range(blocks + 1):
            heads = int(i == blocks and r in attended)
            h = torch.cat((h, skips.pop()), 1)
            h = block(f"dec.{r}x{r}_block{i}", h, width * m, heads=heads)
        if skip or not level:
            if out is not None:
                p[f"dec.{r}x{r}_aux_up.resample_filter"] = kernel(taps).float()[None, None]
            top = F.silu(p.norm(f"dec.{r}x{r}_aux_norm", h, 1e-6))
            top = p.conv(f"dec.{r}x{r}_aux_conv", top, x.shape[1])
            out = top if out is None else upsample(out, taps) + top
    return out


def edm_adm(p, x, c, y, *, mult, blocks, attended, width):
    sin, cos = sines(c, width, False)
    emb = F.silu(p.linear("map_layer0", torch.cat((cos, sin), 1), 4 * width))
    emb = p.linear("map_layer1", emb, 4 * width)
    emb = F.silu(emb + p.linear("map_label", y, 4 * width, bias=False))

    def block(name, h, out, mode=None, attention=False):
        heads = out // 64 if attention else 0
        return edm_block(p, name, h, emb, out, adm=True, taps=(1, 1), mode=mode, heads=heads)

    res = x.shape[-1]
    h = p.conv(f"enc.{res}x{res}_conv", x, width * mult[0])
    skips = [h]
    for level, m in enumerate(mult):
        r = res >> level
        if level:
            h = block(f"enc.{r}x{r}_down", h, h.shape[1], "down")
            skips.append(h)
        for i in range(blocks):
            h = block(f"enc.{r}x{r}_block{i}", h, width * m, attention=r in attended)
            skips.append(h)
    h = block(f"dec.{r}x{r}_in0", h, h.shape[1], attention=True)
    h = block(f"dec.{r}x{r}_in1", h, h.shape[1])
    for level, m in reversed(list(enumerate(mult))):
        r = res >> level
        if level < len(mult) - 1:
            h = block(f"dec.{r}x{r}_up", h, h.shape[1], "up")
        for i in range(blocks + 1):
            h = torch.cat((h, skips.pop()), 1)
            h = block(f"dec.{r}x{r}_block{i}", h, width * m, attention=r in attended)
    return p.conv("out_conv", F.silu(p.norm("out_norm", h, 1e-5)), x.shape[1])


DDPMPP = {"residual": False, "skip": False, "taps": (1, 1), "fourier": False}
NCSNPP = {"residual": True, "skip": False, "taps": (1, 3, 3, 1), "fourier": True}
SKIP = {"residual": True, "skip": True, "taps": (1, 3, 3, 1), "fourier": True}
SMALL = {"mult": (1, 2, 2), "blocks": 2, "attended": (4,)}


@pytest.fixture
def batch():
    torch.manual_seed(0)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    return x, torch.rand(3, dtype=torch.float64)


def close(net, x, c, reference, labels=None):
    out = net.double()(x, c, labels).sample
    assert reference.std() > 0.05
    torch.testing.assert_close(out, reference, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("options", [DDPMPP, NCSNPP, SKIP, DDPMPP | {"skip": True}])
@pytest.mark.parametrize("conditional", [False, True])
def test_edm_song(batch, options, conditional):
    x, c = batch
    labels = torch.tensor([0, 4, 2]) if conditional else None
    one_hot = F.one_hot(labels, 5).double() if conditional else None
    store = Store()
    reference = edm_song(store, x, c, one_hot, **SMALL, **options)
    net = load_edm({f"model.{key}": value for key, value in store.items()})
    assert isinstance(net, NCSNpp) and not net.training
    assert net.config.num_classes == (5 if conditional else None)
    assert net.config.augment_dim == 9
    close(net, x, c, reference, labels)


def test_edm_adm(batch):
    x, c = batch
    labels = torch.tensor([0, 4, 2])
    store = Store()
    shape = {"mult": (1, 2), "blocks": 1, "attended": (4,), "width": 64}
    reference = edm_adm(store, x, c, F.one_hot(labels, 5).double(), **shape)
    net = load_edm(dict(store))
    assert isinstance(net, ADM)
    assert [b.attn.heads for b in net.res_blocks() if b.attn] == [2] * 4
    close(net, x, c, reference, labels)


@pytest.fixture
def edm_state(batch):
    store = Store()
    edm_song(store, *batch, **SMALL, **DDPMPP)
    return dict(store)


def test_files_agree(edm_state, tmp_path):
    save_file(edm_state, tmp_path / "net.safetensors")
    torch.save({"ema": edm_state}, tmp_path / "net.pt")
    for name in ("net.safetensors", "net.pt"):
        new = load_edm(tmp_path / name, dropout=0.2).state_dict()
        want = load_edm(edm_state).state_dict()
        assert all(torch.equal(new[key], want[key]) for key in want)


def test_names_are_checked(edm_state):
    lost = {key: value for key, value in edm_state.items() if "in1.conv1.bias" not in key}
    with pytest.raises(FlowkitError, match=r"missing: dec\.2x2_in1\.conv1\.bias"):
        load_edm(lost)
    with pytest.raises(FlowkitError, match="unknown: enc.8x8_block0.extra"):
        load_edm(edm_state | {"enc.8x8_block0.extra": torch.zeros(1)})
    with pytest.raises(FlowkitError, match="of another shape: map_layer1.bias"):
        load_edm(edm_state | {"map_layer1.bias": torch.zeros(1)})
    with pytest.raises(FlowkitError, match="not a state dict of an EDM network"):
        load_edm({"weight": torch.zeros(1)})


def test_pickled_networks_are_refused(tmp_path):
    """Neither by name nor by content does a pickle run; the message says how to export."""
    (tmp_path / "net.pkl").write_bytes(pickle.dumps({"ema": torch.nn.Linear(1, 1)}))
    torch.save(torch.nn.Linear(1, 1), tmp_path / "net.pth")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"ema": torch.nn.Linear(1, 1)}))
    for name in ("net.pkl", "net.pth", "plain.pt"):
        with pytest.raises(FlowkitError, match="save_file") as caught:
            load_edm(tmp_path / name)
        assert "\n" not in str(caught.value)
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    whole = (tmp_path / "net.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    for name in ("cut.safetensors", "cut.pth", "absent.pth"):
        with pytest.raises(FlowkitError, match=name):
            load_edm(tmp_path / name)


def test_augmentation_can_be_left_out(edm_state, batch):
    x, c = batch
    whole, bare = load_edm(edm_state), load_edm(edm_state, augmentation=False)
    assert whole.num_parameters() - bare.num_parameters() == 9 * 8
    assert bare.config.augment_dim == 0
    assert torch.equal(whole(x.float(), c.float()).sample, bare(x.float(), c.float()).sample)


def test_command_edm(batch, tmp_path):
    """FILE -> folder -> velocity, against EDM's preconditioning around the reference network."""
    x, _ = batch
    store = Store()
    t = torch.tensor([0.03, 0.4, 0.9], dtype=torch.float64)
    wide, sigma = t[:, None, None, None], (1 - t) / t
    power = (sigma**2 + 0.25)[:, None, None, None]
    labels = torch.tensor([0, 4, 2])
    one_hot, y = F.one_hot(labels, 5).double(), x / wide
    output = edm_song(store, y / power.sqrt(), sigma.log() / 4, one_hot, **SMALL, **NCSNPP)
    denoised = 0.25 / power * y + 0.5 * sigma[:, None, None, None] / power.sqrt() * output
    save_file({f"model.{key}": value for key, value in store.items()}, tmp_path / "net.safetensors")
    main(["edm", str(tmp_path / "net.safetensors"), str(tmp_path / "flow")])
    record = read_json(tmp_path / "flow" / "flowkit.json")
    assert (record["shape"], record["num_classes"]) == ([3, 8, 8], 5)
    velocity = from_diffusers(tmp_path / "flow").eval().double()
    with torch.no_grad():
        v = velocity(x, t, class_labels=labels)
    torch.testing.assert_close(v, (denoised - x) / (1 - wide), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options, expected",
    [
        ([], {"kind": "edm", "sigma_min": 0.002, "sigma_max": 80.0}),
        (["--kind", "vp"], {"kind": "vp", "sigma_min": 0.001, "sigma_max": 152.0}),
        (["--kind", "ve", "--sigma-max", "50"], {"kind": "ve", "sigma_max": 50.0}),
    ],
)
def test_command_takes_the_preconditioning(edm_state, tmp_path, options, expected):
    save_file(edm_state, tmp_path / "net.safetensors")
    main(["edm", str(tmp_path / "net.safetensors"), str(tmp_path / "flow"), *options])
    description = from_diffusers(tmp_path / "flow").description()
    assert description["adapter"] == "preconditioned" and expected.items() <= description.items()
