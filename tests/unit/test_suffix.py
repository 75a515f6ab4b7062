"""SuffixDecoding: its tree against naive counting, its drafts against naive reading, its history within bounds."""

from __future__ import annotations

import gc
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.config import SuffixConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, FinishedText
from outrider.drafting.sources import past_outputs
from outrider.drafting.sources.guess_tree import ESCAPE
from outrider.drafting.sources.past_outputs import PastOutputs, read_history, write_history
from outrider.drafting.sources.suffix_guesses import Place, speculate
from outrider.drafting.sources.suffix_index import Node, PythonCursor, PythonTree
from outrider.drafting.sources.suffix_tree import SuffixSource
from outrider.errors import ConfigError, LookupFileError, VocabularyMismatchError
from outrider.sampling.params import SamplingParams
from outrider.token_tree import TokenTree, VerifiedPath

FINGERPRINT = bytes(range(32))
GREEDY = SamplingParams(temperature=0.0)
Substrings = dict[tuple[int, ...], int]


def naive_counts(sequences: list[list[int]], max_depth: int) -> Substrings:
    counts: Counter[tuple[int, ...]] = Counter()
    for tokens in sequences:
        for start in range(len(tokens)):
            counts.update(tuple(tokens[start:end]) for end in range(start + 1, len(tokens) + 1)[:max_depth])
    return counts


def counts_in(tree: PythonTree) -> Substrings:
    """All substrings that a tree knows, with their counts."""
    places = list(zip(*tree.places, strict=True))
    found: Substrings = {}

    def visit(node: Node, prefix: tuple[int, ...]) -> None:
        for first_token, child in node.children.items():
            substring, known = prefix, tree.known_length(child)
            assert tree.token_at(child, 0) == first_token
            for offset in range(known):
                substring = (*substring, tree.token_at(child, offset))
                num_above = sum(at is child and behind <= offset for at, behind in places)
                if child.count > num_above:
                    assert substring not in found
                    found[substring] = child.count - num_above
            if known == child.length:
                visit(child, substring)

    visit(tree.root, ())
    return found


def num_nodes(node: Node) -> int:
    return 1 + sum(num_nodes(child) for child in node.children.values())


def num_alive() -> int:
    return sum(type(thing) is Node for thing in gc.get_objects())


# Mostly repeats, so that edges are split, joined and followed for long.
operations = st.lists(
    st.one_of(st.integers(0, 3), st.just("repeat"), st.just("repeat"), st.just("end"), st.just("forget")), max_size=80
)


@settings(max_examples=300)
@given(operations, st.integers(2, 9))
def test_the_tree_counts_every_substring_of_what_it_has_not_forgotten(steps: list[int | str], max_depth: int) -> None:
    tree = PythonTree(max_depth)
    ended: list[list[int]] = []
    current: list[int] = []
    for step in steps:
        if step == "forget":
            if ended and not current:
                tree.forget_oldest()
                ended.pop(0)
        elif step == "end":
            tree.end_sequence()
            ended += [current] if current else []
            current = []
        else:
            token = step if isinstance(step, int) else current[-3] if len(current) > 2 else 0
            tree.extend([token])
            current.append(token)
        expected = naive_counts([*ended, current], max_depth)
        assert counts_in(tree) == expected
        occurred = [n for n in range(1, max_depth) if n <= len(current) and expected[tuple(current[-n:])] > 1]
        assert len(tree.places[0]) == len(occurred), "the suffixes that occurred before"
        if not current:
            assert num_nodes(tree.root) <= 2 * len(tree) + 1
    assert tree.sequences() == ended


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), max_size=6), st.lists(st.integers(0, 3)))
def test_a_cursor_stands_at_every_suffix_that_occurs(outputs: list[list[int]], text: list[int]) -> None:
    tree = PythonTree(6)
    cursor = PythonCursor(tree)
    pending = list(outputs)
    for end in range(1, len(text) + 1):
        if pending and end % 3 == 0:  # the tree changes below the cursor
            tree.extend(pending.pop())
            tree.end_sequence()
        elif end % 7 == 0 and len(tree):
            tree.forget_oldest()
        cursor.follow(text[:end], 1)
        known = naive_counts(tree.sequences(), 6)
        lengths = [n for n in range(min(5, end), 0, -1) if tuple(text[end - n : end]) in known]
        assert len(cursor.places[0]) == len(lengths)
        for node, offset, length in zip(*cursor.places, lengths, strict=True):
            place = Place(tree, node, offset, length)
            followed = {t: known[(*text[end - length : end], t)] for t in range(4)} if known else {}
            best = speculate(place, max_nodes=4, max_depth=1)
            total = sum(followed.values()) + ESCAPE / length * sum(count > 0 for count in followed.values())
            assert {t: c / total for t, c in followed.items() if c} == pytest.approx(
                dict(zip(best.tokens, best.probs, strict=True))
            )


