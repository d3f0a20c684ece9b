"""The discriminator's heads: every kind of network, every shape of features, layers by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_distillation import draw, mlp
from torch import nn

from flowkit.adapters import FlowVelocity
from flowkit.errors import FlowkitError
from flowkit.nets import ADM, DiT
from flowkit.nets.mlp import MLP
from flowkit.trainers.discriminator import Critic, Head, Points, middle_layers

NETS = {
    "mlp": lambda: MLP(shape=[3, 16, 16], width=16, num_blocks=3),
    "dit": lambda: DiT(16, 4, 3, hidden_size=32, num_layers=3, num_heads=2),
    "adm": lambda: ADM(
        sample_size=16, in_channels=3, out_channels=3, model_channels=32, num_blocks=1
    ),
}


SHAPES = [(2, 64, 8, 8), (2, 48, 4, 4), (2, 20, 3, 3), (2, 8, 1, 1), (2, 9, 16), (2, 16), (2, 34)]


class TestDiscriminator:
    @pytest.mark.parametrize("name", NETS)
    @pytest.mark.parametrize("features", ["fake", "teacher"])
    def test_it_reads_every_kind_of_network(self, name: str, features: Any) -> None:
        teacher, fake = FlowVelocity(NETS[name]()), FlowVelocity(NETS[name]())
        layers = middle_layers(teacher.net)
        critic = Critic(fake, teacher, layers=layers, features=features, shape=[3, 16, 16])
        t = torch.tensor([0.2, 0.5, 0.9])
        asked, judged = (Points(draw(3, 3, 16, 16, seed=s), t, {}) for s in (0, 1))
        velocity, logits = critic(asked, judged)
        assert velocity.shape == (3, 3, 16, 16) and logits.shape == (3, 1)
        torch.testing.assert_close(velocity, fake(asked.x_t, t), rtol=1e-4, atol=1e-5)
        _, alone = critic(None, judged)
        torch.testing.assert_close(alone, logits, rtol=1e-4, atol=1e-5)
        _, same = critic(judged, judged)
        torch.testing.assert_close(same, logits, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_a_head_takes_features_of_every_shape(self, shape: tuple[int, ...]) -> None:
        head = Head(shape)
        feature = draw(*shape).requires_grad_(True)
        logits = head(feature)
        assert logits.shape == (2, 1)
        logits.sum().backward()
        assert feature.grad.abs().amin(tuple(range(1, feature.ndim))).max() > 0
        assert all(p.grad.abs().sum() > 0 for p in head.parameters())

    def test_dmd2s_head_on_its_own_bottleneck(self) -> None:
        head = Head((1, 768, 8, 8))
        kernels = [layer.kernel_size for layer in head.layers]
        assert kernels == [(4, 4), (4, 4), (1, 1)]
        assert [n.num_groups for n in head.norms] == [32, 32]

    def test_several_layers_several_logits(self) -> None:
        teacher, fake = (FlowVelocity(NETS["dit"]()) for _ in range(2))
        layers = ["blocks.0", "blocks.2"]
        critic = Critic(fake, teacher, layers=layers, features="fake", shape=[3, 16, 16])
        points = Points(draw(2, 3, 16, 16), torch.tensor([0.5, 0.5]), {})
        assert critic(None, points)[1].shape == (2, 2)

    def test_a_layer_that_is_not_there_is_named(self) -> None:
        model = mlp()
        with pytest.raises(FlowkitError, match=r"MLP has no layer 'blocks.7'; its layers: .*proj"):
            Critic(model, model, layers=["blocks.7"], features="fake", shape=[1, 8, 8])
        with pytest.raises(FlowkitError, match="Linear has no bottleneck .* gan.layers"):
            middle_layers(nn.Linear(2, 2))
