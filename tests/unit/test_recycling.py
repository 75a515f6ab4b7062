"""Token Recycling over contexts of several lengths, against a naive reading of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from outrider.config import RecyclingConfig, drafter_config
from outrider.drafting.context_recycling import GREEDY_CHOSEN, GREEDY_SEEN, ContextRecyclingDrafter
from outrider.drafting.context_table import PythonTable, learn_chosen
from outrider.drafting.drafter import DraftContext, DraftOutcome, DraftStyle
from outrider.drafting.recycled_text import FURTHER_RANKS, MAX_OBSERVED, Rates
from outrider.errors import ConfigError
from outrider.sampling.noise import Purpose, gumbel_noise
from outrider.sampling.params import SamplingParams
from outrider.token_tree import TokenTree, VerifiedPath
from outrider.verification.coupled import follow_choices

VOCAB = 12
GREEDY = SamplingParams(temperature=0.0)


def context(
    tokens: Sequence[int], request_id: str = "r", *, params: SamplingParams = GREEDY, max_depth: int = 64
) -> DraftContext:
    return DraftContext(request_id, tokens, len(tokens), 64, max_depth, params, 7, frozenset())


def drafter_of(style: DraftStyle | None = None, **settings: object) -> ContextRecyclingDrafter:
    return ContextRecyclingDrafter(RecyclingConfig(**settings), style or DraftStyle(), VOCAB)  # type: ignore[arg-type]


def logits_of(*rows: Sequence[int]) -> Tensor:
    """Rows of logits in which the given tokens are the likeliest, in their order."""
    logits = torch.zeros(len(rows), VOCAB)
    for row, tokens in zip(logits, rows, strict=True):
        for rank, token in enumerate(tokens):
            row[token] = 9.0 - rank
    return logits


def show(drafter: ContextRecyclingDrafter, tokens: list[int], *candidates: int, request_id: str = "r") -> None:
    """A step without drafts: the target's candidates after these tokens; the first is what came."""
    drafter.propose([context(tokens, request_id)])
    path = VerifiedPath((), candidates[0])
    drafter.observe([DraftOutcome(request_id, TokenTree.root_only(tokens[-1]), path, logits_of(candidates))])


def learn(tables: Sequence[PythonTable], place: Sequence[int], number: int) -> None:
    """One candidate after a place."""
    root = TokenTree.root_only(place[-1])
    learn_chosen(tables, tuple(place), root, np.array([[number]]), np.zeros((1, 1), dtype=np.float32))


def tokens_after(table: PythonTable, context: tuple[int, ...]) -> Sequence[int]:
    found = table.get(context)
    return found.tokens if found else ()


def first_level(tree: TokenTree) -> dict[int, float]:
    """The root's children and their confidences."""
    assert tree.confidences is not None
    return {tree.tokens[node]: tree.confidences[node] for node in tree.children()[0]}


def naive_first_level(text: Sequence[int], lengths: Sequence[int], num_candidates: int) -> dict[int, float]:
    """What followed each suffix of the text before, the latest first; the longest suffix speaks first."""
    found: dict[int, float] = {}
    left = 1.0
    for length in sorted(lengths, reverse=True):
        if length > len(text):
            continue
        suffix = text[len(text) - length :]
        ends = [end for end in range(length, len(text)) if text[end - length : end] == suffix]
        followed = list(dict.fromkeys(text[end] for end in reversed(ends)))[:num_candidates]
        new = [token for token in followed if token not in found][:num_candidates]
        right = GREEDY_SEEN[length]
        rates = [right, *[(1 - right) * share for share in FURTHER_RANKS]][: len(new)]
        found |= {token: left * rate for token, rate in zip(new, rates, strict=True)}
        left *= 1 - sum(rates)
        if len(found) >= num_candidates or left < 0.01:
            break
    likeliest = sorted(found, key=lambda token: -found[token])[:num_candidates]
    return {token: found[token] for token in likeliest if found[token] >= 0.01}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.sampled_from([1, 2, 3, 8]), st.integers(1, 30))
def test_a_text_alone_is_read_as_prompt_lookup_does_with_back_off(
    text: list[int], max_context: int, first: int
) -> None:
    drafter = drafter_of(max_context=max_context, num_candidates=3, depth=1)
    lengths = [length for length in (1, 2, 3, 4, 8) if length <= max_context]
    for end in sorted({min(first, len(text)), len(text)}):  # in one piece or in two
        (tree,) = drafter.propose([context(text[:end])])
        assert first_level(tree) == pytest.approx(naive_first_level(text[:end], lengths, 3))


