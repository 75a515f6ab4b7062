"""Tri-gram statistics searched with an exploration bonus (ADED; Liu et al., arXiv 2407.12021).

All requests share a matrix of statistics (`trigrams.py`), which is updated with every token, and with the target's
choices at rejected nodes too. Requests that run together would overwrite each other's latest, so each also has one
of its own, which is asked first. How the matrix is updated (rates, forgetting, a row for single tokens, rejected
nodes) is ours, and so is that it may begin empty: the authors begin with the tri-grams of a corpus (`references`
here).
"""

from __future__ import annotations

from collections.abc import Sequence

from outrider.config import AdedConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, FinishedText
from outrider.drafting.sources.references import token_references
from outrider.drafting.sources.trigrams import SearchLimits, TrigramMatrix, new_matrix, search
from outrider.drafting.tree_merge import WeightedPath

MIN_PATH_PROB = 0.01  # less likely nodes are not worth looking for


class AdedSource:
    name = "aded"
    reads_logits = False

    def __init__(self, config: AdedConfig) -> None:
        self._config = config
        self.matrix = self._new_matrix()
        self._own: dict[str, TrigramMatrix] = {}
        self._num_learnt: dict[str, int] = {}
        for reference in token_references(config):
            self.matrix.learn_text(reference, 1)

    def _new_matrix(self) -> TrigramMatrix:
        return new_matrix(self._config.capacity, self._config.num_candidates, self._config.rate)

    def continuations(self, context: DraftContext) -> list[WeightedPath]:
        tokens = context.token_ids
        own = self._own.get(context.request_id)
        if own is None:
            own = self._own[context.request_id] = self._new_matrix()
        matrices = [own, self.matrix]
        num_learnt = self._num_learnt.get(context.request_id, 1)
        for matrix in matrices:
            matrix.learn_text(tokens, num_learnt)
        self._num_learnt[context.request_id] = len(tokens)
        limits = SearchLimits(
            num_candidates=self._config.num_candidates,
            exploration=self._config.exploration,
            max_nodes=min(self._config.max_nodes, context.max_nodes),
            max_depth=min(self._config.depth, context.max_depth),
            min_path_prob=max(MIN_PATH_PROB, context.min_path_prob),
        )
        return search(matrices, tokens[-2] if len(tokens) > 1 else None, tokens[-1], limits)

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        """Learn the choices at rejected nodes; the accepted tokens are learnt from the next context."""
        for outcome in outcomes:
            if outcome.choices is None:
                continue
            tree, accepted = outcome.tree, set(outcome.path.accepted_nodes)
            for node in range(1, tree.num_nodes):
                if node not in accepted:
                    self.matrix.learn(tree.tokens[tree.parents[node]], tree.tokens[node], outcome.choices[node])

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._num_learnt.pop(request_id, None)
        self._own.pop(request_id, None)  # the shared matrix outlives requests: that is the point
