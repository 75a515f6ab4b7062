"""Copying from references and from the request's own history.

Inference with reference (LLMA; Yang et al., arXiv 2304.04487): where the last tokens stand in a given reference, what
follows there is the draft. CopySpec (Dumitru et al., arXiv 2502.08923): the same for the history, found by a hash of
the last gamma tokens in constant time; a block of fixed length is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from outrider.config import CopyConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, FinishedText
from outrider.drafting.sources.hash_index import HashIndex
from outrider.drafting.sources.matches import END_OF_TEXT, MAX_LENGTH, continuation, match_length, weighted_paths
from outrider.drafting.sources.references import token_references
from outrider.drafting.tree_merge import WeightedPath


class CopySource:
    name = "copy"
    reads_logits = False

    def __init__(self, config: CopyConfig) -> None:
        self._config = config
        self._references: list[int] = []
        for reference in token_references(config):
            self._references += [*reference, END_OF_TEXT]
        self._reference_index = HashIndex(config.gammas)
        self._reference_index.extend(self._references)
        self._histories: dict[str, HashIndex] = {}

    def continuations(self, context: DraftContext) -> list[WeightedPath]:
        tokens = context.token_ids
        history = self._histories.get(context.request_id)
        if history is None:
            history = self._histories[context.request_id] = HashIndex(self._config.gammas)
        history.extend(tokens)
        depth = min(self._config.depth, context.max_depth, context.max_nodes)
        if depth <= 0:
            return []
        hashes = history.suffix_hashes()
        found: list[tuple[Sequence[int], int]] = []
        for text, index, periodic in (
            (self._references, self._reference_index, False),
            (tokens, history, True),
        ):
            if text is tokens and not self._config.history:
                continue
            for end, gamma in islice(index.ends(hashes, self._config.num_candidates), self._config.num_candidates):
                length = match_length(text, end, tokens, 0)
                if length >= min(gamma, MAX_LENGTH):  # else equal hashes of different tokens
                    found.append((continuation(text, end, depth, periodic=periodic), length))
        found.sort(key=lambda candidate: -candidate[1])
        return weighted_paths(found, self._config.num_candidates)

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        pass  # the accepted tokens are read from the next context

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._histories.pop(request_id, None)
