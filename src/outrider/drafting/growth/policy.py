"""What a growth is: the order in which a draft model's tree comes about, one class a method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from outrider.drafting.growth.shape_planner import ShapePlanner
from outrider.drafting.growth.tree import Draws, GrowingTree, GrowthLimits


class Growth(Protocol):
    """Attributes:
    limits: of its trees.
    draws: how it wants children drawn.
    num_rows: the most nodes of one tree that it has the draft model read.
    """

    @property
    def limits(self) -> GrowthLimits: ...

    @property
    def draws(self) -> Draws: ...

    @property
    def num_rows(self) -> int: ...

    def grow(self, tree: GrowingTree) -> Iterator[Sequence[int]]:
        """Grow a tree whose root is read.

        Yields:
            Nodes whose successors are wanted: when it goes on, the draft model has read them. All the trees of a step
            are read together, so every yield costs a forward.
        """
        ...


@runtime_checkable
class PlannedGrowth(Growth, Protocol):
    """A growth whose shapes are planned before a step.

    Attributes:
        planner: wants to know what became of the trees.
    """

    @property
    def planner(self) -> ShapePlanner: ...
