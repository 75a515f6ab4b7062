"""With keyed noise the coupled rule emits, token for token, what plain decoding does, whatever is drafted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outrider.drafting.growth.tree import Draws
from outrider.sampling.noise import Purpose, gumbel_noise
from outrider.sampling.params import SamplingParams
from outrider.sampling.processors import RowContext, process_logits
from outrider.sampling.sampler import KeyedDecisions
from outrider.token_tree import TokenTree, TokenTreeBatch
from outrider.verification.build import build_rule
from outrider.verification.rule import Decisions
from tests.growing_trees import growing_tree
from tests.losslessness.enumeration import emitted_tokens

VOCAB = 7
PROMPT = (3, 1)
NUM_TOKENS = 10
MakeDecisions = Callable[[TokenTreeBatch, Sequence[int], Sequence[int], Sequence[bool]], Decisions]


@dataclass(frozen=True)
class Stream:
    """One request: a random model of its own, its parameters, and a drafter that is `skill` as good as it."""

    model_seed: int
    seed: int
    params: SamplingParams
    skill: float

    def logits(self, tokens: Sequence[int], which: int = 0) -> Tensor:
        rng = np.random.default_rng([self.model_seed, which, *tokens])
        return torch.from_numpy(2.0 * rng.standard_normal(VOCAB)).float()

    def context(self, output: Sequence[int], tree: TokenTree, rows: slice) -> RowContext:
        return RowContext(rows, self.params, [*PROMPT, *output], len(PROMPT), tree, (0,))

    def plain(self) -> list[int]:
        """One token at a time, by the definition: argmax of log p plus the noise of the token's position."""
        output: list[int] = []
        while len(output) < NUM_TOKENS:
            tokens = (*PROMPT, *output)
            root = TokenTree.root_only(tokens[-1])
            row = process_logits(self.logits(tokens)[None], [self.context(output, root, slice(0, 1))])[0].numpy()
            if self.params.temperature > 0:
                row = row + gumbel_noise(self.seed, len(tokens), Purpose.TARGET, VOCAB)
            output.append(int(row.argmax()))
        return output

    def draft(self, output: Sequence[int], rng: np.random.Generator) -> TokenTree:
        """A random tree, part of it drawn by a noisy copy of the target with the target's noise."""
        context = (*PROMPT, *output)
        draws = Draws("shared", "without_replacement")
        tree = growing_tree(draws, context, params=self.params, seed=self.seed)
        for _ in range(int(rng.integers(0, 8))):
            parent = int(rng.integers(1 + tree.num_drafted))
            if rng.random() < 0.7:
                path = (*context, *tree.path_tokens(parent))
                mixed = self.skill * self.logits(path) + (1 - self.skill) * self.logits(path, which=1)
                tree.set_log_weights(parent, mixed.numpy())
                assert len(tree.draw(parent, 2)) == 2
            else:
                tree.add(parent, int(rng.integers(VOCAB)), tree.scores[parent])
        return tree.finished()


def speculative(
    streams: Sequence[Stream], draft_seed: int, make_decisions: MakeDecisions = KeyedDecisions
) -> list[list[int]]:
    """All streams in one batch, each step with random trees, until the slowest has enough tokens."""
    rng = np.random.default_rng(draft_seed)
    outputs: list[list[int]] = [[] for _ in streams]
    while min(map(len, outputs)) < NUM_TOKENS:
        drafts = [stream.draft(output, rng) for stream, output in zip(streams, outputs, strict=True)]
        trees = TokenTreeBatch.from_trees(drafts)
        rows, contexts = [], []
        for index, (stream, output, tree) in enumerate(zip(streams, outputs, drafts, strict=True)):
            paths = [[tree.tokens[n] for n in tree.path(node)] for node in range(tree.num_nodes)]
            rows.extend(stream.logits((*PROMPT, *output, *path)) for path in paths)
            contexts.append(stream.context(output, tree, trees.rows(index)))
        decisions = make_decisions(
            trees,
            [stream.seed for stream in streams],
            [len(PROMPT) + len(output) for output in outputs],
            [stream.params.greedy for stream in streams],
        )
        result = build_rule("coupled").verify(trees, process_logits(torch.stack(rows), contexts), decisions)
        for output, tree, path in zip(outputs, drafts, result.paths, strict=True):
            output.extend(emitted_tokens(tree, path))
    return [output[:NUM_TOKENS] for output in outputs]


