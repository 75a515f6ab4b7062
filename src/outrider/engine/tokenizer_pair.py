"""What the target's and a draft's tokenizer have to do with each other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from outrider.drafting.text_draft import TextSide
from outrider.inputs.tokenizer import Tokenizer


class TokenizerPair:
    """Args:
    num_target, num_draft: widths of the models' logits; ids beyond them are never chosen.
    """

    def __init__(self, target: Tokenizer, draft: Tokenizer, num_target: int, num_draft: int) -> None:
        self._target, self._draft = target, draft
        self._num_target, self._num_draft = num_target, num_draft
        self._spelled: dict[int, tuple[int, ...]] = {}

    @cached_property
    def shared_ids(self) -> np.ndarray:
        """``[num_shared, 2]`` int64: ids of the same piece of text in both, by the target's ids.

        Of several tokens of a vocabulary for one piece the lowest counts. What ends a text is shared by its meaning.
        """
        draft_id_of = {piece: token for token, piece in _lowest_last(self._draft) if token < self._num_draft}
        target_id_of = {piece: token for token, piece in _lowest_last(self._target) if token < self._num_target}
        pairs = {token: draft_id_of[piece] for piece, token in target_id_of.items() if piece in draft_id_of}
        ends = (self._target.eos_id, self._draft.eos_id)
        if ends[0] is not None and ends[1] is not None and ends[0] < self._num_target and ends[1] < self._num_draft:
            pairs = {token: other for token, other in pairs.items() if other != ends[1]} | {ends[0]: ends[1]}
        return np.array(sorted(pairs.items()), dtype=np.int64).reshape(-1, 2)

    @property
    def overlap(self) -> float:
        """Which part of the target's tokens the draft has too."""
        return len(self.shared_ids) / max(1, len(self._target.pieces))

    def encode_for_draft(self, token_ids: Sequence[int]) -> list[int]:
        """The draft's tokens for the target's, as a text begins."""
        return [*self.draft_side.prefix, *self.draft_side.codec.encode(self.target_side.codec.decode(token_ids))]

    def spell_for_draft(self, token_id: int) -> tuple[int, ...]:
        """The draft's tokens for one of the target's: none for a special one, or bytes that the draft cannot say."""
        spelled = self._spelled.get(token_id)
        if spelled is None:
            kind, piece = self._target.pieces.get(token_id, ("special", b""))
            spelled = () if kind == "special" else self._spell(piece)
            self._spelled[token_id] = spelled
        return spelled

    @cached_property
    def target_side(self) -> TextSide:
        known = self._draft.vocab.keys() & {
            token for token, token_id in self._target.vocab.items() if token_id in self._target.special_ids
        }
        dropped = self._target.special_ids - {self._target.vocab[token] for token in known}
        return TextSide(_Codec(self._target, frozenset(dropped)), self._target.special_ids, self._target.eos_id)

    @cached_property
    def draft_side(self) -> TextSide:
        codec = _Codec(self._draft, self._draft.special_ids)
        return TextSide(codec, self._draft.special_ids, self._draft.eos_id, _prefix(self._draft))

    def _spell(self, piece: bytes) -> tuple[int, ...]:
        """Encoded behind another character, so that a leading space is one; else byte by byte."""
        text, encode = piece.decode(errors="replace"), self._draft.encode
        if text.encode() == piece:
            for before in ("\n", "a", "."):
                known = encode(before, add_special_tokens=False)
                whole = encode(before + text, add_special_tokens=False)
                if whole[: len(known)] == known:
                    return tuple(whole[len(known) :])
        found = [self._draft_bytes.get(byte) for byte in piece]
        return tuple(token for token in found if token is not None) if None not in found else ()

    @cached_property
    def _draft_bytes(self) -> dict[int, int]:
        """The draft's tokens of single bytes."""
        pieces = self._draft.pieces.items()
        return {piece[0]: token for token, (kind, piece) in pieces if kind == "text" and len(piece) == 1}


class _Codec:
    """A tokenizer as `TextCodec`: `dropped` tokens are no text."""

    def __init__(self, tokenizer: Tokenizer, dropped: frozenset[int]) -> None:
        self._tokenizer, self._dropped = tokenizer, dropped

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        kept = [token for token in token_ids if token not in self._dropped]
        return self._tokenizer.decode(kept, skip_special_tokens=False)


def _lowest_last(tokenizer: Tokenizer) -> list[tuple[int, tuple[str, bytes]]]:
    return sorted(tokenizer.pieces.items(), reverse=True)


def _prefix(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Special tokens that the tokenizer puts before a text."""
    plain, marked = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    start = next((i for i in range(len(marked)) if marked[i : i + len(plain)] == plain), 0)
    return tuple(marked[:start])
