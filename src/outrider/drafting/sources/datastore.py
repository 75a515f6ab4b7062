"""REST (He et al., arXiv 2311.08252): what followed the longest suffix of the context in a corpus on disk.

REST looks at the longest suffix alone. Here a shorter one with several times as many matches is looked at too: where
the longest occurs once or twice it is right less often than what is common after fewer tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np

from outrider.config import DatastoreConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, FinishedText
from outrider.drafting.sources.datastore_file import Chunk, open_datastore
from outrider.drafting.sources.guess_tree import GuessTree, grow
from outrider.drafting.tree_merge import WeightedPath
from outrider.errors import ConfigError

# As `guess_tree.ESCAPE`, for a corpus of others' texts: in held-out code a single match of two tokens is right in 18%
# of cases, of three in 22%, of four in 30%, of nine and more in 67%.
ESCAPE = 10.0
MORE_MATCHES = 4  # times as many as the longest suffix has make a shorter one worth looking at
CACHED_TOKENS = 4096  # whose entries are remembered


@dataclass(frozen=True)
class Matches:
    """Where tokens stand in one chunk: entries ``[first, end)`` of its suffix array."""

    chunk: Chunk
    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.first


class ChunkIndex:
    """Looks tokens up in one chunk, in a logarithm of its length."""

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self._after_first_token = lru_cache(CACHED_TOKENS)(lambda token: self._find(token, 1, (0, chunk.length)))

    def find(self, tokens: bytes) -> Matches:
        """All places of some tokens, in the order of what stands there.

        Args:
            tokens: as the chunk stores them; at least one, and no more than its suffix array is sorted by.
        """
        width = self.chunk.token_bytes
        entries = self._after_first_token(tokens[:width])
        if len(tokens) > width:
            entries = self._find(tokens, len(tokens) // width, entries)
        return Matches(self.chunk, *entries)

    def _find(self, tokens: bytes, length: int, entries: tuple[int, int]) -> tuple[int, int]:
        array, read = self.chunk.suffix_array, self.chunk.reader(length)
        first = bisect_left(array, tokens, *entries, key=read)
        # There are few as a rule: look near first, then twice as far each time.
        near, step = first, 1
        while near < entries[1] and read(array[near]) == tokens:
            near, step = near + step, 2 * step
        return first, bisect_right(array, tokens, first, min(near, entries[1]), key=read)


class DatastoreSource:
    """Proposes the most frequent continuations in a corpus.

    Args:
        vocab_size: of the target; no other tokens are proposed.
        vocab_fingerprint: digest of what its token ids mean, 32 bytes.

    Raises:
        ConfigError: no path.
        LookupFileError: the datastore is damaged or is something else.
        VocabularyMismatchError: it was built with another tokenizer.
        OSError: it cannot be read.
    """

    name = "datastore"
    reads_logits = False

    def __init__(self, config: DatastoreConfig, *, vocab_size: int, vocab_fingerprint: Callable[[], bytes]) -> None:
        if config.path is None:
            raise ConfigError(
                "datastore drafter",
                got="no path",
                expected="a datastore",
                remedy="pass decoding={'method': 'datastore', 'path': ...}; `outrider datastore build` makes one",
            )
        self._config = config
        store = open_datastore(Path(config.path), fingerprint=vocab_fingerprint())
        self._indexes = [ChunkIndex(chunk) for chunk in store.chunks]
        self._separator = store.header.vocab_size
        self._end = min(vocab_size, self._separator)  # a tokenizer may know tokens that its model does not
        self._dtype = np.dtype(">u2" if store.header.token_bytes == 2 else ">u4")
        self._last_match: dict[str, tuple[int, int]] = {}  # tokens of the context, tokens that matched

    def continuations(self, context: DraftContext) -> Sequence[WeightedPath]:
        depth = min(self._config.depth, context.max_depth)
        if min(depth, context.max_nodes) <= 0:
            return ()  # and nothing to learn: how long a match can be follows from the last one that was looked for
        query = self._query(context)
        length = self._longest(query)
        self._last_match[context.request_id] = len(context.token_ids), length
        paths: list[WeightedPath] = []
        num_looked_at = num_matches = 0
        while length and num_looked_at < self._config.num_lengths:
            matches = self._matches(query, length)
            if (found := sum(map(len, matches))) >= MORE_MATCHES * num_matches:
                rows, weight = self._sample(matches, length, depth)
                paths += self._grow(rows, weight, length, context, depth).paths()
                num_matches = found
                num_looked_at += 1
            length -= 1
        return paths

    def _query(self, context: DraftContext) -> bytes:
        """The end of the context, as far as it may match; a match grows by what was committed, never by more."""
        tokens = context.token_ids
        num_seen, last = self._last_match.get(context.request_id, (0, 0))
        limit = min(self._config.max_match, last + len(tokens) - num_seen)
        recent = np.array(tokens[len(tokens) - min(limit, len(tokens)) :], dtype=np.int64)
        foreign = np.flatnonzero(recent >= self._separator)  # the model's, but not the tokenizer's
        if foreign.size:
            recent = recent[foreign[-1] + 1 :]
        return recent.astype(self._dtype).tobytes()

    def _longest(self, query: bytes) -> int:
        """Tokens of the longest suffix that occurs: by bisection, as all suffixes of one that occurs do so too."""
        longest, too_long = 0, len(query) // self._dtype.itemsize + 1
        while too_long - longest > 1:
            length = (longest + too_long) // 2
            if any(map(len, self._matches(query, length))):
                longest = length
            else:
                too_long = length
        return longest

    def _matches(self, query: bytes, length: int) -> list[Matches]:
        suffix = query[len(query) - length * self._dtype.itemsize :]
        return [index.find(suffix) for index in self._indexes]

    def _sample(self, matches: Sequence[Matches], length: int, depth: int) -> tuple[list[list[int]], float]:
        """What follows some of the matches, in order; they are taken at equal distances, so that counts keep ratios.

        Returns:
            ``[num_samples][depth]`` tokens, numbers beyond the vocabulary where a text ends; and how many matches
            each sample stands for.
        """
        total = sum(map(len, matches))
        share = min(1.0, self._config.num_samples / total)
        pieces = []
        for match in matches:
            array, read, width = match.chunk.suffix_array, match.chunk.reader(depth), depth * self._dtype.itemsize
            num_samples = math.ceil(len(match) * share)
            for sample in range(num_samples):
                position = array[match.first + sample * len(match) // num_samples]
                pieces.append(read(position + length).ljust(width, b"\xff"))
        tokens = np.frombuffer(b"".join(pieces), dtype=self._dtype).reshape(len(pieces), depth)
        rows = np.minimum(tokens, self._separator).tolist()  # all ends are one
        rows.sort()
        return rows, total / len(rows)

    def _grow(
        self, rows: list[list[int]], weight: float, length: int, context: DraftContext, depth: int
    ) -> GuessTree:
        """The trie of continuations, weighted by prefix frequency and cut to the best nodes (algorithm 2)."""

        def successors(
            _made: GuessTree, _guess: int, depth: int, state: tuple[int, int]
        ) -> Iterable[tuple[int, float, tuple[int, int]]]:
            first, end = state
            escape = ESCAPE / (length + depth)
            token = rows[first][depth]
            if token == rows[end - 1][depth]:  # in order, so all between them are the same
                found = (end - first) * weight
                return ((token, found / (found + escape), state),) if token < self._end else ()
            counts = []
            for token, group in groupby(rows[first:end], key=lambda row: row[depth]):
                count = sum(1 for _ in group)
                counts.append((-count, token, first))
                first += count
            counts.sort()
            total = (end - state[0]) * weight + len(counts) * escape
            return [
                (token, -count * weight / total, (begin, begin - count))
                for count, token, begin in counts
                if token < self._end
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

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._last_match.pop(request_id, None)
