"""Our scheduler inside real diffusers pipelines, whose networks are tiny and random."""

from __future__ import annotations

import inspect

import diffusers
import numpy as np
import pytest
import torch
from tiny_pipelines import (
    PIPELINES,
    denoiser,
    dit,
    draw,
    flux,
    flux_img2img,
    flux_inpaint,
    generate,
    sana,
    sd3,
    sd15,
    sd15_img2img,
    sdxl,
    wan,
)

from flowkit.adapters import from_diffusers
from flowkit.errors import FlowkitError
from flowkit.paths import from_path
from flowkit.samplers import FlowScheduler, sample
from flowkit.samplers.solve import SOLVERS, is_adaptive
from flowkit.velocity import bind

FIXED_STEP = [name for name, solver in SOLVERS.items() if not is_adaptive(solver)]
# EDM's sigma is infinite at t = 0, where a flow's grid begins.
FLOW_SOLVERS = [name for name in FIXED_STEP if name != "bdia_edm"]
FLOWS = {"flux": flux, "sd3": sd3, "sana": sana, "wan": wan}
DIFFUSIONS = {"sd15": sd15, "sdxl": sdxl, "dit": dit}
V_PREDICTIONS = {
    "sd15 v": lambda **config: sd15("v_prediction", **config),
    "sdxl v": lambda **config: sdxl("v_prediction", **config),
}
VP = DIFFUSIONS | V_PREDICTIONS


def ours(pipe, solver="euler", **options):
    """The same pipeline under our scheduler, made from the config of its own."""
    pipe.scheduler = FlowScheduler.from_config(pipe.scheduler.config, solver=solver, **options)
    return pipe


def theirs(pipe, cls, **options):
    """The same pipeline under another scheduler of diffusers."""
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **options)
    return pipe


class Record:
    """A run of a pipeline, and the calls that it made to its network."""

    def __init__(self, pipe, **options):
        self.net, self.states, self.conditions = denoiser(pipe), [], []
        hook = self.net.register_forward_pre_hook(self._call, with_kwargs=True)
        # Without a generator of its own a pipeline draws from torch's, and its scheduler after it.
        self.result = generate(pipe, **{"num_inference_steps": 4, "generator": None} | options)
        hook.remove()
        self.scheduler = pipe.scheduler

    def _call(self, net, args, kwargs):
        if not self.states:
            self.random = torch.get_rng_state()
        self.states.append((args[0] if args else kwargs["hidden_states"]).clone())
        self.conditions.append(
            (args[1:], {k: value for k, value in kwargs.items() if k != "hidden_states"})
        )

    def replayed(self):
        """The flow network's velocity, conditioned call by call as by the pipeline."""
        conditions = iter(self.conditions)

        @torch.no_grad()
        def velocity(x, t):
            args, kwargs = next(conditions)
            return -self.net(x.to(self.net.dtype), *args, **kwargs)[0]

        return velocity

    @property
    def times(self):
        return self.scheduler.times

    def plain(self, velocity, start, solver, skip=0):
        """The plain loop on the same grid, with the same random numbers."""
        torch.set_rng_state(self.random)
        options = {"path": self.scheduler.latents.path, "draw": lambda x, k: torch.randn(x.shape)}
        known = inspect.signature(SOLVERS[solver]).parameters
        options = {name: value for name, value in options.items() if name in known}
        result = sample(velocity, start, self.times[skip:], solver=solver, **options)
        assert result.nfe == len(self.states)
        return result.x


