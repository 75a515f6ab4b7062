"""Trees that grow level by level: chains, and constant or dynamic branching."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from outrider.drafting.growth.tree import Draws, GrowingTree, GrowthLimits


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
