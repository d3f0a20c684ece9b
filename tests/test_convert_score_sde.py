"""Weights of score_sde compute what its NCSN++ and DDPM++ define.

The reference is written from Song et al., 2021, arXiv:2011.13456: it asks a store for its weights
by the official names, which fixes names, shapes and arithmetic at once.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from flowkit.convert import load_score_sde
from flowkit.errors import FlowkitError


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


def sines(c, num):
    half = num // 2
    omega = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / (half - 1))
    angle = c[:, None] * omega
    return torch.cat((angle.sin(), angle.cos()), 1)


class Numbered:
    """score_sde's all_modules: each next one is asked for by calling this."""

    def __init__(self, store):
        self.store, self.number = store, -1

    def __call__(self):
        self.number += 1
        return f"all_modules.{self.number}"


def score_sde(p, x, c, *, mult, blocks, attended, residual, skip, taps, fourier, width=8):
    module = Numbered(p)
    if fourier:
        angle = c[:, None] * p.get_or_make(f"{module()}.W", width) * 2 * math.pi
        emb = torch.cat((angle.sin(), angle.cos()), 1)
    else:
        emb = sines(c, width)
    emb = F.silu(p.linear(module(), emb, 4 * width))
    emb = F.silu(p.linear(module(), emb, 4 * width))

    def block(h, out, mode=None):
        name = module()
        change = {"up": upsample, "down": downsample, None: lambda h, _: h}[mode]
        branch = change(F.silu(p.norm(f"{name}.GroupNorm_0", h, 1e-6)), taps)
        branch = p.conv(f"{name}.Conv_0", branch, out)
        branch = branch + p.linear(f"{name}.Dense_0", emb, out)[:, :, None, None]
        branch = p.conv(f"{name}.Conv_1", F.silu(p.norm(f"{name}.GroupNorm_1", branch, 1e-6)), out)
        h = change(h, taps)
        if mode or out != h.shape[1]:
            h = p.conv(f"{name}.Conv_2", h, out, 1)
        return (h + branch) / math.sqrt(2)

    def attention(h):
        name, width = module(), h.shape[1]

        def nin(i, rows):
            weight = p.get_or_make(f"{name}.NIN_{i}.W", width, width)
            bias = p.get_or_make(f"{name}.NIN_{i}.b", width)
            return torch.einsum("bcn,cd->bdn", rows, weight) + bias[:, None]

        normed = p.norm(f"{name}.GroupNorm_0", h, 1e-6).flatten(2)
        rows = attend(nin(0, normed), nin(1, normed), nin(2, normed))
        return (h + nin(3, rows).reshape(h.shape)) / math.sqrt(2)

    h, aux = p.conv(module(), x, width), x
    skips = [h]
    for level, m in enumerate(mult):
        for _ in range(blocks):
            h = block(h, width * m)
            h = attention(h) if x.shape[-1] >> level in attended else h
            skips.append(h)
        if level < len(mult) - 1:
            h = block(h, h.shape[1], "down")
            if residual:
                name, border = f"{module()}.Conv2d_0", 1 + (len(taps) - 1) // 2
                weight = p.get_or_make(f"{name}.weight", h.shape[1], aux.shape[1], 3, 3)
                wide = F.pad(aux, (border,) * 4)
                rows = F.conv2d(wide.flatten(0, 1)[:, None], kernel(taps)[None, None])
                rows = rows.view(*aux.shape[:2], *rows.shape[-2:])
                aux = F.conv2d(rows, weight, p.get_or_make(f"{name}.bias", h.shape[1]), stride=2)
                h = aux = (h + aux) / math.sqrt(2)
            skips.append(h)
    h = block(attention(block(h, h.shape[1])), h.shape[1])
    out = None
    for level, m in reversed(list(enumerate(mult))):
        for _ in range(blocks + 1):
            h = block(torch.cat((h, skips.pop()), 1), width * m)
        h = attention(h) if x.shape[-1] >> level in attended else h
        if skip or not level:
            top = F.silu(p.norm(module(), h, 1e-6))
            top = p.conv(module(), top, x.shape[1])
            out = top if out is None else upsample(out, taps) + top
        if level:
            h = block(h, h.shape[1], "up")
    return out


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


@pytest.mark.parametrize("options", [DDPMPP, NCSNPP, SKIP])
@pytest.mark.parametrize("mult, attended", [((1, 2, 2), (4,)), ((2,), (8,)), ((1, 2), (8, 4))])
def test_score_sde(batch, options, mult, attended):
    x, c = batch
    store = Store(sigmas=torch.rand(10))
    reference = score_sde(store, x, c, mult=mult, blocks=1, attended=attended, **options)
    net = load_score_sde({f"module.{key}": value for key, value in store.items()}, 8)
    close(net, x, c, reference)


def test_score_sde_takes_the_average(batch, tmp_path):
    """EMA weights come as a list without names; the Fourier frequencies are not among them."""
    x, c = batch
    store, average = Store(), Store()
    score_sde(store, x, c, **SMALL, **NCSNPP)
    average["all_modules.0.W"] = store["all_modules.0.W"]
    reference = score_sde(average, x, c, **SMALL, **NCSNPP)
    order = [key for key in store if not key.endswith(".0.W")]
    shadow = [average[key] for key in order]
    path = tmp_path / "checkpoint_8.pth"
    torch.save({"model": dict(store), "ema": {"shadow_params": shadow}, "step": 3}, path)
    close(load_score_sde(path, 8), x, c, reference)
    plain = load_score_sde(path, 8, ema=False)
    assert torch.equal(plain.conv_in.weight, store["all_modules.3.weight"])
    torch.save({"model": dict(store), "ema": {"shadow_params": shadow[1:]}}, path)
    with pytest.raises(FlowkitError, match="does not match"):
        load_score_sde(path, 8)


def test_score_sde_names_are_checked(batch):
    store = Store()
    score_sde(store, *batch, **SMALL, **DDPMPP)
    gone = {key: value for key, value in store.items() if ".5." not in key}
    with pytest.raises(FlowkitError, match=r"all_modules\.5 \(missing\)"):
        load_score_sde(gone, 8)
    del store["all_modules.4.Dense_0.bias"]
    with pytest.raises(FlowkitError, match="missing: all_modules.4.Dense_0.bias"):
        load_score_sde(store, 8)
    with pytest.raises(FlowkitError, match="not a state dict of score_sde"):
        load_score_sde({"weight": torch.zeros(1)}, 8)
