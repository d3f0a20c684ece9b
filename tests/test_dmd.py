"""Distribution matching: closed forms, who learns from what, the student's steps, the critic."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from small_distillation import NO_GAN, draw, method, mlp
from torch import Tensor, nn

from flowkit.adapters import EDMVelocity, VPVelocity
from flowkit.analytic import Gaussian
from flowkit.coupling import Batch
from flowkit.samplers import sample
from flowkit.trainers.distilling import frozen
from flowkit.trainers.distribution_matching import (
    matching_gradient,
    score_loss,
    surrogate,
)
from flowkit.trainers.dmd_settings import CriticOptions, GANOptions, MatchingOptions
from flowkit.velocity import to_data


def _batch(count: int = 8) -> Batch:
    return Batch(draw(count, 1, 8, 8), draw(count, 1, 8, 8, seed=1))


class TestGradient:
    def test_the_surrogates_gradient_is_g_over_numel_exactly(self) -> None:
        data = draw(4, 1, 8, 8).requires_grad_(True)
        g = 1e-4 * draw(4, 1, 8, 8, seed=1)  # where x - (x - g) would round g to 1e-7
        value = surrogate(data, g)
        value.backward()
        assert torch.equal(data.grad, g / g.numel())
        torch.testing.assert_close(value.detach(), 0.5 * g.square().mean())

    def test_on_gaussians_it_is_the_difference_of_their_scores(self) -> None:
        """D_q - D_p = (1 - t)^2 / t (score_q - score_p), with scores known in closed form."""
        p, q = Gaussian(0.7, 0.4), Gaussian(-0.2, 0.9)
        x, noise, t = draw(64, 5).double(), draw(64, 5, seed=1).double(), 0.6
        x_t = (1 - t) * noise + t * x
        real, fake = (to_data(x_t, velocity(x_t, t), t) for velocity in (p, q))
        found = matching_gradient(x, real, fake)
        score_p, score_q = ((t * g.mean - x_t) / (t**2 * g.std**2 + (1 - t) ** 2) for g in (p, q))
        expected = (1 - t) ** 2 / t * (score_q - score_p)
        scale = (x - real).abs().mean(1, keepdim=True)
        torch.testing.assert_close(found, expected / scale, rtol=1e-10, atol=1e-12)

    def test_it_vanishes_where_the_two_agree_and_knows_no_scale(self) -> None:
        x, real, fake = (draw(4, 3, 2, 2, seed=s) for s in range(3))
        assert torch.equal(matching_gradient(x, real, real), torch.zeros_like(x))
        assert torch.equal(matching_gradient(x, x, x), torch.zeros_like(x))
        g = matching_gradient(x, real, fake)
        scaled = matching_gradient(x, x - 5 * (x - real), x - 5 * (x - fake))
        torch.testing.assert_close(scaled, g, rtol=1e-4, atol=1e-5)

    def test_what_is_not_finite_stays_so(self) -> None:
        x, fake = draw(2, 4), torch.full((2, 4), torch.nan)
        assert matching_gradient(x, torch.zeros(2, 4), fake).isnan().all()

    def test_descending_it_makes_one_gaussian_the_other(self) -> None:
        """x = a z + b against N(0.7, 0.4^2), the fake score being that of N(b, a^2) itself."""
        a = torch.tensor(1.0, requires_grad=True)
        b = torch.tensor(-1.0, requires_grad=True)
        optimizer = torch.optim.Adam([a, b], lr=0.03, betas=(0.0, 0.9))
        generator = torch.Generator().manual_seed(0)
        for _ in range(250):
            z, noise = (torch.randn(512, 1, generator=generator) for _ in range(2))
            t = 0.02 + 0.96 * torch.rand(512, generator=generator)
            x = a * z + b
            x_t = (1 - t[:, None]) * noise + t[:, None] * x.detach()
            teacher, own = Gaussian(0.7, 0.4), Gaussian(b.item(), abs(a.item()))
            real, fake = (to_data(x_t, v(x_t, t), t) for v in (teacher, own))
            optimizer.zero_grad()
            surrogate(x, matching_gradient(x.detach(), real, fake)).backward()
            optimizer.step()
        assert b.item() == pytest.approx(0.7, abs=0.05)
        assert abs(a.item()) == pytest.approx(0.4, abs=0.05)


class Exact(nn.Module):
    """What a network of another convention would learn of N(0.7, 0.4^2): data or noise at y."""

    def __init__(self, table: Tensor | None = None) -> None:
        super().__init__()
        self.table = table
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, y: Tensor, time: Tensor, **cond: Any) -> Tensor:
        time = time.reshape(-1, *[1] * (y.ndim - 1))
        if self.table is None:
            return 0.7 + 0.16 / (0.16 + time**2) * (y - 0.7)
        alpha, sigma = (f.sqrt() for f in (self.table[time.long()], 1 - self.table[time.long()]))
        power = alpha.square() * 0.16 + sigma.square()
        data = 0.7 + alpha * 0.16 / power * (y - alpha * 0.7)
        return (y - alpha * data) / sigma


def test_teachers_in_velocity_epsilon_and_edm_form_give_one_gradient() -> None:
    table = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0)
    teachers = {
        "velocity": Gaussian(0.7, 0.4),
        "edm": EDMVelocity(Exact()),
        "epsilon": VPVelocity(Exact(table), alphas_cumprod=table.tolist(), integer_times=True),
    }
    # times at which the table has an entry, so that the rounding of epsilon's index is none
    ratio = ((1 - table) / table).sqrt()[[20, 300, 700]]
    t = 1 / (1 + ratio)
    x, noise = draw(3, 1, 4, 4).double(), draw(3, 1, 4, 4, seed=1).double()
    x_t = (1 - t[:, None, None, None]) * noise + t[:, None, None, None] * x
    fake = to_data(x_t, Gaussian(0.1, 0.8)(x_t, t), t)
    found = {}
    for name, teacher in teachers.items():
        real = to_data(x_t, teacher(x_t, t), t).detach()
        found[name] = matching_gradient(x, real, fake)
    for name in ("edm", "epsilon"):
        torch.testing.assert_close(found[name], found["velocity"], rtol=1e-6, atol=1e-7)


def test_a_guided_teacher_is_the_conditional_one_pushed_from_the_unconditional() -> None:
    model = mlp(num_classes=10, label_dropout=0.1).eval()
    x, t, labels = draw(4, 1, 8, 8), torch.rand(4), torch.arange(4)
    teacher = frozen(model, 3.0, nullcontext, torch.device("cpu"))
    conditional = model(x, t, class_labels=labels)
    nothing = model(x, t, class_labels=torch.full_like(labels, 10))
    found = teacher(x, t, class_labels=labels)
    torch.testing.assert_close(found, nothing + 3 * (conditional - nothing))
    assert not torch.allclose(found, conditional, atol=1e-3)


class TestWhoLearns:
    def test_the_student_every_nth_step_before_the_critic(self) -> None:
        built = method(matching=MatchingOptions(student_every=3))
        roles = [[turn.role for turn in built.turns(step)] for step in range(6)]
        both, alone = ["student", "critic"], ["critic"]
        assert roles == [both, alone, alone, both, alone, alone]

    @pytest.mark.parametrize("features", ["fake", "teacher"])
    def test_the_students_turn_reaches_the_student_alone(self, features: Any) -> None:
        built = method(gan=GANOptions(weight=0.1, critic_weight=0.1, features=features))
        built.critic.requires_grad_(False)  # as the loop does
        built.loss(_batch()).value.backward()
        assert all(p.grad is not None for p in built.model.parameters())
        assert all(p.grad is None for p in built.critic.parameters())
        assert all(p.grad is None for p in built.teacher.parameters())

    @pytest.mark.parametrize("features", ["fake", "teacher"])
    def test_the_critics_turn_reaches_the_critic_alone(self, features: Any) -> None:
        built = method(gan=GANOptions(weight=0.1, critic_weight=0.1, features=features))
        built.critic_loss(_batch()).value.backward()
        assert all(p.grad is None for p in built.model.parameters())
        assert all(p.grad is None for p in built.teacher.parameters())
        assert all(p.grad is not None for p in built.critic.parameters())
        teacher = set(built.teacher.state_dict())
        assert len(built.critic.state_dict()) - len(teacher) == len(built.critic.heads.state_dict())

    def test_the_discriminators_term_reaches_the_student(self) -> None:
        built = method(
            matching=MatchingOptions(weight=0.0), gan=GANOptions(weight=1.0, critic_weight=1.0)
        )
        loss = built.loss(_batch())
        loss.value.backward()
        assert any(p.grad.abs().sum() > 0 for p in built.model.parameters())
        assert loss.logs.keys() == {"fake_logit"}  # no trace of the score where it has no weight

    def test_it_trains_the_fake_network_only_where_that_is_read(self) -> None:
        for features, moves in (("fake", True), ("teacher", False)):
            built = method(
                critic=CriticOptions(weight=0.0),
                gan=GANOptions(weight=1.0, critic_weight=1.0, features=features),
            )
            built.critic_loss(_batch()).value.backward()
            norm = sum(p.grad.abs().sum() for p in built.critic.fake.parameters())
            assert bool(norm > 0) == moves

    def test_without_one_there_are_no_heads_and_no_logits(self) -> None:
        built = method(gan=NO_GAN)
        assert not len(built.critic.heads)
        assert built.critic_loss(_batch()).logs.keys() == {"score"}
        assert "fake_logit" not in built.loss(_batch()).logs

    @pytest.mark.parametrize("divergence", ["rkl", "kl", "js", "sf", "sh", "jf", "neyman"])
    def test_every_divergence_trains(self, divergence: str) -> None:
        built = method(matching=MatchingOptions(divergence=divergence, num_bins=2))
        loss = built.loss(_batch())
        loss.value.backward()
        assert loss.value.isfinite() and {"ratio", "ratio_min", "ratio_max"} <= loss.logs.keys()


def test_reverse_kl_is_plain_distribution_matching() -> None:
    values = []
    for divergence in (None, "rkl"):
        built = method(matching=MatchingOptions(divergence=divergence))
        torch.manual_seed(0)
        values.append(built.loss(_batch()).value.item())
    assert values[1] == pytest.approx(values[0], rel=1e-5)


def test_edms_weighting_is_that_of_the_denoised_picture() -> None:
    t = torch.linspace(0.05, 0.95, 8)
    v, data, noise = (draw(8, 1, 4, 4, seed=s) for s in range(3))
    x_t = (1 - t)[:, None, None, None] * noise + t[:, None, None, None] * data
    sigma = (1 - t) / t
    error = (to_data(x_t, v, t) - data).square().flatten(1).mean(1)
    expected = ((1 / sigma**2 + 1 / 0.5**2) * error).mean()
    found = score_loss(v, data, noise, t, CriticOptions(weighting="edm", sigma_data=0.5))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


class TestGenerate:
    def test_one_step_is_noise_plus_velocity(self) -> None:
        built, batch = method(), _batch()
        expected = batch.noise + built.model(batch.noise, 0.0)
        torch.testing.assert_close(built.generate(batch), expected)

    def test_several_are_the_consistency_sampler_on_itself(self) -> None:
        times = [0.0, 0.3, 0.7]
        built, batch = method(matching=MatchingOptions(student_times=times)), _batch()
        seen = set()
        for seed in range(12):
            torch.manual_seed(seed)
            last = int(torch.randint(3, ()))
            noises = [torch.randn_like(batch.data) for _ in range(last)]
            torch.manual_seed(seed)
            made = built.generate(batch)
            grid = [*times[: last + 1], 1.0]
            expected = sample(
                built.model, batch.noise, grid, "consistency", draw=lambda x, k, n=noises: n[k]
            ).x
            torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
            seen.add(last)
        assert seen == {0, 1, 2}

    def test_only_the_last_step_has_a_gradient(self) -> None:
        built = method(matching=MatchingOptions(student_times=[0.0, 0.5]))
        calls: list[bool] = []
        built.model.register_forward_hook(lambda m, i, o: calls.append(o.requires_grad))
        for seed in range(8):
            torch.manual_seed(seed)
            built.generate(_batch())
            assert calls in ([True], [False, True])
            calls.clear()

    def test_without_simulation_later_steps_start_from_real_pictures(self) -> None:
        options = MatchingOptions(student_times=[0.0, 0.5], backward_simulation=False)
        built, batch = method(matching=options), _batch()
        inputs = []
        built.model.register_forward_hook(lambda m, i, o: inputs.append(i[0]))
        for seed in range(8):
            torch.manual_seed(seed)
            built.generate(batch)
        middle = 0.5 * (batch.noise + batch.data)
        assert any(torch.equal(x, middle) for x in inputs)
        assert all(torch.equal(x, middle) or torch.equal(x, batch.noise) for x in inputs)
