"""A tiny teacher, student and critic for distribution matching, the same weights at every call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowkit.adapters import FlowVelocity
from flowkit.nets.mlp import MLP
from flowkit.samplers.timesteps import density
from flowkit.trainers.discriminator import Critic, middle_layers
from flowkit.trainers.distribution_matching import DistributionMatching
from flowkit.trainers.dmd_settings import CriticOptions, GANOptions, MatchingOptions
from flowkit.trainers.settings import TrainOptions

NO_GAN = GANOptions(weight=0.0, critic_weight=0.0)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(seed: int = 0, **options: Any) -> FlowVelocity:
    torch.manual_seed(seed)
    net = MLP(**{"shape": [1, 8, 8], "width": 16, "num_blocks": 1, **options})
    nn.init.normal_(net.proj_out.weight, std=0.1)  # it starts as zero, and would hide mistakes
    return FlowVelocity(net)


def method(
    *,
    matching: MatchingOptions | None = None,
    critic: CriticOptions | None = None,
    gan: GANOptions | None = None,
    training: TrainOptions | None = None,
) -> DistributionMatching:
    """All three for 8 x 8 pictures; whole batches of noise levels are uniform."""
    gan = gan or GANOptions(weight=0.1, critic_weight=0.1)
    teacher = mlp(0).eval().requires_grad_(False)
    layers = middle_layers(teacher.net) if gan.critic_weight else []
    fake, student = mlp(1), mlp(2)
    torch.manual_seed(3)
    judge = Critic(fake, teacher, layers=layers, features=gan.features, shape=[1, 8, 8])
    return DistributionMatching(
        student,
        teacher,
        judge,
        training or TrainOptions(warmup_steps=0),
        times=density("uniform"),
        critic_times=density("uniform"),
        gan_times=density("uniform"),
        matching=matching or MatchingOptions(),
        critic_options=critic or CriticOptions(),
        gan=gan,
        frozen={"teacher": teacher},
    )
