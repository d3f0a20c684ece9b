"""Feature caches on every kind of network, compiled ones too, and on those that they refuse."""

from __future__ import annotations

import re

import diffusers
import pytest
import torch
from small_networks import Blocks, Moving, distance, dit, draw, moving, randomised
from tiny_pipelines import flux, sd15
from torch import nn

from flowkit.adapters import FlowVelocity, from_diffusers
from flowkit.errors import FlowkitError
from flowkit.nets import ADM, MLP, NCSNpp
from flowkit.samplers import sample
from flowkit.samplers.grids import uniform
from flowkit.samplers.taylor import enable_taylorseer, taylorseer

TIMES = uniform(12)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# Networks.


def networks():
    small = {"sample_size": 8, "in_channels": 1, "model_channels": 32, "num_blocks": 1}
    small |= {"channel_mult": [1, 2], "attention_resolutions": [4]}
    return {
        "dit": dit(),
        "mlp": MLP(shape=[1, 8, 8]),
        "ncsnpp": NCSNpp(**small),
        "ncsnpp with many heads": NCSNpp(**small, decoder="skip", encoder="residual"),
        "adm": ADM(**small),
        "unet": diffusers.UNet2DModel(
            8,
            1,
            1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
        ),
    }


@pytest.mark.parametrize("level", [None, "each", "module"])
@pytest.mark.parametrize("name", list(networks()))
def test_networks(name, level):
    net, noise = randomised(networks()[name]), draw(2, 1, 8, 8)
    velocity = FlowVelocity(net)
    if name == "mlp" and level == "module":
        with pytest.raises(
            FlowkitError, match='no attention or MLP found in MLPBlock.*level="block"'
        ):
            enable_taylorseer(net, level=level)
        return
    plain = sample(velocity, noise, TIMES).x
    with taylorseer(net, interval=2, order=1, level=level) as cache:
        sample(velocity, noise, TIMES)  # the many heads are found out
        fast = sample(velocity, noise, TIMES).x
        assert cache.stats.full_steps == [0, 1, 3, 5, 7, 9, 11]
    assert 1e-6 < distance(fast, plain) < 0.1
    assert torch.equal(sample(velocity, noise, TIMES).x, plain)


def test_every_part_of_a_unet_is_found():
    with taylorseer(sd15(), level="block") as cache:
        assert sorted(cache.parts) == [
            "down_blocks.0",
            "down_blocks.1",
            "mid_block",
            "up_blocks.0",
            "up_blocks.1",
        ]
    with taylorseer(sd15(), level="module") as cache:
        kinds = {re.sub(r".*\.", "", name) for name in cache.parts}
        assert kinds == {"attn1", "attn2", "ff", "conv2"}
    with taylorseer(flux(), level="module") as cache:
        assert cache.parts == [
            "transformer_blocks.0.attn",
            "transformer_blocks.0.ff",
            "transformer_blocks.0.ff_context",
            "single_transformer_blocks.0.proj_out",
        ]


def test_blocks_and_modules_by_name():
    net, noise = dit(), draw(2, 1, 8, 8)
    with taylorseer(net, modules=[r"\.attn$"]) as cache:
        assert cache.parts == [f"blocks.{i}.attn" for i in range(3)]
        sample(from_diffusers(net), noise, TIMES)
    with taylorseer(net, blocks=["blocks.1", "blocks.2"]) as cache:
        sample(from_diffusers(net), noise, TIMES)
        assert cache.parts == ["blocks.1", "blocks.2"]
    with pytest.raises(FlowkitError, match="no module 'layers'; its lists of blocks are blocks"):
        enable_taylorseer(net, blocks=["layers"])


def test_the_largest_list_is_taken_where_no_name_tells():
    net = moving(1)
    net.extras = nn.ModuleList([nn.Linear(1, 1)])
    with taylorseer(net) as cache:
        assert cache.parts == ["stages.0", "stages.1", "stages.2"]


# Compiled.


def compiled_runs(net, compile_net, cache_first):
    velocity, noise = from_diffusers(net), draw(2, 1, 8, 8)
    with taylorseer(net, interval=3):
        expected = sample(velocity, noise, TIMES).x
    if cache_first:
        cache = enable_taylorseer(net, interval=3)
        compiled = compile_net(net)
    else:
        compiled = compile_net(net)
        sample(from_diffusers(compiled), noise, TIMES[:3])
        cache = enable_taylorseer(compiled, interval=3)
    graphs = sample(from_diffusers(compiled), noise, TIMES).x
    assert cache.stats.full_steps == [0, 1, 4, 7, 10]
    cache.disable()
    return graphs, expected


