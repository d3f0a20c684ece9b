"""Caches whose first block decides: the gate, the schedule around it, and the batch."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from small_networks import Blocks, Moving, distance, dit, draw, moving, randomised
from tiny_pipelines import generate, sd15
from torch import nn

from flowkit.adapters import from_diffusers
from flowkit.errors import FlowkitError
from flowkit.samplers import sample
from flowkit.samplers.gated import cg_taylor, enable_cg_taylor, first_block_cache
from flowkit.samplers.grids import uniform
from flowkit.samplers.taylor import taylorseer
from flowkit.velocity import bind, guided

TIMES = uniform(30)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("cached", [cg_taylor, first_block_cache])
def test_a_threshold_of_0_changes_no_bit(cached):
    net, noise = dit(), draw(2, 1, 8, 8)
    plain = sample(from_diffusers(net), noise, TIMES).x
    with cached(net, threshold=0.0) as cache:
        assert torch.equal(sample(from_diffusers(net), noise, TIMES).x, plain)
        assert cache.stats.full_steps == list(range(30))
        assert cache.stats.forecast == 0


def test_a_huge_threshold_leaves_warm_up_and_the_last_step():
    net = moving(1)
    with cg_taylor(net, threshold=1e9, warmup=5, num_steps=30) as cache:
        for t in TIMES[:-1]:
            net(torch.ones(1, 4), t)
        assert cache.stats.full_steps == [0, 1, 2, 3, 4, 29]
    assert [block.runs for block in net.stages] == [30, 6, 6]


@pytest.mark.parametrize("residual", [True, False])
def test_linear_features_are_trusted_and_forecast_exactly(residual):
    net, x = moving(1).double(), draw(2, 4).double()
    plain = [net(x, t) for t in TIMES]
    with cg_taylor(net, threshold=1e-6, warmup=2, residual=residual, last=False) as cache:
        cached = [net(x, t) for t in TIMES]
    assert cache.stats.full_steps == [0, 1]
    torch.testing.assert_close(cached, plain)


def test_features_that_turn_are_not_trusted():
    class Kink(nn.Module):
        def forward(self, h, t):
            return h + t + 5 * max(t - 0.5, 0.0)

    net, x = Blocks([Kink(), Moving([1.0, 2.0])]), torch.ones(1, 4)
    net.stages[0].weight = nn.Parameter(torch.zeros(1))
    with cg_taylor(net, threshold=0.02, warmup=2, last=False) as cache:
        for t in TIMES[:-1]:
            net(x, t)
    # 0.5 is step 15: the slope is new at 16 and known again after 17.
    assert cache.stats.full_steps[:2] == [0, 1]
    assert cache.stats.full_steps[2:] and min(cache.stats.full_steps[2:]) == 16
    assert len(cache.stats.full_steps) <= 5


@pytest.mark.parametrize("cached", [cg_taylor, first_block_cache])
def test_the_gate_looks_at_relative_errors(cached):
    """Scaling every feature changes no decision."""

    class Linear(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.weight = nn.Parameter(draw(8, 8, seed=seed) / 3)

        def forward(self, h, t):
            return h + h @ self.weight * (t**3 - t)

    net, x = Blocks([Linear(i) for i in range(3)]).double(), draw(2, 8).double()
    with cached(net, threshold=0.05) as cache:
        steps = []
        for scale in (1.0, 1000.0):
            for t in TIMES[1:]:
                net(scale * x, t)
            steps.append(cache.stats.full_steps)
            cache.reset()
    assert steps[0] == steps[1]
    assert 3 < len(steps[0]) < 29


def test_a_batch_decides_together_or_by_its_worst_sample():
    class Rough(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, h, t):
            wave = torch.sin(torch.tensor(40.0 * t)) * torch.tensor([[0.0], [0.02]])
            return h + 1 + wave[: len(h)] * torch.tensor([[1.0]])

    net, x = Blocks([Rough(), Moving([1.0, 2.0])]), torch.ones(2, 4)
    counts = {}
    for per_sample in (False, True):
        with cg_taylor(net, threshold=0.008, per_sample=per_sample) as cache:
            for t in TIMES[:-1]:
                net(x, t)
            counts[per_sample] = cache.stats.computed
    assert counts[False] < counts[True]


def test_what_a_gate_costs_and_gives():
    net, noise = dit(), draw(2, 1, 8, 8)
    velocity = from_diffusers(net)
    plain = sample(velocity, noise, TIMES).x
    with cg_taylor(net, threshold=0.01) as cache:
        gated = sample(velocity, noise, TIMES).x
    assert 3 < cache.stats.computed < 20
    with taylorseer(net, interval=100, warmup=3):
        blind = sample(velocity, noise, TIMES).x
    assert distance(gated, plain) < 0.5 * distance(blind, plain)


def test_branches_decide_for_themselves():
    net, noise = dit(num_classes=4), draw(2, 1, 8, 8)
    model = from_diffusers(net)
    branches = [bind(model, class_labels=torch.tensor(y)) for y in ([0, 1], [4, 4])]
    two = guided(*branches, 3.0)
    plain = sample(two, noise, TIMES).x
    with cg_taylor(net, threshold=0.02) as cache:
        fast = sample(two, noise, TIMES).x
    assert cache.stats.computed + cache.stats.forecast == 60
    assert distance(fast, plain) < 0.1


def test_a_pipeline_with_a_unet_computes_its_last_step():
    pipe = sd15()
    plain = generate(pipe, num_inference_steps=10)
    with cg_taylor(pipe, threshold=10.0) as cache:
        fast = generate(pipe, num_inference_steps=10)
        assert cache.stats.full_steps == [0, 1, 2, 9]
    assert distance(fast, plain) < 0.5


@pytest.mark.parametrize("threshold", [0.6, 0.9])
def test_first_block_cache_is_that_of_diffusers(threshold):
    def run(net):
        x = draw(2, 4, 8, 8)
        for t in range(1000, 0, -40):
            given = {"timestep": torch.tensor([t, t]), "class_labels": torch.tensor([1, 2])}
            x = x + 0.05 * net(x, **given, return_dict=False)[0]
        return x

    config = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4}
    nets = [randomised(DiTTransformer2DModel(**config, num_layers=4, sample_size=8)) for _ in "ab"]
    theirs, ours = nets
    ran = []
    theirs.transformer_blocks[2].attn1.register_forward_hook(lambda *args: ran.append(1))
    apply_first_block_cache(theirs, FirstBlockCacheConfig(threshold=threshold))
    _set_cache_context(theirs, CacheContext("only"))
    expected = run(theirs)
    with first_block_cache(ours, threshold=threshold) as cache:
        torch.testing.assert_close(run(ours), expected)
    assert cache.stats.computed == len(ran)
    assert 1 < len(ran) < 25


def test_a_gate_needs_a_first_block_and_others():
    with pytest.raises(FlowkitError, match="a gate needs .* at least two blocks"):
        enable_cg_taylor(moving(1, count=1))
    with pytest.raises(FlowkitError, match="threshold must be 0 .* got -1"):
        enable_cg_taylor(moving(1), threshold=-1)


def test_a_head_that_reads_other_blocks_is_refused():
    net = moving(1, head=lambda h, outputs: h + outputs[1])
    with cg_taylor(net, threshold=1e9, warmup=2):
        for t in TIMES[:2]:
            net(torch.ones(1, 4), t)
        with pytest.raises(FlowkitError, match="reads blocks whose output is not"):
            net(torch.ones(1, 4), TIMES[2])
