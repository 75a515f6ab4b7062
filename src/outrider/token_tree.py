"""Token trees: what every drafter proposes and every verification rule walks.

Node 0 is the root: the last committed token, whose successor is not known yet. Every other node is a
draft token; its parent stands before it. A chain is a tree of width one, plain decoding the root alone.

    tokens   = [the, cat, dog, sat]          the ─┬─ cat ── sat
    parents  = [ -1,   0,   0,   1]               └─ dog
    depths   = [  0,   1,   1,   2]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from outrider.errors import TokenTreeError

SiblingDraws = Literal["with_replacement", "without_replacement"]
DraftNoise = Literal["shared", "independent"]


@dataclass(frozen=True, eq=False)
class DraftDistribution:
    """The distributions that a tree's children were drawn from, which rejection rules need.

    Attributes:
        log_probs: ``[num_nodes, vocab]`` float; row i is log q of the children of node i. Rows of leaves
            are not read.
        draws: how the siblings below one node were drawn from its row, in node order.
    """

    log_probs: Tensor
    draws: SiblingDraws


@dataclass(frozen=True, eq=False)
class TokenTree:
    """One sequence's proposal, rooted at its last committed token.

    Attributes:
        tokens: ``[num_nodes]`` token ids; ``tokens[0]`` is the committed root.
        parents: ``[num_nodes]`` parent node, ``-1`` for the root; ``parents[i] < i``.
        draft: the distributions behind the draft tokens; None means a point mass on each draft token
            (n-grams and every other drafter without probabilities).
        confidences: ``[num_nodes]`` the drafter's own guess, in [0, 1], that a node is the target's choice once its
            parent is on the path; 1 for the root; None where it has none. Only planning reads them.

    Raises:
        TokenTreeError: not a tree rooted at node 0.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    draft: DraftDistribution | None = None
    confidences: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.tokens or len(self.tokens) != len(self.parents):
            raise TokenTreeError(
                "token tree",
                got=f"{len(self.tokens)} tokens, {len(self.parents)} parents",
                expected="equal, >= 1",
            )
        if self.parents[0] != -1 or any(not 0 <= p < i for i, p in enumerate(self.parents[1:], 1)):
            raise TokenTreeError(
                "token tree parents", got=list(self.parents), expected="-1 first, then 0 <= parents[i] < i"
            )

    @staticmethod
    def root_only(root: int) -> TokenTree:
        return TokenTree((root,), (-1,))

    @staticmethod
    def chain(root: int, draft_tokens: Sequence[int]) -> TokenTree:
        return TokenTree((root, *draft_tokens), tuple(range(-1, len(draft_tokens))))

    @staticmethod
    def from_paths(root: int, paths: Iterable[Sequence[int]], max_nodes: int) -> TokenTree:
        """Merge paths into one tree; earlier paths win when `max_nodes` (root included) is reached."""
        tokens, parents = [root], [-1]
        child_of: dict[tuple[int, int], int] = {}
        for path in paths:
            node = 0
            for token in path:
                child = child_of.get((node, token))
                if child is None:
                    if len(tokens) >= max_nodes:
                        break
                    child = len(tokens)
                    child_of[node, token] = child
                    tokens.append(token)
                    parents.append(node)
                node = child
        return TokenTree(tuple(tokens), tuple(parents))

    @property
    def num_nodes(self) -> int:
        return len(self.tokens)

    @property
    def depths(self) -> tuple[int, ...]:
        depths = [0] * len(self.tokens)
        for node in range(1, len(self.tokens)):
            depths[node] = depths[self.parents[node]] + 1
        return tuple(depths)

    @property
    def path_confidences(self) -> tuple[float, ...] | None:
        """``[num_nodes]`` product of the confidences on the way to each node; None where there are none."""
        if self.confidences is None:
            return None
        products = [1.0] * len(self.tokens)
        for node in range(1, len(self.tokens)):
            products[node] = products[self.parents[node]] * self.confidences[node]
        return tuple(products)

    def restricted_to(self, nodes: Sequence[int]) -> TokenTree:
        """The part of the tree that consists of `nodes`.

        Args:
            nodes: in ascending order, the root first; the parent of each among them.

        Raises:
            TokenTreeError: a parent is missing.
        """
        if len(nodes) == len(self.tokens):
            return self
        new_of = {-1: -1} | {node: new for new, node in enumerate(nodes)}
        if any(self.parents[node] not in new_of for node in nodes):
            raise TokenTreeError("part of a token tree", got=list(nodes), expected="every node's parent among them")
        return TokenTree(
            tuple(self.tokens[node] for node in nodes),
            tuple(new_of[self.parents[node]] for node in nodes),
            DraftDistribution(self.draft.log_probs[list(nodes)], self.draft.draws) if self.draft else None,
            tuple(self.confidences[node] for node in nodes) if self.confidences else None,
        )

    def children(self) -> list[list[int]]:
        """Children of each node, in node order (the order in which they were drawn)."""
        children: list[list[int]] = [[] for _ in self.tokens]
        for node in range(1, len(self.tokens)):
            children[self.parents[node]].append(node)
        return children

    def child_of(self) -> dict[tuple[int, int], int]:
        """``(parent, token) -> node``; of equal siblings the first."""
        found: dict[tuple[int, int], int] = {}
        for node in range(1, len(self.tokens)):
            found.setdefault((self.parents[node], self.tokens[node]), node)
        return found

    def nodes_along(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Nodes of the path that begins with `tokens`, as far as the tree has them; the root excluded."""
        child_of = self.child_of()
        nodes, node = [], 0
        for token in tokens:
            child = child_of.get((node, token))
            if child is None:
                break
            nodes.append(child)
            node = child
        return tuple(nodes)

    def path(self, node: int) -> tuple[int, ...]:
        """Nodes from below the root down to `node`; empty for the root."""
        nodes = []
        while node > 0:
            nodes.append(node)
            node = self.parents[node]
        return tuple(reversed(nodes))


@dataclass(frozen=True, eq=False)
class TokenTreeBatch:
    """The trees of one step, flattened: node i of tree b is row ``cu_nodes[b] + i``."""

    trees: tuple[TokenTree, ...]
    cu_nodes: tuple[int, ...]

    @staticmethod
    def from_trees(trees: Sequence[TokenTree]) -> TokenTreeBatch:
        cu_nodes = [0]
        for tree in trees:
            cu_nodes.append(cu_nodes[-1] + tree.num_nodes)
        return TokenTreeBatch(tuple(trees), tuple(cu_nodes))

    @property
    def num_nodes(self) -> int:
        return self.cu_nodes[-1]

    def rows(self, tree: int) -> slice:
        return slice(self.cu_nodes[tree], self.cu_nodes[tree + 1])


@dataclass(frozen=True)
class VerifiedPath:
    """What one tree came to.

    Attributes:
        accepted_nodes: nodes of the tree on the accepted path, root excluded, in order.
        next_token: the token after the last of them: the bonus token, or the correction after a rejection.
    """

    accepted_nodes: tuple[int, ...]
    next_token: int


@dataclass(frozen=True)
class VerifyResult:
    """What a step's trees came to.

    Attributes:
        paths: one a tree.
        choices: a tuple ``[tree.num_nodes]`` a tree: the target's choice of every node's successor; None for a tree
            whose rule decided only along the path.
    """

    paths: tuple[VerifiedPath, ...]
    choices: tuple[tuple[int, ...] | None, ...]


def ancestor_mask(parents: Sequence[int]) -> Tensor:
    """Which rows each row attends to among the rows of its own step.

    Args:
        parents: ``[num_rows]`` parent row, ``-1`` where a row hangs off the cached context.

    Returns:
        ``[num_rows, num_rows]`` bool; row i is True at i and at all its ancestors.
    """
    num_rows = len(parents)
    chain = next((i for i, parent in enumerate(parents) if parent != i - 1), num_rows)
    mask = np.tri(num_rows, dtype=bool)
    for row in range(chain, num_rows):
        parent = parents[row]
        mask[row] = mask[parent] if parent >= 0 else False
        mask[row, row] = True
    return torch.from_numpy(mask)