@torch.no_grad()
@pytest.mark.parametrize("build", PIPELINES.values(), ids=PIPELINES)
def test_the_tiny_networks_depend_on_all_their_inputs(build):
    run = Record(build())
    x, (args, kwargs) = run.states[0], run.conditions[0]

    def output(x=x, args=args, **changed):
        return run.net(x, *args, **kwargs | changed)[0][:, : x.shape[1]]

    plain = output()
    outputs = [output(x + 0.1 * x.sin())]
    if args:  # a U-Net's time
        outputs += [output(args=(args[0] // 2,))]
    else:
        outputs += [output(timestep=kwargs["timestep"] // 2)]
    names = ("encoder_hidden_states", "pooled_projections", "guidance", "class_labels")
    given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    outputs += [output(**{name: value + 1}) for name, value in given.items()]
    assert given and plain.std() > 0.1
    assert all((changed - plain).abs().max() > 0.01 * plain.std() for changed in outputs)


# -- The scheduler is the plain loop ------------------------------------------------------------


@pytest.mark.parametrize("solver", FLOW_SOLVERS)
@pytest.mark.parametrize("build", FLOWS.values(), ids=FLOWS)
def test_a_flow_pipeline_is_the_plain_loop_to_the_last_bit(build, solver):
    run = Record(ours(build(), solver))
    plain = run.plain(run.replayed(), run.states[0], solver)
    assert run.result.isfinite().all() and run.result.std() > 0.3
    assert torch.equal(plain, run.result)


@torch.no_grad()
def check_diffusion(build, solver):
    run = Record(pipe := ours(build(), solver))
    velocity, first = from_diffusers(pipe), float(pipe.scheduler.timesteps[0])
    names = ("encoder_hidden_states", "added_cond_kwargs", "class_labels")
    cond = {name: run.conditions[0][1].get(name) for name in names}
    cond = {name: value for name, value in cond.items() if value is not None}
    start, t = from_path(velocity.path, run.states[0], first)
    assert t.tolist() == pytest.approx([run.times[0]] * 2, abs=1e-6)
    plain = run.plain(bind(velocity, **cond), start, solver)
    assert run.result.isfinite().all() and run.result.std() > 0.3
    scale = float(run.result.abs().max())
    torch.testing.assert_close(plain, run.result, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("solver", FIXED_STEP)
@pytest.mark.parametrize("build", DIFFUSIONS.values(), ids=DIFFUSIONS)
def test_a_diffusion_pipeline_is_the_plain_loop(build, solver):
    check_diffusion(build, solver)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "ab2"])
@pytest.mark.parametrize("build", V_PREDICTIONS.values(), ids=V_PREDICTIONS)
def test_a_v_prediction_pipeline_is_the_plain_loop(build, solver):
    check_diffusion(build, solver)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "ab2"])
@pytest.mark.parametrize("build", [flux, sd3])
def test_a_bfloat16_pipeline_keeps_a_float32_state(build, solver):
    run = Record(ours(build().to(torch.bfloat16), solver))
    plain = run.plain(run.replayed(), run.states[0], solver)
    assert run.result.dtype == torch.bfloat16
    assert torch.equal(plain.to(torch.bfloat16), run.result)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("build", PIPELINES.values(), ids=PIPELINES)
def test_bfloat16_follows_float32(build, guided):
    exact = generate(ours(build(), "midpoint"), guided=guided)
    half = generate(ours(build().to(torch.bfloat16), "midpoint"), guided=guided)
    assert (half - exact).std() < 0.05 * exact.std()


# -- Euler is what diffusers has ----------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_dynamic_shifting": False},
        {"use_dynamic_shifting": False, "shift": 1.0},
        {"time_shift_type": "linear"},
        {"shift_terminal": 0.1},
    ],
    ids=str,
)
def test_euler_is_flow_match_euler_on_flux(config):
    """The pipeline passes sigmas, and mu where the config asks for it."""
    expected = generate(flux(**config), num_inference_steps=5)
    result = generate(ours(flux(**config)), num_inference_steps=5)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("build", [sd3, sana])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 5])
def test_euler_is_flow_match_euler_where_the_caller_gives_sigmas(build, shift, steps):
    sigmas = np.linspace(1, 1 / steps, steps)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler
    expected = generate(theirs(build(), scheduler, shift=shift), sigmas=sigmas)
    config = {"shift": shift} if build is sd3 else {"flow_shift": shift}
    result = generate(ours(build(**config)), sigmas=sigmas)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("build", VP.values(), ids=VP)
