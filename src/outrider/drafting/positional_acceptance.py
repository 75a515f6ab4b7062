"""Measuring acceptance by rank and depth, which optimal shapes are made from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from outrider.drafting.drafter import DraftOutcome
from outrider.token_tree import TokenTree


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
            self.count_path(outcome.tree, outcome.path.accepted_nodes)

    def count_path(self, tree: TokenTree, path: Sequence[int], *, is_open: bool = False) -> None:
        """Count the children of the root and of a path's nodes: one of each was accepted, or none behind the path.

        Args:
            is_open: what came after the path's last node is not known.
        """
        children = tree.children()
        ends = path if is_open else (*path, None)
        for depth, (node, accepted) in enumerate(zip((0, *path), ends, strict=False)):
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

    def estimates(self, prior: Sequence[float], num_trials: float) -> list[list[float]]:
        """``[depth][rank]`` as counted; the less was seen, the nearer to the rank's over all depths, and to `prior`.

        Never rises with the rank, so that a shape takes siblings from the first on.

        Args:
            prior: ``[num_ranks]``.
            num_trials: how many outcomes `prior` weighs as much as, and all depths beside one.
        """
        seen, accepted = np.array(self._seen, dtype=np.float64), np.array(self._accepted, dtype=np.float64)
        of_rank = (accepted.sum(axis=0) + num_trials * np.asarray(prior)) / (seen.sum(axis=0) + num_trials)
        of_depth = (accepted + num_trials * of_rank) / (seen + num_trials)
        return np.minimum.accumulate(of_depth, axis=1).tolist()
