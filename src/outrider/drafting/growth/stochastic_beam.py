"""Stochastic beam search: paths drawn without replacement, unlikely ones cut early (RSD-S).

Jeon et al., arXiv 2402.14160 (RSD-S), over the stochastic beams of Kool et al., arXiv 1903.06059.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outrider.drafting.growth.tree import Draws, GrowingTree, GrowthLimits


@dataclass(frozen=True)
class StochasticBeam:
    """At each depth the paths with the greatest perturbed log-probabilities, given their parents'.

    Recursive rejection takes a node's children as draws without replacement from q, as many as there are. That how
    many there are depends on other nodes is harmless: the i-th greatest of the perturbed values below a node tells
    nothing of the token it belongs to, given the tokens before (the maximum of Gumbels is independent of its place).
    So whether a child is among the best of its depth does not depend on the child's own token.

    Attributes:
        width: paths kept at each depth.
    """

    limits: GrowthLimits
    draws: Draws
    width: int

    @property
    def num_rows(self) -> int:
        return self.limits.num_nodes

    def grow(self, tree: GrowingTree) -> Iterator[Sequence[int]]:
        beam = {0: 0.0}  # perturbed log-probability of each path
        while True:
            places = [
                (-value, node)
                for node, perturbed in beam.items()
                for value in self._children(tree, node, perturbed)
                if value > -np.inf
            ]
            beam = {}
            for negative, node in sorted(places)[: self.width]:  # stable below a node: its values come falling
                for child in tree.draw(node, 1):
                    if tree.may_extend(child):
                        beam[child] = -negative
            if not beam:
                return
            yield list(beam)

    def _children(self, tree: GrowingTree, node: int, perturbed: float) -> list[float]:
        """Perturbed log-probabilities of the best children's paths, falling; where nothing is drawn, their scores."""
        if not tree.is_sampled:
            return tree.candidate_scores(node, self.width)
        values = tree.scores[node] + tree.candidate_keys(node, self.width).astype(np.float64)
        return truncated(values, perturbed).tolist()


def truncated(values: NDArray[np.float64], maximum: float) -> NDArray[np.float64]:
    """Gumbel variables as they would be if their maximum were `maximum` (after Kool et al., arXiv 1903.06059).

    What is returned for a variable G, with Z the largest given, is -log(exp(-maximum) - exp(-Z) + exp(-G)), in a form
    that neither overflows nor cancels.

    Args:
        values: falling; the first is the maximum of all.
    """
    with np.errstate(divide="ignore", over="ignore"):
        v = maximum - values + np.log1p(-np.exp(values - values[0]))
    return maximum - np.maximum(v, 0.0) - np.log1p(np.exp(-np.abs(v)))
