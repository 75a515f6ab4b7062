"""Which nodes a tree should keep: pure functions of how likely each node's path is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def best_nodes(scores: Sequence[float], num_nodes: int) -> list[int]:
    """The nodes that make the expected accepted length greatest.

    A tree's expected accepted length is the sum of its nodes' path probabilities, which fall along every path; so the
    most probable nodes are the optimum, and closed under parents (OPT-Tree, arXiv 2406.17276, equation 3 and theorem
    3.1; for drawn trees DySpec, 2410.11744v1, appendix D).

    Args:
        scores: log of each node's path probability, at most its parent's; parents before children.

    Returns:
        At most `num_nodes` indices, ascending; of equals the first.
    """
    if len(scores) <= num_nodes:
        return list(range(len(scores)))
    return sorted(np.argsort(-np.asarray(scores), kind="stable")[:num_nodes].tolist())


def expected_length(scores: Sequence[float]) -> float:
    """Expected number of accepted draft tokens of a tree of these nodes."""
    return float(np.exp(np.asarray(scores, dtype=np.float64)).sum())
