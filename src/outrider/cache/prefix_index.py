"""Which cached block holds the keys and values of which token prefix.

A trie over full blocks: an entry is found by (its parent entry, the block's own tokens), compared exactly, so
that no hash collision can ever hand one prompt's cache to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

ROOT = 0


class PrefixIndex:
    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._entries: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # key -> (entry id, block)
        self._key_of_block: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._next_id = count(ROOT + 1)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, block: int) -> bool:
        return block in self._key_of_block

    def match(self, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """(entry, block) of the longest cached chain of full blocks that `token_ids` starts with."""
        found: list[tuple[int, int]] = []
        parent = ROOT
        for start in range(0, len(token_ids) - self._block_size + 1, self._block_size):
            entry = self._entries.get((parent, tuple(token_ids[start : start + self._block_size])))
            if entry is None:
                break
            found.append(entry)
            parent = entry[0]
        return found

    def insert(self, parent: int, tokens: Sequence[int], block: int) -> int:
        """Name `block` as the holder of `tokens` after `parent`; returns the entry, an older one if there is one."""
        key = (parent, tuple(tokens))
        entry = self._entries.get(key)
        if entry is None:
            entry = (next(self._next_id), block)
            self._entries[key] = entry
            self._key_of_block[block] = key
        return entry[0]

    def remove(self, block: int) -> None:
        """Forget an evicted block; entries below it are out of reach now, and are evicted in their turn."""
        del self._entries[self._key_of_block.pop(block)]

    def check_integrity(self) -> None:
        assert {block for _, block in self._entries.values()} == set(self._key_of_block)
        for key, (_, block) in self._entries.items():
            assert self._key_of_block[block] == key
