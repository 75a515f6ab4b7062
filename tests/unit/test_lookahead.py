"""Lookahead decoding against the paper's definitions: attention by mask, n-grams by trajectory, LRU by key."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.config import LookaheadConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, DraftStyle
from outrider.drafting.lookahead import LookaheadDrafter, NgramPool
from outrider.errors import ConfigError
from outrider.sampling.params import SamplingParams
from outrider.token_tree import TokenTree, VerifiedPath
from tests.losslessness import engine_harness
from tests.losslessness.engine_harness import make_engine, make_request, run
from tests.toy_model import ToyModel
from tests.unit.test_jacobi import GREEDY, PROMPT, SAMPLED, VOCAB, Choose, solution, target

LENGTH = 40


def context(tokens: Sequence[int], *, max_nodes: int = 500, max_depth: int = 500) -> DraftContext:
    return DraftContext("r", tokens, len(tokens), max_nodes, max_depth, GREEDY, 0, frozenset())


def leaves(tree: TokenTree) -> set[tuple[int, ...]]:
    ends = set(range(tree.num_nodes)) - set(tree.parents)
    return {tuple(tree.tokens[node] for node in tree.path(end)) for end in ends if end}


def maximal(paths: Sequence[Sequence[int]]) -> set[tuple[int, ...]]:
    """Paths that are no other one's beginning: the leaves of their tree."""
    whole = {tuple(path) for path in paths}
    return {p for p in whole if p and not any(q != p and q[: len(p)] == p for q in whole)}


class NaiveLookahead:
    """The paper's window on lists, each token of the window computed from the tokens that its mask shows."""

    def __init__(self, choose: Choose, config: LookaheadConfig) -> None:
        self.choose, self.config = choose, config
        self.pool: list[tuple[int, ...]] = []  # n-grams, the most recently seen last
        self.levels: list[dict[int, int]] = [{}]  # by column; 0 stands where nothing was computed yet
        self.text = list(PROMPT)
        self.num_pooled = 0

    def remember(self, ngram: tuple[int, ...]) -> None:
        self.pool = [other for other in self.pool if other != ngram] + [ngram]
        alike = [other for other in self.pool if other[0] == ngram[0]]
        if len(alike) > self.config.guesses:
            self.pool.remove(alike[0])

    def step(self, truth: Sequence[int]) -> set[tuple[int, ...]]:
        """Returns the leaves of the tree that is to be verified, and moves on along `truth`."""
        config, text = self.config, self.text
        if config.text_ngrams:
            for end in range(max(self.num_pooled + 1, config.ngram), len(text) + 1):
                self.remember(tuple(text[end - config.ngram : end]))
            self.num_pooled = len(text)
        num_levels = len(self.levels)
        num_columns = config.window + config.ngram - 1 - num_levels
        # levels[j][c]: column c's token of level j, at depth c + j; column 0 of level 0 is the root.
        columns = []
        for column in range(num_columns):
            heads = [self.levels[0].get(c, 0) for c in range(1, column + 1)]
            columns.append(heads + [self.levels[level].get(column, 0) for level in range(1, num_levels)])
        guesses = [ngram[1:] for ngram in reversed(self.pool) if ngram[0] == text[-1]]
        deepest = len(PROMPT) + LENGTH - len(text) - 1
        fitting = [path for column, path in enumerate(columns) if column + num_levels - 1 <= deepest]
        drafts = maximal([*(guess[:deepest] for guess in guesses), *fitting])
        accepted = max(
            sum(all(path[i] == truth[i] for i in range(d + 1)) for d in range(len(path))) for path in [*drafts, ()]
        )
        new = {column: self.choose([*text, *path]) for column, path in enumerate(fitting)}
        if new and num_levels == config.ngram - 1:
            for column, path in enumerate(fitting):
                first = text[-1] if column == 0 else path[column - 1]
                self.remember((first, *path[column:], new[column]))
        if new:
            is_full = num_levels == config.ngram - 1
            by = accepted if is_full else accepted + 1  # level 1, now level 0, stands one further anyway
            self.levels = [
                {c - by: level.get(c, 0) for c in new if c >= by} for level in (*self.levels[is_full:], new)
            ]
        self.text += truth[: accepted + 1]
        return drafts


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "config",
    [
        LookaheadConfig(window=5, ngram=4, guesses=3, text_ngrams=False, initial="zero"),
        LookaheadConfig(window=3, ngram=3, guesses=2, initial="zero"),
        LookaheadConfig(window=4, ngram=2, guesses=3, text_ngrams=False, initial="zero"),
        LookaheadConfig(window=1, ngram=3, guesses=4, initial="zero"),
        LookaheadConfig(window=7, ngram=5, guesses=7, text_ngrams=False, initial="zero"),
    ],
    ids=lambda config: f"{config.window}-{config.ngram}-{config.guesses}",
)
def test_every_step_verifies_what_the_paper_says(
    config: LookaheadConfig, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engine_harness.CATALOGUE, "under test", config)
    engine = make_engine("under test", model=ToyModel(VOCAB, memory=0.0))
    right, trees = engine.drafter.propose, []

    def propose(contexts: Sequence[DraftContext]) -> list[TokenTree]:
        trees.extend(right(contexts))
        return trees[-1:]

    monkeypatch.setattr(engine.drafter, "propose", propose)
    request = make_request("r", PROMPT, params, ToyModel(VOCAB))
    run(engine, [request])
    choose = target(params)
    expected = solution(choose)
    assert request.output_token_ids == expected
    naive = NaiveLookahead(choose, config)
    for tree in trees:
        num_known = len(naive.text) - len(PROMPT)
        assert leaves(tree) == naive.step(expected[num_known:])
        assert tree.num_nodes - 1 <= engine.drafter.max_nodes
        assert tree.confidences is None
    assert len(naive.text) - len(PROMPT) == LENGTH


