"""Several sources' continuations in one tree: the nodes that are most likely to be reached."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from outrider.token_tree import TokenTree


@dataclass(frozen=True)
class WeightedPath:
    """One guess of what follows.

    Attributes:
        tokens: the continuation, from the token after the root on.
        confidences: ``[len(tokens)]`` how likely each is, in [0, 1], once those before it are right.
    """

    tokens: Sequence[int]
    confidences: Sequence[float]


@dataclass(eq=False, slots=True)
class _Node:
    confidence: float
    children: dict[int, _Node]


def merge_paths(root: int, paths: Iterable[WeightedPath], max_nodes: int, *, min_path_prob: float = 0.0) -> TokenTree:
    """Merge paths by their prefixes and keep the nodes with the greatest product of confidences.

    Where sources agree on a node the most confident one counts. Products fall along a path, so taking the best node
    next gives the tree of `max_nodes` with the greatest expected accepted length that these confidences allow
    (multi-candidate merging by expected acceptance; OPT-Tree, arXiv 2406.17276, theorem 3.1).

    Args:
        max_nodes: the most draft tokens, root not counted.
        min_path_prob: nodes with a smaller product are left out.

    Returns:
        A tree with confidences, in the order in which nodes were taken.
    """
    top = _Node(1.0, {})
    for path in paths:
        node = top
        for token, confidence in zip(path.tokens, path.confidences, strict=True):
            child = node.children.get(token)
            if child is None:
                child = node.children[token] = _Node(confidence, {})
            elif confidence > child.confidence:
                child.confidence = confidence
            node = child
    tokens, parents, confidences = [root], [-1], [1.0]
    heap: list[tuple[float, int, int, int, _Node]] = []  # (-product, order of discovery, parent, token, node)
    discovered = 0

    def discover(node: _Node, index: int, product: float) -> None:
        nonlocal discovered
        for token, child in node.children.items():
            if product * child.confidence >= min_path_prob:
                heapq.heappush(heap, (-product * child.confidence, discovered, index, token, child))
                discovered += 1

    discover(top, 0, 1.0)
    while heap and len(tokens) <= max_nodes:
        negative, _, parent, token, node = heapq.heappop(heap)
        tokens.append(token)
        parents.append(parent)
        confidences.append(node.confidence)
        discover(node, len(tokens) - 1, -negative)
    return TokenTree(tuple(tokens), tuple(parents), confidences=tuple(confidences))
