"""Where stretches of tokens stand in a text, by a rolling hash: O(1) per token, however long the stretches."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

MODULUS = (1 << 61) - 1
BASE = 0x1F3D5B79A2C4E681 % MODULUS  # any large odd number; hits are compared with the text, collisions cost nothing
NOWHERE = -1


class HashIndex:
    """The latest ends of each stretch of `lengths` tokens of a growing text.

    Args:
        lengths: of the stretches, the longest first.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        self._powers = tuple(pow(BASE, length, MODULUS) for length in lengths)
        self._prefix_hashes = array("Q", [0])  # of the text up to each position
        self._latest: tuple[dict[int, int], ...] = tuple({} for _ in lengths)
        self._earlier = tuple(array("q", [NOWHERE]) for _ in lengths)  # [position] the end before, of an equal hash

    def __len__(self) -> int:
        """Tokens indexed."""
        return len(self._prefix_hashes) - 1

    def extend(self, text: Sequence[int]) -> None:
        """Index the tokens that are new since the last call."""
        hashes = self._prefix_hashes
        for end in range(len(hashes), len(text) + 1):
            value = (hashes[end - 1] * BASE + text[end - 1] + 2) % MODULUS
            hashes.append(value)
            for length, power, latest, earlier in zip(
                self.lengths, self._powers, self._latest, self._earlier, strict=True
            ):
                if length > end:
                    earlier.append(NOWHERE)
                    continue
                window = (value - hashes[end - length] * power) % MODULUS
                earlier.append(latest.get(window, NOWHERE))
                latest[window] = end

    def suffix_hashes(self) -> tuple[int | None, ...]:
        """``[len(lengths)]`` hashes of the text's last tokens; None where it is shorter."""
        hashes, end = self._prefix_hashes, len(self)
        return tuple(
            (hashes[end] - hashes[end - length] * power) % MODULUS if length <= end else None
            for length, power in zip(self.lengths, self._powers, strict=True)
        )

    def ends(self, suffix_hashes: Sequence[int | None], limit: int) -> Iterator[tuple[int, int]]:
        """Where a suffix stands in the text with a token behind it: the longest first, then the latest first.

        Args:
            suffix_hashes: of an index with the same lengths.
            limit: the most to look at for each length.

        Yields:
            The position behind an occurrence, and the length whose hash is equal; the tokens may still differ.
        """
        seen: set[int] = set()
        for length, wanted, latest, earlier in zip(
            self.lengths, suffix_hashes, self._latest, self._earlier, strict=True
        ):
            end = latest.get(wanted, NOWHERE) if wanted is not None else NOWHERE
            for _ in range(limit + 1):
                if end == NOWHERE:
                    break
                if end < len(self) and end not in seen:
                    seen.add(end)
                    yield end, length
                end = earlier[end]