def test_forgetting_frees_memory() -> None:
    alive = num_alive()
    tree = PythonTree(16)
    for output in range(20):
        tree.extend([(output * 7 + i * i) % 11 for i in range(200)])
        tree.end_sequence()
    full = num_nodes(tree.root)
    for _ in range(19):
        tree.forget_oldest()
    assert len(tree) == 200
    assert num_nodes(tree.root) < full / 4
    tree.forget_oldest()
    assert len(tree) == 0
    assert not tree.root.children
    tree.extend(range(5))
    del tree
    assert num_alive() == alive, "without waiting for a garbage collection"


# Drafts


def source(**settings: object) -> SuffixSource:
    return SuffixSource(SuffixConfig(**settings), vocab_size=100, vocab_fingerprint=lambda: FINGERPRINT)  # type: ignore[arg-type]


def context(
    tokens: list[int], request_id: str = "r", *, prompt: int | None = None, max_nodes: int = 16
) -> DraftContext:
    return DraftContext(
        request_id, tokens, prompt or len(tokens), max_nodes, 64, GREEDY, 0, frozenset({99}), min_path_prob=0.0
    )


def outcome(request_id: str, token: int) -> DraftOutcome:
    return DraftOutcome(request_id, TokenTree.root_only(0), VerifiedPath((), token), None)


def test_the_most_frequent_continuation_comes_first_with_its_ratio_as_confidence() -> None:
    (first, *others) = source(depth=2).continuations(context([1, 2, 3, 7, 1, 2, 4, 7, 1, 2, 3, 7, 9, 1, 2]))
    assert first.tokens == [3, 7]
    total = 3 + 2 * ESCAPE / 2
    assert first.confidences == pytest.approx([2 / total, 2 / (2 + ESCAPE / 3)])
    assert [path.tokens for path in others] == [[4, 7]]
    assert others[0].confidences == pytest.approx([1 / total, 1 / (1 + ESCAPE / 3)])


def test_a_longer_match_wins_and_speculates_further() -> None:
    text = [5, 6, 7, 8, 20, 21, 22, 23, 9, 8, 30, 31, 5, 6, 7, 8]
    assert source(depth=4).continuations(context(text))[0].tokens == [20, 21, 22, 23]
    factor_one = source(max_spec_factor=1.0)
    assert sum(len(path.tokens) for path in factor_one.continuations(context(text))) == 4, "MAX_SPEC = 1 x 4"
    assert sum(len(path.tokens) for path in factor_one.continuations(context([1, 2, 3, 1], "s"))) == 1


def test_what_repeats_itself_goes_on_beyond_the_text() -> None:
    assert source(depth=9).continuations(context([4, 1, 2, 3, 1, 2, 3]))[0].tokens == [1, 2, 3] * 3


def test_past_outputs_are_proposed_prompts_of_others_are_not() -> None:
    drafter = source()
    assert drafter.continuations(context([50, 51, 52], "first")) == []
    drafter.release("first", FinishedText([50, 51, 52, 60, 61, 62], 3))
    assert drafter.continuations(context([1, 52], "second"))[0].tokens == [60, 61, 62], "behind the prompt's tail"
    drafter.release("second")
    drafter.continuations(context([*range(30, 50), 1], "third"))
    drafter.release("third", FinishedText([*range(30, 50), 1], 21))
    assert drafter.continuations(context([1, 35], "fourth")) == [], "a prompt without output leaves nothing"


def test_past_outputs_stand_beside_the_requests_own_text_for_what_they_have_kept() -> None:
    """Past outputs say 7 after 5, the request's own text says 8: both are proposed, and what came is believed."""
    drafter = source(depth=1)
    drafter.release("past", FinishedText([5, 7] * 10, 1))
    text = [5, 8] * 10 + [5]
    first = {path.tokens[0]: path.confidences[0] for path in drafter.continuations(context(text))}
    assert set(first) == {7, 8}
    for _ in range(100):
        drafter.continuations(context(text))
        drafter.observe([outcome("r", 8)])
    later = {path.tokens[0]: path.confidences[0] for path in drafter.continuations(context(text))}
    assert later[7] < first[7] / 2
    assert later[8] > first[8]


