"""Sources of continuations are right, not only harmless: each against a naive reading of its method."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.config import NgramConfig, drafter_config
from outrider.drafting.build import build_drafter
from outrider.drafting.drafter import DraftContext, Drafter, DraftStyle
from outrider.drafting.sources.matches import DISCOUNTS, MAX_LENGTH, NgramIndex, match_length, weighted_paths
from outrider.drafting.sources.ngram import NgramSource
from outrider.sampling.params import SamplingParams
from outrider.token_tree import TokenTree

GREEDY = SamplingParams(temperature=0.0)
CHAINS = DraftStyle(chains_only=True)


def context(
    tokens: Sequence[int], *, prompt: int | None = None, max_nodes: int = 64, max_depth: int = 64, request: str = "r"
) -> DraftContext:
    num_prompt_tokens = len(tokens) if prompt is None else prompt
    return DraftContext(request, tokens, num_prompt_tokens, max_nodes, max_depth, GREEDY, 0, frozenset())


def drafter_of(spec: object, style: DraftStyle | None = None) -> Drafter:
    def no_model(*_: object) -> None:
        raise AssertionError("a lookup drafter has no model")

    config = drafter_config(spec)  # type: ignore[arg-type]
    return build_drafter(config, style or DraftStyle(), vocab_size=100, build_draft_model=no_model)  # type: ignore[arg-type]


def propose(drafter: Drafter, tokens: Sequence[int], **settings: object) -> TokenTree:
    (tree,) = drafter.propose([context(tokens, **settings)])  # type: ignore[arg-type]
    return tree


def paths(tree: TokenTree) -> set[tuple[int, ...]]:
    """Token paths from below the root to each leaf."""
    leaves = set(range(tree.num_nodes)) - set(tree.parents)
    return {tuple(tree.tokens[node] for node in tree.path(leaf)) for leaf in leaves if leaf}


# Matches and their confidences


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.data())
def test_an_index_grown_in_pieces_equals_a_scan(tokens: list[int], data: st.DataObject) -> None:
    index = NgramIndex(1, 3)
    length = 0
    while length < len(tokens):
        length = data.draw(st.integers(length + 1, len(tokens)))
        index.extend(tokens[:length])
    expected: list[tuple[int, int]] = []
    for n in (3, 2, 1):
        suffix = tokens[-n:] if n <= len(tokens) else None
        ends = [e for e in range(len(tokens) - 1, n - 1, -1) if tokens[e - n : e] == suffix]
        expected += [(end, n) for end in ends if end not in [seen for seen, _ in expected]]
    assert list(index.matches(tokens)) == expected


@given(st.lists(st.integers(0, 1), min_size=2, max_size=40), st.data())
def test_match_length_counts_the_agreeing_tokens(tokens: list[int], data: st.DataObject) -> None:
    end = data.draw(st.integers(0, len(tokens) - 1))
    agreeing = 0
    while agreeing < min(end, MAX_LENGTH) and tokens[end - 1 - agreeing] == tokens[-1 - agreeing]:
        agreeing += 1
    assert match_length(tokens, end, tokens, min(agreeing, 2)) == agreeing


def test_confidences_follow_length_and_agreement() -> None:
    (lone,) = weighted_paths([([5, 6], 2)], 4)
    assert lone.confidences == pytest.approx([1 - DISCOUNTS[2], 1 - DISCOUNTS[3]]), "one token longer when right"
    same, other = weighted_paths([([5], 2), ([7], 2), ([5], 2)], 4)
    assert (list(same.tokens), list(other.tokens)) == ([5], [7])
    assert same.confidences == pytest.approx([(2 - DISCOUNTS[2]) / 3])
    assert other.confidences == pytest.approx([(1 - DISCOUNTS[2]) / 3])
    longer, shorter = weighted_paths([([5], 4), ([7], 1)], 4)
    assert longer.confidences == pytest.approx([16 / 18 * (1 - DISCOUNTS[4])])
    assert shorter.confidences == pytest.approx([2 / 18 * (1 - DISCOUNTS[1])])


# Prompt lookup


def test_ngram_copies_what_followed_the_longest_match() -> None:
    drafter = drafter_of({"method": "ngram", "max_ngram": 3, "num_candidates": 1, "depth": 3})
    tree = propose(drafter, [1, 2, 3, 7, 7, 9, 2, 3, 5, 6, 4, 1, 2, 3])
    assert paths(tree) == {(7, 7, 9)}, "the match of three tokens, not the later one of two"


def test_ngram_merges_candidates_into_one_tree() -> None:
    tokens = [1, 2, 5, 6, 1, 2, 5, 7, 1, 2, 8, 1, 2]
    drafter = drafter_of({"method": "ngram", "max_ngram": 2, "num_candidates": 3, "depth": 2, "max_nodes": 8})
    tree = propose(drafter, tokens)
    assert paths(tree) == {(8, 1), (5, 7), (5, 6)}
    assert tree.num_nodes == 1 + 5
    assert tree.tokens[1] == 5, "two of three occurrences agree on it"
    small = propose(drafter, tokens, max_nodes=1)
    assert small.tokens == (2, 5)
    chain = propose(drafter_of("ngram", CHAINS), [1, 2, 5, 1, 2, 6, 1, 2])
    assert chain.num_nodes > 1
    assert all(parent == node - 1 for node, parent in enumerate(chain.parents))


def test_ngram_proposes_nothing_where_nothing_matches_or_nothing_is_wanted() -> None:
    drafter = drafter_of("ngram")
    assert propose(drafter, [1, 2, 3]).num_nodes == 1
    assert propose(drafter, [1, 1, 1, 1], max_depth=0, request="b").num_nodes == 1
    assert propose(drafter, [1, 1, 1, 1], max_nodes=0, request="b").num_nodes == 1


def test_ngram_repeats_a_period() -> None:
    tree = propose(drafter_of({"method": "ngram", "depth": 5}), [9, 1, 2, 1, 2])
    assert (1, 2, 1, 2, 1) in paths(tree)


def test_ngram_forgets_released_requests() -> None:
    source = NgramSource(NgramConfig())
    assert source.continuations(context([1, 2, 1]))
    source.release("r")
    assert not source.continuations(context([4, 5]))
    assert not source._indexes.keys() - {"r"}
