"""Static tree shapes: which rank of which node's candidates a tree holds, before any token is known."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TreeShape:
    """Nodes below the root in breadth-first order.

    Attributes:
        parents: ``[num_nodes]`` parent node (0 is the root, node i of the tree is entry i - 1).
        ranks: ``[num_nodes]`` which of the parent's candidates stands here (0: the most probable).
        depths: ``[num_nodes]`` from 1.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]
    depths: tuple[int, ...]


def best_first_shape(max_nodes: int, max_depth: int, rank_probs: Sequence[float]) -> TreeShape:
    """The tree of `max_nodes` nodes with the greatest expected accepted length.

    A node is accepted with the product of `rank_probs` on its path (acceptance by rank, independent of depth, as
    in Sequoia, arXiv 2402.12374, section 3.1), so taking the most probable node next is optimal.
    """
    # (-probability, depth, path of ranks): ties are resolved towards shallow nodes and low ranks.
    heap: list[tuple[float, int, tuple[int, ...]]] = [(-p, 1, (r,)) for r, p in enumerate(rank_probs)]
    heapq.heapify(heap)
    chosen: list[tuple[int, ...]] = []
    while heap and len(chosen) < max_nodes:
        probability, depth, path = heapq.heappop(heap)
        chosen.append(path)
        if depth < max_depth:
            for rank, p in enumerate(rank_probs):
                heapq.heappush(heap, (probability * p, depth + 1, (*path, rank)))
    chosen.sort(key=lambda path: (len(path), path))
    node_of = {(): 0} | {path: node for node, path in enumerate(chosen, 1)}
    return TreeShape(
        parents=tuple(node_of[path[:-1]] for path in chosen),
        ranks=tuple(path[-1] for path in chosen),
        depths=tuple(len(path) for path in chosen),
    )