def check_invariance(
    streams: Sequence[Stream], draft_seed: int, make_decisions: MakeDecisions = KeyedDecisions
) -> None:
    """Raises AssertionError where a stream's tokens are not those of plain decoding."""
    for stream, tokens in zip(streams, speculative(streams, draft_seed, make_decisions), strict=True):
        assert tokens == stream.plain(), stream


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    presence_penalty=st.sampled_from([0.0, -0.5]),
    min_tokens=st.sampled_from([0, 5]),
    logit_bias=st.sampled_from([{}, {2: 1.5}]),
)
streams_strategy = st.lists(
    st.builds(
        Stream,
        model_seed=st.integers(0, 2**32),
        seed=st.integers(0, 2**64 - 1),
        params=params_strategy,
        skill=st.sampled_from([0.0, 0.7, 1.0]),
    ),
    min_size=1,
    max_size=3,
)


@given(streams=streams_strategy, draft_seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_coupled_rule_emits_what_plain_decoding_emits(streams: list[Stream], draft_seed: int) -> None:
    check_invariance(streams, draft_seed)


def test_perfect_drafter_is_always_accepted() -> None:
    stream = Stream(model_seed=1, seed=5, params=SamplingParams(temperature=0.8), skill=1.0)
    tree = TokenTree.chain(PROMPT[-1], stream.plain()[:6])
    trees = TokenTreeBatch.from_trees([tree])
    rows = torch.stack([stream.logits((*PROMPT, *tree.tokens[1 : node + 1])) for node in range(7)]) / 0.8
    result = build_rule("coupled").verify(trees, rows, KeyedDecisions(trees, [5], [len(PROMPT)], [False]))
    assert result.paths[0].accepted_nodes == tuple(range(1, 7))


class _PositionOfNode(KeyedDecisions):
    """Counts nodes where it should count depths: right for chains alone."""

    @cached_property
    def _node_positions(self) -> list[int]:
        trees = zip(self._trees.trees, self._positions, strict=True)
        return [position + node for tree, position in trees for node in range(tree.num_nodes)]


class _PositionOfRoot(KeyedDecisions):
    """One position for the whole tree."""

    @cached_property
    def _node_positions(self) -> list[int]:
        trees = zip(self._trees.trees, self._positions, strict=True)
        return [position for tree, position in trees for _ in range(tree.num_nodes)]


def _one_late(
    trees: TokenTreeBatch, seeds: Sequence[int], positions: Sequence[int], greedy: Sequence[bool]
) -> Decisions:
    return KeyedDecisions(trees, seeds, [position + 1 for position in positions], greedy)


def _seed_of_first(
    trees: TokenTreeBatch, seeds: Sequence[int], positions: Sequence[int], greedy: Sequence[bool]
) -> Decisions:
    return KeyedDecisions(trees, [seeds[0]] * len(seeds), positions, greedy)


def _greedy_of_first(
    trees: TokenTreeBatch, seeds: Sequence[int], positions: Sequence[int], greedy: Sequence[bool]
) -> Decisions:
    return KeyedDecisions(trees, seeds, positions, [greedy[0]] * len(greedy))


@pytest.mark.parametrize("wrong", [_PositionOfNode, _PositionOfRoot, _one_late, _seed_of_first, _greedy_of_first])
def test_wrong_noise_is_found(wrong: MakeDecisions) -> None:
    temperatures = (1.0, 0.0, 1.0)
    streams = [
        Stream(model_seed=index, seed=index, params=SamplingParams(temperature=temperature), skill=0.7)
        for index, temperature in enumerate(temperatures)
    ]
    check_invariance(streams, draft_seed=0)
    with pytest.raises(AssertionError):
        check_invariance(streams, 0, wrong)


@pytest.mark.parametrize("name", ["rejection", "tree_rejection", "multi_candidate"])
def test_keyed_rejection_samples_the_target(name: str) -> None:
    """The keyed uniforms, residual noise and draft noise are independent: frequencies come out as p."""
    rule = build_rule(name)
    draws = Draws(rule.draft_noise, rule.sibling_draws)
    p = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.3, 0.1, 0.5]])
    q = torch.tensor([0.1, 0.4, 0.4, 0.1])
    counts = np.zeros(4)
    num_samples = 4000
    for seed in range(num_samples):
        growing = growing_tree(draws, [0] * 9, params=SamplingParams(temperature=1.0), seed=seed)
        growing.set_log_weights(0, q.log().numpy())
        growing.draw(0, 1 if rule.chains_only else 3)
        tree = growing.finished()
        rows = torch.stack([p[0], *[p[1]] * (tree.num_nodes - 1)]).log()
        trees = TokenTreeBatch.from_trees([tree])
        path = rule.verify(trees, rows, KeyedDecisions(trees, [seed], [9], [False])).paths[0]
        counts[emitted_tokens(tree, path)[0]] += 1
    expected = num_samples * p[0].numpy()
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, 0.1%
