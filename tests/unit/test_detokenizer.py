"""Text appears whole, stop strings are found wherever they fall, and nothing after them leaks."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.engine.detokenizer import IncrementalDetokenizer


def decode_bytes(token_ids) -> str:
    """One token a byte: characters span tokens."""
    return bytes(token_ids).decode("utf-8", errors="replace")


def decode_pieces(token_ids) -> str:
    """As SentencePiece: a piece brings its space, but for the first of a text."""
    pieces = [" the", " cat", "s", " sat", "</s", ">", " a", "b"]
    return "".join(pieces[t] for t in token_ids).removeprefix(" ")


def feed(detokenizer: IncrementalDetokenizer, token_ids) -> tuple[list[str], str | None]:
    """The texts shown after each token, and the stop string that ended it."""
    shown = []
    for token in token_ids:
        stop = detokenizer.append(token)
        shown.append(detokenizer.stable_text())
        if stop is not None:
            return shown, stop
    detokenizer.finish()
    return shown, None


@given(st.text(max_size=30))
def test_pieces_add_up_to_the_text(text: str) -> None:
    detokenizer = IncrementalDetokenizer(decode_bytes)
    shown, _ = feed(detokenizer, text.encode())
    assert detokenizer.text == text
    assert all("\ufffd" not in part or "\ufffd" in text for part in shown)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))


@given(st.lists(st.integers(0, 7), max_size=20), st.lists(st.integers(0, 7), min_size=1, max_size=4))
def test_the_first_token_is_decoded_as_what_follows_the_prompt(output: list[int], prompt: list[int]) -> None:
    detokenizer = IncrementalDetokenizer(decode_pieces, context=prompt)
    feed(detokenizer, output)
    assert decode_pieces(prompt) + detokenizer.text == decode_pieces(prompt + output)
    bulk = IncrementalDetokenizer(decode_pieces, context=prompt)
    bulk.extend(output)
    assert bulk.text == detokenizer.text


def test_incomplete_characters_wait_and_end_as_replacement() -> None:
    detokenizer = IncrementalDetokenizer(decode_bytes)
    for byte in "a€".encode()[:-1]:
        assert detokenizer.append(byte) is None
    assert detokenizer.text == "a"
    detokenizer.finish()
    assert detokenizer.text == "a\ufffd"


@given(
    st.text(alphabet="abé", max_size=24),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_against_a_plain_search(text: str, stop: list[str]) -> None:
    """The reference looks at every prefix of the text: the first that contains a stop string is where it ends."""
    detokenizer = IncrementalDetokenizer(decode_bytes, stop=stop)
    shown, found = feed(detokenizer, text.encode())
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stop)]
    if not ends:
        assert found is None
        assert detokenizer.text == text
        return
    candidates = [s for s in stop if text[: ends[0]].endswith(s)]
    assert found in candidates
    assert detokenizer.text == text[: ends[0] - max(len(s) for s in candidates)]
    assert all(detokenizer.text.startswith(part) for part in shown), "text was shown that the stop string took back"


def test_stop_string_across_token_borders_and_inside_a_token() -> None:
    detokenizer = IncrementalDetokenizer(decode_pieces, stop=["</s>"])
    _, found = feed(detokenizer, [0, 1, 4, 5, 2])
    assert found == "</s>"
    assert detokenizer.text == "the cat"
    inside = IncrementalDetokenizer(decode_pieces, stop=["a"])
    assert feed(inside, [0, 1])[1] == "a"
    assert inside.text == "the c"


@pytest.mark.parametrize(("include", "text"), [(False, "the"), (True, "the cat")])
def test_the_stop_string_is_kept_if_asked_for(include: bool, text: str) -> None:
    detokenizer = IncrementalDetokenizer(decode_pieces, stop=[" cat"], include_stop=include)
    feed(detokenizer, [0, 1, 2])
    assert detokenizer.text == text


def test_stop_strings_before_min_tokens_are_text() -> None:
    detokenizer = IncrementalDetokenizer(decode_bytes, stop=["ab"])
    assert detokenizer.append(ord("a"), may_stop=False) is None
    assert detokenizer.append(ord("b"), may_stop=False) is None
    assert detokenizer.append(ord("c")) is None
    assert detokenizer.append(ord("a")) is None
    assert detokenizer.append(ord("b")) == "ab"
    assert detokenizer.text == "abc"
