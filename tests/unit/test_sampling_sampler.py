from __future__ import annotations

import itertools
import math

import pytest
import torch

from outrider.sampling.noise import Purpose, gumbel_noise, uniform
from outrider.sampling.sampler import KeyedDecisions, check_finite
from outrider.token_tree import TokenTree, TokenTreeBatch

TREES = TokenTreeBatch.from_trees([TokenTree((0, 1, 2, 3), (-1, 0, 0, 2)), TokenTree.chain(0, [1])])
DEPTHS = [0, 1, 1, 2, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_choices_are_argmax_of_weights_plus_noise_of_the_position(dtype: torch.dtype) -> None:
    weights = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    decisions = KeyedDecisions(TREES, seeds=[11, 12], positions=[5, 8], greedy=[False, True])
    chosen = decisions.sample(weights, range(6), Purpose.TARGET)
    for node in range(4):
        noise = gumbel_noise(11, 5 + DEPTHS[node], Purpose.TARGET, 9)
        assert chosen[node] == int((weights[node].float().numpy() + noise).argmax())
    assert chosen[4:] == weights[4:].argmax(-1).tolist()
    assert decisions.sample(weights[[3, 1]], [3, 1], Purpose.TARGET) == [chosen[3], chosen[1]]
    assert [decisions.greedy(node) for node in range(6)] == [False] * 4 + [True] * 2


def test_purposes_draw_differently() -> None:
    decisions = KeyedDecisions(TREES, [11, 12], [5, 8], [False, False])
    weights = torch.zeros(6, 1000)
    target, residual = (decisions.sample(weights, range(6), p) for p in (Purpose.TARGET, Purpose.RESIDUAL))
    assert all(a != b for a, b in zip(target, residual, strict=True))


def test_greedy_takes_the_lowest_of_equals_and_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outrider.sampling.sampler.gumbel_noise", None)
    decisions = KeyedDecisions(TREES, [1, 2], [5, 8], [True, True])
    weights = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    assert decisions.sample(weights, [0, 5], Purpose.TARGET) == [1, 0]


def test_sampling_nothing() -> None:
    decisions = KeyedDecisions(TREES, [1, 2], [5, 8], [False, False])
    assert decisions.sample(torch.empty(0, 3), [], Purpose.RESIDUAL) == []


def test_excluded_tokens_are_never_chosen() -> None:
    decisions = KeyedDecisions(TREES, [1, 2], [5, 8], [False, False])
    weights = torch.full((6, 50), -math.inf)
    weights[:, 7] = -1000.0
    assert decisions.sample(weights, range(6), Purpose.TARGET) == [7] * 6


def test_acceptance_uses_the_uniform_of_its_position_and_trial() -> None:
    decisions = KeyedDecisions(TREES, [11, 12], [5, 8], [False, False])
    for node, trial in itertools.product(range(6), range(3)):
        seed, position = (11, 5) if node < 4 else (12, 8)
        u = uniform(seed, position + DEPTHS[node], Purpose.ACCEPT, trial)
        assert decisions.accept(u + 1e-9, node, trial)
        assert not decisions.accept(u, node, trial)
        assert decisions.accept(1.0, node, trial)
        assert not decisions.accept(0.0, node, trial)


def test_check_finite() -> None:
    nan, inf = math.nan, math.inf
    rows = torch.tensor([[1.0, 2.0], [nan, 1.0], [1.0, nan], [inf, 0.0], [-inf, 0.0], [-inf, -inf], [inf, -inf]])
    expected = [True, False, False, False, True, False, False]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert check_finite(rows.to(dtype)).tolist() == expected
    assert check_finite(rows.t().contiguous().t()).tolist() == expected
