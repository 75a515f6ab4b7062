"""Prompt lookup: what followed the longest matching suffixes before is proposed again.

After Saxena's prompt lookup decoding and LLMA (Yang et al., arXiv 2304.04487), with several earlier occurrences
merged into one tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from outrider.config import NgramConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, FinishedText
from outrider.drafting.sources.matches import MAX_MATCHES, NgramIndex, continuation, match_length, weighted_paths
from outrider.drafting.tree_merge import WeightedPath


class NgramSource:
    name = "ngram"
    reads_logits = False

    def __init__(self, config: NgramConfig) -> None:
        self._config = config
        self._indexes: dict[str, NgramIndex] = {}

    def continuations(self, context: DraftContext) -> list[WeightedPath]:
        tokens = context.token_ids
        index = self._indexes.get(context.request_id)
        if index is None:
            index = NgramIndex(self._config.min_ngram, self._config.max_ngram)
            self._indexes[context.request_id] = index
        index.extend(tokens)
        depth = min(self._config.depth, context.max_depth, context.max_nodes)
        if depth <= 0:
            return []
        longest = self._config.max_ngram
        candidates = [
            (
                continuation(tokens, end, depth, periodic=True),
                match_length(tokens, end, tokens, known) if known == longest else known,
            )
            for end, known in islice(index.matches(tokens), MAX_MATCHES)
        ]
        return weighted_paths(candidates, self._config.num_candidates)

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        pass  # the accepted tokens are read from the next context

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._indexes.pop(request_id, None)