def test_euler_is_ddim(build, spacing):
    config = {"timestep_spacing": spacing, "set_alpha_to_one": True, "clip_sample": False}
    pipe = theirs(build(), diffusers.DDIMScheduler, **config)
    expected = generate(pipe, num_inference_steps=5)
    result = generate(ours(pipe), num_inference_steps=5)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_euler_is_euler_discrete_whose_latents_have_another_scale():
    expected = generate(sdxl(), num_inference_steps=5)
    result = generate(ours(sdxl()), num_inference_steps=5)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_without_sigmas_no_step_is_wasted():
    """diffusers' own grid takes its last step from sigma = 0.001 shift."""
    times = Record(ours(sd3(shift=1.0)), num_inference_steps=5).times
    assert times == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])


# -- From an image on, and inside a mask --------------------------------------------------------


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_image_to_image_with_euler_is_that_of_diffusers(strength):
    options = {"num_inference_steps": 5, "strength": strength}
    expected = generate(flux_img2img(), **options)
    result = generate(ours(flux_img2img()), **options)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    ddim = {"set_alpha_to_one": True, "clip_sample": False}
    pipe = theirs(sd15_img2img(), diffusers.DDIMScheduler, **ddim)
    expected = generate(pipe, **options)
    result = generate(ours(pipe), **options)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", [name for name in FLOW_SOLVERS if name != "fireflow"])
def test_every_solver_goes_from_image_to_image(solver):
    for build in (flux_img2img, sd15_img2img):
        run = Record(pipe := ours(build(), solver), num_inference_steps=5, strength=0.7)
        first = pipe.scheduler.timesteps[-len(run.states)]
        assert 400 < first < 900 and run.result.isfinite().all() and 0.3 < run.result.std() < 10


def test_a_solver_whose_first_step_differs_does_not_begin_in_the_middle():
    with pytest.raises(FlowkitError, match="cannot begin at evaluation"):
        generate(ours(flux_img2img(), "fireflow"))


@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4", "ab2", "unipc"])
def test_image_to_image_is_the_plain_loop_on_the_rest_of_the_grid(solver):
    run = Record(ours(flux_img2img(), solver), num_inference_steps=5, strength=0.4)
    plain = run.plain(run.replayed(), run.states[0], solver, skip=3)
    assert torch.equal(plain, run.result)


class Watch:
    """A callback that keeps the latents after every call of the network, as pictures."""

    def __init__(self):
        self.latents = []

    def __call__(self, pipe, index, timestep, kwargs):
        self.latents.append(diffusers.FluxPipeline._unpack_latents(kwargs["latents"], 16, 16, 2))
        return {}


@pytest.mark.parametrize("solver", ["euler", "ab2", "midpoint", "heun"])
def test_inpainting_keeps_what_is_known(solver):
    noise, seen = draw(2, 4, 8, 8, seed=5), Watch()
    pipe = ours(flux_inpaint(), solver)
    generate(pipe, latents=noise, strength=1.0, num_inference_steps=4, callback_on_step_end=seen)
    sigmas = [*(pipe.scheduler.timesteps[1:] / 1000), 0]
    image = seen.latents[-1]
    for latents, sigma in zip(seen.latents, sigmas, strict=True):
        known = (1 - sigma) * image + sigma * noise
        torch.testing.assert_close(latents[..., :4], known[..., :4], rtol=1e-5, atol=1e-5)
    assert (latents[..., 4:] - noise[..., 4:]).std() > 0.3


def test_inpainting_with_euler_is_that_of_diffusers():
    expected = generate(flux_inpaint(), num_inference_steps=5)
    result = generate(ours(flux_inpaint()), num_inference_steps=5)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
