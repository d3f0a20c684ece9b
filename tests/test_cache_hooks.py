"""Feature caches: what is skipped, that the rest comes out as it should, and the handle."""

from __future__ import annotations

import re

import pytest
import torch
from small_networks import Blocks, Moving, distance, dit, draw, moving, randomised
from tiny_pipelines import flux, generate
from torch import nn

from flowkit.adapters import from_diffusers
from flowkit.samplers import sample
from flowkit.samplers.grids import power, uniform
from flowkit.samplers.taylor import enable_taylorseer, step_rehash, taylorseer
from flowkit.velocity import bind

LEVELS = ["block", "each", "module"]
SOLVERS = ["euler", "abm", "midpoint", "heun", "rk4", "fireflow", "unipc"]
TIMES = uniform(12)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# Exactness.


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_interval_1_changes_no_bit(solver, level):
    net, noise = dit(), draw(2, 1, 8, 8)
    velocity = from_diffusers(net)
    plain = sample(velocity, noise, TIMES, solver).x
    with taylorseer(net, interval=1, level=level) as cache:
        assert torch.equal(sample(velocity, noise, TIMES, solver).x, plain)
        assert cache.stats.forecast == 0
        followed = cache.follow(velocity, solver, TIMES)
        assert torch.equal(sample(followed, noise, TIMES, solver).x, plain)
    with taylorseer(net, interval=3, level=level):
        assert not torch.equal(sample(velocity, noise, TIMES, solver).x, plain)
    assert torch.equal(sample(velocity, noise, TIMES, solver).x, plain)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("level", ["block", "each"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_features_that_are_polynomials_are_forecast_exactly(order, level, residual):
    net, x = moving(order).double(), draw(2, 4).double()
    times = power(12)[:-1]  # uneven
    plain = [net(x, t) for t in times]
    with taylorseer(net, interval=4, order=order, warmup=order + 1, level=level, residual=residual):
        cached = [net(x, t) for t in times]
    torch.testing.assert_close(cached, plain)


def test_what_is_skipped_does_not_run():
    for level, ran in (("block", 5), ("each", 5)):
        net = moving(1)
        with taylorseer(net, interval=4, level=level) as cache:
            for t in TIMES[:-1]:
                net(torch.ones(1, 4), t)
        assert cache.stats.full_steps == [0, 1, 5, 9]
        assert cache.stats.forecast_steps == [2, 3, 4, 6, 7, 8, 10, 11]
        assert (cache.stats.computed, cache.stats.forecast) == (4, 8)
        assert [block.runs for block in net.stages] == [ran - 1] * 3


def test_the_residual_is_added_to_the_live_input():
    net = moving(1)
    with taylorseer(net, interval=8, order=0, warmup=1):
        first = net(torch.zeros(1, 4), 0.0)
        moved = net(torch.full((1, 4), 5.0), 0.1)
    torch.testing.assert_close(moved, first + 5)
    with taylorseer(net, interval=8, order=0, warmup=1, residual=False):
        first = net(torch.zeros(1, 4), 0.0)
        moved = net(torch.full((1, 4), 5.0), 0.1)
    torch.testing.assert_close(moved, first)


@pytest.mark.parametrize("level", LEVELS)
def test_order_0_is_plain_reuse(level):
    """FORA (Selvaraju et al., 2024): the outputs of the last full step stand in for the others."""
    net, noise = dit(), draw(2, 1, 8, 8)
    with taylorseer(net, interval=3, order=0, warmup=1, level=level) as cache:
        x = sample(from_diffusers(net), noise, TIMES).x
    with step_rehash(net, steps=range(0, 12, 3), level=level) as again:
        assert torch.equal(sample(from_diffusers(net), noise, TIMES).x, x)
    assert cache.stats.full_steps == again.stats.full_steps == [0, 3, 6, 9]


def test_reuse_at_module_level_is_by_hand():
    net, x, y = dit(), draw(2, 1, 8, 8), draw(2, 1, 8, 8, seed=1)
    parts = [part for block in net.blocks for part in (block.attn, block.mlp)]
    outputs = []
    hooks = [part.register_forward_hook(lambda m, i, out: outputs.append(out)) for part in parts]
    net(x, 0.2)
    for hook in hooks:
        hook.remove()
    hooks = [
        part.register_forward_hook(lambda m, i, out, old=old: old)
        for part, old in zip(parts, outputs, strict=True)
    ]
    expected = net(y, 0.5).sample
    for hook in hooks:
        hook.remove()
    with taylorseer(net, interval=8, order=0, warmup=1, level="module"):
        net(x, 0.2)
        assert torch.equal(net(y, 0.5).sample, expected)


def test_features_that_the_model_writes_into_are_copies():
    def head(h, outputs):
        return h.mul_(2)

    net, x = moving(1, head=head).double(), draw(2, 4).double()
    plain = [net(x, t) for t in TIMES]
    for level, residual in (("block", False), ("block", True)):
        with taylorseer(net, interval=4, level=level, residual=residual):
            torch.testing.assert_close([net(x, t) for t in TIMES], plain)
    with torch.inference_mode(), taylorseer(net, interval=4, residual=False):
        torch.testing.assert_close([net(x, t) for t in TIMES], plain)


def test_blocks_that_write_into_their_input():
    class InPlace(Moving):
        def forward(self, h, t):
            return h.add_(super().forward(0, t))

    def run(net):
        return [net(torch.ones(1, 4).double(), t) for t in TIMES]

    net = Blocks([InPlace([0.1, 0.5]), InPlace([0.3, -0.2])]).double()
    plain = run(net)
    for level in ("block", "each"):
        with taylorseer(net, interval=4, level=level) as cache:
            torch.testing.assert_close(run(net), plain)
            assert cache.stats.full_steps == [0, 1, 5, 9]


def test_norms_that_the_output_reads_are_computed():
    class Sandwich(nn.Module):
        """A norm before the branch and, unlike in most networks, one behind it."""

        def __init__(self):
            super().__init__()
            self.before, self.behind = nn.LayerNorm(8), nn.LayerNorm(8)
            self.mlp = nn.Linear(8, 8)

        def forward(self, h, t):
            return h + t * self.behind(self.mlp(self.before(h)))

    class Plain(Sandwich):
        def forward(self, h, t):
            return h + t * self.mlp(self.before(h).flatten(1).unflatten(1, h.shape[1:]))

    for block in (Sandwich, Plain):  # the one gives NaN, the other an error of shapes
        net, x = Blocks([randomised(block()) for _ in range(2)]), draw(2, 3, 8)
        plain = [net(x, t) for t in TIMES]
        with taylorseer(net, interval=2, level="module") as cache:
            fast = [net(x, t) for t in TIMES]
        assert cache.stats.forecast == 6
        assert all(distance(a, b) < 0.1 for a, b in zip(fast, plain, strict=True))


# The handle.


def test_disable_gives_the_model_back():
    net = dit()
    before = {name: dict(vars(module)) for name, module in net.named_modules()}
    cache = enable_taylorseer(net, level="module")
    sample(from_diffusers(net), draw(1, 1, 8, 8), TIMES)
    assert "forward" in vars(net)
    cache.disable()
    cache.disable()
    for name, module in net.named_modules():
        assert vars(module).keys() == before[name].keys()
    assert cache.stats.computed == 4


def test_a_model_with_a_cache_context_is_given_back_too():
    pipe = flux()
    with taylorseer(pipe):
        generate(pipe, num_inference_steps=4)
    assert "forward" not in vars(pipe.transformer)


def test_a_forward_that_was_wrapped_since_stays():
    net = moving(1)
    cache = enable_taylorseer(net, interval=9)
    ours = net.forward
    net.forward = lambda *args: 2 * ours(*args)
    cache.disable()
    runs = net.stages[0].runs
    for t in TIMES[:5]:
        torch.testing.assert_close(
            net(torch.zeros(1, 4), t), 2 * type(net).forward(net, torch.zeros(1, 4), t)
        )
    assert net.stages[0].runs == runs + 10


def test_the_context_ends_the_cache_whatever_happens():
    net = dit()
    with pytest.raises(ZeroDivisionError), taylorseer(net):
        raise ZeroDivisionError
    assert "forward" not in vars(net)


def test_reset_begins_a_run():
    net, x = moving(1), torch.ones(1, 4)
    with taylorseer(net, interval=9) as cache:
        for t in TIMES[:4]:
            net(x, t)
        cache.reset()
        for t in TIMES[4:8]:
            net(x, t)
        assert cache.stats.full_steps == [0, 1] and cache.stats.computed == 2


def test_summary_says_what_happened():
    net = dit()
    with taylorseer(net, interval=3) as cache:
        sample(from_diffusers(net), draw(1, 1, 8, 8), TIMES)
    assert re.fullmatch(
        r"DiT: 3 blocks as one, order 2 newton; 5 of 12 passes computed, full steps "
        r"\[0, 1, 4, 7, 10\]; 0\.0 MiB kept",
        cache.summary(),
    )


def test_what_is_kept_has_the_size_it_must():
    net, noise = dit(), draw(2, 1, 8, 8)
    tokens = 2 * 16 * 32 * 4  # bytes
    for level, features in (("block", 1), ("each", 3), ("module", 6)):
        for order in (0, 1, 2):
            with taylorseer(net, level=level, order=order) as cache:
                sample(from_diffusers(net), noise, TIMES)
            assert cache.stats.nbytes == features * (order + 1) * tokens


def test_an_adapter_is_its_network():
    net, noise = dit(), draw(1, 1, 8, 8)
    velocity = from_diffusers(net)
    with taylorseer(velocity, interval=3) as cache:
        assert cache.model is net
        sample(bind(velocity), noise, TIMES)
        assert cache.stats.computed == 5


def test_no_gradient_is_kept():
    net, x = dit(), draw(1, 1, 8, 8)
    with torch.enable_grad(), taylorseer(net, interval=9) as cache:
        for t in TIMES[:3]:
            out = net(x, t).sample
        features = [
            v for b in cache._branches.values() for h in b.histories["stack"] for v in h.values
        ]
        assert features and not any(v.requires_grad for v in features)
        out.sum().backward()  # the head's own
