"""Static tree shapes: which rank of which node's candidates a tree holds, before any token is known."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from outrider.errors import ConfigError
from outrider.token_tree import TokenTree

# Probability that a candidate is the target's choice once its parent is on the path: by rank, or by depth and rank
# ([depth][rank], the root's candidates first), which also ends the tree at the last depth.
Acceptance = Sequence[float] | Sequence[Sequence[float]]


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

    @staticmethod
    def from_paths(paths: Iterable[Sequence[int]]) -> TreeShape:
        """A shape from its nodes, each given by the ranks that lead to it: ``[[0], [1], [0, 0], [0, 1]]``.

        Static trees are published so, as those of Medusa (arXiv 2401.10774) and EAGLE (2401.15077).

        Raises:
            ConfigError: a rank that is none, a node twice, or a node without its parent.
        """
        chosen: set[tuple[int, ...]] = set()
        for given in paths:
            path = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else ()
            if not path or not all(isinstance(r, int) and not isinstance(r, bool) and r >= 0 for r in path):
                raise ConfigError("tree shape", got=repr(given), expected="a list of ranks from 0, at least one")
            if path in chosen:
                raise ConfigError("tree shape", got=f"node {list(path)} twice", expected="every node once")
            chosen.add(path)
        for path in chosen:
            if len(path) > 1 and path[:-1] not in chosen:
                raise ConfigError(
                    "tree shape", got=f"node {list(path)}", expected=f"its parent {list(path[:-1])} too"
                )
        return _from_closed(chosen)

    @property
    def paths(self) -> list[tuple[int, ...]]:
        """The ranks that lead to each node."""
        paths: list[tuple[int, ...]] = [()]
        for parent, rank in zip(self.parents, self.ranks, strict=True):
            paths.append((*paths[parent], rank))
        return paths[1:]

    def fill(
        self,
        root: int,
        candidates: Callable[[int, int], Sequence[int]],
        *,
        max_nodes: int,
        max_depth: int,
        confidences: Sequence[float] | None = None,
        min_path_prob: float = 0.0,
    ) -> TokenTree:
        """The tree of this shape over given candidates, cut to the first `max_nodes` draft tokens.

        Args:
            candidates: ``(token, depth) -> tokens by rank`` of what may follow a token at a depth (the root's is 0);
                a negative one, or one beyond the end, is missing, and so are the nodes below it.
            confidences: ``[1 + num_nodes]`` of the shape's nodes, the root first; None for a tree without.
            min_path_prob: paths with a smaller product of confidences are left out.
        """
        tokens, parents, kept, probs = [root], [-1], [1.0], [1.0]
        rows: list[Sequence[int] | None] = [None]  # of each tree node, asked for once
        node_of = {0: 0}  # shape node -> tree node
        for node, (parent, rank, depth) in enumerate(zip(self.parents, self.ranks, self.depths, strict=True), 1):
            if len(tokens) > max_nodes or depth > max_depth:
                break
            above = node_of.get(parent)
            if above is None:
                continue
            confidence = confidences[node] if confidences else 1.0
            if probs[above] * confidence < min_path_prob:
                continue
            row = rows[above]
            if row is None:
                row = rows[above] = candidates(tokens[above], depth - 1)
            if rank < len(row) and row[rank] >= 0:
                node_of[node] = len(tokens)
                tokens.append(row[rank])
                parents.append(above)
                kept.append(confidence)
                probs.append(probs[above] * confidence)
                rows.append(None)
        return TokenTree(tuple(tokens), tuple(parents), confidences=tuple(kept) if confidences else None)


def best_first_shape(max_nodes: int, max_depth: int, acceptance: Acceptance) -> TreeShape:
    """The tree of `max_nodes` nodes with the greatest expected accepted length.

    A node is accepted with the product of the acceptance on its path (positional acceptance, Sequoia, arXiv
    2402.12374, section 3.1), so taking the most probable node next is optimal.

    Raises:
        ConfigError: see `acceptance_rows`.
    """
    rows = acceptance_rows(acceptance, max_depth)
    # (-probability, depth, path of ranks): ties are resolved towards shallow nodes and low ranks.
    heap: list[tuple[float, int, tuple[int, ...]]] = [(-p, 1, (r,)) for r, p in enumerate(rows[0] if rows else ())]
    heapq.heapify(heap)
    chosen: list[tuple[int, ...]] = []
    while heap and len(chosen) < max_nodes:
        probability, depth, path = heapq.heappop(heap)
        chosen.append(path)
        if depth < len(rows):
            for rank, p in enumerate(rows[depth]):
                heapq.heappush(heap, (probability * p, depth + 1, (*path, rank)))
    return _from_closed(chosen)


def acceptance_rows(acceptance: Acceptance, max_depth: int) -> list[tuple[float, ...]]:
    """``[depth][rank]``, at most `max_depth` rows of equal length, from either form of `Acceptance`.

    Raises:
        ConfigError: empty, or numbers that are no probabilities.
    """
    by_depth = [tuple(row) for row in acceptance if isinstance(row, Sequence)]
    by_rank = tuple(p for p in acceptance if isinstance(p, int | float))
    rows: list[tuple[float, ...]] = by_depth or [by_rank] * max_depth
    valid = all(isinstance(p, int | float) and 0 <= p <= 1 for row in (*by_depth, by_rank) for p in row)
    if not valid or len(acceptance) not in {len(by_depth), len(by_rank)} or not acceptance:
        raise ConfigError("acceptance", got=repr(acceptance), expected="probabilities by rank, or by depth and rank")
    width = max(map(len, rows), default=0)
    return [row + (0.0,) * (width - len(row)) for row in rows[:max_depth]]


def node_confidences(shape: TreeShape, acceptance: Acceptance) -> list[float]:
    """``[1 + num_nodes]`` acceptance of each node once its parent is on the path, the root's 1 first."""
    rows = acceptance_rows(acceptance, max(shape.depths, default=0))
    width = len(rows[0]) if rows else 0
    places = zip(shape.depths, shape.ranks, strict=True)
    return [1.0, *(rows[d - 1][rank] if d <= len(rows) and rank < width else 0.0 for d, rank in places)]


def node_probs(shape: TreeShape, acceptance: Acceptance) -> list[float]:
    """``[1 + num_nodes]`` probability that each node lies on the accepted path, the root's 1 first."""
    probs = node_confidences(shape, acceptance)
    for node, parent in enumerate(shape.parents, 1):
        probs[node] *= probs[parent]
    return probs


def expected_length(shape: TreeShape, acceptance: Acceptance) -> float:
    """Expected draft tokens accepted from a tree of this shape; the token after them is not counted.

    The sum over nodes of the products of acceptance on their paths (arXiv 2402.12374, section 3.1).
    """
    return sum(node_probs(shape, acceptance)[1:])


def _from_closed(paths: Iterable[tuple[int, ...]]) -> TreeShape:
    """The shape of nodes given by their ranks, all their parents among them."""
    chosen = sorted(paths, key=lambda path: (len(path), path))
    node_of = {(): 0} | {path: node for node, path in enumerate(chosen, 1)}
    return TreeShape(
        parents=tuple(node_of[path[:-1]] for path in chosen),
        ranks=tuple(path[-1] for path in chosen),
        depths=tuple(len(path) for path in chosen),
    )
