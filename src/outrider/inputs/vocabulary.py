"""What the tokens of two tokenizers have in common: the same piece of text under different ids."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

Piece = tuple[str, bytes]
"""A kind ("text" or "special") and the bytes that a token stands for, a leading space included."""


def pieces_of(backend: Any) -> dict[int, Piece]:
    """What each token of a Hugging Face tokenizer stands for.

    Byte-level tokens ("Ġthe"), SentencePiece's ("▁the", "<0xE2>") and plain strings become the same bytes, so that
    equal pieces are found across these conventions.
    """
    to_bytes = _reader(backend)
    special = set(backend.all_special_ids) | _special_added(backend)
    return {
        token_id: ("special", token.encode()) if token_id in special else ("text", to_bytes(token))
        for token, token_id in backend.get_vocab().items()
    }


def special_ids_of(backend: Any) -> frozenset[int]:
    """Tokens that are no text."""
    return frozenset(backend.all_special_ids) | _special_added(backend)


def _special_added(backend: Any) -> frozenset[int]:
    added = getattr(backend, "added_tokens_decoder", {})
    return frozenset(token_id for token_id, token in added.items() if getattr(token, "special", False))


def _reader(backend: Any) -> Any:
    """How the strings of a vocabulary spell bytes: what the tokenizer's decoder undoes."""
    fast = getattr(backend, "backend_tokenizer", None)
    decoder = json.dumps(json.loads(fast.to_str()).get("decoder"), ensure_ascii=False) if fast is not None else "▁"
    if '"ByteLevel"' in decoder:
        return _byte_level
    return _sentencepiece if "▁" in decoder else str.encode


def _byte_level(token: str) -> bytes:
    """Of a vocabulary in which every byte has a visible character of its own, as GPT-2 began it."""
    byte_of = _visible_bytes()
    if all(character in byte_of for character in token):
        return bytes(byte_of[character] for character in token)
    return token.encode()  # a token that was added as it is


def _sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace("▁", " ").encode()


@cache
def _visible_bytes() -> dict[str, int]:
    """Printable Latin-1 characters stand for themselves, the other bytes for characters from U+0100 on, in order."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    byte_of = {chr(byte): byte for byte in visible}
    hidden = (byte for byte in range(256) if byte not in visible)
    return byte_of | {chr(256 + n): byte for n, byte in enumerate(hidden)}
