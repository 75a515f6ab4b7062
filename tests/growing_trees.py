"""Trees that grow from log-weights given by hand, as a draft model's do."""

from __future__ import annotations

from collections.abc import Sequence

from outrider.drafting.drafter import DraftContext
from outrider.drafting.growth.tree import Draws, GrowingTree, GrowthLimits
from outrider.sampling.params import SamplingParams

LIMITS = GrowthLimits(num_nodes=64, depth=64, min_path_prob=0.0)


def growing_tree(draws: Draws, token_ids: Sequence[int], *, params: SamplingParams, seed: int) -> GrowingTree:
    """A tree that nothing is drawn in yet, below the last of `token_ids`."""
    context = DraftContext("r", token_ids, 1, LIMITS.num_nodes, LIMITS.depth, params, seed, frozenset())
    return GrowingTree(context, draws, LIMITS)
