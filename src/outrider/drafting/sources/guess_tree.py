"""Trees of guesses grown from counts, the most probable node next."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import TypeVar

from outrider.drafting.tree_merge import WeightedPath

# Weight of a token never seen after a match of one token; it falls with the match's length. With 2, what the ratios
# promise is what held-out code keeps: 0.32 for a single match of one token, 0.50 of two, 0.67 of four, 0.89 of ten.
ESCAPE = 2.0
State = TypeVar("State")


@dataclass(eq=False)
class GuessTree:
    """Guesses below a match, nodes in the order in which they were taken.

    Attributes:
        tokens, parents, probs: of each node; parent -1 is the root, a prob that of the node once its parent is right.
        score: sum over the nodes of the product of probs on the way to each: tokens expected to be accepted.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)
    score: float = 0.0

    def path(self, node: int) -> list[int]:
        """Nodes from below the root down to `node`; none for the root."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = self.parents[node]
        nodes.reverse()
        return nodes

    def leaves(self) -> list[int]:
        """In the order in which they were taken."""
        inner = set(self.parents)
        return [node for node in range(len(self.tokens)) if node not in inner]

    def path_to(self, node: int) -> WeightedPath:
        """Tokens and probs from the root to a node."""
        nodes = self.path(node)
        return WeightedPath([self.tokens[n] for n in nodes], [self.probs[n] for n in nodes])

    def paths(self) -> list[WeightedPath]:
        """From the root to each leaf, the one with the most expected tokens first."""
        products: list[float] = []
        expected: list[float] = []  # tokens, on the way to each node
        for parent, prob in zip(self.parents, self.probs, strict=True):
            products.append(prob if parent < 0 else products[parent] * prob)
            expected.append(products[-1] if parent < 0 else expected[parent] + products[-1])
        leaves = sorted(self.leaves(), key=lambda leaf: -expected[leaf])
        return [self.path_to(leaf) for leaf in leaves]


def grow(
    root: State,
    successors: Callable[[GuessTree, int, int, State], Iterable[tuple[int, float, State]]],
    *,
    max_nodes: int,
    max_depth: int,
    min_path_prob: float = 0.0,
    chain: GuessTree | None = None,
) -> GuessTree:
    """The tree with the greatest score.

    Args:
        root: the state of the root, or of the end of `chain`.
        successors: of a node in a tree at a depth (-1 and 0 for the root) with its state: tokens, their probs and
            states, at most `max_nodes`, the most probable first.
        min_path_prob: nodes with a smaller product are left out.
        chain: what is known to come first, without an alternative; it is grown on.
    """
    made = chain or GuessTree()
    heap: list[tuple[float, int, int, int, float, int, State]] = []
    product, depth, state, order = prod(made.probs, start=1.0), len(made.tokens), root, 0
    node = depth - 1
    while True:
        if depth < max_depth:
            for token, prob, below in successors(made, node, depth, state):
                if product * prob < min_path_prob:
                    break
                order += 1
                heapq.heappush(heap, (-product * prob, order, node, depth + 1, prob, token, below))
        if not heap or len(made.tokens) >= max_nodes:
            return made
        product, _, parent, depth, prob, token, state = heapq.heappop(heap)
        product = -product
        node = len(made.tokens)
        made.tokens.append(token)
        made.parents.append(parent)
        made.probs.append(prob)
        made.score += product
