"""The index of a pair store, the coding of its data, and what counts as noise."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flowkit.errors import FlowkitError
from flowkit.noise import keyed_noise
from flowkit.pair_format import PairIndex, TensorSpec, check_noise, decode, encode

INDEX = PairIndex(
    shape=(2, 4, 4),
    num_pairs=150,  # 8 shards, the last of 10 pairs; chunks of 8, 8, 4
    seed=7,
    shard_size=20,
    chunk_size=8,
    cond={"class_labels": TensorSpec("int64"), "embedding": TensorSpec("float16", (3,))},
    source={"solver": "euler", "times": (0.0, 0.5, 1.0), "model": {"sha256": "ab"}},
)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"shape": (2, 0)}, "shape"),
        ({"shape": ()}, "shape"),
        ({"num_pairs": 0}, "num_pairs"),
        ({"seed": -1}, "seed"),
        ({"chunk_size": 21}, "chunk_size"),
        ({"noise": "seed"}, "noise"),
        ({"dtype": "int8"}, "dtype"),
        ({"cond": {"data": TensorSpec("int64")}}, "cond"),
        ({"cond": {"labels": TensorSpec("long")}}, "cond.labels"),
        ({"source": {"x": float("nan")}}, "source"),
        ({"convention": 2}, "convention"),
    ],
)
def test_bad_index(change, named):
    with pytest.raises(FlowkitError, match=named):
        dataclasses.replace(INDEX, **change)


def test_index_round_trip():
    assert PairIndex.from_json(INDEX.to_json()) == INDEX


def test_first_difference_names_the_field_and_both_values():
    other = dataclasses.replace(INDEX, source=dict(INDEX.source, solver="heun"))
    assert INDEX.first_difference(INDEX) is None
    assert INDEX.first_difference(other) == "source.solver: euler != heun"
    assert INDEX.digest != other.digest


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"convention": 1}', '{"convention": 1, "x": 0}'])
def test_not_an_index(text):
    with pytest.raises(FlowkitError, match="not the index of a pair store"):
        PairIndex.from_json(text)


def test_shards_cover_all_pairs_once():
    covered = [i for shard in range(INDEX.num_shards) for i in INDEX.pairs_of(shard)]
    assert covered == list(range(150)) and len(INDEX.pairs_of(7)) == 10


def test_uint8_is_exact_on_the_grid_and_clips_overshoot():
    grid = torch.arange(256).reshape(1, 256)
    assert torch.equal(encode(decode(grid.to(torch.uint8)), "uint8"), grid)
    pictures = torch.linspace(-1.1, 1.1, 1001).reshape(1, 1001)
    back = decode(encode(pictures, "uint8"))
    torch.testing.assert_close(back, pictures.clamp(-1, 1), rtol=0, atol=0.5 / 127.5 + 1e-6)
    assert back.min() == -1 and back.max() == 1


def test_uint8_refuses_latents_and_takes_a_rough_teachers_pictures():
    noise = keyed_noise(0, range(8), (4, 8, 8))
    with pytest.raises(FlowkitError, match="pictures in .* use float16 or float32"):
        encode(noise, "uint8")
    encode(-1 + 0.2 * noise, "uint8")  # a flat background, badly fitted


SMOOTH = keyed_noise(1, range(64), (1, 8, 8)).cumsum(3) / torch.arange(1, 9).sqrt()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("count", [1, 4, 512])
def test_noise_passes(count, exact):
    for seed in range(50):
        check_noise(keyed_noise(seed, range(count), (2,)), torch.zeros(count, 2), exact=exact)
        noise = keyed_noise(seed, range(count), (1, 4, 4))
        check_noise(noise, torch.zeros(count, 1, 4, 4), exact=exact)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda z: z + 0.25, "mean 0.2"),
        (lambda z: 0.9 * z, "variance 0.8"),
        (lambda z: SMOOTH, "correlation 0.8"),
    ],
)
def test_drawn_noise_is_held_to_chance(change, named):
    noise = change(keyed_noise(0, range(64), (1, 8, 8)))
    with pytest.raises(FlowkitError, match=f"not standard normal: .*{named}"):
        check_noise(noise, torch.zeros_like(noise), exact=True)


def test_inverted_noise_may_be_a_little_off():
    noise = 0.9 * keyed_noise(0, range(64), (1, 8, 8)) + 0.1
    noise[..., 0] = 0  # inverting a constant border gives a constant
    check_noise(noise, torch.full_like(noise, -1), exact=False)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("data", [SMOOTH, SMOOTH.tanh(), torch.linspace(-1, 0, 64).expand(64, 64)])
def test_swap_is_seen(data, exact):  # SMOOTH has mean 0 and variance 1, as latents have
    noise = keyed_noise(0, range(64), data.shape[1:])
    check_noise(noise, data, exact=exact)
    with pytest.raises(FlowkitError, match="noise and data are swapped"):
        check_noise(data, noise, exact=exact)
