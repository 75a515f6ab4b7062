"""One text in two tokenizations, followed as it grows: what of it is new, and where the other tokens still agree.

Only the end of the text is ever encoded again. A tokenizer may split a word in another way once more of it is there,
so the last tokens are compared with what they were, and those that changed are replaced (the alignment of universal
assisted generation, Hugging Face and Intel Labs 2024; string-level exact match, Timor et al., arXiv 2502.05202,
algorithm 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

BROKEN = "\ufffd"  # how decoders show bytes that are no whole character
CONTEXT = 8  # tokens before new ones that their text may depend on
MAX_CONTEXT = 3 * CONTEXT  # where these begin within a character
MAX_WINDOW = 48  # tokens encoded again with each step
MIN_WINDOW_CHARACTERS = 48
MAX_CHARACTER_TOKENS = 4  # a character has at most four bytes


class TextCodec(Protocol):
    """A tokenizer; neither direction adds special tokens."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


class TextReader:
    """The text of one growing sequence of tokens, by whole characters."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._num_read = 0  # tokens that end with a whole character
        self._num_ahead = 0  # characters of the text after them that were given already

    def read(self, token_ids: Sequence[int]) -> str:
        """The text that is new since the last call; bytes of an unfinished character wait for the rest of it."""
        before = whole_tail(self._codec, token_ids[max(0, self._num_read - MAX_CONTEXT) : self._num_read])
        new = token_ids[self._num_read :]
        known = len(self._codec.decode(before)) if before else 0
        text = self._codec.decode([*before, *new])
        ends_within = text.endswith(BROKEN) and self._may_be_completed(before, new)
        text = text[known:].rstrip(BROKEN) if ends_within else text[known:]
        given, self._num_ahead = self._num_ahead, max(self._num_ahead, len(text))
        if not ends_within:
            self._num_read, self._num_ahead = len(token_ids), 0
        return text[given:]

    def _may_be_completed(self, before: list[int], new: Sequence[int]) -> bool:
        """Whether tokens end within a character, and not with bytes that never will be one."""
        if len(new) <= 2 * MAX_CHARACTER_TOKENS:
            return True
        ends = (self._codec.decode([*before, *new[:-held]]) for held in range(1, MAX_CHARACTER_TOKENS))
        return not all(text.endswith(BROKEN) for text in ends)


class TokenFollower:
    """The tokens of a growing text.

    Attributes:
        token_ids: of all the text so far.
    """

    def __init__(self, codec: TextCodec, prefix: Sequence[int]) -> None:
        """Args:
        prefix: special tokens that a text begins with.
        """
        self._codec = codec
        self.token_ids = list(prefix)
        self._window = ""  # the end of the text, and what its tokens would be on their own
        self._window_ids: list[int] = []

    def append(self, text: str) -> None:
        if not text:
            return
        self._window += text
        new_ids = self._codec.encode(self._window)
        agreed = common_prefix(self._window_ids, new_ids)
        num_dropped = len(self._window_ids) - agreed
        del self.token_ids[len(self.token_ids) - num_dropped :]
        self.token_ids += new_ids[agreed:]
        self._window_ids = new_ids
        if len(new_ids) > MAX_WINDOW:
            self._shorten_window()

    def _shorten_window(self) -> None:
        """Begin the window at a later space from which on the tokens are the same; as it is if there is none."""
        end = len(self._window) - MIN_WINDOW_CHARACTERS
        for _ in range(CONTEXT):
            start = self._window.rfind(" ", 0, end)
            if start <= 0:
                break
            ids = self._codec.encode(self._window[start:])
            # The first token may differ: what stands before it is gone.
            if ids and ids[1:] == self.token_ids[len(self.token_ids) - len(ids) + 1 :]:
                self._window, self._window_ids = self._window[start:], ids
                return
            end = start
        if len(self._window_ids) > 4 * MAX_WINDOW:  # a text without a seam: go on from its end
            self._window = self._window[-MIN_WINDOW_CHARACTERS:]
            self._window_ids = self._codec.encode(self._window)


def continuation(codec: TextCodec, token_ids: Sequence[int], text: str) -> list[int]:
    """Tokens of `text` where it follows `token_ids`.

    The end of `token_ids` is encoded together with the text, since spaces and the bytes of one character may belong
    to tokens on both sides; an end that comes out as it went in counts.

    Args:
        token_ids: may end within a character, whose whole `text` then begins with.
    """
    if not text:
        return []
    for length in (*range(CONTEXT, 0, -1), *range(CONTEXT + 1, MAX_CONTEXT)):
        if length > len(token_ids):
            continue
        tail = list(token_ids[-length:])
        ids = codec.encode(codec.decode(tail).rstrip(BROKEN) + text)
        if ids[:length] == tail:
            return ids[length:]
        if ids[1 : length + 1] == tail and not codec.decode(ids[:1]).strip():  # a space that some put before a text
            return ids[length + 1 :]
    return codec.encode(text)


def whole_tail(codec: TextCodec, token_ids: Sequence[int]) -> list[int]:
    """The last tokens, enough of them for the text of what follows, from the beginning of a character on."""
    for length in range(CONTEXT, MAX_CONTEXT):
        tail = list(token_ids[-length:])
        if length >= len(token_ids) or BROKEN not in codec.decode(tail):
            return tail
    return list(token_ids[-CONTEXT:])


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many first tokens two sequences share."""
    length = min(len(left), len(right))
    if left[:length] == right[:length]:
        return length
    return next(i for i in range(length) if left[i] != right[i])
