"""One request's text in Token Recycling over contexts (`context_recycling.py`): what it teaches, and its next tree.

Compiled where there is a compiler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from outrider.drafting.context_table import (
    Context,
    Origin,
    PlaceNoise,
    Proposals,
    PythonTable,
    Row,
    learn_chosen,
)
from outrider.drafting.sources.guess_tree import GuessTree, grow
from outrider.kernels.drafting import compiled
from outrider.token_tree import TokenTree

NUM_BELIEVED = 20  # observations that a first rate counts for
MAX_OBSERVED = 400  # of a rate; then all of its observations count half
FURTHER_RANKS = (0.2, 0.08, 0.06, 0.04, 0.03, 0.03, 0.02)  # of what the first candidate leaves

NOT_THERE = -2  # a node of no tree; -1 is the root

# Tokens, parents and confidences of a `TokenTree`.
GrownTree = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]


class Rates:
    """How often candidates of each rank were the target's choice: counted, the old for less and less.

    Args:
        prior: by rank; what is believed at first.
    """

    __slots__ = ("_right", "_seen", "by_rank")

    def __init__(self, prior: Sequence[float]) -> None:
        self.by_rank = list(prior)
        self._right = [rate * NUM_BELIEVED for rate in prior]
        self._seen = [float(NUM_BELIEVED)] * len(prior)

    def count(self, proposed: Sequence[int], chosen: int) -> None:
        """Candidates were proposed, by rank; one of them or another one was chosen."""
        by_rank, right, seen = self.by_rank, self._right, self._seen
        for rank, token in enumerate(proposed):
            if token == chosen:
                right[rank] += 1.0
            num_seen = seen[rank] + 1.0
            if num_seen > MAX_OBSERVED:
                right[rank] /= 2
                num_seen /= 2
            seen[rank] = num_seen
            by_rank[rank] = right[rank] / num_seen


class PythonRates:
    """Rates by where candidates are from and by the length of the context.

    Attributes:
        by_origin: lists by the index of the context's length.
    """

    def __init__(self, priors: Sequence[Sequence[Sequence[float]]]) -> None:
        self.by_origin = [[Rates(prior) for prior in of_origin] for of_origin in priors]


def new_rates(chosen: Mapping[int, float], seen: Mapping[int, float], lengths: Sequence[int], num_ranks: int) -> Any:
    """What measuring begins with: `PythonRates`, or the same compiled.

    Args:
        chosen, seen: by the length of the context, how often the first candidate is right where no longer context is
            known: one of the target's, and a token that was only seen to follow.
    """
    first_of = {Origin.OWN_CHOSEN: chosen, Origin.OWN_SEEN: seen, Origin.SHARED: chosen}
    priors = [[_prior(first_of[origin], length)[:num_ranks] for length in lengths] for origin in Origin]
    module = compiled()
    return PythonRates(priors) if module is None else module.RecyclingRates(priors, NUM_BELIEVED, MAX_OBSERVED)


def _prior(first: Mapping[int, float], length: int) -> list[float]:
    right = first[min(length, max(first))]
    return [right, *[(1.0 - right) * share for share in FURTHER_RANKS]]


class RecycledText(Protocol):
    """What `PythonText` is, in Python or compiled."""

    def grow(
        self,
        tokens: Sequence[int],
        max_nodes: int,
        max_depth: int,
        min_path_prob: float,
        noise: PlaceNoise | None,
    ) -> GrownTree:
        """The likeliest tree behind the text so far, of which what is new is learnt.

        Args:
            min_path_prob: more than 0; less likely nodes are not looked for.
            noise: that the text's next token will be chosen with, as candidates are ranked then; None goes by logits.
        """
        ...

    def observe(self, tree: TokenTree, token_rows: NDArray[np.int64], logits: Row, new_tokens: Sequence[int]) -> None:
        """The target's candidates after each node of a verified tree, not always the last one grown; what came.

        Args:
            token_rows, logits: ``[num_nodes, num_candidates]``, the likeliest first.
            new_tokens: the tokens that follow the root.
        """
        ...


def new_text(shared: Any, rates: Any, max_context: int, num_candidates: int, capacity: int) -> RecycledText:
    """A text of which nothing is known; see `PythonText`."""
    module = compiled()
    kind = PythonText if module is None else module.RecycledText
    return kind(shared, rates, max_context, num_candidates, capacity)


class PythonText:
    """A request's own table of contexts, its last tree, and what was predicted below the tree's nodes.

    Args:
        shared: the table that is asked where its own knows nothing; it learns the target's candidates too.
        rates: how much each candidate is believed.
        max_context, num_candidates, capacity: of its table; no node has more children than candidates.
    """

    def __init__(
        self, shared: PythonTable, rates: PythonRates, max_context: int, num_candidates: int, capacity: int
    ) -> None:
        self._shared, self._rates, self._num_candidates = shared, rates, num_candidates
        self._table = PythonTable(max_context, num_candidates, capacity)
        self._longest = self._table.lengths[-1]
        self._num_known = 0  # tokens of the text that have been learnt
        self._tail: Context = ()  # the last of them, up to the root
        self._made = GuessTree()
        self._predictions: dict[int, Proposals] = {}  # by node; -1 is the root

    def grow(
        self,
        tokens: Sequence[int],
        max_nodes: int,
        max_depth: int,
        min_path_prob: float,
        noise: PlaceNoise | None,
    ) -> GrownTree:
        longest = self._longest
        self._table.learn_seen(tokens, self._num_known)
        self._num_known = len(tokens)
        self._tail = tuple(tokens[-longest:])
        predictions = self._predictions = {}

        # The state of a node: its place, the product of probabilities up to it, and how many lengths of context may
        # be known there.
        def successors(
            _: GuessTree, node: int, depth: int, state: tuple[Context, float, int]
        ) -> list[tuple[int, float, tuple[Context, float, int]]]:
            place, product, num_lengths = state
            at_place = None if noise is None else noise.behind(depth)
            predictions[node], num_lengths = self._table.predict(
                self._shared, place, num_lengths, self._num_candidates, at_place
            )
            likeliest = self._likeliest(predictions[node], min_path_prob / product)[: self._num_candidates]
            return [
                (token, prob, ((*place, token)[-longest:], product * prob, num_lengths)) for prob, token in likeliest
            ]

        made = self._made = grow(
            (self._tail, 1.0, len(self._table.lengths)),
            successors,
            max_nodes=max_nodes,
            max_depth=max_depth,
            min_path_prob=min_path_prob,
        )
        parents = (-1, *[parent + 1 for parent in made.parents])
        return (tokens[-1], *made.tokens), parents, (1.0, *made.probs)

    def _likeliest(self, proposals: Proposals, least: float) -> list[tuple[float, int]]:
        """Probabilities and tokens, the most likely first: what a context's rates leave is for the shorter ones.

        Args:
            least: less likely tokens are left out.
        """
        found: list[tuple[float, int]] = []
        left = 1.0
        for origin, length_index, tokens in proposals:
            taken = 0.0
            by_rank = self._rates.by_origin[origin][length_index].by_rank
            for rate, token in zip(by_rank, tokens, strict=False):  # there may be fewer tokens than ranks
                taken += rate
                if left * rate >= least:
                    found.append((left * rate, token))
            left *= 1.0 - taken
            if left < least:
                break
        found.sort(key=itemgetter(0), reverse=True)
        return found

    def observe(self, tree: TokenTree, token_rows: NDArray[np.int64], logits: Row, new_tokens: Sequence[int]) -> None:
        # Of a text whose last steps were not shown here the root is all that is known.
        in_step = self._tail[-1:] == tree.tokens[:1]
        tail = self._tail if in_step else tree.tokens[:1]
        learn_chosen((self._shared, self._table), tail, tree, token_rows, logits)
        if in_step:
            self._take_in(new_tokens)

    def _take_in(self, new_tokens: Sequence[int]) -> None:
        """Judge the predictions along the tokens that came, which need not be learnt again."""
        made, node = self._made, -1
        for token in new_tokens:
            for origin, length_index, proposed in self._predictions.get(node, ()):
                self._rates.by_origin[origin][length_index].count(proposed, token)
                if token in proposed:
                    break
            below = zip(made.parents, made.tokens, strict=True)
            node = next((n for n, child in enumerate(below) if child == (node, token)), NOT_THERE)
        self._tail = (*self._tail, *new_tokens)[-self._longest :]
        self._predictions = {}
        self._num_known += len(new_tokens)
