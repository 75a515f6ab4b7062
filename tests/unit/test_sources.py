"""Sources of continuations are right, not only harmless: each against a naive reading of its method."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.bench.replay import Recording, ReplayResult, replay
from outrider.config import HistoryConfig, NgramConfig, drafter_config
from outrider.drafting.build import TargetParts, build_drafter
from outrider.drafting.drafter import DraftContext, Drafter, DraftOutcome, DraftStyle, FinishedText
from outrider.drafting.forward_cost import ForwardCost
from outrider.drafting.sources.anpd import PythonModel
from outrider.drafting.sources.calibration import CalibratedSource
from outrider.drafting.sources.hash_index import PythonIndex, new_index
from outrider.drafting.sources.hierarchy import HierarchyDrafter
from outrider.drafting.sources.history import HistorySource, HistoryStore
from outrider.drafting.sources.matches import DISCOUNTS, MAX_LENGTH, match_length, weighted_paths
from outrider.drafting.sources.ngram import NgramSource
from outrider.drafting.sources.trigrams import PythonMatrix, SearchLimits, new_matrix, predict, search
from outrider.drafting.tree_merge import WeightedPath
from outrider.errors import ConfigError
from outrider.sampling.params import SamplingParams
from outrider.token_tree import TokenTree, VerifiedPath
from outrider.verification.coupled import follow_choices

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
    return build_drafter(
        config, style or DraftStyle(), TargetParts(100, lambda: bytes(32), no_model, ForwardCost.unknown)
    )  # type: ignore[arg-type]


def propose(drafter: Drafter, tokens: Sequence[int], **settings: object) -> TokenTree:
    (tree,) = drafter.propose([context(tokens, **settings)])  # type: ignore[arg-type]
    return tree


def paths(tree: TokenTree) -> set[tuple[int, ...]]:
    """Token paths from below the root to each leaf."""
    leaves = set(range(tree.num_nodes)) - set(tree.parents)
    return {tuple(tree.tokens[node] for node in tree.path(leaf)) for leaf in leaves if leaf}


# Matches and their confidences


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


# Adaptive n-grams


def naive_prediction(text: Sequence[int], suffix: Sequence[int], levels: Sequence[int]) -> list[int]:
    """All that followed the longest known suffix, the most frequent first, of equals the latest."""
    for level in levels:
        wanted = tuple(suffix[-level:])
        seen = [text[i] for i in range(level, len(text)) if tuple(text[i - level : i]) == wanted]
        if len(suffix) >= level and seen:
            latest = {token: position for position, token in enumerate(seen)}
            return sorted(latest, key=lambda token: (-seen.count(token), -latest[token]))
    return []


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.data())
def test_anpd_predicts_by_the_longest_known_level(tokens: list[int], data: st.DataObject) -> None:
    model, levels = PythonModel((3, 2, 1)), (3, 2, 1)
    model.extend(tokens[: data.draw(st.integers(0, len(tokens)))])
    model.extend(tokens)
    predicted = model.predict(tuple(tokens[-3:]), 8)
    expected = naive_prediction(tokens, tokens[-3:], levels)
    assert [token for token, _ in predicted if token in expected] == expected
    assert sum(probability for _, probability in predicted) <= 1 + 1e-9
    assert all(first[1] >= second[1] > 0 for first, second in pairwise(predicted))


def test_anpd_backs_off_with_the_discount() -> None:
    model = PythonModel((2, 1))
    model.extend([1, 2, 5, 3, 2, 6, 1, 2])
    assert model.predict((1, 2), 8) == [
        (5, pytest.approx(1 - DISCOUNTS[2])),
        (6, pytest.approx(DISCOUNTS[2] * (1 - DISCOUNTS[1]))),
    ]


def test_anpd_predicts_every_token_anew_and_learns_what_was_generated() -> None:
    """After 1 2 comes 3, after 2 3 comes 4: no single place in the text has 3 and 4 behind 1 2."""
    drafter = drafter_of({"method": "anpd", "levels": [2], "num_candidates": 1, "depth": 2})
    text = [1, 2, 3, 9, 8, 2, 3, 4, 7, 8, 2, 3, 4, 7, 1, 2]
    assert paths(propose(drafter, text)) == {(3, 4)}
    assert propose(drafter_of({"method": "anpd", "levels": [2]}), [5, 6, 7]).num_nodes == 1
    assert paths(propose(drafter, [*text, 3, 5, 6, 3, 5])) == {(6, 3)}, "learnt online"


# Tri-gram statistics


def outcome_of(tree: TokenTree, accepted: tuple[int, ...], choices: tuple[int, ...]) -> DraftOutcome:
    last = accepted[-1] if accepted else 0
    return DraftOutcome("r", tree, VerifiedPath(accepted, choices[last]), None, choices)


def test_aded_moves_probabilities_towards_what_is_seen() -> None:
    matrix = PythonMatrix(capacity=100, num_candidates=2, rate=0.5)
    matrix.learn(1, 2, 3)
    assert dict(predict([matrix], 1, 2)) == {3: pytest.approx(0.5)}
    matrix.learn(1, 2, 4)
    assert dict(predict([matrix], 1, 2)) == {4: pytest.approx(0.5), 3: pytest.approx(0.25)}
    assert predict([matrix], 9, 2)[0][0] == 4, "an unseen pair falls back on its last token"
    matrix.learn(1, 2, 5)
    assert set(
        matrix.row(
            (
                1,
                2,
            )
        )
    ) == {4, 5}, "the least likely candidate made place"


def test_aded_keeps_the_rows_updated_last() -> None:
    matrix = PythonMatrix(capacity=4, num_candidates=2, rate=0.5)
    for token in range(50):
        matrix.learn(token, token + 1, token + 2)
    assert len(matrix) == 4
    assert matrix.row(
        (
            49,
            50,
        )
    )
    assert not matrix.row(
        (
            0,
            1,
        )
    )


def test_aded_without_exploration_takes_the_likeliest_nodes() -> None:
    """Against the whole tree of what the matrix knows, the likeliest nodes taken."""
    matrix = PythonMatrix(capacity=1000, num_candidates=3, rate=0.4)
    text = [(i * i + i // 3) % 7 for i in range(60)]
    for position in range(2, len(text)):
        matrix.learn(text[position - 2], text[position - 1], text[position])
    every: dict[tuple[int, ...], float] = {}

    def expand(path: tuple[int, ...], probability: float) -> None:
        before, last = (text[-2:] + list(path))[-2:]
        for token, confidence in predict([matrix], before, last)[:3] if len(path) < 4 else ():
            every[(*path, token)] = probability * confidence
            expand((*path, token), probability * confidence)

    expand((), 1.0)
    best = sorted(every.values(), reverse=True)[:12]
    found = search([matrix], text[-2], text[-1], SearchLimits(3, 0.0, 12, 4, 1e-9))
    nodes = {tuple(path.tokens[:n]) for path in found for n in range(1, len(path.tokens) + 1)}
    assert len(nodes) == 12
    assert sorted((every[node] for node in nodes), reverse=True) == pytest.approx(best)


def test_aded_explores_more_with_a_greater_weight() -> None:
    matrix = new_matrix(1000, 8, 0.3)
    for token in (5, 6, 7, 8, 9):
        matrix.learn(1, 2, token)
        for below in range(9):  # what follows each of them is all but sure
            for _ in range(9):
                matrix.learn(
                    2 if below == 0 else token + 10 * (below - 1), token + 10 * below, token + 10 * below + 10
                )

    def first_tokens(exploration: float) -> int:
        found = search([matrix], 1, 2, SearchLimits(8, exploration, 10, 8, 1e-9))
        return len({path.tokens[0] for path in found})

    assert 1 < first_tokens(0.0) < first_tokens(5.0)


def test_aded_learns_choices_at_rejected_nodes_and_keeps_them_after_the_request() -> None:
    drafter = drafter_of({"method": "aded", "depth": 1})
    tree = TokenTree((1, 2, 3), (-1, 0, 0))
    drafter.observe([outcome_of(tree, (1,), (2, 7, 9))])
    drafter.release("r")
    assert paths(propose(drafter, [4, 1, 3], request="b")) == {(9,)}
    assert propose(drafter, [4, 1, 2], request="c").num_nodes == 1, "accepted tokens are learnt from the context"


def test_aded_asks_the_requests_own_matrix_first() -> None:
    drafter = drafter_of({"method": "aded", "depth": 1, "max_nodes": 1})
    propose(drafter, [1, 2, 3, 9], request="a")
    for other in range(5):
        propose(drafter, [1, 2, 7, 9], request=f"other {other}")
    assert paths(propose(drafter, [1, 2, 3, 9, 1, 2], request="a")) == {(3,)}
    assert paths(propose(drafter, [1, 2], request="b")) == {(7,)}


def test_aded_begins_with_a_corpus() -> None:
    drafter = drafter_of({"method": "aded", "references": [[1, 2, 3, 4]], "depth": 2})
    assert (3, 4) in paths(propose(drafter, [1, 2]))


# Copying


@pytest.mark.parametrize("new", [new_index, PythonIndex])
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.data())
def test_an_index_grown_in_pieces_equals_a_scan(new, tokens: list[int], data: st.DataObject) -> None:
    lengths = data.draw(st.sampled_from([(3, 1), (3, 2, 1), (20, 2)]))
    index = new(lengths)
    while len(index) < len(tokens):
        length = data.draw(st.integers(len(index) + 1, len(tokens)))
        index.append(tokens[len(index) : length])
    ends: list[int] = []
    for n in lengths:
        suffix = tokens[-n:] if n <= len(tokens) else None
        new_ends = [e for e in range(len(tokens) - 1, n - 1, -1) if tokens[e - n : e] == suffix]
        ends += [end for end in new_ends if end not in ends]
    expected = [(tokens[end : end + 4], match_length(tokens, end, tokens, 0)) for end in ends]
    found = index.copies(tokens, 4, per_length=100, most=1000, periodic=False)
    assert [(list(path), length) for path, length in found] == expected


def test_copy_takes_a_block_from_a_reference() -> None:
    reference = [1, 2, 3, 4, 5, 6, 7]
    spec = {"method": "copy", "gammas": [2], "references": [reference, [3, 3, 9]], "depth": 3, "history": False}
    drafter = drafter_of(spec)
    assert paths(propose(drafter, [8, 2, 3])) == {(4, 5, 6)}
    assert paths(propose(drafter, [8, 6, 7], request="b")) == set(), "nothing of the next reference"
    assert paths(propose(drafter, [3, 1, 2, 3, 1], request="c")) == set(), "one token is no match, history is off"


def test_copy_takes_a_block_from_the_history() -> None:
    drafter = drafter_of({"method": "copy", "gammas": [3], "depth": 4})
    assert paths(propose(drafter, [1, 2, 3, 4, 5, 6, 1, 2, 3])) == {(4, 5, 6, 1)}
    assert propose(drafter, [7, 2, 3, 4, 5, 9, 2, 3], request="b").num_nodes == 1


def test_copy_is_not_fooled_by_equal_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outrider.drafting.sources.hash_index.MODULUS", 2)
    monkeypatch.setattr("outrider.drafting.sources.hash_index.compiled", lambda: None)
    drafter = drafter_of({"method": "copy", "gammas": [2], "depth": 2, "num_candidates": 64})
    assert paths(propose(drafter, [1, 2, 9, 9, 3, 4, 5, 1, 2])) == {(9, 9)}


# Edits


def edited(spec: Mapping[str, object], prompt: list[int], output: list[int]) -> ReplayResult:
    return replay(drafter_of(spec), [Recording(prompt, output)])


def test_edit_copies_a_whole_reference() -> None:
    source = list(range(10, 90))
    result = edited({"method": "edit", "references": [source], "lookup": False, "max_nodes": 32}, [1, 2], source)
    assert result.num_steps <= 3
    assert result.num_accepted == result.num_tokens - result.num_steps


@pytest.mark.parametrize(
    ("change", "num_steps"),
    [(lambda s: [*s[:40], 5, *s[41:]], 6), (lambda s: [*s[:40], 5, 6, *s[40:]], 7), (lambda s: s[:40] + s[43:], 6)],
    ids=["replaced", "inserted", "deleted"],
)
@pytest.mark.parametrize("given", ["reference", "prompt"])
def test_edit_aligns_again_after_a_change(
    change: Callable[[list[int]], list[int]], num_steps: int, given: str
) -> None:
    source = list(range(10, 90))
    spec = {"method": "edit", "lookup": False, "max_nodes": 32}
    if given == "reference":
        result = edited({**spec, "references": [source]}, [1, 2], change(source))
    else:  # the first tokens of the output say where it begins
        result = edited(spec, [1, *source, 2, *source[:4]], change(source)[4:])
    assert result.num_steps <= num_steps


def test_edit_prefers_the_place_near_the_last_alignment() -> None:
    """The same four tokens stand in three places; the copy goes on behind the nearest."""
    block = [1, 2, 3, 4]
    source = [*block, 20, 21, 22, 23, 24, *block, 30, 31, 32, 33, 34, *block, 40, 41, 42]
    drafter = drafter_of({"method": "edit", "references": [source], "lookup": False, "depth": 3})
    output = [*block, 20, 21, 22, 99, 98, *block]
    for length in range(1, len(output) + 1):
        tree = propose(drafter, [7, *output[:length]], prompt=1)
    assert (30, 31, 32) in paths(tree)


def test_edit_makes_a_change_again() -> None:
    source = [10, 11, 50, 12, 13, 14, 15, 50, 16, 17, 18, 19]
    drafter = drafter_of({"method": "edit", "references": [source], "lookup": False, "depth": 8})
    output = [10, 11, 60, 61, 12, 13, 14]
    for length in range(1, len(output) + 1):
        tree = propose(drafter, [7, *output[:length]], prompt=1)
    assert paths(tree) == {(15, 60, 61, 16, 17, 18, 19), (15, 50, 16, 17, 18, 19)}


def test_edit_comes_back_from_an_excursion_to_the_instruction() -> None:
    """The instruction holds the new name, four tokens long, far from where the old one is replaced."""
    name = [91, 92, 93, 94]
    source = [*range(10, 30), 50, *range(30, 40), 50, *range(40, 60)]
    output = [*range(10, 30), *name, *range(30, 40), *name, *range(40, 60)]
    prompt = [1, 2, 50, 3, *name, 4, 5, *source, 6]
    drafter = drafter_of({"method": "edit", "lookup": False, "depth": 6, "max_nodes": 40})
    for length in range(1, 4 + 20 + 4 + 1):
        tree = propose(drafter, [*prompt, *source[:4], *output][: len(prompt) + length], prompt=len(prompt))
    assert (4, 5, *source[:4]) in paths(tree), "the copy goes on where the name stands"
    assert tuple(range(30, 36)) in paths(tree), "or behind what it replaced"
    assert edited({"method": "edit", "max_nodes": 24}, prompt, output).num_steps <= 12


# History and hierarchy


def feed(drafter: Drafter, request: str, tokens: Sequence[int], steps: Iterable[int] | None = None) -> None:
    """Let a drafter propose at these lengths of a text of one prompt token, at all of them if none are given."""
    for length in steps or range(1, len(tokens)):
        propose(drafter, tokens[:length], prompt=1, request=request)


def test_history_proposes_what_another_request_generated() -> None:
    drafter = drafter_of({"method": "history", "lengths": [2], "depth": 3})
    output = [1, 2, 3, 4, 5, 6]
    feed(drafter, "a", output)
    assert propose(drafter, [9, 2, 3], request="b").num_nodes == 1, "not before it ends"
    drafter.release("a", FinishedText(output, 1))
    assert paths(propose(drafter, [9, 2, 3], request="b")) == {(4, 5, 6)}
    assert propose(drafter, [9, 9, 3], request="b").num_nodes == 1
    drafter.release("never seen", FinishedText([7, 8, 11, 12, 13], 2))
    assert paths(propose(drafter, [9, 8, 11], request="b")) == {(12, 13)}
    assert propose(drafter, [9, 7, 8], request="b").num_nodes == 1, "of a prompt nothing but its last token"
    long = drafter_of({"method": "history", "lengths": [2], "depth": 3, "segment": 4})
    feed(long, "a", range(20))
    assert (8, 9, 10) in paths(propose(long, [6, 7], request="b")), "a long one is stored as it goes"


@given(st.sets(st.integers(1, 99)), st.integers(1, 20), st.integers(1, 40))
def test_history_knows_every_place_of_an_output_however_rarely_it_was_asked(
    steps: set[int], segment: int, prompt: int
) -> None:
    source = HistorySource(HistoryConfig(lengths=(2,), segment=segment, depth=3))
    text = list(range(100))
    with patch.object(source.store, "add", wraps=source.store.add) as add:
        for length in sorted(step for step in steps if step >= prompt):
            source.continuations(context(text[:length], prompt=prompt))
        source.release("r", FinishedText(text, prompt))
    assert all(after == before + 1 for call in add.call_args_list for before, after in pairwise(call.args[0]))
    for place in range(prompt, 98):
        found = source.store.candidates(text[: place + 1], 3, 4)
        assert max((list(path) for path, _ in found), key=len) == text[place + 1 : place + 4]


UNSAID = 90  # tokens from here on stand in no text
LEARNING = [
    "ngram",
    "anpd",
    "aded",
    {"method": "copy", "references": [[5, 6, 7]]},
    {"method": "history", "segment": 8},
    "suffix",
    "hierarchy",
    "merge",
    "recycling",
    {"method": "recycling", "shape": "sequoia"},
]


@pytest.mark.parametrize("spec", LEARNING, ids=str)
def test_what_is_learnt_has_no_gaps_however_rarely_a_drafter_is_asked(spec: object) -> None:
    """Of texts that count 0, 1, 2, ..., each asked for in some steps alone, nothing but counting may be learnt."""
    drafter, rng, num_drafted = drafter_of(spec), random.Random(5), 0
    for request in map(str, range(6)):
        text = list(range(UNSAID))
        length = 2 + rng.randrange(3)
        while length < len(text):
            if rng.random() < 0.4:
                tree = propose(drafter, text[:length], prompt=2, request=request)
                pairs = [(tree.tokens[parent], tree.tokens[node]) for node, parent in enumerate(tree.parents) if node]
                assert all(after == before + 1 or after >= UNSAID for before, after in pairs), pairs
                num_drafted += len(pairs)
                choices = [min(token + 1, 99) for token in tree.tokens]
                logits = 2 * torch.eye(100)[choices]
                logits[:, UNSAID:] += 1  # the target's other candidates
                path = follow_choices(tree, choices)
                drafter.observe([DraftOutcome(request, tree, path, logits, choices)])
                length += len(path.accepted_nodes)
            length += 1
        drafter.release(request, FinishedText(text, 2))
    assert num_drafted or spec in ("ngram", "anpd"), "the others know earlier texts"


def test_history_is_bounded_and_forgets_the_oldest() -> None:
    store = HistoryStore((2,), capacity=100)
    for start in range(0, 1000, 10):
        store.add(range(start, start + 10))
        assert len(store) <= 100
    assert store.candidates([994, 995], 3, 4)
    assert not store.candidates([4, 5], 3, 4)
    store.add(range(5000))
    assert len(store) <= 100


def test_hierarchy_asks_the_nearest_level_first_and_counts_hits() -> None:
    spec = {
        "method": "hierarchy",
        "levels": [
            {"method": "ngram", "min_ngram": 2, "depth": 2},
            {
                "method": "copy",
                "references": [[1, 2, 8, 9], [6, 7, 5, 5]],
                "gammas": [2],
                "history": False,
                "depth": 2,
            },
        ],
        "max_nodes": 2,
    }
    drafter = drafter_of(spec)
    assert isinstance(drafter, HierarchyDrafter)
    near, far = drafter.statistics
    tree = propose(drafter, [1, 2, 3, 4, 1, 2])
    assert paths(tree) == {(3, 4)}
    assert (near.num_asked, far.num_asked) == (1, 0), "the first level filled the tree"
    drafter.observe([outcome_of(tree, (1,), (3, 0, 0))])
    assert (near.num_drafted, near.num_accepted) == (2, 1)
    tree = propose(drafter, [1, 2, 3, 4, 6, 7], request="b")
    assert paths(tree) == {(5, 5)}
    drafter.observe([DraftOutcome("b", tree, VerifiedPath((1, 2), 0), None)])
    assert (near.num_asked, near.num_answered, far.num_asked, far.num_answered) == (2, 1, 1, 1)
    assert (near.num_drafted, far.num_drafted, far.num_accepted) == (2, 2, 2)


def test_hierarchy_statistics_count_only_what_was_verified() -> None:
    drafter = drafter_of({"method": "hierarchy", "levels": ["ngram"]})
    assert isinstance(drafter, HierarchyDrafter)
    tree = propose(drafter, [1, 2, 3, 1])
    drafter.observe([outcome_of(tree.restricted_to([0, 1]), (1,), (2, 3))])
    assert (drafter.statistics[0].num_drafted, drafter.statistics[0].num_accepted) == (1, 1)


# Merging


def test_merge_takes_the_likeliest_of_all_sources() -> None:
    sources = [
        {"method": "ngram", "min_ngram": 1, "depth": 2},
        {"method": "copy", "references": [[8, 1, 2, 5, 6]], "gammas": [3], "history": False, "depth": 2},
    ]
    text = [2, 7, 7, 8, 1, 2]
    both = propose(drafter_of({"method": "merge", "sources": sources, "max_nodes": 4}), text)
    assert paths(both) == {(7, 7), (5, 6)}
    assert both.tokens[1] == 5, "three tokens matched, against one"
    assert paths(propose(drafter_of({"method": "merge", "sources": sources, "max_nodes": 2}), text)) == {(5, 6)}
    chain = propose(drafter_of({"method": "merge", "sources": sources}, CHAINS), text)
    assert paths(chain) == {(5, 6)}, "the best chain is not the first source's"


@pytest.mark.parametrize("method", ["ngram", "anpd", "aded", "copy", "edit", "history", "merge", "hierarchy"])
def test_limits_are_kept(method: str) -> None:
    text = [(i * i + i // 5) % 9 for i in range(120)]
    drafter = drafter_of({"method": method, "depth": 3, "max_nodes": 7})
    for max_nodes, max_depth in ((64, 64), (5, 64), (64, 2), (0, 64), (64, 0)):
        tree = propose(drafter, text, prompt=60, max_nodes=max_nodes, max_depth=max_depth)
        assert tree.num_nodes - 1 <= min(7, max_nodes)
        assert max(tree.depths) <= min(3, max_depth)
        assert tree.confidences is not None
        assert all(0 <= confidence <= 1 for confidence in tree.confidences)
    chain = propose(drafter_of({"method": method}, CHAINS), text, prompt=60)
    assert all(parent == node - 1 for node, parent in enumerate(chain.parents))


@pytest.mark.parametrize(
    "spec",
    [
        {"method": "merge", "sources": ["ngram", "recycling"]},
        {"method": "merge", "sources": []},
        {"method": "merge", "sources": "ngram"},
        {"method": "hierarchy", "levels": [{"method": "ngram", "dept": 3}]},
        {"method": "copy", "gammas": [2, 3]},
        {"method": "copy", "references": [[-1]]},
        {"method": "copy", "references": [[1, 2, 3]], "max_reference_tokens": 2},
        {"method": "edit", "reference_files": "one.txt"},
        {"method": "aded", "rate": 1.0},
        {"method": "history", "capacity": 3},
    ],
    ids=str,
)
def test_wrong_settings_are_refused(spec: Mapping[str, object]) -> None:
    with pytest.raises(ConfigError):
        drafter_config(spec)


def test_untokenised_references_are_refused() -> None:
    with pytest.raises(ConfigError, match="token ids"):
        drafter_of({"method": "copy", "references": ["text"]})


class Claims:
    """A source that says the same all the time, as sure as it is told to be."""

    name, reads_logits = "claims", False

    def __init__(self, confidence: float) -> None:
        self.confidence = confidence

    def continuations(self, context: DraftContext) -> list[WeightedPath]:
        return [WeightedPath([5, 6], [self.confidence] * 2), WeightedPath([8], [0.25])]

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        pass

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        pass


def test_confidences_are_corrected_by_what_came_true() -> None:
    """A source that is right in one of four cases about its first token, and then about the second, says 0.9."""
    source = CalibratedSource(Claims(0.9))
    first = source.continuations(context([1]))
    assert first[0].confidences == pytest.approx([0.9, 0.9]), "its own word counts until something was seen"
    for step in range(400):
        source.continuations(context([1]))
        tree = TokenTree.chain(1, (5,) if step % 4 == 0 else (9,))
        source.observe([DraftOutcome("r", tree, VerifiedPath((1,), 6), None)])
    right, other = source.continuations(context([1]))
    # Of the claims of 0.9 a fifth come from the second token, where they are always right.
    assert right.confidences == pytest.approx([2 / 5, 2 / 5], abs=0.05)
    assert other.confidences == pytest.approx([0.0], abs=0.01), "another bin, never right"
    source.release("r")
    source.observe([DraftOutcome("r", TokenTree.chain(1, (5,)), VerifiedPath((1,), 6), None)])
    assert source.continuations(context([1]))[0].confidences == right.confidences, "forgotten, not counted"
