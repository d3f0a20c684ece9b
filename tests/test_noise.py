"""Noise is a function of (seed, index) alone, and standard normal."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from scipy.stats import kstest

from flowkit.noise import derive_seed, keyed_noise


def test_sample_does_not_depend_on_its_batch():
    whole = keyed_noise(3, range(10), (2, 5))
    assert whole.shape == (10, 2, 5) and whole.dtype == torch.float32
    assert torch.equal(keyed_noise(3, [7, 2, 7], (2, 5)), whole[[7, 2, 7]])
    assert torch.equal(keyed_noise(3, torch.tensor([9]), (10,)), whole[9:].reshape(1, 10))
    assert keyed_noise(3, [], (2, 5)).shape == (0, 2, 5)


def test_values_are_pinned():
    noise = keyed_noise(0, [0, 1], (3,))
    expected = torch.tensor(
        [[0.059911035, 0.015559634, -1.1644385], [-1.431463, 1.6707169, -0.40272397]]
    )
    torch.testing.assert_close(noise, expected, rtol=0, atol=0)


def test_another_process_draws_the_same():
    code = "from flowkit.noise import keyed_noise; print(keyed_noise(5, [11], (4,)).tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(keyed_noise(5, [11], (4,)).tolist())


def test_standard_normal():
    noise = keyed_noise(1, range(2000), (50,)).double()
    n = noise.numel()
    assert abs(noise.mean()) < 5 / math.sqrt(n)
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / n)
    assert kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    # across samples at a fixed place: the keys themselves must not leave a trace
    assert kstest(noise[:, 0].numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("left, right", [((0, 1), (1, 0)), ((0, 0), (0, 1)), ((0, 0), (1, 0))])
def test_other_seed_or_index_is_independent(left, right):
    a, b = (keyed_noise(seed, [index], (10_000,))[0] for seed, index in (left, right))
    assert abs((a * b).mean()) < 5 / math.sqrt(10_000)


def test_full_key_range():
    top = 2**64 - 1
    assert not torch.equal(keyed_noise(top, [0], (4,)), keyed_noise(0, [0], (4,)))
    assert not torch.equal(keyed_noise(0, [top], (4,)), keyed_noise(0, [0], (4,)))


def test_derived_seeds_are_stable_and_distinct():
    assert derive_seed(0, "pairs", 1) == 182975724989201874
    seeds = {derive_seed(s, name, k) for s in range(5) for name in ("a", "b") for k in range(5)}
    assert len(seeds) == 50 and all(0 <= seed < 2**63 for seed in seeds)
