"""Tri-gram statistics and the search over them, for ADED (`aded.py`); compiled where there is a compiler.

A matrix from token pairs to what follows them stands for the model's output distribution. The draft maker searches
it by PUCT: what is likely, plus a bonus for what was visited little. The paper's search (arXiv 2407.12021) is
modelled on Monte Carlo tree search; here the best value that is left counts, so the search is deterministic, and
without the bonus it is best-first search.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from math import sqrt
from typing import Protocol

from outrider.drafting.tree_merge import WeightedPath
from outrider.kernels.drafting import compiled

UNKNOWN: Mapping[int, float] = {}
SINGLE_RATE = 0.5  # of the rate of pairs: what followed a token alone is less likely to follow it again


class TrigramMatrix(Protocol):
    """What follows each pair of tokens, and each token by itself; in Python (`PythonMatrix`) or compiled."""

    def __len__(self) -> int:
        """Rows."""
        ...

    def learn(self, before: int | None, last: int, token: int) -> None:
        """`token` followed `last`, which followed `before`."""
        ...

    def learn_text(self, text: Sequence[int], start: int) -> None:
        """A text's tokens from `start` on, at least 1, each as what follows those before it."""
        ...


class PythonMatrix:
    """What follows each pair of tokens, and each token by itself, as probabilities that favour the recent.

    Args:
        capacity: the most rows; the row that was updated longest ago makes place for a new one.
        num_candidates: the most tokens of a row; the least likely one makes place.
        rate: an update moves each probability of a row by this share of the way to what was seen.
    """

    def __init__(self, capacity: int, num_candidates: int, rate: float) -> None:
        self._capacity, self._num_candidates, self._rate = capacity, num_candidates, rate
        self._rows: dict[tuple[int, ...], dict[int, float]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def learn(self, before: int | None, last: int, token: int) -> None:
        self._update((last,), token, self._rate * SINGLE_RATE)
        if before is not None:
            self._update((before, last), token, self._rate)

    def learn_text(self, text: Sequence[int], start: int) -> None:
        for position in range(start, len(text)):
            self.learn(text[position - 2] if position > 1 else None, text[position - 1], text[position])

    def _update(self, key: tuple[int, ...], token: int, rate: float) -> None:
        row = self._rows.pop(key, None)  # and in again, as the latest
        if row is None:
            row = {}
            if len(self._rows) >= self._capacity:
                del self._rows[next(iter(self._rows))]
        self._rows[key] = row
        for other in row:
            row[other] *= 1.0 - rate
        if token not in row and len(row) >= self._num_candidates:
            del row[min(row, key=row.__getitem__)]
        row[token] = row.get(token, 0.0) + rate

    def row(self, key: tuple[int, ...]) -> Mapping[int, float]:
        """What follows a pair or a single token; empty where it is not known."""
        return self._rows.get(key, UNKNOWN)


def predict(
    matrices: Sequence[PythonMatrix], before: int | None, last: int, least: float = 0.0
) -> list[tuple[int, float]]:
    """What may follow, the most likely first: of the pair in each matrix in turn, then of the last token alone.

    What one row leaves of the probability is shared out by the next.

    Args:
        least: tokens that are less likely are left out.
    """
    keys = ((last,),) if before is None else ((before, last), (last,))
    found: dict[int, float] = {}
    left = 1.0
    for matrix, key in [(matrix, key) for key in keys for matrix in matrices]:
        if left < least:
            break
        row = matrix.row(key)
        if row:
            taken = 0.0
            for token, probability in row.items():
                if token not in found:
                    found[token] = left * probability
                    taken += probability
            left *= 1.0 - taken
    likely = [item for item in found.items() if item[1] >= least]
    likely.sort(key=_negative_probability)
    return likely


def _negative_probability(item: tuple[int, float]) -> float:
    return -item[1]


class _State:
    """A node of the search: `best` is the greatest probability, from here, of a node that is not in the tree yet."""

    __slots__ = ("best", "confidences", "num_visits", "states", "tokens", "values", "visits")

    def __init__(self, candidates: Sequence[tuple[int, float]]) -> None:
        self.tokens = [token for token, _ in candidates]
        self.confidences = [confidence for _, confidence in candidates]
        self.states: list[_State | None] = [None] * len(candidates)
        self.values = list(self.confidences)
        self.visits = [0] * len(candidates)
        self.num_visits = 0
        self.best = max(self.values, default=0.0)


@dataclass(frozen=True)
class SearchLimits:
    """Attributes:
    num_candidates: the most children of a node.
    exploration: weight of the bonus P * sqrt(visits of the parent) / (1 + visits).
    max_nodes, max_depth: of the tree.
    min_path_prob: nodes with a smaller product are not looked for; more than 0.
    """

    num_candidates: int
    exploration: float
    max_nodes: int
    max_depth: int
    min_path_prob: float


class PythonSearch:
    """Grows a tree by PUCT over matrices."""

    def __init__(self, matrices: Sequence[PythonMatrix], limits: SearchLimits) -> None:
        self._matrices, self._limits = matrices, limits

    def _predict(self, before: int | None, last: int, least: float) -> list[tuple[int, float]]:
        return predict(self._matrices, before, last, least)[: self._limits.num_candidates]

    def paths(self, before: int | None, last: int) -> list[WeightedPath]:
        """The tree as the paths to its leaves."""
        limits = self._limits
        if limits.max_nodes <= 0 or limits.max_depth <= 0:
            return []
        root = _State(self._predict(before, last, limits.min_path_prob))
        num_nodes = 0
        while num_nodes < limits.max_nodes and root.best >= limits.min_path_prob:
            self._add_node(root, before, last)
            num_nodes += 1
        return list(_leaves(root, (), ()))

    def _add_node(self, root: _State, before: int | None, last: int) -> None:
        walk: list[tuple[_State, int]] = []
        min_path_prob = self._limits.min_path_prob
        state, product = root, 1.0
        while True:
            index = self._select(state, min_path_prob / product)
            walk.append((state, index))
            before, last = last, state.tokens[index]
            product *= state.confidences[index]
            below = state.states[index]
            if below is None:
                break
            state = below
        # What is too unlikely from here would never be taken.
        candidates = (
            self._predict(before, last, min_path_prob / product) if len(walk) < self._limits.max_depth else ()
        )
        state.states[index] = below = _State(candidates)
        value = below.best
        for state, index in reversed(walk):
            state.values[index] = state.confidences[index] * value
            state.visits[index] += 1
            state.num_visits += 1
            value = state.best = max(state.values)

    def _select(self, state: _State, least: float) -> int:
        """The child with the greatest value and bonus among those below which something worthwhile is left."""
        bonus = self._limits.exploration * sqrt(1 + state.num_visits)
        chosen, greatest = -1, -1.0
        confidences, visits = state.confidences, state.visits
        for index, value in enumerate(state.values):
            if value >= least:
                score = value + bonus * confidences[index] / (1 + visits[index])
                if score > greatest:
                    chosen, greatest = index, score
        # A promise may be missed by a rounding.
        return chosen if chosen >= 0 else state.values.index(state.best)


def _leaves(state: _State, tokens: tuple[int, ...], confidences: tuple[float, ...]) -> Iterator[WeightedPath]:
    is_leaf = True
    for token, confidence, below in zip(state.tokens, state.confidences, state.states, strict=True):
        if below is not None:
            is_leaf = False
            yield from _leaves(below, (*tokens, token), (*confidences, confidence))
    if is_leaf and tokens:
        yield WeightedPath(tokens, confidences)


def new_matrix(capacity: int, num_candidates: int, rate: float) -> TrigramMatrix:
    """An empty matrix, compiled if that can be; see `PythonMatrix`."""
    module = compiled()
    return (
        PythonMatrix(capacity, num_candidates, rate)
        if module is None
        else module.Trigrams(capacity, num_candidates, rate)
    )


def search(
    matrices: Sequence[TrigramMatrix], before: int | None, last: int, limits: SearchLimits
) -> list[WeightedPath]:
    """What may follow two tokens, as paths to the leaves of the tree that was searched.

    Args:
        matrices: the first one is asked first; all in Python or all compiled.
        before: the token before the last; None if there is none.
    """
    python = [matrix for matrix in matrices if isinstance(matrix, PythonMatrix)]
    if python:
        return PythonSearch(python, limits).paths(before, last)
    module = compiled()
    assert module is not None, "a compiled matrix without compiled code"
    return list(
        starmap(
            WeightedPath,
            module.search_trigrams(
                matrices,
                before,
                last,
                limits.num_candidates,
                limits.exploration,
                limits.max_nodes,
                limits.max_depth,
                limits.min_path_prob,
            ),
        )
    )
