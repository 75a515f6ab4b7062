"""Tri-gram statistics searched with an exploration bonus (ADED; Liu et al., arXiv 2407.12021).

A matrix from token pairs to what follows them stands for the model's output distribution; all requests share it, and
it is updated with every token, and with the target's choices at rejected nodes too. Requests that run together would
overwrite each other's latest, so each also has one of its own, which is asked first. The draft maker searches it by
PUCT: what is likely, plus a bonus for what was visited little. The paper's search is modelled on Monte Carlo tree
search; here the best value that is left counts, so the search is deterministic, and without the bonus it is
best-first search. How the matrix is updated (rates, forgetting, a row for single tokens, rejected nodes) is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import sqrt

from outrider.config import AdedConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome
from outrider.drafting.sources.references import token_references
from outrider.drafting.tree_merge import WeightedPath

UNKNOWN: Mapping[int, float] = {}
MIN_PATH_PROB = 0.01  # less likely nodes are not worth looking for
SINGLE_RATE = 0.5  # of the rate of pairs: what followed a token alone is less likely to follow it again


class TrigramMatrix:
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
        """`token` followed `last`, which followed `before`."""
        self._update((last,), token, self._rate * SINGLE_RATE)
        if before is not None:
            self._update((before, last), token, self._rate)

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
    matrices: Sequence[TrigramMatrix], before: int | None, last: int, least: float = 0.0
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


class DraftMaker:
    """Grows a tree by PUCT over matrices.

    Args:
        num_candidates: the most children of a node.
        exploration: weight of the bonus P * sqrt(visits of the parent) / (1 + visits).
    """

    def __init__(self, matrices: Sequence[TrigramMatrix], num_candidates: int, exploration: float) -> None:
        self._matrices, self._num_candidates, self._exploration = matrices, num_candidates, exploration

    def _predict(self, before: int | None, last: int, least: float) -> list[tuple[int, float]]:
        return predict(self._matrices, before, last, least)[: self._num_candidates]

    def paths(
        self, before: int | None, last: int, max_nodes: int, max_depth: int, min_path_prob: float
    ) -> list[WeightedPath]:
        """The tree as the paths to its leaves."""
        if max_nodes <= 0 or max_depth <= 0:
            return []
        root = _State(self._predict(before, last, min_path_prob))
        num_nodes = 0
        while num_nodes < max_nodes and root.best >= min_path_prob:
            self._add_node(root, before, last, max_depth, min_path_prob)
            num_nodes += 1
        return list(_leaves(root, (), ()))

    def _add_node(self, root: _State, before: int | None, last: int, max_depth: int, min_path_prob: float) -> None:
        walk: list[tuple[_State, int]] = []
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
        candidates = self._predict(before, last, min_path_prob / product) if len(walk) < max_depth else ()
        state.states[index] = below = _State(candidates)
        value = below.best
        for state, index in reversed(walk):
            state.values[index] = state.confidences[index] * value
            state.visits[index] += 1
            state.num_visits += 1
            value = state.best = max(state.values)

    def _select(self, state: _State, least: float) -> int:
        """The child with the greatest value and bonus among those below which something worthwhile is left."""
        bonus = self._exploration * sqrt(1 + state.num_visits) if self._exploration else 0.0
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


class AdedSource:
    name = "aded"
    reads_logits = False

    def __init__(self, config: AdedConfig) -> None:
        self._config = config
        self.matrix = self._new_matrix()
        self._own: dict[str, TrigramMatrix] = {}
        self._num_learnt: dict[str, int] = {}
        for reference in token_references(config):
            _learn((self.matrix,), reference, 1)

    def _new_matrix(self) -> TrigramMatrix:
        return TrigramMatrix(self._config.capacity, self._config.num_candidates, self._config.rate)

    def continuations(self, context: DraftContext) -> list[WeightedPath]:
        tokens = context.token_ids
        own = self._own.get(context.request_id)
        if own is None:
            own = self._own[context.request_id] = self._new_matrix()
        matrices = (own, self.matrix)
        _learn(matrices, tokens, self._num_learnt.get(context.request_id, 1))
        self._num_learnt[context.request_id] = len(tokens)
        maker = DraftMaker(matrices, self._config.num_candidates, self._config.exploration)
        return maker.paths(
            tokens[-2] if len(tokens) > 1 else None,
            tokens[-1],
            max_nodes=min(self._config.max_nodes, context.max_nodes),
            max_depth=min(self._config.depth, context.max_depth),
            min_path_prob=max(MIN_PATH_PROB, context.min_path_prob),
        )

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        """Learn the choices at rejected nodes; the accepted tokens are learnt from the next context."""
        for outcome in outcomes:
            if outcome.choices is None:
                continue
            tree, accepted = outcome.tree, set(outcome.path.accepted_nodes)
            for node in range(1, tree.num_nodes):
                if node not in accepted:
                    self.matrix.learn(tree.tokens[tree.parents[node]], tree.tokens[node], outcome.choices[node])

    def release(self, request_id: str) -> None:
        self._num_learnt.pop(request_id, None)
        self._own.pop(request_id, None)  # the shared matrix outlives requests: that is the point


def _learn(matrices: Sequence[TrigramMatrix], text: Sequence[int], start: int) -> None:
    for position in range(max(start, 1), len(text)):
        before = text[position - 2] if position > 1 else None
        for matrix in matrices:
            matrix.learn(before, text[position - 1], text[position])
