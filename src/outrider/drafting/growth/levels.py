"""Trees that grow level by level: beams, constant branching, widened chains, fixed shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from outrider.drafting.growth.shape_planner import ShapePlanner
from outrider.drafting.growth.tree import Draws, GrowingTree, GrowthLimits
from outrider.drafting.tree_shape import TreeShape


@dataclass(frozen=True)
class Beam:
    """The most probable paths of each depth are expanded (expansion of EAGLE-2, Li et al., arXiv 2406.16858, 4.1).

    With `width` 1 it is the chain of speculative decoding (Leviathan et al., arXiv 2211.17192; Chen et al.,
    2302.01318).

    Attributes:
        width: children below each expanded node.
        max_expanded: nodes expanded per depth.
    """

    limits: GrowthLimits
    draws: Draws
    width: int = 1
    max_expanded: int = 1

    @property
    def num_rows(self) -> int:
        return min(self.limits.num_nodes, self.max_expanded * self.limits.depth)

    def grow(self, tree: GrowingTree) -> Iterator[Sequence[int]]:
        frontier: Sequence[int] = [0]
        while True:
            drawn = [child for node in frontier for child in tree.draw(node, self.width)]
            likely = sorted(filter(tree.may_extend, drawn), key=lambda node: -tree.scores[node])
            frontier = sorted(likely[: self.max_expanded])
            if not frontier:
                return
            yield frontier


@dataclass(frozen=True)
class Branching:
    """Every node of a depth has the same number of children.

    Multi-candidate speculative decoding (MCSD, Yang et al., arXiv 2401.06706) draws them as the rule asks; recursive
    speculative decoding with constant branching (RSD-C, Jeon et al., arXiv 2402.14160) without replacement.

    Attributes:
        factors: ``[depth]`` children of each node of depth 0, 1, ...
    """

    limits: GrowthLimits
    draws: Draws
    factors: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return self.limits.num_nodes

    def grow(self, tree: GrowingTree) -> Iterator[Sequence[int]]:
        level: Sequence[int] = [0]
        for depth, factor in enumerate(self.factors, 1):
            drawn = [child for node in level for child in tree.draw(node, factor)]
            level = [node for node in drawn if tree.may_extend(node)]
            if not level or depth == len(self.factors):
                return
            yield level


# Confidence-aware proposal expansion: candidates beside the chain's token, by the draft's confidence in that.
CAPE_CANDIDATES = ((0.3, 7), (0.6, 5), (0.8, 3), (1.0, 1))


@dataclass(frozen=True)
class ExpandedChain:
    """A chain, and other candidates where the draft is not sure of it (CaPE, Du et al., arXiv 2402.02082).

    The chain comes first, then the others from the root on, as far as there is room. How many they are depends on the
    chain's token at their position, which was drawn before them. CaPE takes the draft's likeliest tokens for both, a
    chain of fixed length, and a draft (GliDe) that attends to the target's cache; here any draft model draws them as
    the rule asks, and the chain ends where it is no longer likely.
    """

    limits: GrowthLimits
    draws: Draws

    @property
    def num_rows(self) -> int:
        return min(self.limits.num_nodes, self.limits.depth)

    def grow(self, tree: GrowingTree) -> Iterator[Sequence[int]]:
        chain = [0]
        while drawn := tree.draw(chain[-1], 1):
            chain += drawn
            if not tree.may_extend(chain[-1]):
                break
            yield drawn
        for parent, node in pairwise(chain):
            confidence = math.exp(tree.scores[node] - tree.scores[parent])
            num_candidates = next(number for border, number in CAPE_CANDIDATES if confidence <= border or number == 1)
            tree.draw(parent, num_candidates)


@dataclass(frozen=True)
class Static:
    """A shape that is fixed before any token is known, such as Sequoia's (Chen et al., arXiv 2402.12374).

    Attributes:
        shape: each node's parent, depth and rank among its siblings; ranks of siblings come in order, from 0 on.
    """

    limits: GrowthLimits
    draws: Draws
    shape: TreeShape

    @property
    def num_rows(self) -> int:
        return self.limits.num_nodes

    def grow(self, tree: GrowingTree) -> Iterator[Sequence[int]]:
        node_of = {0: 0}  # shape node -> tree node; those below what could not be drawn have none
        parents = set(self.shape.parents)
        for depth in range(1, 1 + max(self.shape.depths, default=0)):
            level = []
            for place, parent in enumerate(self.shape.parents, 1):
                if self.shape.depths[place - 1] == depth and tree.is_read(node_of.get(parent, -1)):
                    for child in tree.draw(node_of[parent], 1):
                        node_of[place] = child
                        if place in parents and tree.may_extend(child):
                            level.append(child)
            if not level:
                return
            yield level


@dataclass(frozen=True)
class Planned:
    """The best shape by what was accepted so far, on this machine (Sequoia, arXiv 2402.12374v3, section 4.1)."""

    limits: GrowthLimits
    draws: Draws
    planner: ShapePlanner

    @property
    def num_rows(self) -> int:
        return self.limits.num_nodes

    def grow(self, tree: GrowingTree) -> Iterator[Sequence[int]]:
        return Static(self.limits, self.draws, self.planner.shape(tree.context.num_step_rows)).grow(tree)


@dataclass(frozen=True)
class SparseByState:
    """A tree for each state, sparse and as large as pays (PPD's dynamic tree, Chen et al., arXiv 2405.18628).

    In PPD prompt tokens, which have to be trained, guess the positions ahead in the target's own forward. Here a
    draft model guesses them, and no row is a prompt token. What is kept: one guess for each position, whatever
    candidate stands above it, so that a whole tree takes one reading of the draft per level; a state, here the number
    of levels that the draft is confident for (there: of prompt tokens behind the last accepted one), which a chain
    finds out; and a shape for each state, planned for the machine.
    """

    limits: GrowthLimits
    draws: Draws
    planner: ShapePlanner

    @property
    def num_rows(self) -> int:
        return min(self.limits.num_nodes, self.limits.depth)

    def grow(self, tree: GrowingTree) -> Iterator[Sequence[int]]:
        planner, num_step_rows = self.planner, tree.context.num_step_rows
        longest, chain = max(planner.shape_of_depth(planner.max_depth, num_step_rows).depths), [0]
        while drawn := tree.draw(chain[-1], 1):
            chain += drawn
            if len(chain) > longest or not tree.may_extend(chain[-1]):
                break
            yield drawn
        if len(chain) > 1:
            self._widen(tree, chain, planner.shape_of_depth(len(chain) - 1, num_step_rows))

    def _widen(self, tree: GrowingTree, chain: Sequence[int], shape: TreeShape) -> None:
        """Draw the nodes of a shape that are not on the chain, which is the first child of each of its nodes."""
        node_of, num_on_chain = {0: 0}, 1
        for place, (parent, depth) in enumerate(zip(shape.parents, shape.depths, strict=True), 1):
            above = node_of.get(parent)
            if above == chain[depth - 1] and num_on_chain == depth:
                node_of[place], num_on_chain = chain[depth], depth + 1
            elif above is not None:
                if not tree.is_read(above):
                    tree.read_as(above, chain[depth - 1])
                node_of.update((place, child) for child in tree.draw(above, 1))
