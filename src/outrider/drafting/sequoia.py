"""Optimal static trees (Sequoia, arXiv 2402.12374): the dynamic programme, and size and depth for a machine.

Section 3.1 (of version 3) gives the expected tokens of a tree under positional acceptance and the recursion for its
maximum, section 4.1 the tokens per time, and appendix F.1.1 bounds the depth and lets acceptance depend on it. Here a
node's children need not be the first ranks (where acceptance falls with the rank, as it does in the paper, they are).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outrider.drafting.tree_shape import Acceptance, TreeShape, acceptance_rows
from outrider.errors import ConfigError

Values = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class LatencyTable:
    """How long a forward takes, measured at some numbers of rows and interpolated between them.

    More rows never take less time: where the measurements say so, the longer time counts.

    Attributes:
        rows: ascending.
        ms: ``[len(rows)]``.

    Raises:
        ConfigError: not ascending, or times that are none.
    """

    rows: tuple[int, ...]
    ms: tuple[float, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.rows, self.rows[1:], strict=False))
        if not self.rows or len(self.rows) != len(self.ms) or not ascending or self.rows[0] < 1:
            raise ConfigError("latency table rows", got=self.rows, expected="ascending from 1, one for each time")
        if not all(0 < ms < float("inf") for ms in self.ms):
            raise ConfigError("latency table times", got=self.ms, expected="finite and above 0")

    @property
    def max_rows(self) -> int:
        return self.rows[-1]

    def ms_of(self, rows: int) -> float:
        """Time of a forward over `rows`; between 1 and `max_rows`."""
        assert 1 <= rows <= self.max_rows, "beyond what was measured"
        return float(np.interp(rows, self.rows, np.maximum.accumulate(self.ms)))


@dataclass(frozen=True)
class ShapeChoice:
    """A shape for a machine.

    Attributes:
        tokens_per_step: expected, the one after the accepted ones included.
        step_ms: of the draft's and the target's forwards.
    """

    shape: TreeShape
    tokens_per_step: float
    step_ms: float

    @property
    def tokens_per_ms(self) -> float:
        return self.tokens_per_step / self.step_ms


class OptimalTrees:
    """Trees of the greatest expected accepted length for every size up to `max_nodes`.

    With ``value[d][r][n]`` the best that n nodes give below a node of depth d whose children have rank r or higher,

        value[d][r][n] = max over a of  p[d][r] (1 + value[d+1][0][a-1])  +  value[d][r+1][n-a],

    where a = 0 leaves rank r out. Takes O(max_depth x ranks x max_nodes^2).

    Args:
        max_depth: the longest path; acceptance by depth may end before it.
    """

    def __init__(self, max_nodes: int, max_depth: int, acceptance: Acceptance) -> None:
        self._max_nodes = max_nodes
        self._rows = acceptance_rows(acceptance, max_depth)
        # Entry [n, a] of the second term is index n - a, and -1, which is never the best, where a > n.
        difference = np.arange(max_nodes + 1)[:, None] - np.arange(max_nodes + 1)[None, :]
        self._allowed, self._rest = difference >= 0, np.maximum(difference, 0)
        below = np.zeros(max_nodes + 1)
        self._shares: list[list[Counts]] = []  # [depth][rank][n]: nodes for this rank's child and what is below it
        for row in reversed(self._rows):
            below, shares = self._one_depth(row, below)
            self._shares.insert(0, shares)
        self.values: Values = below

    def _one_depth(self, row: Sequence[float], below: Values) -> tuple[Values, list[Counts]]:
        value, shares = np.zeros(self._max_nodes + 1), []
        for p in reversed(row):
            own = np.concatenate([[0.0], p * (1.0 + below[:-1])])
            total = np.where(self._allowed, own[None, :] + value[self._rest], -1.0)
            share = total.argmax(axis=1)  # the fewest nodes of equals: none where they are never accepted
            shares.insert(0, share)
            value = total[np.arange(len(share)), share]
        return value, shares

    def expected_length(self, num_nodes: int) -> float:
        return float(self.values[num_nodes])

    def shape(self, num_nodes: int) -> TreeShape:
        """The best tree of at most `num_nodes`; smaller only where more would never be accepted."""
        paths: list[tuple[int, ...]] = []
        pending: list[tuple[tuple[int, ...], int]] = [((), num_nodes)]
        while pending:
            path, budget = pending.pop()
            for rank, share in enumerate(self._shares[len(path)] if len(path) < len(self._rows) else ()):
                size = int(share[budget])
                if size:
                    paths.append((*path, rank))
                    pending.append(((*path, rank), size - 1))
                    budget -= size
        return TreeShape.from_paths(paths)


def sequoia_shape(max_nodes: int, max_depth: int, acceptance: Acceptance) -> TreeShape:
    """The tree of at most `max_nodes` nodes and `max_depth` with the greatest expected accepted length.

    Raises:
        ConfigError: see `acceptance_rows`.
    """
    return OptimalTrees(max_nodes, max_depth, acceptance).shape(max_nodes)


def best_lengths(max_nodes: int, max_depth: int, acceptance: Acceptance) -> Values:
    """``[1 + max_depth, 1 + max_nodes]`` expected accepted length of the best tree of each depth and size.

    The most probable nodes make the best tree, so that no tree has to be made to know what it is worth.

    Raises:
        ConfigError: see `acceptance_rows`.
    """
    level, best, lengths = np.ones(1), np.zeros(0), [np.zeros(1 + max_nodes)]
    for row in acceptance_rows(acceptance, max_depth):
        level = _largest(np.outer(level, row).ravel(), max_nodes)
        best = _largest(np.concatenate([best, level]), max_nodes)
        lengths.append(np.concatenate([[0.0], best, np.zeros(max_nodes - len(best))]).cumsum())
    return np.stack(lengths)


def _largest(values: Values, count: int) -> Values:
    return np.sort(values)[::-1][:count]


def hardware_aware_shape(
    acceptance: Acceptance, target: LatencyTable, draft_ms: float, *, max_nodes: int, max_depth: int
) -> ShapeChoice:
    """Size and depth with the most expected tokens per time (arXiv 2402.12374v3, section 4.1).

    A step of a tree of n nodes and depth d takes ``target(1 + n) + d * draft_ms``. The empty tree, which is plain
    decoding, is among the choices.

    Args:
        draft_ms: time of the drafter for each depth of the tree.
        max_nodes: no more than the table was measured for are considered.

    Raises:
        ConfigError: see `acceptance_rows`.
    """
    largest = min(max_nodes, target.max_rows - 1)
    lengths = best_lengths(largest, max_depth, acceptance)
    target_ms = np.array([target.ms_of(1 + size) for size in range(1 + largest)])
    step_ms = target_ms + draft_ms * np.arange(len(lengths))[:, None]
    depth, size = np.unravel_index(np.argmax((1.0 + lengths) / step_ms), lengths.shape)
    length, ms = float(lengths[depth, size]), float(step_ms[depth, size])
    if not size:
        return ShapeChoice(TreeShape((), (), ()), 1.0, float(target_ms[0]))
    return ShapeChoice(sequoia_shape(int(size), int(depth), acceptance), 1.0 + length, ms)