def test_an_output_is_recorded_once_and_whole() -> None:
    """Whether its request lost its place, was asked for rarely, or never."""
    drafter = source()
    drafter.continuations(context([1], "a"))
    drafter.continuations(context([1, 10, 11], "a", prompt=1))
    drafter.release("a")
    drafter.continuations(context([1, 10, 11], "a", prompt=1))
    drafter.observe([outcome("a", 12)])
    drafter.release("a", FinishedText([1, 10, 11, 12, 13, 14], 1))
    drafter.release("b", FinishedText([1, 20, 21], 1))
    assert [list(output) for output in drafter._history.tree.sequences()] == [[1, 10, 11, 12, 13, 14], [1, 20, 21]]


def test_a_long_request_keeps_its_newest_tokens_only() -> None:
    drafter = source(request_tokens=200, max_match=24)
    tokens = [i * i % 89 for i in range(1000)]
    for end in range(1, len(tokens)):
        drafter.continuations(context(tokens[:end]))
        assert len(drafter._requests["r"].tree) <= 200
    assert len(drafter._requests["r"].tree) >= 100
    drafter.release("r")
    assert not drafter._requests


@given(st.lists(st.lists(st.integers(0, 9), max_size=30), max_size=12), st.sampled_from([0, 1, 20, 50]))
def test_the_history_keeps_the_newest_outputs_within_its_limit(outputs: list[list[int]], limit: int) -> None:
    history = PastOutputs(SuffixConfig(history_tokens=limit), vocab_size=10, vocab_fingerprint=lambda: FINGERPRINT)
    for output in outputs:
        history.add(output)
        assert len(history.tree) <= limit
    kept = list(history.tree.sequences())
    expected = [output[-limit:] for output in outputs if output and limit]
    assert kept == expected[len(expected) - len(kept) :]
    if len(kept) < len(expected):
        assert sum(map(len, kept)) + len(expected[len(expected) - len(kept) - 1]) > limit


@pytest.mark.parametrize(
    "settings", [{"max_match": 16}, {"max_spec_factor": 0.5}, {"history_file": ""}, {"request_tokens": 100}]
)
def test_settings_that_cannot_work_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError):
        SuffixConfig(**settings)


# The history file


def read(path: Path, fingerprint: bytes = FINGERPRINT) -> list[list[int]]:
    return read_history(path, vocab_size=100, fingerprint=fingerprint)


def test_a_history_survives_its_engine(tmp_path: Path) -> None:
    path = tmp_path / "history"
    first = source(history_file=str(path))
    first.release("a", FinishedText([1, 70, 71, 72], 1))
    del first
    gc.collect()
    assert read(path) == [[1, 70, 71, 72]]
    again = source(history_file=str(path))
    assert again.continuations(context([5, 70], "b"))[0].tokens == [71, 72]
    small = source(history_file=str(path), history_tokens=2)
    assert list(small._history.tree.sequences()) == [[71, 72]]


def test_a_damaged_history_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "history"
    write_history(path, [[1, 2, 3], [4]], fingerprint=FINGERPRINT)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(LookupFileError, match="delete it"):
            read(path)
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(LookupFileError):
            read(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(LookupFileError):
        source(history_file=str(path))


def test_a_history_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "history"
    write_history(path, [[1]], fingerprint=bytes(32))
    with pytest.raises(VocabularyMismatchError, match="of its own"):
        source(history_file=str(path))
    write_history(path, [[100]], fingerprint=FINGERPRINT)
    with pytest.raises(LookupFileError):
        read(path)
    with pytest.raises(FileNotFoundError):
        source(history_file=str(tmp_path / "nowhere" / "history"))


def test_an_interrupted_write_leaves_the_old_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "history"
    write_history(path, [[1, 2]], fingerprint=FINGERPRINT)

    def interrupted(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(past_outputs.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_history(path, [[3]], fingerprint=FINGERPRINT)
    assert read(path) == [[1, 2]]
    assert os.listdir(tmp_path) == ["history"]


def test_a_history_that_cannot_be_written_ends_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    drafter = source(history_file=str(tmp_path / "history"), history_tokens=16)

    def full(_descriptor: int) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr(past_outputs.os, "fsync", full)
    drafter.release("a", FinishedText([1, 2], 1))
    assert "no space left" in caplog.text
