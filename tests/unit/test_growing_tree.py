"""How the children of a node are drawn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from outrider.drafting.growth.tree import GREEDY_SHARPNESS, SAMPLED_SHARPNESS, Draws, GrowingTree
from outrider.sampling.noise import Purpose, gumbel_noise
from outrider.sampling.params import SamplingParams
from outrider.sampling.sampler import KeyedDecisions
from outrider.token_tree import DraftNoise, SiblingDraws, TokenTree, TokenTreeBatch
from tests.growing_trees import growing_tree

CONTEXT = (0, 0, 0)


def draw(
    q: list[float],
    seed: int,
    num_children: int,
    *,
    noise: DraftNoise = "independent",
    draws: SiblingDraws = "without_replacement",
    greedy: bool = False,
) -> list[int]:
    """The children of a root, after a check of all that the tree says of them."""
    params = SamplingParams(temperature=0.0 if greedy else 1.0)
    tree = growing_tree(Draws(noise, draws), CONTEXT, params=params, seed=seed)
    with np.errstate(divide="ignore"):
        log_q = np.log(np.array(q, dtype=np.float32))
    tree.set_log_weights(0, log_q + np.float32(3.0))  # known up to a constant
    nodes = tree.draw(0, num_children)
    assert nodes == list(range(1, len(nodes) + 1))
    assert tree.parents == [-1] + [0] * len(nodes)
    assert tree.depths == [0] + [1] * len(nodes)
    tokens = tree.tokens[1:]
    check_scores(tree, log_q, seed)
    return tokens


def check_scores(tree: GrowingTree, log_q: np.ndarray, seed: int) -> None:
    """Log q of what was sampled, with q itself for the rule; else how likely each is the target's choice."""
    tokens, finished = tree.tokens[1:], tree.finished()
    if tree.is_sampled:
        assert tree.scores[1:] == pytest.approx(log_q[tokens].tolist(), abs=1e-5)
        if tokens:
            assert finished.draft is not None
            assert finished.draft.log_probs[0].exp().numpy() == pytest.approx(np.exp(log_q), abs=1e-6)
        return
    assert finished.draft is None
    if tree.context.params.greedy:
        keys = GREEDY_SHARPNESS * log_q.astype(np.float64)
    else:
        keys = SAMPLED_SHARPNESS * (log_q + gumbel_noise(seed, len(CONTEXT), Purpose.TARGET, len(log_q)))
    expected = keys - np.log(np.exp(keys).sum())
    assert tree.scores[1:] == pytest.approx(expected[tokens].tolist(), abs=1e-5)
    assert tree.confidences[1:] == pytest.approx(np.exp(expected[tokens]).tolist(), abs=1e-5)


@pytest.mark.parametrize("noise", ["shared", "independent"])
def test_gumbel_top_k_draws_in_order_without_replacement(noise: DraftNoise) -> None:
    q = [0.5, 0.25, 0.15, 0.1]
    num_samples = 20_000
    counts = dict.fromkeys(itertools.permutations(range(4), 2), 0)
    for seed in range(num_samples):
        first, second = draw(q, seed, 2, noise=noise)
        counts[first, second] += 1
    expected = {(a, b): num_samples * q[a] * q[b] / (1 - q[a]) for a, b in counts}
    chi_square = sum((counts[pair] - expected[pair]) ** 2 / expected[pair] for pair in counts)
    assert chi_square < 31.3  # 11 degrees of freedom, 0.1%


def test_draws_with_replacement_are_independent() -> None:
    q = [0.5, 0.3, 0.2]
    num_samples = 10_000
    counts = np.zeros((3, 3))
    for seed in range(num_samples):
        first, second = draw(q, seed, 2, draws="with_replacement")
        counts[first, second] += 1
    expected = num_samples * np.outer(q, q)
    assert ((counts - expected) ** 2 / expected).sum() < 26.2  # 8 degrees of freedom, 0.1%


def test_shared_noise_gives_the_targets_own_choice_first() -> None:
    q = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    trees = TokenTreeBatch.from_trees([TokenTree.root_only(0)])
    for seed in range(50):
        choice = KeyedDecisions(trees, [seed], [len(CONTEXT)], [False]).sample(q[None], [0], Purpose.TARGET)
        assert draw(q.exp().tolist(), seed, 3, noise="shared")[:1] == choice
        assert draw(q.exp().tolist(), seed, 1, noise="shared") == choice


def test_shared_noise_is_that_of_the_depth() -> None:
    q = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    trees = TokenTreeBatch.from_trees([TokenTree((0, 1, 2, 3), (-1, 0, 0, 2))])
    for seed in range(50):
        tree = growing_tree(Draws("shared", None), CONTEXT, params=SamplingParams(temperature=1.0), seed=seed)
        for parent, token in ((0, 1), (0, 2), (2, 3)):
            tree.add(parent, token, 0.0)
        decisions = KeyedDecisions(trees, [seed], [len(CONTEXT)], [False])
        for node in range(4):
            tree.set_log_weights(node, q.numpy())
            (child,) = tree.draw(node, 1)
            assert [tree.tokens[child]] == decisions.sample(q[None], [node], Purpose.TARGET)


@pytest.mark.parametrize("draws", ["with_replacement", "without_replacement"])
def test_greedy_children_are_the_most_probable(draws: SiblingDraws) -> None:
    assert draw([0.1, 0.3, 0.4, 0.2], 5, 3, draws=draws, greedy=True) == [2, 1, 3]
    assert draw([0.3, 0.4, 0.4 - 0.1, 0.0], 5, 1, draws=draws, greedy=True) == [1]


@pytest.mark.parametrize("num_children", [1, 2, 3])
def test_of_equals_the_lowest_id_comes_first(num_children: int) -> None:
    assert draw([0.1, 0.3, 0.3, 0.3], 5, num_children, greedy=True) == [1, 2, 3][:num_children]


def test_impossible_children_are_left_out() -> None:
    assert sorted(draw([0.0, 0.7, 0.3], 5, 3)) == [1, 2]
    assert draw([0.0, 1.0, 0.0], 5, 2, greedy=True) == [1]
    assert draw([0.0, 1.0, 0.0], 5, 3, noise="shared") == [1]
    assert draw([0.0, 1.0, 0.0], 5, 3, draws="with_replacement") == [1, 1, 1]
    assert len(draw([0.25] * 4, 5, 9)) == 4


@pytest.mark.parametrize("noise", ["shared", "independent"])
@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("draws", ["with_replacement", "without_replacement"])
def test_unsound_drafters_draw_nothing(noise: DraftNoise, greedy: bool, draws: SiblingDraws) -> None:
    params = SamplingParams(temperature=0.0 if greedy else 1.0)
    tree = growing_tree(Draws(noise, draws), CONTEXT, params=params, seed=1)
    tree.set_log_weights(0, np.full(5, math.nan, dtype=np.float32))
    assert tree.draw(0, 2) == []
    assert tree.num_drafted == 0
    assert tree.finished().tokens == (0,)
