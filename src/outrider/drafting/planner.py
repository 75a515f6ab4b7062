"""Which draft tokens are worth their rows: one greedy choice for the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray


def choose_nodes(
    path_probs: Sequence[Sequence[float]], costs: Callable[[int], NDArray[np.float64]], tokens_per_s: float
) -> list[list[int]]:
    """The nodes of each tree to verify, so that the step gains the most.

    A node is worth the probability that it is reached and accepted; it costs what one more row of the one forward
    takes, in tokens that could be had in that time. Probabilities fall along paths, so the best set of any size
    consists of the most probable nodes, and comparing all sizes finds the best set of all, whatever the shape of the
    cost. Over a batch of chains and a fixed number of rows this is TETRIS (arXiv 2502.15197), over one tree the
    choice of size of Sequoia (arXiv 2402.12374) and the dynamic trees of OPT-Tree (2406.17276) and DySpec
    (2410.11744).

    Args:
        path_probs: of each tree ``[num_nodes]``; the root's 1 is always taken.
        costs: ``n -> [1 + n]`` seconds of the step's forward with 0 to n draft tokens.
        tokens_per_s: what a second is worth.

    Returns:
        Of each tree the nodes to keep, ascending, the root first.
    """
    kept: list[list[int]] = [[0] for _ in path_probs]
    owners = [(tree, node) for tree, probs in enumerate(path_probs) for node in range(1, len(probs))]
    if not owners:
        return kept
    flat = np.array([path_probs[tree][node] for tree, node in owners])
    order = np.argsort(-flat, kind="stable")  # of equals the parent, which stands before its children, first
    seconds = costs(len(owners))
    worth = np.cumsum(flat[order]) - tokens_per_s * (seconds[1:] - seconds[0])
    best = int(worth.argmax())
    if worth[best] <= 0.0:
        return kept
    for index in sorted(order[: best + 1].tolist()):
        tree, node = owners[index]
        kept[tree].append(node)
    return kept
