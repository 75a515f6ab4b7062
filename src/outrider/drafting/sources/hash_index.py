"""Where stretches of tokens stand in a text, by a rolling hash: O(1) per token, however long the stretches.

Compiled where there is a compiler.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol

from outrider.drafting.sources.matches import MAX_LENGTH, continuation, match_length
from outrider.kernels.drafting import compiled

MODULUS = (1 << 61) - 1
BASE = 0x1F3D5B79A2C4E681 % MODULUS  # any large odd number; hits are compared with the text, collisions cost nothing
NOWHERE = -1


class HashIndex(Protocol):
    """A growing text, and the latest ends of its stretches of some lengths."""

    def __len__(self) -> int:
        """Tokens of the text."""
        ...

    def append(self, tokens: Sequence[int]) -> None:
        """Make the text longer."""
        ...

    def copies(
        self, tokens: Sequence[int], depth: int, *, per_length: int, most: int, periodic: bool
    ) -> list[tuple[Sequence[int], int]]:
        """What stands behind the places that agree with the end of some tokens: the longest, then the latest first.

        Args:
            depth: the most tokens of each continuation.
            per_length: the most places looked at for each length of stretch, by and large.
            most: the most places looked at.
            periodic: see `continuation`.

        Returns:
            Continuations, with the length of agreement.
        """
        ...


def new_index(lengths: Sequence[int]) -> HashIndex:
    """An index of an empty text.

    Args:
        lengths: of the stretches, the longest first.
    """
    module = compiled()
    return PythonIndex(lengths) if module is None else module.HashIndex(lengths)


class PythonIndex:
    def __init__(self, lengths: Sequence[int]) -> None:
        self._text: list[int] = []
        self._hashes = array("Q", [0])  # of the text up to each position
        self._levels = [
            # The length, the power that shifts a hash by it, the latest end of each hash, by position the end before.
            (length, pow(BASE, length, MODULUS), dict[int, int](), array("q", [NOWHERE]))
            for length in lengths
        ]

    def __len__(self) -> int:
        return len(self._text)

    def append(self, tokens: Sequence[int]) -> None:
        text, hashes, levels = self._text, self._hashes, self._levels
        value, end = hashes[-1], len(text)
        text.extend(tokens)
        for token in tokens:
            end += 1
            value = (value * BASE + token + 2) % MODULUS
            hashes.append(value)
            for length, power, latest, earlier in levels:
                if length > end:
                    earlier.append(NOWHERE)
                    continue
                window = (value - hashes[end - length] * power) % MODULUS
                earlier.append(latest.get(window, NOWHERE))
                latest[window] = end

    def copies(
        self, tokens: Sequence[int], depth: int, *, per_length: int, most: int, periodic: bool
    ) -> list[tuple[Sequence[int], int]]:
        found: list[tuple[Sequence[int], int]] = []
        text, size, seen, last = self._text, len(self._text), set[int](), list(tokens[-MAX_LENGTH:])
        for (length, _, latest, earlier), wanted in zip(self._levels, self._suffix_hashes(tokens), strict=True):
            end = latest.get(wanted, NOWHERE)
            known = min(length, MAX_LENGTH)
            stretch = last[-known:]
            for _ in range(per_length + 1):
                if end == NOWHERE:
                    break
                if end < size and end not in seen:
                    if len(seen) == most:
                        return found
                    seen.add(end)
                    if text[end - known : end] == stretch:  # else equal hashes of different tokens
                        found.append(
                            (continuation(text, end, depth, periodic=periodic), _agreement(text, end, last, known))
                        )
                end = earlier[end]
        return found

    def _suffix_hashes(self, tokens: Sequence[int]) -> list[int]:
        """Hashes of the last tokens, of each length; `NOWHERE` where there are fewer."""
        lengths = [length for length, *_ in self._levels]
        found: dict[int, int] = {}
        value, power = 0, 1
        for length in range(1, min(lengths[0], len(tokens)) + 1):
            value += (tokens[-length] + 2) * power
            power = power * BASE % MODULUS
            if length in lengths:
                found[length] = value % MODULUS
        return [found.get(length, NOWHERE) for length in lengths]


def _agreement(text: list[int], end: int, last: list[int], known: int) -> int:
    """`match_length`, faster where all or no more than the known agrees."""
    if known == min(end, len(last)) or text[end - 1 - known] != last[-1 - known]:
        return known
    if text[max(end - len(last), 0) : end] == last:
        return len(last)
    return match_length(text, end, last, known + 1)
