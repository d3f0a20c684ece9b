"""Runs in which some evaluations make a state and the others have only the decoder."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from flowkit.adapters import from_diffusers
from flowkit.errors import FlowkitError
from flowkit.nets import DDT, DiT
from flowkit.paths import VPLinear
from flowkit.samplers import evaluation_times, invert, sample
from flowkit.samplers.encoder_sharing import encoder_states, shared_encoder
from flowkit.samplers.sharing import optimal_sharing, state_similarity
from flowkit.samplers.solve import SOLVERS
from flowkit.velocity import bind, guided

TIMES = [0.0, 0.1, 0.25, 0.4, 0.6, 0.8, 1.0]
LABELS = torch.tensor([0, 3])


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ENCODER, DECODER = 4, 2


class Case:
    """A tiny random DDT, guided inside an interval or not, and the blocks that it runs."""

    def __init__(self, **options):
        torch.manual_seed(0)
        self.net = DDT(
            sample_size=8,
            in_channels=2,
            hidden_size=16,
            num_encoder_layers=ENCODER,
            num_decoder_layers=DECODER,
            num_heads=2,
            num_classes=4,
            **options,
        ).eval()
        for parameter in self.net.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        self.net.requires_grad_(False)
        self.model = from_diffusers(self.net)
        self.velocity = bind(self.model, class_labels=LABELS)
        self.noise = draw(2, 2, 8, 8)
        self.blocks, both = 0, (*self.net.encoder_blocks, *self.net.decoder_blocks)
        self.hooks = [block.register_forward_hook(self._count) for block in both]

    def _count(self, *_):
        self.blocks += 1

    def stop_counting(self):
        """Hooks take long to compile."""
        for hook in self.hooks:
            hook.remove()

    def guided(self, interval=(-1.0, 2.0)):
        return guided(self.velocity, bind(self.model), 2.0, interval=interval)

    def run(self, solver="euler", velocity=None, **sharing):
        velocity = self.velocity if velocity is None else velocity
        with shared_encoder(velocity, TIMES, solver, **sharing) as shared:
            return sample(shared, self.noise, TIMES, solver).x, shared


@pytest.fixture
def case():
    return Case()


def by_hand(case, steps, name, order=0):
    """Euler's steps, each with the state, or what the encoder gave, of the latest of `steps`."""
    x, (t_a, a), (t_b, b) = case.noise, (0.0, None), (0.0, None)
    for i, (t, s) in enumerate(zip(TIMES, TIMES[1:], strict=False)):
        line = order and t_b > t_a
        kept = a if a is None else b + (t - t_b) / (t_b - t_a) * (b - a) if line else b
        out = case.net(x, torch.full((2,), t), LABELS, **({} if i in steps else {name: kept}))
        if i in steps:
            new = t, getattr(out, name)
            (t_a, a), (t_b, b) = ((t_b, b) if i else new), new
        x = x + (s - t) * out.sample
    return x


@pytest.mark.parametrize("refresh_time", [False, True])
@pytest.mark.parametrize("steps", [[0], [0, 1, 4], [0, 3]])
def test_sharing_is_what_one_would_do_by_hand(case, steps, refresh_time):
    x, shared = case.run(steps=steps, refresh_time=refresh_time)
    torch.testing.assert_close(x, by_hand(case, steps, "encoded" if refresh_time else "state"))
    assert (shared.encoder_calls, shared.decoder_calls) == (len(steps), 6)
    assert case.run(steps=steps, refresh_time=not refresh_time)[0].sub(x).abs().max() > 1e-4
    name = "encoded" if refresh_time else "state"
    line, _ = case.run(steps=steps, refresh_time=refresh_time, order=1)
    torch.testing.assert_close(line, by_hand(case, steps, name, order=1))
    assert torch.equal(line, x) is (len(steps) == 1)


OPTIONS = {"bdia_ddim": {"path": VPLinear()}}
FIXED = [name for name in SOLVERS if name != "dopri5"]


@pytest.mark.parametrize("solver", FIXED)
def test_a_state_in_every_evaluation_is_bit_equal_to_none_shared(case, solver):
    options = OPTIONS.get(solver, {})
    times = [0.02, *TIMES[1:-1], 0.98]
    want = sample(case.velocity, case.noise, times, solver, **options)
    for steps, refresh_time in ((None, False), (range(want.nfe), True)):
        how = {"steps": steps, "refresh_time": refresh_time, "order": 2} | options
        with shared_encoder(case.velocity, times, solver, **how) as shared:
            got = sample(shared, case.noise, times, solver, **options)
        assert torch.equal(got.x, want.x)
        assert shared.encoder_calls == shared.decoder_calls == want.nfe


