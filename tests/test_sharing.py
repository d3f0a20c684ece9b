"""Which steps serve the others best: the dynamic program, and the similarity it is fed."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from flowkit.errors import FlowkitError
from flowkit.samplers.sharing import optimal_sharing, sharing_cost, state_similarity


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_similarity(n, seed):
    """Of a random walk on the sphere: high beside the diagonal, low far from it."""
    walk = draw(n, 6, seed=seed).cumsum(0).double() + 1
    return state_similarity(list(walk[:, None]))


def uniform(n, count):
    return [n * i // count for i in range(count)]


# The dynamic program.


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [1, 2, 5, 9, 12])
def test_no_choice_of_steps_is_cheaper(n, seed):
    similarity = random_similarity(n, seed)
    for count in range(1, n + 1):
        steps = optimal_sharing(similarity, count)
        assert len(steps) == count and steps[0] == 0
        every = ([0, *rest] for rest in combinations(range(1, n), count - 1))
        least = min(sharing_cost(similarity, other) for other in every)
        assert sharing_cost(similarity, steps) == pytest.approx(least, abs=1e-12)


def test_cost_sums_what_each_step_is_off_the_one_that_serves_it():
    similarity = random_similarity(6, 0)
    served = {1: 0, 3: 2, 4: 2, 5: 2}
    want = sum(1 - similarity[k, a].item() for k, a in served.items())
    assert sharing_cost(similarity, [0, 2]) == pytest.approx(want, abs=1e-12)


def test_all_steps_cost_nothing_and_one_is_the_first():
    similarity = random_similarity(8, 1)
    assert optimal_sharing(similarity, 8) == list(range(8))
    assert sharing_cost(similarity, range(8)) == 0
    assert optimal_sharing(similarity, 1) == [0]


def test_cost_falls_with_every_step_and_is_no_more_than_of_even_spacing():
    similarity = random_similarity(40, 2)
    costs = [sharing_cost(similarity, optimal_sharing(similarity, k)) for k in range(1, 41)]
    assert all(more > less for more, less in zip(costs, costs[1:], strict=False))
    even = [sharing_cost(similarity, uniform(40, k)) for k in range(1, 41)]
    assert all(best <= other + 1e-12 for best, other in zip(costs, even, strict=True))
    assert min(b / e for b, e in zip(costs[4:20], even[4:20], strict=True)) < 0.9


def test_states_that_stand_still_cost_nothing_and_ties_go_to_the_earlier():
    state = draw(2, 5, 8)
    similarity = state_similarity([state] * 7)
    for count in range(1, 8):
        steps = optimal_sharing(similarity, count)
        assert sharing_cost(similarity, steps) == pytest.approx(0, abs=1e-12)
        assert steps == list(range(count))


def test_steps_go_where_states_change():
    """Three plateaus, the second twice as long."""
    states = [torch.eye(3)[i][None] for i in (0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2)]
    assert optimal_sharing(state_similarity(states), 3) == [0, 3, 9]


def test_only_what_is_below_the_diagonal_counts():
    similarity = random_similarity(9, 3)
    other = similarity.tril(-1) + torch.full((9, 9), torch.nan).double().triu()
    for count in (2, 4):
        want = optimal_sharing(similarity, count)
        assert optimal_sharing(other, count) == want
        assert optimal_sharing(other.tolist(), count) == want
        assert optimal_sharing(other.numpy(), count) == want
        assert optimal_sharing(3 * similarity - 7, count) == want  # of any scale


@pytest.mark.parametrize("count", [0, 5, 2.0, True, None])
def test_count_of_steps_must_fit(count):
    with pytest.raises(FlowkitError, match="K must be a number of steps from 1 to 4"):
        optimal_sharing(random_similarity(4, 0), count)


@pytest.mark.parametrize(
    "similarity, message",
    [
        (torch.ones(3), r"shape \(N, N\), got \(3,\)"),
        (torch.ones(3, 4), r"shape \(N, N\), got \(3, 4\)"),
        (torch.ones(0, 0), r"shape \(N, N\), got \(0, 0\)"),
        (torch.full((3, 3), torch.nan), "finite"),
        ([[1.0], [1.0, 2.0]], "matrix of numbers, got a list"),
    ],
)
def test_similarity_must_be_square_and_finite(similarity, message):
    with pytest.raises(FlowkitError, match=message):
        optimal_sharing(similarity, 1)


@pytest.mark.parametrize("steps", [[], [1, 2], [0, 2, 2], [0, 4], [0, 1.5], [0, 3, 1]])
def test_steps_must_increase_from_the_first(steps):
    with pytest.raises(FlowkitError, match="increase from 0 and stay below 4"):
        sharing_cost(random_similarity(4, 0), steps)


# What it is fed.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_similarity_is_the_mean_cosine(dtype):
    states = [draw(2, 5, 8, seed=seed).to(dtype) for seed in range(4)]
    similarity = state_similarity(states)
    for i, j in combinations(range(4), 2):
        want = torch.cosine_similarity(states[i].double(), states[j].double(), dim=-1).mean()
        assert similarity[i, j].item() == pytest.approx(want.item(), abs=1e-12)
        assert similarity[j, i].item() == pytest.approx(want.item(), abs=1e-12)
    assert torch.equal(similarity.diagonal(), torch.ones(4).double())


def test_similarity_forgets_lengths_token_by_token():
    states = [draw(2, 5, 8, seed=seed) for seed in range(3)]
    scaled = [state * draw(2, 5, 1, seed=9).abs() for state in states]
    torch.testing.assert_close(state_similarity(scaled), state_similarity(states))


def test_states_must_be_alike():
    for states in ([], [draw(4)], [draw(2, 5, 8), draw(1, 5, 8)]):
        with pytest.raises(FlowkitError, match="one shape"):
            state_similarity(states)
