"""Prompt lookup: what followed the longest matching suffix before is proposed again.

After Saxena's prompt lookup decoding and LLMA (Yang et al., arXiv 2304.04487), with several earlier occurrences
merged into one tree, the longest and most recent first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice

from outrider.config import NgramConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, DraftStyle
from outrider.token_tree import TokenTree

MAX_MATCHES = 64  # looked at in a step: periodic text matches everywhere, with the same continuation


class NgramIndex:
    """Where each n-gram of one growing sequence ended, kept incrementally: O(max_ngram) per new token."""

    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        self._lengths = range(max_ngram, min_ngram - 1, -1)
        self._ends: dict[tuple[int, ...], list[int]] = defaultdict(list)
        self._num_indexed = 0

    def extend(self, token_ids: Sequence[int]) -> None:
        """Index the tokens that are new since the last call."""
        for end in range(self._num_indexed + 1, len(token_ids) + 1):
            for length in self._lengths:
                if length <= end:
                    self._ends[tuple(token_ids[end - length : end])].append(end)
        self._num_indexed = len(token_ids)

    def matches(self, token_ids: Sequence[int]) -> Iterator[int]:
        """Ends of earlier occurrences of the sequence's suffixes: longest first, then most recent first."""
        seen: set[int] = set()
        for length in self._lengths:
            if length > len(token_ids):
                continue
            for end in reversed(self._ends.get(tuple(token_ids[-length:]), ())):
                if end < len(token_ids) and end not in seen:
                    seen.add(end)
                    yield end


class NgramDrafter:
    name = "ngram"
    returns_probs = False
    reads_logits = False

    def __init__(self, config: NgramConfig, style: DraftStyle) -> None:
        self._config = config
        self._num_candidates = 1 if style.chains_only else config.num_candidates
        self.max_nodes = min(config.max_nodes, config.depth) if style.chains_only else config.max_nodes
        self._indexes: dict[str, NgramIndex] = {}

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        return [self._propose(context) for context in contexts]

    def _propose(self, context: DraftContext) -> TokenTree:
        tokens = context.token_ids
        index = self._indexes.get(context.request_id)
        if index is None:
            index = NgramIndex(self._config.min_ngram, self._config.max_ngram)
            self._indexes[context.request_id] = index
        index.extend(tokens)
        depth = min(self._config.depth, context.max_depth)
        max_nodes = min(self.max_nodes, context.max_nodes)
        paths: list[Sequence[int]] = []
        if depth > 0 and max_nodes > 0:
            for end in islice(index.matches(tokens), MAX_MATCHES):
                path = tokens[end : end + depth]
                # A match that reaches the end of the text repeats itself: so may what follows.
                path = [path[i % len(path)] for i in range(depth)]
                if path not in paths:
                    paths.append(path)
                    if len(paths) == self._num_candidates:
                        break
        return TokenTree.from_paths(tokens[-1], paths, max_nodes + 1)

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        pass  # the accepted tokens are read from the next context

    def release(self, request_id: str) -> None:
        self._indexes.pop(request_id, None)