def test_contexts_tell_places_apart_that_one_token_does_not() -> None:
    for max_context, expected in ((1, (8,)), (2, (6,))):
        drafter = drafter_of(max_context=max_context, num_candidates=1, depth=1)
        show(drafter, [1, 5], 6)
        show(drafter, [2, 5], 8, request_id="other")
        drafter.release("r")
        (tree,) = drafter.propose([context([1, 5], "new")])
        assert tree.tokens[1:] == expected


def test_what_the_target_found_likely_is_kept_for_every_node_verified_or_not() -> None:
    drafter = drafter_of(num_candidates=2, depth=1)
    drafter.propose([context([3, 1])])
    tree = TokenTree((1, 4, 5), (-1, 0, 0))
    drafter.observe([DraftOutcome("r", tree, VerifiedPath((1,), 6), logits_of((4, 5), (6, 7), (8, 9)))])
    right = GREEDY_CHOSEN[3]
    for last, (best, second) in ((4, (6, 7)), (5, (8, 9))):
        (tree,) = drafter.propose([context([3, 1, last], f"r{last}")])
        assert first_level(tree) == pytest.approx({best: right, second: (1 - right) * FURTHER_RANKS[0]})


def test_a_requests_own_text_is_asked_before_what_others_were_told() -> None:
    drafter = drafter_of(num_candidates=1, depth=1)
    show(drafter, [1, 2], 3, request_id="a")
    show(drafter, [1, 2], 4, request_id="b")
    for request_id, expected in (("a", 3), ("b", 4), ("c", 4)):
        (tree,) = drafter.propose([context([1, 2], request_id)])
        assert tree.tokens[1:] == (expected,)
    assert drafter.propose([context([7, 8], "d")])[0].num_nodes == 1
    drafter.propose([context([7, 8, 9], "e")])
    assert drafter.propose([context([7, 8], "f")])[0].num_nodes == 1, "prompts are not shared"


def test_a_release_forgets_the_request_and_no_more() -> None:
    drafter = drafter_of(num_candidates=1, depth=1)
    show(drafter, [1, 2], 3)
    drafter.release("r")
    drafter.release("unknown")
    assert not drafter._requests
    assert drafter.propose([context([1, 2])])[0].tokens == (2, 3)


def test_long_matches_make_deep_chains_and_short_ones_wide_trees() -> None:
    drafter = drafter_of(max_nodes=8)
    text = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    (deep,) = drafter.propose([context([*text, *text[:9]])])
    assert deep.tokens[:4] == (8, 9, 10, 11)
    assert max(deep.depths) == 8
    show(drafter, [3], 4, 5, 6, 7, 8, 9, request_id="s")
    (wide,) = drafter.propose([context([3], "w")])
    assert len(wide.children()[0]) > 3


def test_confidences_become_what_is_kept() -> None:
    """The first candidate comes in one step of four; its confidence starts elsewhere and ends near there."""
    drafter = drafter_of(num_candidates=2, depth=1)
    show(drafter, [1, 2], 3, 4, request_id="first")
    for step in range(400):
        (tree,) = drafter.propose([context([1, 2], f"r{step}")])
        token = 3 if step % 4 == 0 else 5
        logits = logits_of((3, 4), (0, 1), (0, 1))[: tree.num_nodes]
        path = follow_choices(tree, [token] * tree.num_nodes)
        outcome = DraftOutcome(f"r{step}", tree, VerifiedPath((), token), logits)
        assert len(path.accepted_nodes) <= 1
        drafter.observe([outcome])
        drafter.release(f"r{step}")
    (tree,) = drafter.propose([context([1, 2])])
    assert first_level(tree)[3] == pytest.approx(0.25, abs=0.05)
    assert first_level(tree).get(4, 0.0) < 0.02


def test_rates_forget_slowly() -> None:
    rates = Rates([0.5, 0.5])
    for _ in range(10 * MAX_OBSERVED):
        rates.count([8], 9)
    assert rates.by_rank[0] < 0.001
    assert rates.by_rank[1] == 0.5, "no second candidate was proposed"
    for _ in range(2 * MAX_OBSERVED):
        rates.count([8, 9], 8)
    assert rates.by_rank[0] > 0.9
    assert rates.by_rank[1] < 0.02


