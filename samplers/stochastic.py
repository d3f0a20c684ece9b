"""Stochastic solvers: noise drawn on the way makes them forget the errors of earlier steps.

The noise comes from `draw` (flowkit/samplers/evaluations.py), by default that of seed 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.samplers.evaluations import Draw, Evaluations, per_sample

__all__ = ["edm_heun", "sde"]


def sde(
    x: Tensor,
    times: Sequence[float],
    *,
    diffusion_norm: float = 1.0,
    diffusion: Callable[[float], float] | None = None,
    draw: Draw | None = None,
) -> Evaluations:
    """Weak order 1, 1 NFE per step: Euler-Maruyama (Ma et al., 2024, arXiv:2401.08740) for

        dx = (v + w score) dt + sqrt(2 w) dW,

    which has the marginals of the flow for every w >= 0; w(t) is diffusion_norm * diffusion(t).
    diffusion: None is 1 - t, SiT's "sigma".  With it the drift is v - diffusion_norm * noise,
    finite up to t = 1, and stable on every grid for a norm up to 1.  Others need care at the ends:
    SiT's "SBDM", (1 - t) / t, a start after 0, and what does not vanish at t = 1 small last steps.
    A step to t = 1, like one with w = 0, is Euler's on the flow: it ends on the predicted data,
    where the mean of the step above would leave some of the noise.
    Raises FlowkitError for w that is negative or infinite, and for decreasing times.
    """
    if times[-1] < times[0]:
        raise FlowkitError("solver 'sde' cannot invert: it draws noise; use 'euler' or 'midpoint'")
    weights = {t: diffusion_norm * (diffusion(t) if diffusion else 1 - t) for t in times[:-1]}
    for t, w in weights.items():
        if not 0 <= w < math.inf:
            raise FlowkitError(
                f"diffusion_norm * diffusion(t) must be finite and >= 0, got {w} at t={t:.4g}"
            )
    draw = draw or per_sample()
    for k, (t, s) in enumerate(pairwise(times)):
        x, v = yield x, t
        w = weights[t]
        x_s = x + (s - t) * v
        if w > 0 and s < 1:
            noise = x - t * v  # the score is -noise / (1 - t)
            x_s = x_s - (s - t) * w / (1 - t) * noise + math.sqrt(2 * w * (s - t)) * draw(x, k)
        x = x_s
    return x


def edm_heun(
    x: Tensor,
    times: Sequence[float],
    *,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.003,
    draw: Draw | None = None,
) -> Evaluations:
    """Order 2 where 0 < t < 1, 2 NFE per step: Heun in sigma = (1 - t) / t, for x / t (Karras et
    al., 2022, arXiv:2206.00364, alg. 2); meant for grids.edm.

    As d(x / t)/dsigma is the predicted noise x - t v,  x_s = x_t + (s - t) v + (1 - s/t)/2 (noise_s
    - noise_t), noise_s at the end of Euler's step.  A step that touches t = 1 is Euler's, as in
    the paper, so N steps of grids.edm take 2 N - 1 NFE; one that touches t = 0 as well, because
    sigma is infinite there and Heun's slope has no limit.
    s_churn > 0: where s_min <= sigma <= s_max, a step first raises sigma by the factor
    1 + min(s_churn / N, sqrt(2) - 1) with fresh noise of standard deviation s_noise, and evaluates
    there; a callback sees only the other grid times.
    Raises FlowkitError for options out of range, and for decreasing times with s_churn > 0.
    """
    if not (0 <= s_churn < math.inf and 0 <= s_min <= s_max and 0 <= s_noise < math.inf):
        raise FlowkitError(
            "edm_heun needs s_churn >= 0, 0 <= s_min <= s_max and s_noise >= 0, got "
            f"s_churn={s_churn}, s_min={s_min}, s_max={s_max}, s_noise={s_noise}"
        )
    if s_churn and times[-1] < times[0]:
        raise FlowkitError(
            f"edm_heun cannot invert with s_churn={s_churn}: it draws noise; set s_churn=0"
        )
    draw = draw or per_sample()
    raised = 1 + min(s_churn / (len(times) - 1), math.sqrt(2) - 1)
    churned = {t for t in times if s_churn and 0 < t < 1 and s_min <= (1 - t) / t <= s_max}
    for k, (t, s) in enumerate(pairwise(times)):
        if t in churned:
            sigma = (1 - t) / t
            t_hat = 1 / (1 + raised * sigma)
            spread = s_noise * sigma * math.sqrt(raised**2 - 1)
            t, x = t_hat, t_hat * (x / t + spread * draw(x, k))
        x, v = yield x, t
        x_s = x + (s - t) * v
        if 0 < min(t, s) and max(t, s) < 1:
            # Where the next step begins elsewhere, this stage must not pass for the state at s.
            _, v_s = yield x_s, math.nextafter(s, t) if s in churned else s
            x_s = x_s + 0.5 * (1 - s / t) * ((x_s - s * v_s) - (x - t * v))
        x = x_s
    return x
