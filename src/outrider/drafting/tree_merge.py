"""Several sources' continuations in one tree: the nodes that are most likely to be reached."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from outrider.kernels.drafting import compiled
from outrider.token_tree import TokenTree


class WeightedPath(NamedTuple):
    """One guess of what follows.

    Attributes:
        tokens: the continuation, from the token after the root on.
        confidences: ``[len(tokens)]`` how likely each is, in [0, 1], once those before it are right.
    """

    tokens: Sequence[int]
    confidences: Sequence[float]


# A token below a node: its greatest confidence, and the paths that lead there.
_Child = tuple[float, list[WeightedPath]]


def merge_paths(
    root: int, paths: Sequence[WeightedPath], max_nodes: int, *, max_depth: int, min_path_prob: float = 0.0
) -> TokenTree:
    """Merge paths by their prefixes and keep the nodes with the greatest product of confidences.

    Where sources agree on a node the most confident one counts. Products fall along a path, so taking the best node
    next gives the tree of `max_nodes` with the greatest expected accepted length that these confidences allow
    (multi-candidate merging by expected acceptance; OPT-Tree, arXiv 2406.17276, section 3).

    Args:
        max_nodes: the most draft tokens, root not counted.
        max_depth: what paths have beyond is left out.
        min_path_prob: nodes with a smaller product are left out.

    Returns:
        A tree with confidences, in the order in which nodes were taken.
    """
    module = compiled()
    merge = _merge if module is None else module.merge_paths
    tokens, parents, confidences = merge(root, paths, max_nodes, max_depth, min_path_prob)
    return TokenTree(tokens, parents, confidences=confidences)


_Nodes = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]


def _merge(root: int, paths: Sequence[WeightedPath], max_nodes: int, max_depth: int, min_path_prob: float) -> _Nodes:
    """Tokens, parents and confidences of the merged tree: paths are read only below the nodes that are taken."""
    tokens, parents, confidences = [root], [-1], [1.0]
    # (-product, order of discovery, parent, depth, token, confidence, the paths that lead there)
    heap: list[tuple[float, int, int, int, int, float, list[WeightedPath]]] = []
    product, node, depth, discovered, group = 1.0, 0, 0, 0, list(paths)
    while len(tokens) <= max_nodes:
        children = _children(group, depth) if depth < max_depth else {}
        for token, (confidence, below) in children.items():
            if product * confidence >= min_path_prob:
                heappush(heap, (-product * confidence, discovered, node, depth + 1, token, confidence, below))
                discovered += 1
        if not heap:
            break
        negative, _, parent, depth, token, confidence, group = heappop(heap)
        product, node = -negative, len(tokens)
        tokens.append(token)
        parents.append(parent)
        confidences.append(confidence)
    return tuple(tokens), tuple(parents), tuple(confidences)


def _children(paths: list[WeightedPath], depth: int) -> dict[int, _Child]:
    """What follows the first `depth` tokens that all of the paths have in common, in the order of the paths."""
    children: dict[int, _Child] = {}
    for path in paths:
        tokens, confidences = path
        if len(tokens) > depth:
            token, confidence = tokens[depth], confidences[depth]
            child = children.get(token)
            if child is None:
                children[token] = (confidence, [path])
            else:
                child[1].append(path)
                if confidence > child[0]:
                    children[token] = (confidence, child[1])
    return children