@pytest.mark.slow
@pytest.mark.parametrize("cache_first", [True, False])
@pytest.mark.parametrize("regional", [True, False])
def test_compiled_before_or_after(cache_first, regional):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile_net(net):
        if not regional:
            return torch.compile(net, backend=backend)
        for block in net.blocks:
            block.compile(backend=backend)
        return net

    fast, expected = compiled_runs(dit(), compile_net, cache_first)
    torch.testing.assert_close(fast, expected)
    # The blocks themselves are in graphs: compiled code does not fall back to plain torch.
    assert any("scaled_dot_product_attention" in str(graph.graph) for graph in graphs)


@pytest.mark.slow
@pytest.mark.parametrize("cache_first", [True, False])
def test_compiled_with_inductor(cache_first):
    torch._dynamo.reset()
    fast, expected = compiled_runs(dit(), torch.compile, cache_first)
    torch.testing.assert_close(fast, expected, rtol=1e-4, atol=1e-4)


# Mistakes.


def test_nothing_to_hook():
    with pytest.raises(FlowkitError, match="nothing to cache in a Linear: it has no ModuleList"):
        enable_taylorseer(nn.Linear(2, 2))
    with pytest.raises(FlowkitError, match="needs a network or a pipeline.*got a dict"):
        enable_taylorseer({})
    with pytest.raises(FlowkitError, match="no attention or MLP found in Moving"):
        enable_taylorseer(moving(1), level="module")
    with pytest.raises(FlowkitError, match="level must be one of block, each, module, got 'lite'"):
        enable_taylorseer(dit(), level="lite")


def test_a_head_that_would_see_nothing():
    net = moving(1, head=lambda h, outputs: h + outputs[0])
    with taylorseer(net, interval=9, level="block"):
        for t in TIMES[:2]:
            net(torch.ones(1, 4), t)
        with pytest.raises(FlowkitError, match='reads blocks whose output is not.*level="each"'):
            net(torch.ones(1, 4), TIMES[2])


def test_by_itself_a_cache_finds_out_what_the_head_sees():
    net, x = moving(1, head=lambda h, outputs: h + outputs[0]).double(), draw(1, 4).double()
    plain = [net(x, t) for t in TIMES]
    with taylorseer(net, interval=9) as cache:
        cached = [net(x, t) for t in TIMES]
    torch.testing.assert_close(cached, plain)
    assert cache.stats.full_steps == [0, 1, 2, 3, 10]


def test_a_pass_without_a_step():
    class Timeless(Blocks):
        def forward(self, x):
            return super().forward(x, 0.0)

    net = Timeless([Moving([1.0]), Moving([2.0])])
    with taylorseer(net) as cache:
        with pytest.raises(FlowkitError, match=r"which step Timeless runs.*with cache.at\(step\)"):
            net(torch.ones(1, 4))
        with cache.at(0):
            net(torch.ones(1, 4))
        with pytest.raises(FlowkitError, match="a step is a whole number from 0 on, got -1"):
            cache.at(-1)
        with pytest.raises(
            FlowkitError, match="stages.1 ran outside of a forward pass of Timeless"
        ):
            net.stages[1](torch.ones(1, 4), 0.0)


def test_two_caches_on_one_model():
    net = dit()
    with taylorseer(net), pytest.raises(FlowkitError, match="has a cache already; disable"):
        enable_taylorseer(net)


def test_a_followed_run_that_is_another():
    net, noise = dit(), draw(1, 1, 8, 8)
    with taylorseer(net) as cache:
        followed = cache.follow(from_diffusers(net), "midpoint", TIMES)
        with pytest.raises(
            FlowkitError, match="evaluation 1 is at t = 0.08.*expected was t = 0.04"
        ):
            sample(followed, noise, TIMES, "euler")


def test_passes_with_other_blocks():
    net = moving(1)
    with taylorseer(net, interval=9, level="block"):
        for t in TIMES[:2]:
            net(torch.ones(1, 4), t)
        net.stages = net.stages[:2]
        with pytest.raises(FlowkitError, match="reads blocks"):
            net(torch.ones(1, 4), TIMES[2])
