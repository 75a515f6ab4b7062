"""A toy draft whose token ids mean other things than the target's, and the letters that both write."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from outrider.drafting.text_draft import TextSide
from outrider.drafting.translated_runner import Translation
from tests.toy_model import ToyModel


def num_shared(vocab_size: int) -> int:
    """The last of the target's tokens are unknown to the draft."""
    return vocab_size - max(1, vocab_size // 8)


def draft_ids(vocab_size: int) -> np.ndarray:
    """The draft's id of each of the target's tokens that it knows: backwards, behind an id of its own."""
    return np.arange(num_shared(vocab_size), 0, -1)


class RenamedToyModel(ToyModel):
    """A toy model in the draft's ids; id 0 is a token that the target does not have."""

    def _logits(self, seen: tuple[int, ...]) -> np.ndarray:
        ids = draft_ids(self.vocab_size)
        target_id_of = {int(draft): target for target, draft in enumerate(ids)}
        near = super()._logits(tuple(target_id_of.get(token, self.vocab_size - 1) for token in seen))
        logits = np.full(self.vocab_size, -4.0, dtype=np.float32)
        logits[ids] = near[: len(ids)]
        return logits


def toy_translation(vocab_size: int) -> Translation:
    ids = draft_ids(vocab_size)

    def spell(token: int) -> tuple[int, ...]:
        return (int(ids[token]),) if token < len(ids) else (0,)

    return Translation(
        pairs=np.stack([np.arange(len(ids)), ids], axis=1),
        encode=lambda tokens: [draft for token in tokens for draft in spell(token)],
        spell=spell,
    )


class _Letters:
    """Token i is a letter; "?" is token 0 of the draft and none of the target's."""

    def __init__(self, letters: Sequence[str]) -> None:
        self._letters = list(letters)
        self._id_of = {letter: token for token, letter in enumerate(letters)}

    def encode(self, text: str) -> list[int]:
        unknown = self._id_of.get("?")
        ids = [self._id_of.get(letter, unknown) for letter in text]
        return [token for token in ids if token is not None]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(self._letters[token] for token in token_ids)


_ALPHABET = [chr(ord("a") + token) for token in range(26)]
TARGET_SIDE = TextSide(_Letters(_ALPHABET), frozenset(), None)


def draft_side(vocab_size: int) -> TextSide:
    letters = ["?"] * (num_shared(vocab_size) + 1)
    for token, draft in enumerate(draft_ids(vocab_size)):
        letters[draft] = _ALPHABET[token]
    return TextSide(_Letters(letters), frozenset(), None)
