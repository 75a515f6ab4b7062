"""REST (He et al., arXiv 2311.08252): what followed the longest suffix of the context in a corpus on disk.

REST looks at the longest suffix alone (algorithm 1), and its trees have 64 nodes. Here a shorter suffix with several
times as many matches is looked at too: where the longest occurs once or twice it is right less often than what is
common after fewer tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, starmap
from pathlib import Path
from typing import Any

import numpy as np

from outrider.config import DatastoreConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, FinishedText
from outrider.drafting.sources.datastore_file import Chunk, Datastore, open_datastore
from outrider.drafting.sources.guess_tree import GuessTree, grow
from outrider.drafting.tree_merge import WeightedPath
from outrider.errors import ConfigError
from outrider.kernels.drafting import address, compiled

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


@dataclass(frozen=True)
class SearchLimits:
    """Attributes:
    num_lengths, num_samples: as in `DatastoreConfig`.
    max_nodes, max_depth: of a tree of guesses; at least 1.
    min_path_prob: nodes with a smaller product are left out.
    """

    num_lengths: int
    num_samples: int
    max_nodes: int
    max_depth: int
    min_path_prob: float


# How many of a query's last tokens occur, and what follows them, as paths. Tokens of a query are the store's.
Search = Callable[[Sequence[int], SearchLimits], tuple[int, list[WeightedPath]]]


class PythonSearch:
    """Args:
    num_proposed: no greater token is proposed.
    """

    def __init__(self, store: Datastore, num_proposed: int) -> None:
        self._indexes = [ChunkIndex(chunk) for chunk in store.chunks]
        self._separator, self._end = store.header.vocab_size, num_proposed
        self._dtype = np.dtype(">u2" if store.header.token_bytes == 2 else ">u4")

    def __call__(self, tokens: Sequence[int], limits: SearchLimits) -> tuple[int, list[WeightedPath]]:
        query = np.array(tokens, dtype=np.int64).astype(self._dtype).tobytes()
        longest = length = self._longest(query)
        paths: list[WeightedPath] = []
        num_looked_at = num_matches = 0
        while length and num_looked_at < limits.num_lengths:
            matches = self._matches(query, length)
            if (found := sum(map(len, matches))) >= MORE_MATCHES * num_matches:
                rows, weight = self._sample(matches, length, limits)
                paths += self._grow(rows, weight, length, limits).paths()
                num_matches = found
                num_looked_at += 1
            length -= 1
        return longest, paths

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

    def _sample(self, matches: Sequence[Matches], length: int, limits: SearchLimits) -> tuple[list[list[int]], float]:
        """What follows some of the matches, in order; they are taken at equal distances, so that counts keep ratios.

        Returns:
            ``[num_samples][max_depth]`` tokens, numbers beyond the vocabulary where a text ends; and how many matches
            each sample stands for.
        """
        total, depth = sum(map(len, matches)), limits.max_depth
        share = min(1.0, limits.num_samples / total)
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

    def _grow(self, rows: list[list[int]], weight: float, length: int, limits: SearchLimits) -> GuessTree:
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
            max_nodes=limits.max_nodes,
            max_depth=limits.max_depth,
            min_path_prob=limits.min_path_prob,
        )


class CompiledSearch:
    """The same over the bytes of the mapped file."""

    def __init__(self, module: Any, store: Datastore, num_proposed: int) -> None:
        self._contents = [np.frombuffer(chunk.content, dtype=np.uint8) for chunk in store.chunks]  # mapped as long
        chunks = [
            (address(content) + chunk.start, chunk.length)
            for content, chunk in zip(self._contents, store.chunks, strict=True)
        ]
        self._store = module.Datastore(chunks, store.header.token_bytes, store.header.vocab_size, num_proposed)

    def __call__(self, tokens: Sequence[int], limits: SearchLimits) -> tuple[int, list[WeightedPath]]:
        length, paths = self._store.search(
            tokens,
            limits.num_lengths,
            limits.num_samples,
            limits.max_nodes,
            limits.max_depth,
            limits.min_path_prob,
        )
        return length, list(starmap(WeightedPath, paths))


def new_search(store: Datastore, num_proposed: int) -> Search:
    """Searches a datastore; see `PythonSearch`."""
    module = compiled()
    return PythonSearch(store, num_proposed) if module is None else CompiledSearch(module, store, num_proposed)


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
        self._separator = store.header.vocab_size
        # A tokenizer may know tokens that its model does not.
        self._search = new_search(store, min(vocab_size, self._separator))
        self._last_match: dict[str, tuple[int, int]] = {}  # tokens of the context, tokens that matched

    def continuations(self, context: DraftContext) -> Sequence[WeightedPath]:
        depth = min(self._config.depth, context.max_depth)
        if min(depth, context.max_nodes) <= 0:
            return ()  # and nothing to learn: how long a match can be follows from the last one that was looked for
        limits = SearchLimits(
            self._config.num_lengths,
            self._config.num_samples,
            min(self._config.max_nodes, context.max_nodes),
            depth,
            context.min_path_prob,
        )
        length, paths = self._search(self._query(context), limits)
        self._last_match[context.request_id] = len(context.token_ids), length
        return paths

    def _query(self, context: DraftContext) -> Sequence[int]:
        """The end of the context, as far as it may match; a match grows by what was committed, never by more."""
        tokens = context.token_ids
        num_seen, last = self._last_match.get(context.request_id, (0, 0))
        limit = min(self._config.max_match, last + len(tokens) - num_seen)
        recent = tokens[len(tokens) - min(limit, len(tokens)) :]
        foreign = [place for place, token in enumerate(recent) if token >= self._separator]
        return recent[foreign[-1] + 1 :] if foreign else recent  # the model's, but not the tokenizer's

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        pass  # the corpus is what it is

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._last_match.pop(request_id, None)
