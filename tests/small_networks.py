"""Networks that are evaluated in no time, for tests of what is put around a network."""

from __future__ import annotations

import torch
from torch import nn

from flowkit.nets import DiT


def randomised(net, seed=0):
    """Weights that are nowhere zero."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        std = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
        nn.init.normal_(p, std=std, generator=generator)
    return net.eval()


def dit(**options):
    return randomised(DiT(8, 2, 1, hidden_size=32, num_layers=3, num_heads=2, **options))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(x, reference):
    return ((x - reference).norm() / reference.norm()).item()


class Blocks(nn.Module):
    """A network of a user: blocks in a list, a time argument, and a head."""

    def __init__(self, blocks, head=lambda h, outputs: h):
        super().__init__()
        self.stages = nn.ModuleList(blocks)
        self.head = head

    def forward(self, x, t):
        h, outputs = x, []
        for block in self.stages:
            h = block(h, t)
            outputs.append(h)
        return self.head(h, outputs)


class Moving(nn.Module):
    """h + a + b t + c t^2: features that are polynomials in t; it counts how often it ran."""

    def __init__(self, coefficients):
        super().__init__()
        self.coefficients = nn.Parameter(torch.tensor(coefficients))
        self.runs = 0

    def forward(self, h, t):
        self.runs += 1
        return h + sum(c * t**k for k, c in enumerate(self.coefficients))


def moving(degree, count=3, **options):
    rows = [[0.3 * i + 0.1, 0.5 - i, 0.7 * i, 1.1][: degree + 1] for i in range(count)]
    return Blocks([Moving(row) for row in rows], **options)