@pytest.mark.parametrize("noise", ["shared", "independent"])
def test_sampled_requests_rank_by_the_targets_noise_where_it_is_shared(noise) -> None:
    params = SamplingParams(temperature=0.7)
    drafter = drafter_of(DraftStyle(noise=noise), num_candidates=3, depth=2)
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(1))
    first = context([1, 2], "a", params=params)
    drafter.propose([first])
    chain = TokenTree.chain(2, [5])
    drafter.observe([DraftOutcome("a", chain, VerifiedPath((1,), 6), logits)])
    (tree,) = drafter.propose([replace(first, request_id="b")])
    for node, row, position in ((0, logits[0], 2), *((n, logits[1], 3) for n in range(1, tree.num_nodes))):
        children = tree.children()[node]
        if node and tree.tokens[node] != 5:
            continue
        keys = row / 0.7
        if noise == "shared":
            keys = keys + torch.from_numpy(gumbel_noise(7, position, Purpose.TARGET, VOCAB).copy())
        assert [tree.tokens[child] for child in children] == keys.topk(len(children)).indices.tolist()
        assert node or len(children) == 3


def test_steps_that_were_not_shown_do_no_harm() -> None:
    drafter = drafter_of(num_candidates=2, depth=1)
    drafter.propose([context([1, 2, 3])])
    other = TokenTree.root_only(9)  # the request has gone on to another root
    drafter.observe([DraftOutcome("r", other, VerifiedPath((), 4), logits_of((4, 5)))])
    drafter.observe([DraftOutcome("never seen", other, VerifiedPath((), 4), logits_of((4, 5)))])
    (tree,) = drafter.propose([context([1, 2, 3, 8, 8, 9, 4, 1, 2, 3])])
    assert max(first_level(tree), key=lambda token: first_level(tree)[token]) == 8, "the tokens between are learnt"
    assert set(first_level(drafter.propose([context([9], "s")])[0])) == {4, 5}, "the root's context is known"


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), max_size=60), st.integers(6, 20))
def test_a_table_is_bounded_and_keeps_the_newest(places: list[list[int]], capacity: int) -> None:
    table = PythonTable(3, 2, capacity)
    for number, place in enumerate(places):
        learn([table], place, number)
        assert len(table) <= capacity
    newest = {tuple(place)[-length:]: number for number, place in enumerate(places) for length in (1, 2, 3)}
    for place in places[len(places) - capacity // 2 // 3 :]:
        contexts = table.contexts_at(tuple(place))
        assert [tokens_after(table, context) for context in contexts] == [[newest[context]] for context in contexts]
    for token in {place[-1] for place in places}:
        assert table.get((token,)), "single tokens are kept"


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60)), min_size=1, max_size=60), st.integers(6, 20))
def test_places_learnt_together_are_learnt_in_their_order(nodes: list[tuple[int, int]], capacity: int) -> None:
    apart = [PythonTable(3, 2, capacity) for _ in range(2)]
    together = [PythonTable(3, 2, capacity) for _ in range(2)]
    tree = TokenTree(
        tuple(token for token, _ in nodes), (-1, *[parent % node for node, (_, parent) in enumerate(nodes) if node])
    )
    places = [tuple(tree.tokens[n] for n in (0, *tree.path(node)))[-3:] for node in range(tree.num_nodes)]
    for number, place in enumerate(places):
        learn(apart, place, number)
    numbers = np.arange(len(places))[:, None]
    learn_chosen(together, places[0], tree, numbers, np.zeros(numbers.shape, dtype=np.float32))
    for table in together:
        assert len(table) <= capacity
        for place in places[len(places) - capacity // 2 // 3 :]:
            for context in (place[-1:], place):
                assert tokens_after(table, context) == tokens_after(apart[0], context)


def test_limits_and_chains() -> None:
    text = [(i * i + i // 5) % 9 for i in range(120)]
    for style in (DraftStyle(), DraftStyle(chains_only=True)):
        drafter = drafter_of(style, depth=3, max_nodes=7)
        for max_nodes, max_depth in ((64, 64), (5, 64), (64, 2), (0, 64), (64, 0)):
            (tree,) = drafter.propose([replace(context(text, max_depth=max_depth), max_nodes=max_nodes)])
            assert tree.num_nodes - 1 <= min(7, max_nodes)
            assert max(tree.depths) <= min(3, max_depth)
            assert tree.confidences is not None
            assert all(0 <= confidence <= 1 for confidence in tree.confidences)
        (likely,) = drafter.propose([replace(context(text), min_path_prob=0.3)])
        assert all(prob >= 0.3 for prob in likely.path_confidences or ())
    assert all(parent == node - 1 for node, parent in enumerate(tree.parents))


@pytest.mark.parametrize(
    "settings", [{"max_context": 0}, {"max_context": 65}, {"capacity": 63}, {"shape": "wide"}, {"num_candidates": 9}]
)
def test_wrong_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        drafter_config({"method": "recycling", **settings})
