"""Reflow of a known flow: eight Gaussians on a ring, whose velocity has a closed form."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowkit.adapters import FlowVelocity
from flowkit.coupling import Paired
from flowkit.eval import straightness
from flowkit.losses import premetric
from flowkit.nets.mlp import MLP
from flowkit.noise import keyed_noise
from flowkit.samplers import sample
from flowkit.samplers.grids import uniform
from flowkit.samplers.timesteps import density
from flowkit.trainers.launch import make_accelerator
from flowkit.trainers.loop import Loop
from flowkit.trainers.matching import FlowMatching
from flowkit.trainers.settings import RunOptions, TrainOptions

STD = 0.2
ANGLES = torch.arange(8, dtype=torch.float64) * math.pi / 4
CENTRES = 3 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


def _gaussians(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Responsibilities (B, 8) and velocities (B, 8, 2) of the components at x (B, 2)."""
    g = t * t * STD**2 + (1 - t) ** 2
    centres = CENTRES.to(x.dtype)
    away = x[:, None] - t * centres
    weights = torch.softmax(-away.square().sum(-1) / (2 * g), 1)
    return weights, centres + (t * STD**2 - (1 - t)) / g * away


def _velocity(x: Tensor, t: float) -> Tensor:
    """The exact 1-rectified flow."""
    weights, velocities = _gaussians(x, t)
    return (weights[..., None] * velocities).sum(1)


class RingPairs:
    """Pairs of the exact flow's ODE."""

    shape = (2, 1, 1)

    def __init__(self, count: int) -> None:
        noise = keyed_noise(0, range(count), (2,))
        data = sample(_velocity, noise, uniform(50), solver="rk4").x
        self.rows = {"noise": noise[..., None, None], "data": data[..., None, None]}

    def __len__(self) -> int:
        return len(self.rows["data"])

    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        return {name: rows[indices] for name, rows in self.rows.items()}


def test_the_exact_flow_obeys_the_transport_identity() -> None:
    """E|data - noise|^2 - E|Z_1 - Z_0|^2 = S + V, V = int E|data - noise - v|^2 dt (Liu et al.,
    2022, arXiv:2209.03003, eq. 13)."""
    generator = torch.Generator().manual_seed(0)
    count = 40_000
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    data = CENTRES[torch.randint(8, (count,), generator=generator)]
    data = data + STD * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    t = torch.rand(count, generator=generator, dtype=torch.float64).sort().values
    spread = torch.stack(
        [
            (y - z - _velocity(((1 - s) * z + s * y)[None], float(s))[0]).square().sum()
            for z, y, s in zip(noise[::40], data[::40], t[::40], strict=True)
        ]
    ).mean()
    moved = (sample(_velocity, noise, uniform(100)).x - noise).square().sum(1).mean()
    lost = (data - noise).square().sum(1).mean() - moved
    s = straightness(_velocity, noise[:5000], num_steps=200).total
    assert s == pytest.approx(2.18, abs=0.1)
    assert float(lost) == pytest.approx(s + float(spread), rel=0.1)


def test_reflow_straightens_the_ring(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FlowVelocity(MLP(shape=[2, 1, 1], width=64, num_blocks=2))
    method = FlowMatching(model, density("u_shaped"), premetric("squared"))
    run = RunOptions(sample_every=0)
    training = TrainOptions(steps=1200, batch_size=256, learning_rate=3e-3, lr_schedule="linear")
    loop = Loop(
        method,
        Paired(RingPairs(10_000)),
        replace(training, warmup_steps=50, ema_decay=0.99),
        run,
        folder=tmp_path,
        accelerator=make_accelerator(run),
        name="ring",
    )
    student = loop.run()
    noise = keyed_noise(1, range(2000), (2,))
    before = straightness(_velocity, noise).total
    after = straightness(student, noise[..., None, None]).total
    ends = sample(student, noise[..., None, None], uniform(1)).x.flatten(1)
    to_centre = torch.cdist(ends, CENTRES.float()).min(1).values.mean()
    assert after < 0.1 * before
    assert to_centre < 0.8
