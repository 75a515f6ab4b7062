"""Adaptive n-grams (ANPD; Ou et al., arXiv 2404.08698): n-grams of several levels, learnt from the request.

The table starts with the prompt and takes in every generated token. Unlike prompt lookup it does not copy one span:
each draft token is predicted anew from the tokens before it, by the longest level that knows them, and by shorter
ones for what is left (the multi-level n-gram). That the counts also give the branches of a tree is ours.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from outrider.config import AnpdConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, FinishedText
from outrider.drafting.sources.matches import DISCOUNTS, MAX_LENGTH
from outrider.drafting.tree_merge import WeightedPath

MIN_PATH_PROB = 0.01  # less likely nodes are not worth looking for


class NgramModel:
    """Counts of what followed each n-gram of one growing text: O(levels) per new token."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = tuple(lengths)
        self._counts: dict[tuple[int, ...], dict[int, int]] = {}
        self._num_learnt = 0

    def extend(self, text: Sequence[int]) -> None:
        """Count the tokens that are new since the last call."""
        counts = self._counts
        for position in range(self._num_learnt, len(text)):
            token = text[position]
            for length in self._lengths:
                if length <= position:
                    row = counts.setdefault(tuple(text[position - length : position]), {})
                    row[token] = row.pop(token, 0) + 1  # the latest is the last entry
        self._num_learnt = len(text)

    def predict(self, suffix: tuple[int, ...], limit: int) -> list[tuple[int, float]]:
        """What may follow, the most likely first, with its probability.

        The longest level that knows the suffix gives each token its count less a discount; the discounts go to what
        the next shorter level knows besides.
        """
        left = 1.0
        found: dict[int, float] = {}
        for length in self._lengths:
            row = self._counts.get(suffix[-length:]) if length <= len(suffix) else None
            if row is None:
                continue
            new = [item for item in reversed(row.items()) if item[0] not in found]
            total = sum(count for _, count in new)
            if not total:
                continue
            discount = DISCOUNTS[min(length, MAX_LENGTH)]
            for token, count in new:
                found[token] = left * (count - discount) / total
            left *= discount * len(new) / total
            if left < MIN_PATH_PROB:
                break
        return sorted(found.items(), key=lambda item: -item[1])[:limit]


class AnpdSource:
    name = "anpd"
    reads_logits = False

    def __init__(self, config: AnpdConfig) -> None:
        self._config = config
        self._models: dict[str, NgramModel] = {}

    def continuations(self, context: DraftContext) -> list[WeightedPath]:
        config = self._config
        model = self._models.get(context.request_id)
        if model is None:
            model = self._models[context.request_id] = NgramModel(config.levels)
        model.extend(context.token_ids)
        max_nodes, max_depth = min(config.max_nodes, context.max_nodes), min(config.depth, context.max_depth)
        threshold = max(MIN_PATH_PROB, context.min_path_prob)
        taken: dict[tuple[int, ...], tuple[float, ...]] = {}
        # (-probability, order of discovery, path, confidences): the most likely node is expanded next.
        heap: list[tuple[float, int, tuple[int, ...], tuple[float, ...]]] = [(-1.0, 0, (), ())]
        longest = config.levels[0]
        suffix = tuple(context.token_ids[-longest:])
        num_found = 0
        while heap and len(taken) <= max_nodes and max_depth > 0:
            negative, _, path, confidences = heapq.heappop(heap)
            taken[path] = confidences
            if len(path) == max_depth:
                continue
            for token, confidence in model.predict((suffix + path)[-longest:], config.num_candidates):
                if -negative * confidence >= threshold:
                    num_found += 1
                    entry = (negative * confidence, num_found, (*path, token), (*confidences, confidence))
                    heapq.heappush(heap, entry)
        inner = {path[:-1] for path in taken}
        return [WeightedPath(path, confidences) for path, confidences in taken.items() if path not in inner]

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        pass  # the accepted tokens are read from the next context

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._models.pop(request_id, None)