@pytest.mark.parametrize("solver", FIXED)
def test_every_solver_shares_by_its_evaluations(case, solver):
    """Of many stages or one: every second evaluation makes no state, and only these change."""
    options = OPTIONS.get(solver, {})
    times = [0.02, *TIMES[1:-1], 0.98]
    where = evaluation_times(solver, times, **options)
    seen = []

    def watched(x, t):
        before = case.blocks
        v = case.velocity(x, t)
        seen.append((t, case.blocks - before))
        return v

    steps = range(0, len(where), 2)
    how = {"model": case.model, "steps": steps} | options
    with shared_encoder(watched, times, solver, **how) as shared:
        got = sample(shared, case.noise, times, solver, **options)
    both = ENCODER + DECODER, DECODER
    assert seen == [(t, both[i % 2]) for i, t in enumerate(where)]
    assert got.x.isfinite().all()
    assert (shared.encoder_calls, shared.decoder_calls) == (len(steps), len(where))


def test_inversion_shares_too(case):
    with shared_encoder(case.velocity, TIMES[::-1], "heun", steps=[0, 4, 9]) as shared:
        x = invert(shared, case.noise, TIMES, "heun").x
    assert (shared.encoder_calls, shared.decoder_calls) == (3, 12)
    assert not torch.equal(x, invert(case.velocity, case.noise, TIMES, "heun").x)


def test_one_context_serves_run_after_run(case):
    with shared_encoder(case.velocity, TIMES, "euler", steps=[0, 3]) as shared:
        runs = [sample(shared, noise, TIMES, "euler").x for noise in (case.noise, -case.noise)]
        again = sample(shared, case.noise, TIMES, "euler").x
    assert torch.equal(runs[0], again) and not torch.equal(runs[0], runs[1])
    assert shared.encoder_calls == 6


def test_nothing_is_left_behind(case):
    want = sample(case.velocity, case.noise, TIMES, "euler").x
    with pytest.raises(RuntimeError), shared_encoder(case.velocity, TIMES, "euler", steps=[0]):
        raise RuntimeError
    assert not case.net._forward_pre_hooks and not case.net._forward_hooks
    assert torch.equal(sample(case.velocity, case.noise, TIMES, "euler").x, want)


def test_calls_beside_the_run_are_left_alone(case):
    """A preview in a callback has a state of its own and leaves the run's."""
    previews = []

    def preview(step):
        if step.index < 6:
            previews.append(case.velocity(step.x, step.t))
            own = case.net(step.x, torch.full((2,), step.t), LABELS).sample
            assert torch.equal(previews[-1], own)

    want, _ = case.run(steps=[0, 3])
    with shared_encoder(case.velocity, TIMES, "euler", steps=[0, 3]) as shared:
        x = sample(shared, case.noise, TIMES, "euler", callback=preview).x
    assert torch.equal(x, want) and len(previews) == 6 and shared.decoder_calls == 6


# Guidance: a state for each branch.


@pytest.mark.parametrize("name", ["state", "encoded"])
def test_branches_have_states_of_their_own(case, name):
    steps, x, kept = [0, 2, 5], case.noise, {}
    for i, (t, s) in enumerate(zip(TIMES, TIMES[1:], strict=False)):
        v = []
        for branch, labels in enumerate((LABELS, None)):
            given = {} if i in steps else {name: kept[branch]}
            out = case.net(x, torch.full((2,), t), labels, **given)
            kept[branch] = getattr(out, name) if i in steps else kept[branch]
            v.append(out.sample)
        x = x + (s - t) * (v[1] + 2.0 * (v[0] - v[1]))
    how = {"steps": steps, "refresh_time": name == "encoded"}
    got, shared = case.run(velocity=case.guided(), **how)
    torch.testing.assert_close(got, x)
    assert (shared.encoder_calls, shared.decoder_calls) == (6, 12)


def test_a_branch_that_enters_later_makes_its_state_then(case):
    """Guided at .25, .4 and .6: the null class has no state of evaluation 0 to share."""
    velocity = case.guided((0.2, 0.7))
    _, shared = case.run(velocity=velocity, steps=[0])
    assert (shared.encoder_calls, shared.decoder_calls) == (2, 9)
    assert torch.equal(
        case.run(velocity=velocity)[0], sample(velocity, case.noise, TIMES, "euler").x
    )


def test_branches_are_told_apart_by_conditioning_not_by_order(case):
    """Unconditional first inside an interval, then alone or conditional alone."""
    null = torch.full((2,), 4)

    def velocity(x, t):
        if t < 0.2:
            return case.model(x, t, class_labels=LABELS.clone())
        v_u = case.model(x, t, class_labels=null.clone())
        return 2 * case.model(x, t, class_labels=LABELS.clone()) - v_u

    got, shared = case.run(velocity=velocity, model=case.net, steps=[0, 4])
    assert (shared.encoder_calls, shared.decoder_calls) == (4, 10)
    x, kept = case.noise, {}
    for i, (t, s) in enumerate(zip(TIMES, TIMES[1:], strict=False)):
        v = []
        for branch, labels in enumerate((LABELS, null)[: 1 + (t >= 0.2)]):
            if i in (0, 4):
                kept.pop(branch, None)
            out = case.net(x, torch.full((2,), t), labels, state=kept.get(branch))
            kept[branch] = out.state
            v.append(out.sample)
        x = x + (s - t) * (2 * v[0] - v[1] if len(v) > 1 else v[0])
    torch.testing.assert_close(got, x)