def test_the_window_is_the_papers() -> None:
    """W = 3, N = 4 from the start: levels are added one a step, then the oldest goes."""
    config = LookaheadConfig(window=3, ngram=4, guesses=2, text_ngrams=False, initial="zero")
    drafter = LookaheadDrafter(config, DraftStyle(), 100)
    text, next_choice = [1], iter(range(10, 1000))
    seen: list[tuple[set, list]] = []
    for _ in range(5):
        (tree,) = drafter.propose([context(text)])
        choices = [next(next_choice) for _ in range(tree.num_nodes)]
        window = drafter._requests["r"].window
        seen.append((leaves(tree), [list(level) for level in window.levels]))
        drafter.observe([DraftOutcome("r", tree, VerifiedPath((), choices[0]), None, tuple(choices))])
        text.append(choices[0])
    # 0: a chain of W + N - 3 guesses; nodes 0..4 get choices 10..14.
    assert seen[0] == ({(0, 0, 0, 0)}, [[0, 0, 0, 0]])
    # 1: the root is 10. Below it three old guesses, below each of the four heads the choice after it.
    assert seen[1][1] == [[0, 0, 0], [11, 12, 13, 14]]
    assert seen[1][0] == {(11,), (0, 12), (0, 0, 13), (0, 0, 0, 14)}
    assert [len(level) for level in seen[2][1]] == [2, 3, 3]
    assert seen[2][1][:2] == [[0, 0], [12, 13, 14]]
    # 3: full. Level 0 is forgotten: its successors in columns 1 and 2 are the new heads.
    assert [len(level) for level in seen[3][1]] == [2, 3, 3]
    assert seen[3][1][0] == [13, 14]
    assert seen[3][1][1] == seen[2][1][2]
    assert seen[4][1][1] == seen[3][1][2]
    pool = drafter._requests["r"].pool
    old = seen[2][1]
    assert pool.get(text[2]) == [(old[1][0], old[2][0], seen[3][1][2][0])]


def test_a_window_that_still_grows_moves_on_with_the_text() -> None:
    config = LookaheadConfig(window=2, ngram=4, guesses=1, text_ngrams=False, initial="zero")
    drafter = LookaheadDrafter(config, DraftStyle(), 100)
    (tree,) = drafter.propose([context([1])])
    assert tree.tokens == (1, 0, 0, 0)
    drafter.observe([DraftOutcome("r", tree, VerifiedPath((1,), 5), None, (0, 5, 6, 7))])  # two tokens: 0 5
    drafter.propose([context([1, 0, 5])])
    # 5 took the second guess's place, whose successor was computed as 6; the third guess, 0, had 7.
    assert drafter._requests["r"].window.levels == [[0, 0], [6, 7, 0]]


