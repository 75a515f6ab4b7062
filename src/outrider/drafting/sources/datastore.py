"""REST (He et al., arXiv 2311.08252): what followed the longest suffix of the context in a corpus on disk."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from outrider.config import DatastoreConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome
from outrider.drafting.sources.datastore_file import Chunk, open_datastore
from outrider.drafting.sources.guess_tree import ESCAPE, GuessTree, grow
from outrider.drafting.tree_merge import WeightedPath
from outrider.errors import ConfigError


@dataclass(frozen=True)
class Matches:
    """Where a suffix of the context stands in one chunk: entries ``[first, end)`` of its suffix array."""

    chunk: Chunk
    first: int
    end: int


def longest_match(chunk: Chunk, context: bytes) -> tuple[int, int]:
    """The longest suffix of a context that a chunk contains.

    If a suffix occurs, so do all shorter ones: a binary search over lengths, each a binary search over the chunk.

    Args:
        context: tokens as the chunk stores them; no more than the suffix array is sorted by.

    Returns:
        Its length, and the first entry of the suffix array where it stands; (0, 0) if not even the last token occurs.
    """
    longest, where = 0, 0
    too_long = len(context) // chunk.token_bytes + 1
    while too_long - longest > 1:
        length = (longest + too_long) // 2
        suffix = context[-length * chunk.token_bytes :]
        first = bisect_left(chunk.suffix_array, suffix, key=lambda position, n=length: chunk.tokens(position, n))
        if first < chunk.length and chunk.tokens(chunk.suffix_array[first], length) == suffix:
            longest, where = length, first
        else:
            too_long = length
    return longest, where


class DatastoreSource:
    """Proposes the most frequent continuations in a corpus.

    Raises:
        ConfigError: no path.
        LookupFileError: the datastore is damaged or is something else.
        VocabularyMismatchError: it was built with another tokenizer.
        OSError: it cannot be read.
    """

    name = "datastore"
    reads_logits = False

    def __init__(self, config: DatastoreConfig, *, vocab_fingerprint: Callable[[], bytes]) -> None:
        if config.path is None:
            raise ConfigError(
                "datastore drafter",
                got="no path",
                expected="a datastore",
                remedy="pass drafter={'method': 'datastore', 'path': ...}; `outrider datastore build` makes one",
            )
        self._config = config
        store = open_datastore(Path(config.path), fingerprint=vocab_fingerprint())
        self._chunks, self._vocab_size = store.chunks, store.header.vocab_size
        self._dtype = np.dtype(">u2" if store.header.token_bytes == 2 else ">u4")
        self._last_match: dict[str, tuple[int, int]] = {}  # tokens of the context, tokens that matched

    def continuations(self, context: DraftContext) -> Sequence[WeightedPath]:
        length, matches = self._find(context)
        if not length:
            return []
        depth = min(self._config.depth, context.max_depth)
        rows, weight = self._sample(matches, length, depth)
        return self._grow(rows, weight, length, context, depth).paths()

    def _find(self, context: DraftContext) -> tuple[int, list[Matches]]:
        """Length of the longest match in any chunk, and all matches of that length."""
        tokens = context.token_ids
        num_seen, last = self._last_match.get(context.request_id, (0, 0))
        limit = min(self._config.max_match, last + len(tokens) - num_seen)  # a match grows by what was committed
        recent = np.asarray(tokens[-limit:], dtype=np.int64)
        foreign = np.flatnonzero(recent >= self._vocab_size)  # the model's, but not the tokenizer's
        if foreign.size:
            recent = recent[foreign[-1] + 1 :]
        query = recent.astype(self._dtype).tobytes()
        found = [(chunk, *longest_match(chunk, query)) for chunk in self._chunks]
        length = max(length for _, length, _ in found)
        self._last_match[context.request_id] = len(tokens), length
        suffix = query[-length * self._dtype.itemsize :]
        matches = []
        for chunk, matched, first in found:
            if matched == length > 0:
                array = chunk.suffix_array
                end = bisect_right(array, suffix, lo=first, key=lambda at, of=chunk: of.tokens(at, length))
                matches.append(Matches(chunk, first, end))
        return length, matches

    def _sample(self, matches: Sequence[Matches], length: int, depth: int) -> tuple[list[list[int]], float]:
        """What follows some of the matches, in order; they are taken at equal distances, so that counts keep ratios.

        Returns:
            ``[num_samples][depth]`` tokens, numbers beyond the vocabulary where a text ends; and how many matches
            each sample stands for.
        """
        total = sum(match.end - match.first for match in matches)
        step = max(1.0, total / self._config.num_samples)
        pieces = []
        for match in matches:
            chunk, count = match.chunk, match.end - match.first
            for i in range(max(1, round(count / step))):
                position = chunk.suffix_array[match.first + int((i + 0.5) * count / max(1, round(count / step)))]
                pieces.append(chunk.tokens(position + length, depth).ljust(depth * chunk.token_bytes, b"\xff"))
        rows = np.frombuffer(b"".join(pieces), dtype=self._dtype).reshape(len(pieces), depth).tolist()
        if len(matches) > 1:
            rows.sort()
        return rows, total / len(rows)

    def _grow(
        self, rows: list[list[int]], weight: float, length: int, context: DraftContext, depth: int
    ) -> GuessTree:
        """The trie of continuations, weighted by prefix frequency and cut to the best nodes (section 3.2)."""

        def successors(
            _made: GuessTree, _guess: int, depth: int, state: tuple[int, int]
        ) -> Iterable[tuple[int, float, tuple[int, int]]]:
            first, end = state
            counts = []
            for token, group in groupby(rows[first:end], key=lambda row: row[depth]):
                count = sum(1 for _ in group)
                counts.append((count, token, first))
                first += count
            total = (end - state[0]) * weight + len(counts) * ESCAPE / (length + depth)
            counts.sort(key=lambda of: -of[0])
            return [
                (token, count * weight / total, (begin, begin + count))
                for count, token, begin in counts
                if token < self._vocab_size
            ]

        return grow(
            (0, len(rows)),
            successors,
            max_nodes=min(self._config.max_nodes, context.max_nodes),
            max_depth=depth,
            min_path_prob=context.min_path_prob,
        )

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        pass  # the corpus is what it is

    def release(self, request_id: str) -> None:
        self._last_match.pop(request_id, None)
