"""Distribution matching distillation: few steps whose pictures are distributed as a teacher's.

    g = (D_fake - D_real) / mean |x - D_real|  at x_t, noised from the student's x        (DMD2)
    fake score: denoise the student's pictures            head: tell them from real ones

Yin et al., 2024, arXiv:2311.18828 and arXiv:2405.14867 (DMD, DMD2); Xu et al., 2025,
arXiv:2502.15681 (f-distill).  Every network is a velocity, D = x_t + (1 - t) v.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowkit.coupling import Batch
from flowkit.samplers import sample
from flowkit.samplers.timesteps import TimeDensity
from flowkit.trainers.discriminator import Critic, Points
from flowkit.trainers.divergences import density_ratio, divergence_weights, equal_mass_bins
from flowkit.trainers.dmd_settings import CriticOptions, GANOptions, MatchingOptions
from flowkit.trainers.learner import Role
from flowkit.trainers.method import Loss, Phase, Turn
from flowkit.trainers.settings import TrainOptions
from flowkit.velocity import VelocityModel, bind, expand_to, interpolate, to_data

__all__ = ["DistributionMatching", "matching_gradient", "score_loss", "surrogate"]


def matching_gradient(data: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """DMD2's normalised gradient, (p_real - p_fake) / mean |p_real| with p = data - denoised.

    data, real, fake: (B, *): the student's pictures and what teacher and fake score make of them
    noised.  Returns (B, *); 0 where the teacher changes nothing at all.
    """
    scale = expand_to((data - real).abs().flatten(1).mean(1), data)
    return torch.where(scale == 0, torch.zeros_like(data), (fake - real) / scale)


def surrogate(data: Tensor, gradient: Tensor) -> Tensor:
    """The scalar mean g^2 / 2 whose gradient by `data` is g / numel, to the last bit of g.

    It is DMD's mean (x - sg(x - g))^2 / 2 without the rounding of x - (x - g).
    """
    g = gradient.detach()
    return 0.5 * g.square().mean() + (g * (data - data.detach())).mean()


def score_loss(v: Tensor, data: Tensor, noise: Tensor, t: Tensor, options: CriticOptions) -> Tensor:
    """Denoising score matching of v at x_t, between noise and data: a scalar.

    EDM's weight of a denoised picture's error, 1 / sigma^2 + 1 / sigma_data^2, becomes that of a
    velocity's by (1 - t)^2, which keeps it finite.
    """
    weight = torch.ones_like(t)
    if options.weighting == "edm":
        weight = t.square() + ((1 - t) / options.sigma_data).square()
    return (weight * (v - (data - noise)).square().flatten(1).mean(1)).mean()


class DistributionMatching:
    """A student, a frozen teacher, and a critic that follows the student.

    teacher: Velocity with conditioning, teacher(x_t, t, **cond), guided or not.
    times, critic_times, gan_times: densities of t of the three losses.
    frozen: the networks behind `teacher` and the head's features, by name, for the cost.
    decode: latents to pictures, for `pictures`.

    In memory: teacher; student, its average, gradient and optimizer; fake score and heads, their
    gradient and optimizer.  Activations are largest in the critic's turn, of three batches.
    """

    phase: Phase | None = None

    def __init__(
        self,
        model: Any,
        teacher: Callable[..., Tensor],
        critic: Critic,
        training: TrainOptions,
        *,
        times: TimeDensity,
        critic_times: TimeDensity,
        gan_times: TimeDensity,
        matching: MatchingOptions,
        critic_options: CriticOptions,
        gan: GANOptions,
        frozen: dict[str, VelocityModel] | None = None,
        decode: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        self.model, self.teacher, self.critic = model, teacher, critic
        self.times, self.critic_times, self.gan_times = times, critic_times, gan_times
        self.matching, self.critic_options, self.gan = matching, critic_options, gan
        self.frozen, self.decode = frozen or {}, decode
        self.roles = {"critic": Role(critic, training)}

    def turns(self, step: int) -> Sequence[Turn]:
        """The critic at every step, the student at every student_every-th, before it: two time
        scales (Yin et al., 2024, arXiv:2405.14867, section 4.2)."""
        critic = Turn("critic", self.critic_loss)
        due = step % self.matching.student_every == 0
        return [Turn("student", self.loss), critic] if due else [critic]

    def loss(self, batch: Batch) -> Loss:
        """The student's: distribution matching, and to look real."""
        data = self.generate(batch)
        value, logs = data.new_zeros(()), dict[str, Tensor]()
        if self.matching.weight:
            gradient, logs = self._gradient(data, batch.cond)
            value = value + self.matching.weight * surrogate(data, gradient)
        if self.gan.weight:
            _, logits = self.critic(None, self._noised(data, self.gan_times, batch.cond))
            value = value + self.gan.weight * F.softplus(-logits).mean()
            logs["fake_logit"] = logits.mean()
        return Loss(value, logs)

    def critic_loss(self, batch: Batch) -> Loss:
        """The critic's: denoise the student's pictures, and tell them from real ones."""
        with torch.no_grad():
            data = self.generate(batch)
        cond = batch.cond
        t = self.critic_times.sample(len(data), device=data.device)
        noise = torch.randn_like(data)
        asked, judged = Points(interpolate(noise, data, t), t, cond), None
        if self.gan.critic_weight:
            fake = self._noised(data, self.gan_times, cond)
            judged = fake.join(self._noised(batch.data, self.gan_times, cond))
        v, logits = self.roles["critic"].model(asked, judged)
        score = score_loss(v, data, noise, t, self.critic_options)
        value, logs = self.critic_options.weight * score, {"score": score}
        if logits is not None:
            on_fake, on_real = logits.chunk(2)
            head = F.softplus(on_fake).mean() + F.softplus(-on_real).mean()
            value = value + self.gan.critic_weight * head
            logs |= {"head": head, "fake_logit": on_fake.mean(), "real_logit": on_real.mean()}
        return Loss(value, logs)

    @torch.no_grad()
    def pictures(self, student: VelocityModel, batch: Batch) -> dict[str, Tensor]:
        """The student's, by its own steps, and what teacher and fake score make of them at t = 1/2:
        where these two drift apart in colour or contrast, training fails."""
        times = [*self.matching.student_times, 1.0]
        x = (1 - times[0]) * batch.noise
        data = sample(bind(student, **batch.cond), x, times, solver="consistency").x
        half = data.new_full((len(data),), 0.5)
        points = Points(interpolate(batch.noise, data, half), half, batch.cond)
        real = to_data(points.x_t, self.teacher(points.x_t, half, **batch.cond), half)
        fake = to_data(points.x_t, self.critic(points)[0], half)
        shown = {"student": data, "teacher at t = 1/2": real, "fake score at t = 1/2": fake}
        return {title: self.decode(x).cpu() for title, x in shown.items()}

    def generate(self, batch: Batch) -> Tensor:
        """The student's pictures after a random one of its steps; the last step has a gradient.

        Earlier steps are its own, each jump noised anew (backward simulation), so that it learns
        on what it will be given.
        """
        options = self.matching
        steps, noise = options.student_times, batch.noise
        last = int(torch.randint(len(steps), ())) if len(steps) > 1 else 0
        if last and not options.backward_simulation:
            x = interpolate(noise, batch.data, steps[last])
            return self._jump(x, steps[last], batch.cond)
        x = (1 - steps[0]) * noise
        with torch.no_grad():
            for t, s in zip(steps[:last], steps[1:], strict=False):
                data = self._jump(x, t, batch.cond)
                x = interpolate(torch.randn_like(data), data, s)
        return self._jump(x, steps[last], batch.cond)

    def _jump(self, x: Tensor, t: float, cond: dict[str, Tensor]) -> Tensor:
        return to_data(x, self.model(x, t, **cond), t)

    @torch.no_grad()
    def _gradient(self, data: Tensor, cond: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The matching gradient at a random noise level, weighted by h(r), and what to log."""
        points = self._noised(data, self.times, cond)
        x_t, t, _ = points
        divergence = self.matching.divergence
        v_real = self.teacher(x_t, t, **cond)
        v_fake, logits = self.critic(points, None if divergence is None else points)
        real, fake = to_data(x_t, v_real, t), to_data(x_t, v_fake, t)
        gradient = matching_gradient(data, real, fake)
        logs = {"gradient": gradient.abs().mean(), "distance": (data - real).abs().mean()}
        if divergence is not None:
            ratio, count = density_ratio(logits), self.matching.num_bins
            bins = equal_mass_bins(self.times, t, max(count, 1))
            gradient *= expand_to(divergence_weights(divergence, ratio, bins, count), gradient)
            logs |= {"ratio": ratio.mean(), "ratio_min": ratio.min(), "ratio_max": ratio.max()}
        return gradient, logs

    def _noised(self, data: Tensor, times: TimeDensity, cond: dict[str, Tensor]) -> Points:
        t = times.sample(len(data), device=data.device)
        return Points(interpolate(torch.randn_like(data), data, t), t, cond)