def test_guesses_come_first_and_columns_as_far_as_they_fit() -> None:
    config = LookaheadConfig(window=4, ngram=3, guesses=2, initial="zero")
    drafter = LookaheadDrafter(config, DraftStyle(), 100)
    text = [7, 8, 9, 5, 7, 6, 5, 7]
    (tree,) = drafter.propose([context(text, max_nodes=6)])
    assert tree.tokens == (7, 6, 5, 8, 9, 0, 0), "the n-gram seen last first"
    (tree,) = drafter.propose([context(text, max_depth=1)])
    assert leaves(tree) == {(6,), (8,), (0,)}
    assert drafter.propose([context(text, max_nodes=3)])[0].num_nodes == 4
    assert drafter.propose([context(text, max_nodes=0)])[0].num_nodes == 1
    assert drafter.propose([context(text, max_depth=0)])[0].num_nodes == 1


def test_columns_that_were_not_verified_are_guessed_anew() -> None:
    config = LookaheadConfig(window=3, ngram=2, guesses=1, text_ngrams=False, initial="zero")
    drafter = LookaheadDrafter(config, DraftStyle(), 100)
    drafter.propose([context([1])])
    part = TokenTree.chain(1, [0])  # of the chain 0 0
    drafter.observe([DraftOutcome("r", part, VerifiedPath((), 5), None, (5, 6))])
    (tree,) = drafter.propose([context([1, 5])])
    assert tree.tokens == (5, 6, 0)
    drafter.observe([DraftOutcome("r", TokenTree.root_only(5), VerifiedPath((), 9), None, (9,))])
    (tree,) = drafter.propose([context([1, 5, 9])])
    assert tree.tokens == (9, 0, 0)


def test_rules_that_take_chains_get_one_ngram_of_the_text() -> None:
    style = DraftStyle("independent", chains_only=True)
    drafter = LookaheadDrafter(LookaheadConfig(ngram=3, guesses=4), style, 100)
    assert not drafter.reads_logits
    assert drafter.max_nodes == 2
    (tree,) = drafter.propose([context([7, 8, 9, 5, 7, 6, 5, 7])])
    assert tree.tokens == (7, 6, 5)
    drafter.observe([DraftOutcome("r", tree, VerifiedPath((), 5), None)])
    with pytest.raises(ConfigError, match="text_ngrams=False"):
        LookaheadDrafter(LookaheadConfig(text_ngrams=False), style, 100)


def test_rejection_rules_at_a_temperature_advance_by_the_most_probable_tokens() -> None:
    config = LookaheadConfig(window=3, ngram=2, guesses=1, text_ngrams=False, initial="zero")
    assert not LookaheadDrafter(config, DraftStyle(), 10).reads_logits
    drafter = LookaheadDrafter(config, DraftStyle("independent"), 10)
    assert drafter.reads_logits
    (tree,) = drafter.propose([context([1])])
    drafter.observe([DraftOutcome("r", tree, VerifiedPath((), 9), torch.eye(10)[[5, 6, 7]])])
    assert drafter.propose([context([1, 9])])[0].tokens == (9, 6, 7)


def test_a_release_forgets() -> None:
    drafter = LookaheadDrafter(LookaheadConfig(), DraftStyle(), 100)
    drafter.propose([context([1, 2, 3])])
    drafter.release("r")
    drafter.release("unknown")
    assert not drafter._requests


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=60), st.integers(1, 4), st.integers(1, 3))
def test_the_pool_forgets_what_was_not_seen_for_longest(
    ngrams: list[tuple[int, int]], max_keys: int, max_per_key: int
) -> None:
    pool = NgramPool(max_keys, max_per_key)
    kept: dict[int, list[int]] = {}  # keys and tails, the most recent last
    for first, tail in ngrams:
        pool.add(first, (tail,))
        tails = [t for t in kept.pop(first, []) if t != tail]
        kept[first] = [*tails, tail][-max_per_key:]
        if len(kept) > max_keys:
            del kept[next(iter(kept))]
        assert len(pool) <= max_keys * max_per_key
    for first in range(5):
        found = [tail for (tail,) in pool.get(first)]
        assert found == kept.get(first, [])[::-1]


def test_a_key_that_is_looked_up_is_not_forgotten() -> None:
    pool = NgramPool(2, 1)
    pool.add(1, (5,))
    pool.add(2, (5,))
    assert pool.get(1) == [(5,)]
    pool.add(3, (5,))
    assert pool.get(1) == [(5,)]
    assert pool.get(2) == []


@pytest.mark.parametrize(
    "values", [{"window": 0}, {"ngram": 1}, {"guesses": 0}, {"max_keys": 0}, {"text_ngrams": 1}, {"initial": "x"}]
)
def test_wrong_settings_are_refused(values: dict) -> None:
    with pytest.raises(ConfigError, match=f"lookahead.{next(iter(values))}"):
        LookaheadConfig(**values)
