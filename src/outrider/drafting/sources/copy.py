"""Copying from references and from the request's own history.

Inference with reference (LLMA; Yang et al., arXiv 2304.04487): where the last tokens stand in a given reference, what
follows there is the draft. CopySpec (Dumitru et al., arXiv 2502.08923): the same for the history, found by a hash of
the last gamma tokens in constant time; a block of fixed length is copied.

Both authors' codes copy one block, from the first place that matches, CopySpec's after one length of match. Several
lengths, several places in one tree and confidences by the length of the match are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from outrider.config import CopyConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, FinishedText
from outrider.drafting.sources.hash_index import HashIndex, new_index
from outrider.drafting.sources.matches import END_OF_TEXT, weighted_paths
from outrider.drafting.sources.references import token_references
from outrider.drafting.tree_merge import WeightedPath


class CopySource:
    name = "copy"
    reads_logits = False

    def __init__(self, config: CopyConfig) -> None:
        self._config = config
        self._references = new_index(config.gammas)
        for reference in token_references(config):
            self._references.append([*reference, END_OF_TEXT])
        self._histories: dict[str, HashIndex] = {}

    def continuations(self, context: DraftContext) -> list[WeightedPath]:
        tokens, most = context.token_ids, self._config.num_candidates
        history = self._histories.get(context.request_id)
        if history is None:
            history = self._histories[context.request_id] = new_index(self._config.gammas)
        history.append(tokens[len(history) :])
        depth = min(self._config.depth, context.max_depth, context.max_nodes)
        if depth <= 0:
            return []
        found = self._references.copies(tokens, depth, per_length=most, most=most, periodic=False)
        if self._config.history:
            found += history.copies(tokens, depth, per_length=most, most=most, periodic=True)
        found.sort(key=lambda candidate: -candidate[1])
        return weighted_paths(found, most)

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        pass  # the accepted tokens are read from the next context

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._histories.pop(request_id, None)
