"""The two-step term of flow-guided distillation: closed forms, gradients, conditioning."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowkit.coupling import Batch
from flowkit.errors import FlowkitError
from flowkit.losses import FeatureDistance, Perceptual, Squared
from flowkit.samplers.timesteps import Constant, Curriculum
from flowkit.trainers.guided_distillation import GuidedDistillation

SHAPE = (1, 8, 8)


class Lines(nn.Module):
    """The velocity of the straight paths from noise z to shift + scale z, exact at every time."""

    def __init__(self, shift: float, scale: float) -> None:
        super().__init__()
        self.shift, self.scale = (nn.Parameter(torch.tensor(value)) for value in (shift, scale))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        t = t.reshape(-1, 1, 1, 1)
        noise = (x_t - t * self.shift) / (1 - t + t * self.scale)
        return self.shift + (self.scale - 1) * noise


class Bends(nn.Module):
    """A velocity of no straight path: a x + b t."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(value)) for value in (a, b))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.a * x_t + self.b * t.reshape(-1, 1, 1, 1)


def distillation(model: Any, flow: Any, **options: Any) -> GuidedDistillation:
    premetric = options.pop("premetric", Squared())
    return GuidedDistillation(model, Constant(0.0), premetric, flow=flow, **options)


def pairs_of(velocity: nn.Module) -> Batch:
    noise = torch.randn(50, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return Batch(noise, noise + velocity(noise, torch.zeros(50)))


class TestTwoSteps:
    @pytest.mark.parametrize("first", ["student", "teacher"])
    def test_closed_form(self, first: str) -> None:
        """For v = a x + b t; both published forms, the squared distance."""
        student, flow = Bends(-0.7, 0.3), Bends(-1.1, 0.4)
        method = distillation(student, flow, first=first, between=(0.2, 0.8))
        batch = pairs_of(flow)
        torch.manual_seed(3)
        found = method.loss(batch)
        torch.manual_seed(3)
        method.times.sample(50)
        noise, s = torch.randn(50, *SHAPE), 0.2 + 0.6 * torch.rand(50).reshape(-1, 1, 1, 1)
        v = (-0.7 if first == "student" else -1.1) * noise
        target = s * v + (1 - s) * (-1.1 * (noise + s * v) + 0.4 * s)
        two_step = (-0.7 * noise - target).square().mean()
        direct = (-0.7 * batch.noise - (batch.data - batch.noise)).square().mean()
        torch.testing.assert_close(found.logs["two_step"], two_step)
        torch.testing.assert_close(found.logs["direct"], direct)
        torch.testing.assert_close(found.value, direct + two_step)

    def test_of_features_it_compares_pictures(self) -> None:
        """A perceptual distance sees noise + v of both sides."""
        student, flow = Bends(-0.7, 0.3), Bends(-1.1, 0.4)
        features = nn.Conv2d(1, 3, 3, bias=False)
        distance = FeatureDistance(features, size=16)
        method = distillation(student, flow, premetric=Perceptual(distance), weight=0.5)
        batch = pairs_of(flow)
        torch.manual_seed(3)
        found = method.loss(batch)
        torch.manual_seed(3)
        method.times.sample(50)
        noise, s = torch.randn(50, *SHAPE), 0.2 + 0.6 * torch.rand(50).reshape(-1, 1, 1, 1)
        v = -0.7 * noise
        target = noise + s * v + (1 - s) * (-1.1 * (noise + s * v) + 0.4 * s)
        direct = distance(0.3 * batch.noise, batch.data).mean()
        torch.testing.assert_close(
            found.value, direct + 0.5 * distance(0.3 * noise, target).mean(), atol=1e-6, rtol=1e-5
        )

    @pytest.mark.parametrize("first", ["student", "teacher"])
    def test_of_a_straight_flow_it_is_nothing(self, first: str) -> None:
        flow = Lines(0.4, 0.3)
        loss = distillation(Lines(0.4, 0.3), flow, first=first).loss(pairs_of(flow))
        assert loss.logs["two_step"] < 1e-12 and loss.logs["direct"] < 1e-12
        other = distillation(Lines(0.2, 0.3), flow, first=first).loss(pairs_of(flow))
        assert other.logs["two_step"] > 1e-3

    def test_the_flow_is_asked_in_the_runs_precision(self) -> None:
        asked = []

        class Watched(Bends):
            def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
                asked.append(torch.is_autocast_enabled("cpu"))
                return super().forward(x_t, t)

        bf16 = partial(torch.autocast, "cpu", torch.bfloat16)
        method = distillation(Bends(-0.7, 0.3), Watched(-1.1, 0.4), first="teacher", precision=bf16)
        assert method.loss(pairs_of(Bends(-1.1, 0.4))).value.dtype == torch.float32
        assert asked == [True, True]

    @pytest.mark.parametrize("first", ["student", "teacher"])
    def test_no_gradient_flows_into_the_target(self, first: str) -> None:
        """The student's gradient is that of a target of mere numbers; the flow has none."""
        student, flow = Bends(-0.7, 0.3), Bends(-1.1, 0.4)
        method = distillation(student, flow, first=first)
        batch = pairs_of(flow)
        torch.manual_seed(3)
        method.loss(batch).value.backward()
        assert flow.a.grad is None and flow.b.grad is None
        torch.manual_seed(3)
        method.times.sample(50)
        noise, s = torch.randn(50, *SHAPE), 0.2 + 0.6 * torch.rand(50).reshape(-1, 1, 1, 1)
        v = (-0.7 if first == "student" else -1.1) * noise
        target = s * v + (1 - s) * (-1.1 * (noise + s * v) + 0.4 * s)
        wanted = 2 * ((-0.7 * noise - target) * noise).mean()
        wanted += 2 * ((-0.7 * batch.noise - (batch.data - batch.noise)) * batch.noise).mean()
        torch.testing.assert_close(student.a.grad, wanted)

    def test_conditioning_reaches_both_nets(self) -> None:
        class Labelled(Bends):
            def forward(self, x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
                assert len(class_labels) == len(x_t)
                return super().forward(x_t, t) + class_labels.reshape(-1, 1, 1, 1)

        flow = Labelled(-1.0, 0.0)
        labels = torch.arange(50)
        noise = pairs_of(Bends(-1.0, 0.0)).noise
        pairs = Batch(noise, labels.reshape(-1, 1, 1, 1) + 0 * noise, {"class_labels": labels})
        loss = distillation(Labelled(-1.0, 0.0), flow).loss(pairs)
        assert loss.logs["direct"] < 1e-10
        # x' = c - x from z: two steps end at c (1 - (1 - s)(1 - s)...) != c, for every label but 0
        assert loss.logs["two_step"] > 1

    def test_bad_input(self) -> None:
        for between in ((0.8, 0.2), (-0.1, 0.5), (0.5, 1.1)):
            with pytest.raises(FlowkitError, match=r"between must be \(low, high\)"):
                distillation(Bends(0.0, 0.0), Bends(0.0, 0.0), between=between)
        with pytest.raises(FlowkitError, match="'student' or 'teacher', got 'both'"):
            distillation(Bends(0.0, 0.0), Bends(0.0, 0.0), first="both")
        with pytest.raises(FlowkitError, match="curriculum"):
            GuidedDistillation(Bends(0.0, 0.0), Curriculum(), Squared(), flow=Bends(0.0, 0.0))