def test_a_batch_in_two_parts_has_two_states(case):
    """Two calls of the same conditioning in one evaluation are not mistaken for each other."""

    def parts(x, t):
        return torch.cat([case.model(part, t) for part in x.chunk(2)])

    got, shared = case.run(velocity=parts, model=case.model, steps=[0, 2])
    want, _ = case.run(velocity=bind(case.model), steps=[0, 2])
    torch.testing.assert_close(got, want)
    assert (shared.encoder_calls, shared.decoder_calls) == (4, 12)


class Equals(TorchFunctionMode):
    """Counts comparisons of tensors, each of which would make the host wait for a device."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.equal
        return function(*args, **(kwargs or {}))


def test_branches_are_found_without_looking_at_labels(case):
    null = bind(case.model, class_labels=torch.full((2,), 4))
    with Equals() as equals:
        case.run(velocity=guided(case.velocity, null, 2.0), steps=[0, 3])
    assert equals.count == 0


# The steps found in the same call.


@pytest.mark.parametrize("refresh_time", [False, True])
def test_steps_are_found_from_the_states_of_one_full_run(case, refresh_time):
    states = encoder_states(case.velocity, case.noise, TIMES, "heun", refresh_time=refresh_time)
    assert len(states) == 12 and states[0].shape == (2, 16, 16)
    want = optimal_sharing(state_similarity(states), 5)
    how = {"steps": 5, "probe": case.noise, "refresh_time": refresh_time}
    _, shared = case.run("heun", **how)
    assert shared.steps == want
    assert (shared.encoder_calls, shared.decoder_calls) == (5, 12)  # of this run alone


def test_states_are_those_of_the_run(case):
    states = encoder_states(case.velocity, case.noise, TIMES, "euler")
    out = case.net(case.noise, torch.zeros(2), LABELS)
    assert torch.equal(states[0], out.state)
    second = case.net(case.noise + 0.1 * out.sample, 0.1, LABELS)
    torch.testing.assert_close(states[1], second.state)
    back = encoder_states(case.velocity, case.noise, TIMES[::-1], "euler")
    assert torch.equal(back[0], case.net(case.noise, torch.ones(2), LABELS).state)


def test_states_of_both_branches_are_found(case):
    assert encoder_states(case.guided(), case.noise, TIMES, "euler")[0].shape[0] == 4
    states = encoder_states(case.guided((0.2, 0.7)), case.noise, TIMES, "euler")
    assert {len(state) for state in states} == {2}


def test_blocks_run_fall_as_the_encoder_calls_do(case):
    """E K + D N of (E + D) N blocks."""
    for count in (1, 2, 3, 6):
        case.blocks = 0
        case.run(steps=optimal_sharing(torch.eye(6), count))
        assert case.blocks == ENCODER * count + DECODER * 6


@pytest.mark.parametrize("refresh_time", [False, True])
def test_more_states_bring_the_run_nearer_to_the_full_one(case, refresh_time):
    times = [i / 24 for i in range(25)]
    want = sample(case.velocity, case.noise, times, "euler").x
    states = encoder_states(case.velocity, case.noise, times, "euler", refresh_time=refresh_time)
    similarity, errors = state_similarity(states), []
    for count in (2, 6, 12):
        how = {"steps": optimal_sharing(similarity, count), "refresh_time": refresh_time}
        with shared_encoder(case.velocity, times, "euler", **how) as shared:
            errors.append((sample(shared, case.noise, times, "euler").x - want).norm().item())
    assert errors[0] > 1.3 * errors[1] > 1.69 * errors[2] > 0
    with shared_encoder(case.velocity, times, "euler", order=1, **how) as shared:
        line = (sample(shared, case.noise, times, "euler").x - want).norm().item()
    assert errors[2] > 4 * line > 0


class Quadratic(nn.Module):
    """A network of one's own, whose state is a polynomial of degree 2 in t."""

    def forward(self, sample, timestep, state=None, encoded=None):
        if state is None:
            encoded = 1 + timestep - 3 * timestep**2 if encoded is None else encoded
            state = 2 * encoded
        return (state * torch.ones_like(sample), state, encoded)


