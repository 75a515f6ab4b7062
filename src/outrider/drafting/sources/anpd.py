"""Adaptive n-grams (ANPD; Ou et al., arXiv 2404.08698): n-grams of several levels, learnt from the request.

The table starts with the prompt and takes in every generated token. Unlike prompt lookup it does not copy one span:
each draft token is predicted anew from the tokens before it, by the longest level that knows them, and by shorter
ones for what is left (the multi-level n-gram). That the counts also give the branches of a tree is ours.
Compiled where there is a compiler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import starmap
from typing import Protocol

from outrider.config import AnpdConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, FinishedText
from outrider.drafting.sources.guess_tree import GuessTree, grow
from outrider.drafting.sources.matches import DISCOUNTS, MAX_LENGTH
from outrider.drafting.tree_merge import WeightedPath
from outrider.kernels.drafting import compiled

MIN_PATH_PROB = 0.01  # less likely nodes are not worth looking for


class NgramModel(Protocol):
    """Counts of what followed each n-gram of one growing text: O(levels) per new token."""

    def extend(self, text: Sequence[int]) -> None:
        """Count the tokens that are new since the last call."""
        ...

    def paths(
        self, num_candidates: int, max_nodes: int, max_depth: int, min_path_prob: float
    ) -> Sequence[tuple[Sequence[int], Sequence[float]]]:
        """What may follow the text: tokens and confidences on the way to each leaf of the most likely tree.

        Args:
            num_candidates: the most children of a node.
            max_nodes, max_depth: of the tree.
            min_path_prob: nodes with a smaller product are left out.
        """
        ...


def new_model(lengths: Sequence[int]) -> NgramModel:
    """Of an empty text.

    Args:
        lengths: of the n-grams, the longest first.
    """
    module = compiled()
    return PythonModel(lengths) if module is None else module.NgramCounts(lengths)


class PythonModel:
    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = tuple(lengths)
        self._counts: dict[tuple[int, ...], dict[int, int]] = {}
        self._num_learnt = 0
        self._last: tuple[int, ...] = ()

    def extend(self, text: Sequence[int]) -> None:
        counts = self._counts
        for position in range(self._num_learnt, len(text)):
            token = text[position]
            for length in self._lengths:
                if length <= position:
                    row = counts.setdefault(tuple(text[position - length : position]), {})
                    row[token] = row.pop(token, 0) + 1  # the latest is the last entry
        self._num_learnt = len(text)
        self._last = tuple(text[-self._lengths[0] :])

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

    def paths(
        self, num_candidates: int, max_nodes: int, max_depth: int, min_path_prob: float
    ) -> list[tuple[Sequence[int], Sequence[float]]]:
        longest = self._lengths[0]

        def successors(
            _tree: GuessTree, _node: int, _depth: int, suffix: tuple[int, ...]
        ) -> Iterator[tuple[int, float, tuple[int, ...]]]:
            for token, confidence in self.predict(suffix, num_candidates):
                yield token, confidence, (*suffix, token)[-longest:]

        tree = grow(self._last, successors, max_nodes=max_nodes, max_depth=max_depth, min_path_prob=min_path_prob)
        return [tree.path_to(leaf) for leaf in tree.leaves()]


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
            model = self._models[context.request_id] = new_model(config.levels)
        model.extend(context.token_ids)
        max_nodes, max_depth = min(config.max_nodes, context.max_nodes), min(config.depth, context.max_depth)
        threshold = max(MIN_PATH_PROB, context.min_path_prob)
        return list(starmap(WeightedPath, model.paths(config.num_candidates, max_nodes, max_depth, threshold)))

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        pass  # the accepted tokens are read from the next context

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._models.pop(request_id, None)
