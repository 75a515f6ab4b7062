"""How much to draft for the greatest speed, and from which batch on it is not worth it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from outrider.drafting.sequoia import OptimalTrees
from outrider.drafting.tree_shape import Acceptance, TreeShape, acceptance_rows

BATCHES = (1, 2, 4, 8, 16, 32, 64)
LARGEST_BATCH = 4096
WORTH_IT = 1.02  # a speedup below it is none: nobody could tell the difference

StepSeconds = Callable[[int, int, int], float]  # (sequences, draft tokens of each, depth of the draft) -> seconds


@dataclass(frozen=True)
class Plan:
    """The best draft for a batch.

    Attributes:
        num_nodes: draft tokens of each sequence, on average.
        depth: of the draft.
        tokens_per_step: of each sequence, expected, the one after the accepted ones included.
        step_s: of the whole batch.
        speedup: over plain decoding.
    """

    batch_size: int
    num_nodes: float
    depth: int
    tokens_per_step: float
    step_s: float
    speedup: float

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences together."""
        return self.batch_size * self.tokens_per_step / self.step_s


class Draftings:
    """Every size and depth of draft for given acceptance, each of the shape that is accepted longest.

    Args:
        acceptance: by rank, or by depth and rank; rows of one number are chains.
        max_nodes: the most draft tokens of a sequence.
        max_depth: the longest path.

    Raises:
        ConfigError: see `acceptance_rows`.
    """

    def __init__(self, acceptance: Acceptance, *, max_nodes: int, max_depth: int) -> None:
        rows = acceptance_rows(acceptance, max_depth)
        self._chain_only = all(sum(p > 0 for p in row) <= 1 for row in rows)
        self._max_nodes = max_nodes
        self._trees = {depth: OptimalTrees(max_nodes, depth, rows) for depth in range(1, len(rows) + 1)}

    def best(self, batch_size: int, seconds: StepSeconds) -> Plan:
        """The draft with the most expected tokens per second; at least one draft token.

        A step without drafts takes ``seconds(batch_size, 0, 0)``; `Plan.speedup` compares with it.
        """
        plain_s = seconds(batch_size, 0, 0)
        best: Plan | None = None
        for depth, trees in self._trees.items():
            # Fewer nodes than the depth are a shallower draft, and of a chain more are none.
            for size in range(depth, (depth if self._chain_only else self._max_nodes) + 1):
                if size > self._max_nodes:
                    break
                tokens, step_s = 1.0 + trees.expected_length(size), seconds(batch_size, size, depth)
                plan = Plan(batch_size, size, depth, tokens, step_s, tokens * plain_s / step_s)
                if best is None or plan.speedup > best.speedup:
                    best = plan
        assert best is not None, "at least one depth"
        return best

    def shape(self, plan: Plan) -> TreeShape:
        return self._trees[plan.depth].shape(int(plan.num_nodes))


def width_of(shape: TreeShape) -> int:
    """The most nodes of one depth."""
    return int(np.bincount(shape.depths).max()) if shape.depths else 0


def break_even(speedup: Callable[[int], float], largest: int = LARGEST_BATCH) -> int | None:
    """The smallest batch of which, and of all larger ones examined, plain decoding is as good; None if there is none.

    Examined are all sizes to 64, then 64 times powers of two, to `largest`.
    """
    first: int | None = None
    for batch_size in sorted({*range(1, 65), *(2**power for power in range(7, 31))}, reverse=True):
        if batch_size > largest:
            continue
        if speedup(batch_size) >= WORTH_IT:
            break
        first = batch_size
    return first


def by_depth_and_rank(rates: Sequence[float], sibling_shares: Sequence[float]) -> list[tuple[float, ...]]:
    """Acceptance of a tree from that of a chain.

    Args:
        rates: ``[depth]`` acceptance of the likeliest token.
        sibling_shares: ``[rank - 1]`` which part of what it misses the next ones get.
    """
    rows: list[tuple[float, ...]] = []
    for rate in rates:
        row = [rate]
        for share in sibling_shares:  # a later candidate is never likelier than an earlier one
            row.append(min(row[-1], (1.0 - rate) * share))
        rows.append(tuple(row))
    return rows
