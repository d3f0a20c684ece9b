"""Attention values: kept and replaced exactly, where asked for, and nothing else touched."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn
from torch.overrides import TorchFunctionMode

from flowkit.adapters import from_diffusers
from flowkit.errors import FlowkitError
from flowkit.nets import MLP, DiT
from flowkit.samplers import invert, sample
from flowkit.samplers.replay import evaluation_keys, recording, replaying
from flowkit.samplers.value_sharing import share_values
from flowkit.velocity import bind, guided

TIMES = [0.0, 0.1, 0.3, 0.6, 1.0]
TOKENS, IMAGE_TOKENS, WIDTH = 5, 16, 8


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(net):
    """Random also where training starts from zeros, so that every value counts."""
    for i, weight in enumerate(net.parameters()):
        weight.data = draw(*weight.shape, seed=i) * weight[0].numel() ** -0.5
    return net.eval().requires_grad_(False)


def flux():
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )


def sd3():
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
        dual_attention_layers=(2,),
    )


def dit():
    return DiT(sample_size=8, hidden_size=16, num_layers=3, num_heads=2, num_classes=4)


KINDS = {"flux": flux, "sd3": sd3, "dit": dit}


class Case:
    """A tiny random model with two conditionings and something to invert."""

    def __init__(self, kind, batch=2):
        self.kind, self.batch = kind, batch
        self.velocity = from_diffusers(randomised(KINDS[kind]()))
        self.net = self.velocity.net
        self.source, self.target = self.bound(seed=2), self.bound(seed=4)
        self.data = draw(batch, 4, 8, 8)

    def bound(self, seed, tokens=TOKENS):
        if self.kind == "dit":
            return bind(self.velocity, class_labels=torch.full((self.batch,), seed % 4))
        return bind(
            self.velocity,
            encoder_hidden_states=draw(self.batch, tokens, WIDTH, seed=seed),
            pooled_projections=draw(self.batch, WIDTH, seed=seed + 1),
        )

    @property
    def blocks(self):
        names = "single_transformer_blocks", "transformer_blocks", "blocks"
        return next(getattr(self.net, name) for name in names if hasattr(self.net, name))

    def replayed(self, solver="midpoint", **options):
        """Latents edited with values of every interval but the last."""
        with share_values(self.velocity, **options) as values:
            keep = recording(self.source, values, solver, TIMES[::-1], steps=3)
            noise = invert(keep, self.data, TIMES, solver).x
            return sample(replaying(self.target, values, solver, TIMES), noise, TIMES, solver).x


@pytest.fixture(params=KINDS)
def case(request):
    return Case(request.param)


class Attention(TorchFunctionMode):
    """Every query, key and value that an attention is computed from, in order."""

    def __init__(self):
        super().__init__()
        self.queries, self.keys, self.values = [], [], []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            self.queries.append(given["query"].clone())
            self.keys.append(given["key"].clone())
            self.values.append(given["value"].clone())
        return function(*args, **kwargs)


def processors(net):
    return [m.processor for m in net.modules() if hasattr(m, "set_processor")]


def hooks(net):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def seen(case, run, *args):
    with Attention() as attention:
        run(*args)
    return attention


# Which evaluations correspond.


def slopes_kept(x, times):
    """FireFlow's pattern: after the first step the last midpoint's slope begins the next one."""
    x, v = yield x, times[0]
    for t, s in pairwise(times):
        _, v = yield x + 0.5 * (s - t) * v, 0.5 * (t + s)
        x = x + (s - t) * v
    return x


def with_last(x, times):
    """One evaluation at each grid time, the last included, as correctors need."""
    for t, s in pairwise(times):
        x, v = yield x, t
        x = x + (s - t) * v
    x, _ = yield x, times[-1]
    return x


STAGES = {  # solver: (stages of each interval when sampling, when inverting)
    "euler": ([1, 1, 1, 1], [1, 1, 1, 1]),
    "ab2": ([1, 1, 1, 1], [1, 1, 1, 1]),
    "rf_solver": ([2, 2, 2, 2], [2, 2, 2, 2]),
    "heun": ([2, 2, 2, 2], [2, 2, 2, 2]),
    "rk4": ([4, 4, 4, 4], [4, 4, 4, 4]),
    slopes_kept: ([2, 1, 1, 1], [1, 1, 1, 2]),
    with_last: ([1, 1, 1, 2], [2, 1, 1, 1]),
}


@pytest.mark.parametrize("solver", STAGES)
def test_keys_count_the_evaluations_of_each_interval(solver):
    for times, stages in zip((TIMES, TIMES[::-1]), STAGES[solver], strict=True):
        keys = [key for _, key in evaluation_keys(solver, times)]
        assert sorted(keys) == [(i, s) for i, count in enumerate(stages) for s in range(count)]
        intervals = [i for i, _ in keys]
        assert intervals == sorted(intervals, reverse=times is not TIMES)
        for t, (i, _) in evaluation_keys(solver, times):
            assert TIMES[i] <= t <= TIMES[i + 1]


def test_midpoints_meet_at_one_time_and_first_evaluations_in_one_interval():
    there = {key: t for t, key in evaluation_keys("midpoint", TIMES[::-1])}
    for t, (interval, stage) in evaluation_keys("midpoint", TIMES):
        if stage == 0:
            assert (t, there[interval, 0]) == (TIMES[interval], TIMES[interval + 1])
        else:
            assert t == there[interval, 1]


# What is kept is what is replayed.


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "ab2"])
def test_values_of_the_chosen_blocks_are_those_recorded(case, solver):
    chosen = [0, 2]
    with share_values(case.net, blocks=chosen) as values:
        keep = recording(case.source, values, solver, TIMES[::-1], steps=2)
        there = seen(case, invert, keep, case.data, TIMES, solver)
        replay = replaying(case.target, values, solver, TIMES)
        here = seen(case, sample, replay, draw(*case.data.shape, seed=9), TIMES, solver)
    keys_there = [key for _, key in evaluation_keys(solver, TIMES[::-1])]
    keys_here = [key for _, key in evaluation_keys(solver, TIMES)]
    each = len(here.values) // len(keys_here)  # attentions a forward pass
    # Flux's two-stream block comes first; SD3's last block has a second attention.
    shared = {"flux": [1, 3], "sd3": [0, 2, 3], "dit": [0, 2]}[case.kind]
    assert len(keys_here) * each == len(here.values)
    for e, key in enumerate(keys_here):
        f = keys_there.index(key)
        for b in range(each):
            same = torch.equal(here.values[e * each + b], there.values[f * each + b])
            assert same == (key[0] < 2 and b in shared), (key, b)
            assert not torch.equal(here.queries[e * each + b], there.queries[f * each + b])
            assert not torch.equal(here.keys[e * each + b], there.keys[f * each + b])


def test_unequal_counts_meet_at_their_last_evaluations():
    case = Case("dit")
    with share_values(case.net, blocks=[0]) as values:
        keep = recording(case.source, values, slopes_kept, TIMES[::-1])
        there = seen(case, invert, keep, case.data, TIMES, slopes_kept).values[::3]
        replay = replaying(case.target, values, slopes_kept, TIMES)
        here = seen(case, sample, replay, case.data, TIMES, slopes_kept).values[::3]
    # Sampling: 0, mid 0, 1, 2, 3.  Inversion: 1, mid 3, 2, 1, 0.
    for e, f in enumerate([4, 4, 3, 2, 1]):
        assert torch.equal(here[e], there[f])


def test_the_default_is_the_later_half_or_the_authors_blocks(case):
    with share_values(case.net) as values:
        with values.record((0, 0)):
            case.source(case.data, 0.5)
        blocks = sorted({int(name.split(".")[1]) for name in values.kept[0, 0]})
    assert blocks == [1, 2]


def test_flux_dev_shares_its_last_18_single_blocks():
    net = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=38,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=4,
        pooled_projection_dim=4,
        axes_dims_rope=(2, 2, 4),
    )
    plain = [block.attn.processor for block in net.single_transformer_blocks]
    with share_values(net):
        wrapped = [
            i
            for i, block in enumerate(net.single_transformer_blocks)
            if block.attn.processor is not plain[i]
        ]
    assert wrapped == list(range(20, 38))


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_image_tokens_only_leaves_text_values_alone(kind):
    case = Case(kind, batch=1)
    own = seen(case, case.target, case.data, 0.4)
    with share_values(case.net, blocks=[0], image_tokens_only=True) as values:
        with values.record((0, 0)):
            there = seen(case, case.source, case.data, 0.4)
        with values.replay((0, 0)):
            here = seen(case, case.target, case.data, 0.4)
        assert [value.shape[1] for value in values.kept[0, 0].values()] == [IMAGE_TOKENS]
    if kind == "flux":  # (B, heads, N, D) in the single block, text first
        text, image = slice(0, TOKENS), slice(TOKENS, None)
        b = 1
    else:  # text last
        text, image = slice(IMAGE_TOKENS, None), slice(0, IMAGE_TOKENS)
        b = 0
    assert torch.equal(here.values[b][:, :, text], own.values[b][:, :, text])
    assert torch.equal(here.values[b][:, :, image], there.values[b][:, :, image])
    assert not torch.equal(here.values[b][:, :, image], own.values[b][:, :, image])
    assert torch.equal(here.queries[b], own.queries[b])
    assert torch.equal(here.keys[b], own.keys[b])


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_prompts_of_two_lengths_can_share_image_values_alone(kind):
    case = Case(kind)
    case.target = case.bound(seed=4, tokens=TOKENS + 2)
    assert case.replayed(image_tokens_only=True).isfinite().all()
    with pytest.raises(FlowkitError, match="prompts of the same length or image_tokens_only"):
        case.replayed()


# Nothing else is touched.


def test_without_recording_the_model_computes_what_it_did(case):
    plain = sample(case.target, case.data, TIMES, "midpoint").x
    with share_values(case.net):
        assert torch.equal(sample(case.target, case.data, TIMES, "midpoint").x, plain)
        assert hooks(case.net) == 0
    assert not torch.equal(case.replayed(), plain)
    assert torch.equal(sample(case.target, case.data, TIMES, "midpoint").x, plain)


@pytest.mark.parametrize("image_tokens_only", [False, True])
def test_everything_is_put_back_after_an_error(case, image_tokens_only):
    before = processors(case.net)

    def broken(x, t):
        case.source(x, t)
        raise RuntimeError("broken")

    with (
        pytest.raises(RuntimeError, match="broken"),
        share_values(case.net, image_tokens_only=image_tokens_only) as values,
    ):
        assert processors(case.net) != before
        invert(recording(broken, values, "euler", TIMES[::-1]), case.data, TIMES)
    assert all(a is b for a, b in zip(processors(case.net), before, strict=True))
    assert hooks(case.net) == 0
    assert values.tap is None and values.nbytes == 0


def test_an_error_inside_attention_leaves_no_hook():
    case = Case("dit")
    case.net.blocks[2].attn.to_out[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), share_values(case.net, blocks=[2]) as values:
        invert(recording(case.source, values, "euler", TIMES[::-1]), case.data, TIMES)
    assert hooks(case.net) == 1


class Scaled(nn.Module):
    """A processor with a weight of its own and an argument of its own."""

    def __init__(self, plain):
        super().__init__()
        self.plain, self.weight = plain, nn.Parameter(torch.tensor(2.0))

    def __call__(self, attn, hidden_states, *args, strength=0.0, **kwargs):
        return (1 + self.weight * strength) * self.plain(attn, hidden_states, *args)


def test_processors_of_others_keep_their_weights_and_arguments():
    case = Case("flux")
    attn = case.net.single_transformer_blocks[2].attn
    attn.set_processor(Scaled(attn.processor))
    mine, names = attn.processor, set(case.net.state_dict())
    strong = bind(case.velocity, **case.target.cond, joint_attention_kwargs={"strength": 1.0})
    plain = case.target(case.data, 0.5)
    expected = strong(case.data, 0.5)
    assert not torch.allclose(expected, plain)
    with share_values(case.net, blocks=[2]) as values:
        assert torch.equal(strong(case.data, 0.5), expected)
        with values.record((0, 0)):
            assert torch.equal(strong(case.data, 0.5), expected)
    assert attn.processor is mine and set(case.net.state_dict()) == names


def test_fused_projections_give_the_same(case):
    if case.kind == "sd3":  # diffusers' fused processor cannot do without text
        case.net.transformer_blocks[2].use_dual_attention = False
        case.net.transformer_blocks[2].attn2 = None
        case.net.transformer_blocks[2].norm1 = case.net.transformer_blocks[1].norm1
    expected = case.replayed()
    case.net.fuse_qkv_projections()
    torch.testing.assert_close(case.replayed(), expected, rtol=1e-4, atol=1e-5)


def compiled(net):
    return torch.compile(net, backend="eager")


def compiled_in_place(net):
    net.compile(backend="eager")
    return net


def compiled_by_block(net):
    net.compile_repeated_blocks(backend="eager")
    return net


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, how",
    [("dit", compiled), *(("flux", h) for h in (compiled, compiled_in_place, compiled_by_block))],
)
def test_a_compiled_model_shares_its_values_too(kind, how):
    case = Case(kind)
    options = {"blocks": [1], "image_tokens_only": True, "solver": "euler"}
    expected = case.replayed(**options)
    case.velocity.net = how(case.net)
    plain = case.target(case.data, 0.5)  # compiled before values are shared
    torch.testing.assert_close(case.replayed(**options), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(case.target(case.data, 0.5), plain)


# Where values are kept, and for whom.


def test_values_are_kept_where_asked_and_counted():
    case = Case("dit")
    with share_values(case.net, blocks=[1, 2], device="meta") as values:
        keep = recording(case.source, values, "midpoint", TIMES[::-1], steps=3)
        invert(keep, case.data, TIMES, "midpoint")
        tensors = [value for found in values.kept.values() for value in found.values()]
        assert all(value.is_meta for value in tensors)
        evaluations, blocks, tokens, width = 6, 2, 16, 16
        assert values.nbytes == evaluations * blocks * case.batch * tokens * width * 4
    torch.testing.assert_close(case.replayed(device="cpu"), case.replayed(), rtol=0, atol=0)


def test_kept_values_are_no_part_of_a_graph():
    case = Case("dit")
    case.net.requires_grad_(True)
    with share_values(case.net, blocks=[2]) as values:
        with values.record((0, 0)):
            case.source(case.data, 0.5)
        with values.replay((0, 0)):
            case.target(case.data, 0.5).sum().backward()
    first, last = case.net.blocks[0].attn, case.net.blocks[2].attn
    assert first.to_v.weight.grad.any() and last.to_q.weight.grad.any()
    assert last.to_v.weight.grad is None or not last.to_v.weight.grad.any()


def test_guidance_has_the_values_in_both_branches_or_in_the_one_that_is_wrapped(case):
    def shared(velocity):
        return seen(case, sample, velocity, case.data, TIMES).values

    other = case.bound(seed=7)
    with share_values(case.net, blocks=[2]) as values:
        keep = recording(case.source, values, "euler", TIMES[::-1])
        invert(keep, case.data, TIMES)
        both = shared(replaying(guided(case.target, other, 3.0), values, "euler", TIMES))
        one = shared(guided(replaying(case.target, values, "euler", TIMES), other, 3.0))
    each = len(both) // (2 * 4)
    for e in range(4):
        conditional, without = (2 * e + 1) * each - 1, (2 * e + 2) * each - 1
        assert torch.equal(both[conditional], both[without])
        assert not torch.equal(one[conditional], one[without])
    assert torch.equal(one[each - 1], both[each - 1])


def test_fewer_steps_may_be_replayed_than_were_recorded():
    case = Case("dit")
    with share_values(case.net) as values:
        noise = invert(recording(case.source, values, "euler", TIMES[::-1]), case.data, TIMES).x
        runs = {
            steps: sample(replaying(case.target, values, "euler", TIMES, steps=steps), noise, TIMES)
            for steps in (0, 1, 2)
        }
    assert torch.equal(runs[0].x, sample(case.target, noise, TIMES).x)
    assert not torch.equal(runs[1].x, runs[2].x)


# Mistakes.


def test_a_recording_of_two_passes_is_refused(case):
    twice = guided(case.source, case.target, 2.0)
    with share_values(case.net) as values, pytest.raises(FlowkitError, match="ran twice"):
        invert(recording(twice, values, "euler", TIMES[::-1]), case.data, TIMES)


def test_a_doubled_batch_is_refused(case):
    with share_values(case.net) as values:
        with values.record((0, 0)):
            case.source(case.data, 0.5)
        doubled = bind(case.velocity, **{k: torch.cat([x, x]) for k, x in case.target.cond.items()})
        with values.replay((0, 0)), pytest.raises(FlowkitError, match="guidance in calls of its"):
            doubled(torch.cat([case.data, case.data]), 0.5)


def test_a_velocity_of_another_model_is_refused(case):
    with share_values(case.net) as values:
        with pytest.raises(FlowkitError, match="ran none of the blocks"):
            invert(recording(lambda x, t: x, values, "euler", TIMES[::-1]), case.data, TIMES)
        with values.record((3, 0)):
            case.source(case.data, 0.5)
        replay = replaying(lambda x, t: x, values, "euler", TIMES)
        with pytest.raises(FlowkitError, match="ran none of the blocks"):
            sample(replay, case.data, TIMES)


def test_a_block_alone_does_not_tell_text_from_image():
    case = Case("flux")
    attention = case.blocks[2].attn
    with share_values(case.net, image_tokens_only=True) as values:
        with pytest.raises(FlowkitError, match="run the whole model"), values.record((0, 0)):
            attention(draw(1, TOKENS + IMAGE_TOKENS, 32))


def test_only_what_is_recorded_can_be_replayed(case):
    with (
        share_values(case.net) as values,
        pytest.raises(FlowkitError, match=r"kept for \(interval, stage\) \(1, 0\).*none"),
        values.replay((1, 0)),
    ):
        pass


def test_a_run_other_than_announced_is_refused():
    case = Case("dit")
    with share_values(case.net) as values:
        keep = recording(case.source, values, "midpoint", TIMES[::-1])
        with pytest.raises(FlowkitError, match="evaluation 1 is at t = 0.6, expected was t = 0.8"):
            invert(keep, case.data, TIMES, "euler")
        keep = recording(case.source, values, "euler", TIMES[::-1])
        invert(keep, case.data, TIMES)
        with pytest.raises(FlowkitError, match="expected was none; make one of these for each run"):
            invert(keep, case.data, TIMES)
        with pytest.raises(FlowkitError, match="0 to 4 of 4 steps, got 5"):
            recording(case.source, values, "euler", TIMES[::-1], steps=5)


@pytest.mark.parametrize("blocks", [[], [3], [-1]])
def test_blocks_must_exist(case, blocks):
    before = processors(case.net)
    with (
        pytest.raises(FlowkitError, match="blocks must be some of 0 to 2"),
        share_values(case.net, blocks=blocks),
    ):
        pass
    assert all(a is b for a, b in zip(processors(case.net), before, strict=True))


def test_other_models_are_refused():
    with (
        pytest.raises(FlowkitError, match="FluxTransformer2DModel.*got a MLP"),
        share_values(MLP(shape=[1, 8, 8])),
    ):
        pass
