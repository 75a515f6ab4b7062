"""Two tokenizers over one text: alignment of tokens, shared pieces, and drafts that cross from one to the other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest

from outrider.drafting.drafter import DraftContext, DraftOutcome, FinishedText
from outrider.drafting.realignment import TextReader, TokenFollower, continuation
from outrider.drafting.text_draft import TextDrafter
from outrider.engine.tokenizer_pair import TokenizerPair
from outrider.inputs.tokenizer import Tokenizer
from outrider.sampling.params import SamplingParams
from outrider.token_tree import TokenTree
from outrider.verification.coupled import follow_choices
from tests.tiny_tokenizers import TEXTS, byte_level, sentencepiece

TOKENIZERS = {
    "bytes-600": lambda: byte_level(600),
    "bytes-400": lambda: byte_level(400, seed=1),
    "sentencepiece": lambda: sentencepiece(520),
}
PAIRS = [pair for pair in product(TOKENIZERS, repeat=2) if pair[0] != pair[1]] + [("bytes-600", "bytes-600")]


def tokenizer(name: str) -> Tokenizer:
    return Tokenizer(TOKENIZERS[name]())


def pair(target: str, draft: str) -> TokenizerPair:
    ours, theirs = tokenizer(target), tokenizer(draft)
    return TokenizerPair(ours, theirs, len(ours), len(theirs))


# Reading and following


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_text_read_in_pieces_is_the_text(name: str, text: str) -> None:
    """Never a broken character, whatever the pieces."""
    codec = pair(name, "bytes-600").target_side.codec
    ids = tokenizer(name).encode(text, add_special_tokens=False)
    rng = random.Random(3)
    for _ in range(5):
        reader, got, end = TextReader(codec), "", 0
        while end < len(ids):
            end = min(len(ids), end + rng.randrange(1, 5))
            got += reader.read(ids[:end])
            assert text.startswith(got)
            assert "\ufffd" not in got
        assert got == text


def test_bytes_that_are_no_character_do_not_stop_the_reading() -> None:
    ours = tokenizer("bytes-600")
    byte_of = {piece: token for token, (_, piece) in ours.pieces.items() if len(piece) == 1}
    broken = [byte_of[b"\xff"]] * 12 + ours.encode(" and on", add_special_tokens=False)
    reader, got = TextReader(pair("bytes-600", "bytes-400").target_side.codec), ""
    for end in range(1, len(broken) + 1):
        got += reader.read(broken[:end])
    assert got.endswith(" and on")


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("seed", range(4))
def test_tokens_that_follow_a_text_are_those_of_the_whole(name: str, seed: int) -> None:
    """However it grows, over more than one window."""
    rng = random.Random(seed)
    text = " ".join(rng.choice(TEXTS) for _ in range(8))
    side = pair("bytes-600", name).draft_side
    follower, start = TokenFollower(side.codec, side.prefix), 0
    while start < len(text):
        end = min(len(text), start + rng.choice([1, 1, 2, 5, 30]))
        follower.append(text[start:end])
        assert follower.token_ids == tokenizer(name).encode(text[:end])
        start = end


@pytest.mark.parametrize("name", TOKENIZERS)
def test_following_encodes_the_end_of_the_text_only(name: str) -> None:
    side = pair("bytes-600", name).draft_side
    longest = 0

    class Counting:
        def encode(self, text: str) -> list[int]:
            nonlocal longest
            longest = max(longest, len(text))
            return side.codec.encode(text)

        def decode(self, token_ids: Sequence[int]) -> str:
            return side.codec.decode(token_ids)

    follower, text = TokenFollower(Counting(), side.prefix), " ".join(TEXTS * 10)
    for start in range(0, len(text), 4):
        follower.append(text[start : start + 4])
    assert longest < 400 < len(text)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_continuation_is_the_rest_of_the_tokens(name: str, text: str) -> None:
    """Cut between any two tokens, also within a character."""
    codec = pair(name, "bytes-600").target_side.codec
    ids = tokenizer(name).encode(text, add_special_tokens=False)
    for cut in range(1, len(ids)):
        known = TextReader(codec).read(ids[:cut])
        assert continuation(codec, ids[:cut], text[len(known) :]) == ids[cut:]
    assert continuation(codec, ids, "") == []


# What two vocabularies share


def test_the_same_tokenizer_shares_everything() -> None:
    whole = pair("bytes-600", "bytes-600")
    assert whole.overlap == 1.0
    assert (whole.shared_ids[:, 0] == whole.shared_ids[:, 1]).all()


@pytest.mark.parametrize(("target", "draft"), PAIRS)
def test_shared_tokens_are_the_same_text(target: str, draft: str) -> None:
    of_pair, ours, theirs = pair(target, draft), tokenizer(target), tokenizer(draft)
    assert 0.0 < of_pair.overlap <= 1.0
    ends = (ours.eos_id, theirs.eos_id)
    assert list(ends) in of_pair.shared_ids.tolist()
    for ours_id, theirs_id in of_pair.shared_ids.tolist():
        if (ours_id, theirs_id) != ends:
            assert ours.pieces[ours_id] == theirs.pieces[theirs_id]
    assert len(set(of_pair.shared_ids[:, 1].tolist())) == len(of_pair.shared_ids), "one to one"
    shared_bytes = {ours.pieces[token][1] for token in of_pair.shared_ids[:, 0].tolist()}
    assert {b" the", b"e", b"\xc3"} <= shared_bytes, "words with their space, and bytes, whatever the convention"


@pytest.mark.parametrize(("target", "draft"), PAIRS)
def test_tokens_that_are_not_shared_are_spelled(target: str, draft: str) -> None:
    """Byte for byte, token by token: the draft's context says what the target's does."""
    of_pair, ours, theirs = pair(target, draft), tokenizer(target), tokenizer(draft)
    for token, (kind, piece) in ours.pieces.items():
        if kind == "text":
            assert b"".join(theirs.pieces[t][1] for t in of_pair.spell_for_draft(token)) == piece
        else:
            assert of_pair.spell_for_draft(token) == ()


@pytest.mark.parametrize(("target", "draft"), PAIRS)
def test_a_prompt_begins_as_the_draft_would_encode_it(target: str, draft: str) -> None:
    for text in TEXTS:
        ids = tokenizer(target).encode(text)
        assert pair(target, draft).encode_for_draft(ids) == tokenizer(draft).encode(text)


def test_special_tokens_that_both_have_are_kept() -> None:
    of_pair, ours, theirs = pair("bytes-600", "bytes-400"), tokenizer("bytes-600"), tokenizer("bytes-400")
    ids = ours.encode("<|user|>Hello")
    assert ids[0] in ours.special_ids
    assert of_pair.encode_for_draft(ids) == theirs.encode("<|user|>Hello")
    assert pair("bytes-600", "sentencepiece").encode_for_draft(ids) == tokenizer("sentencepiece").encode("Hello")


# Drafts by their text


class Oracle:
    """A draft model that knows the text, in its own tokens; records what it was told.

    Args:
        err_every: of so many tokens of the text it says one wrongly: the one before again.
    """

    def __init__(self, ids: Sequence[int], depth: int, err_every: int = 0) -> None:
        self.ids, self.depth, self.err_every = list(ids), depth, err_every
        self.known: dict[str, list[int]] = {}
        self.kept: list[int] = []
        self.says_end = False
        self.num_restarts = self.num_committed = self.num_without_room = 0

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        (context,) = contexts
        tokens = list(context.token_ids)
        self.known[context.request_id] = tokens
        at = len(tokens)
        chain = self.ids[at : at + self.depth] if self.ids[:at] == tokens else []
        self.says_end = bool(chain) and at + self.depth >= len(self.ids)
        if self.err_every:
            chain = [self.ids[at + i - ((at + i) % self.err_every == 0)] for i in range(len(chain))]
        return [TokenTree.chain(tokens[-1], chain)]

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        for outcome in outcomes:
            self.kept = [*self.known[outcome.request_id], *outcome.new_tokens[:-1]]
            self.num_committed += len(outcome.path.accepted_nodes)

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self.num_restarts += 1


def follow(oracle: Any, of_pair: TokenizerPair, ids: Sequence[int], eos_id: int, text: str) -> tuple[int, int]:
    """Generate a known text, drafted for by an oracle; numbers of steps and of accepted tokens.

    Args:
        ids: the target's tokens, with the end of the text.
    """
    drafter = TextDrafter(oracle, of_pair.target_side, of_pair.draft_side, depth=12, max_nodes=16)
    codec, end, num_steps, num_accepted = of_pair.target_side.codec, 3, 0, 0
    while end < len(ids):
        context = DraftContext("r", ids[:end], 3, 16, len(ids) - end, SamplingParams(), 0, frozenset())
        (tree,) = drafter.propose([context])
        assert tree.tokens[0] == ids[end - 1]
        drafted = codec.decode([*ids[:end], *(token for token in tree.tokens[1:] if token != eos_id)])
        if not oracle.err_every:
            assert text.startswith(drafted.rstrip("\ufffd"))
            if oracle.says_end and tree.num_nodes <= 16:
                assert tree.tokens[-1] == eos_id, "the text ends there, and the draft knows it"
        kept = of_pair.draft_side.codec.decode(oracle.kept)
        assert of_pair.draft_side.codec.decode(oracle.ids).startswith(kept.rstrip("\ufffd"))
        choices = [*ids[end : end + tree.num_nodes]]
        choices += [0] * (tree.num_nodes - len(choices))
        path = follow_choices(tree, choices)
        drafter.observe([DraftOutcome("r", tree, path, None, choices)])
        num_accepted += len(path.accepted_nodes)
        end += len(path.accepted_nodes) + 1
        num_steps += 1
    return num_steps, num_accepted


@pytest.mark.parametrize(("target", "draft"), PAIRS)
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_draft_that_knows_the_text_is_accepted(text: str, target: str, draft: str) -> None:
    """Across conventions, within characters, wherever the target's tokens end."""
    ours, theirs = tokenizer(target), tokenizer(draft)
    assert ours.eos_id is not None
    assert theirs.eos_id is not None
    ids = [*ours.encode(text), ours.eos_id]
    oracle = Oracle([*theirs.encode(text), theirs.eos_id], depth=12)
    num_steps, num_accepted = follow(oracle, pair(target, draft), ids, ours.eos_id, text)
    # The last word of a draft may be cut short, and then has other tokens: all else is right.
    assert num_steps < 0.5 * len(ids)
    assert num_accepted > num_steps
    assert oracle.num_committed > 0 or num_steps == 1, "the draft keeps what it has read"
    assert oracle.num_restarts < num_steps


@pytest.mark.parametrize(("target", "draft"), PAIRS)
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_draft_that_errs_keeps_what_is_right(text: str, target: str, draft: str) -> None:
    ours, theirs = tokenizer(target), tokenizer(draft)
    assert ours.eos_id is not None
    oracle = Oracle(theirs.encode(text), depth=12, err_every=5)
    num_steps, _ = follow(oracle, pair(target, draft), [*ours.encode(text), ours.eos_id], ours.eos_id, text)
    assert oracle.num_committed > 0 or num_steps < 3


def test_a_text_draft_of_nothing_proposes_nothing() -> None:
    of_pair = pair("bytes-600", "bytes-400")
    oracle: Any = Oracle([], depth=4)
    drafter = TextDrafter(oracle, of_pair.target_side, of_pair.draft_side, depth=4, max_nodes=8)
    end = tokenizer("bytes-600").eos_id
    assert end is not None
    for max_nodes, tokens in [(0, [5, 6]), (8, [end]), (8, [5, 6])]:
        context = DraftContext(f"r{max_nodes}", tokens, 1, max_nodes, 8, SamplingParams(), 0, frozenset())
        assert drafter.propose([context])[0].num_nodes == 1
    drafter.release("r8")
