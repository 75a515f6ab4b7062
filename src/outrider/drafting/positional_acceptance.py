"""Measuring acceptance by rank and depth, which optimal shapes are made from."""

from __future__ import annotations

from collections.abc import Sequence

from outrider.drafting.drafter import DraftOutcome


class AcceptanceCounter:
    """How often the child of each rank was the target's choice, given that its parent was on the path.

    The positional acceptance of Sequoia (arXiv 2402.12374, section 3.1), by depth too. Siblings must stand in the
    order of their ranks, as `TreeShape.fill` and draft models put them.

    Args:
        max_depth: deeper nodes are not counted.
        num_ranks: nor siblings behind so many.
    """

    def __init__(self, max_depth: int, num_ranks: int) -> None:
        self._seen = [[0] * num_ranks for _ in range(max_depth)]
        self._accepted = [[0] * num_ranks for _ in range(max_depth)]

    def count(self, outcomes: Sequence[DraftOutcome]) -> None:
        for outcome in outcomes:
            children = outcome.tree.children()
            path = outcome.path.accepted_nodes
            # Whoever lies on the path had its children put to the test: one was accepted, or none.
            for depth, (node, accepted) in enumerate(zip((0, *path), (*path, None), strict=True)):
                if depth == len(self._seen):
                    break
                for rank, child in enumerate(children[node][: len(self._seen[depth])]):
                    self._seen[depth][rank] += 1
                    self._accepted[depth][rank] += child == accepted

    def by_depth_and_rank(self) -> list[list[float]]:
        """``[depth][rank]``; 0 where nothing was seen."""
        return [
            [accepted / max(1, seen) for accepted, seen in zip(of_accepted, of_seen, strict=True)]
            for of_accepted, of_seen in zip(self._accepted, self._seen, strict=True)
        ]

    def by_rank(self) -> list[float]:
        """``[rank]`` over all depths together; 0 where nothing was seen."""
        return [
            sum(accepted) / max(1, sum(seen))
            for accepted, seen in zip(zip(*self._accepted, strict=True), zip(*self._seen, strict=True), strict=True)
        ]