@pytest.mark.parametrize("refresh_time", [False, True])
@pytest.mark.parametrize("solver, steps", [("euler", [0, 1, 2]), ("heun", [0, 1, 2, 3, 7])])
def test_polynomials_of_the_order_are_shared_exactly(solver, steps, refresh_time):
    """Three times make a parabola; Heun's evaluations 1 and 2 are at one time."""
    net, x = Quadratic(), torch.zeros(2, 3, dtype=torch.float64)

    def velocity(x, t):
        return net(x, torch.tensor(t, dtype=torch.float64))[0]

    want = sample(velocity, x, TIMES, solver).x
    how = {"model": net, "steps": steps, "refresh_time": refresh_time}
    for order, exact in ((0, False), (1, False), (2, True), (4, True)):
        with shared_encoder(velocity, TIMES, solver, order=order, **how) as shared:
            got = sample(shared, x, TIMES, solver).x
        assert torch.allclose(got, want, rtol=0, atol=1e-12) is exact
        assert shared.encoder_calls == len(steps)


# Compiled networks, and what cannot be shared.


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_network_shares(case, in_place):
    """Also one that ran before."""
    want, _ = case.run(steps=[0, 3])
    case.stop_counting()
    if in_place:
        case.net.compile(backend="eager")
        velocity = case.velocity
    else:
        model = from_diffusers(torch.compile(case.net, backend="eager"))
        velocity = bind(model, class_labels=LABELS)
    sample(velocity, case.noise, TIMES, "euler")
    got, shared = case.run(velocity=velocity, steps=[0, 3])
    torch.testing.assert_close(got, want)
    assert (shared.encoder_calls, shared.decoder_calls) == (2, 6)


def test_bfloat16(case):
    case.net.bfloat16()
    want, _ = case.run()
    got, shared = case.run(steps=[0, 1, 2, 4])
    assert got.dtype == torch.float32 and shared.encoder_calls == 4
    assert (got - want).norm() < 0.5 * want.norm()


def test_a_network_without_a_state_is_refused():
    net = DiT(sample_size=8, hidden_size=16, num_layers=2, num_heads=2)
    with (
        pytest.raises(FlowkitError, match="DiT has no encoder state"),
        shared_encoder(from_diffusers(net), TIMES, "euler", steps=[0]),
    ):
        pass


def test_a_velocity_that_hides_its_network_needs_to_name_it(case):
    other = Case()
    for velocity in (lambda x, t: x, guided(case.velocity, other.velocity, 2.0)):
        with (
            pytest.raises(FlowkitError, match="give model="),
            shared_encoder(velocity, TIMES, "euler", steps=[0]),
        ):
            pass
    both = guided(case.velocity, other.velocity, 2.0)
    _, shared = case.run(velocity=both, model=other.net, steps=[0])
    assert (shared.encoder_calls, shared.decoder_calls) == (1, 6)
    with pytest.raises(FlowkitError, match="did not call the network"):
        case.run(model=other.net, steps=[0])


def test_a_run_off_the_plan_is_refused(case):
    with shared_encoder(case.velocity, TIMES, "euler", steps=[0, 3]) as shared:
        with pytest.raises(FlowkitError, match=r"evaluation 1 is at t = 0\.05"):
            sample(shared, case.noise, TIMES, "midpoint")
        with pytest.raises(FlowkitError, match="reset"):
            sample(shared, case.noise, TIMES, "euler")
        shared.reset()
        x = sample(shared, case.noise, TIMES, "euler").x
    assert torch.equal(x, case.run(steps=[0, 3])[0])


def test_a_state_that_is_given_already_is_not_replaced(case):
    state = case.net(case.noise, 0.5, LABELS).state
    velocity = bind(case.model, class_labels=LABELS, state=state)
    with pytest.raises(FlowkitError, match="given a state already"):
        case.run(velocity=velocity, steps=[0, 3])


@pytest.mark.parametrize("order", [-1, 5, 0.5])
def test_order_must_be_known(case, order):
    with pytest.raises(FlowkitError, match="order must be a whole number from 0 to 4"):
        case.run(steps=[0], order=order)


@pytest.mark.parametrize(
    "steps, probe, message",
    [
        (3, False, "got 3 without a probe"),
        (7, True, "number, 1 to 6; got 7 and a probe"),
        (0, True, "got 0 and a probe"),
        ([0, 3], True, r"got \[0, 3\] and a probe"),
        ([1, 3], False, "increase from 0 and stay below 6"),
        ([0, 6], False, "increase from 0 and stay below 6"),
    ],
)
def test_steps_must_fit_the_run(case, steps, probe, message):
    with pytest.raises(FlowkitError, match=message):
        case.run(steps=steps, probe=case.noise if probe else None)


def test_an_adaptive_solver_has_no_evaluations_to_choose(case):
    with pytest.raises(FlowkitError, match="chooses its times as it goes"):
        case.run("dopri5", steps=[0])
