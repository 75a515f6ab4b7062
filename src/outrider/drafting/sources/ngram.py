"""Prompt lookup: what followed the longest matching suffixes before is proposed again.

After Saxena's prompt lookup decoding and LLMA (Yang et al., arXiv 2304.04487), with several earlier occurrences
merged into one tree.
"""

from __future__ import annotations

from collections.abc import Sequence

from outrider.config import NgramConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, FinishedText
from outrider.drafting.sources.hash_index import HashIndex, new_index
from outrider.drafting.sources.matches import MAX_MATCHES, weighted_paths
from outrider.drafting.tree_merge import WeightedPath


class NgramSource:
    name = "ngram"
    reads_logits = False

    def __init__(self, config: NgramConfig) -> None:
        self._config = config
        self._indexes: dict[str, HashIndex] = {}

    def continuations(self, context: DraftContext) -> list[WeightedPath]:
        config, tokens = self._config, context.token_ids
        index = self._indexes.get(context.request_id)
        if index is None:
            index = self._indexes[context.request_id] = new_index(range(config.max_ngram, config.min_ngram - 1, -1))
        index.append(tokens[len(index) :])
        depth = min(config.depth, context.max_depth, context.max_nodes)
        if depth <= 0:
            return []
        found = index.copies(tokens, depth, per_length=MAX_MATCHES, most=MAX_MATCHES, periodic=True)
        return weighted_paths(found, config.num_candidates)

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        pass  # the accepted tokens are read from the next context

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._indexes.pop(request_id, None)
