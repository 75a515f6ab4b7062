"""Token Recycling as in the paper (Luo et al., arXiv 2408.08696): yesterday's candidates are today's draft.

An adjacency matrix keeps, for every token, the target's top candidates when that token was last verified; a static
tree is filled from it, breadth first. The matrix is shared by all requests. The tree's shape is ours (the authors'
has 80 nodes on 6 levels), and what we made of the idea is in `context_recycling.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from outrider.config import RecyclingConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, DraftStyle, FinishedText
from outrider.drafting.sequoia import sequoia_shape
from outrider.drafting.top_tokens import top_tokens
from outrider.drafting.tree_shape import best_first_shape, node_confidences
from outrider.token_tree import TokenTree

UNSEEN = -1
# Acceptance by rank, measured on held-out code with the bundled model; only shape and confidences depend on it.
RANK_PROBS = (0.45, 0.13, 0.07, 0.05, 0.035, 0.025, 0.02, 0.015)
# The same by depth, counted over wide trees; what is deeper is accepted as the last row is.
DEPTH_RANK_PROBS = (
    (0.51, 0.08, 0.04, 0.03, 0.02, 0.017, 0.015, 0.007),
    (0.56, 0.09, 0.045, 0.02, 0.013, 0.013, 0.009, 0.007),
    (0.65, 0.085, 0.033, 0.017, 0.015, 0.007, 0.004, 0.004),
    (0.71, 0.055, 0.03, 0.02, 0.01, 0.008, 0.002, 0.002),
)


class RecyclingDrafter:
    name = "recycling"
    returns_probs = False
    num_without_room = 0
    reads_logits = True

    def __init__(self, config: RecyclingConfig, style: DraftStyle, vocab_size: int) -> None:
        self._num_candidates = 1 if style.chains_only else min(config.num_candidates, vocab_size)
        last = len(DEPTH_RANK_PROBS) - 1
        acceptance = [DEPTH_RANK_PROBS[min(depth, last)][: self._num_candidates] for depth in range(config.depth)]
        assert config.shape != "grown", "another drafter's"
        if config.shape == "sequoia":
            self._shape = sequoia_shape(config.max_nodes, config.depth, acceptance)
        else:
            rank_probs = RANK_PROBS[: self._num_candidates]
            self._shape = best_first_shape(config.max_nodes, config.depth, rank_probs)
        self._confidences = node_confidences(self._shape, acceptance)
        self.max_nodes = len(self._shape.parents)
        self._candidates = np.full((vocab_size, self._num_candidates), UNSEEN, dtype=np.int64)

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        return [self._propose(context) for context in contexts]

    def _propose(self, context: DraftContext) -> TokenTree:
        rows: dict[int, list[int]] = {}

        def candidates(token: int, depth: int) -> list[int]:
            row = rows.get(token)
            if row is None:
                row = rows[token] = self._candidates[token].tolist()
            return row

        return self._shape.fill(
            context.token_ids[-1],
            candidates,
            max_nodes=context.max_nodes,
            max_depth=context.max_depth,
            confidences=self._confidences,
            min_path_prob=context.min_path_prob,
        )

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        for outcome in outcomes:
            assert outcome.target_logits is not None, "a drafter that reads logits got none"
            # In node order: of a token that stands at several nodes the deepest wins.
            tokens, _ = top_tokens(outcome.target_logits, self._num_candidates, outcome.logit_maxima)
            self._candidates[np.asarray(outcome.tree.tokens)] = tokens

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        pass  # the matrix outlives requests: that is the point
