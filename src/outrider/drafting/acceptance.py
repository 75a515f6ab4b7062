"""What a drafter's confidences are worth: acceptance as counted, by drafter and request."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from outrider.token_tree import TokenTree

EDGES = (0.02, 0.05, 0.1, 0.18, 0.28, 0.4, 0.52, 0.64, 0.76, 0.86, 0.93, 0.97, 0.99)
CENTRES = tuple((a + b) / 2 for a, b in zip((0.0, *EDGES), (*EDGES, 1.0), strict=True))
# Trials that a drafter's word, and other requests' trials, count for.
SHARED_PRIOR, OWN_PRIOR = 4.0, 6.0
# What a drafter's word is worth before anything is known: being slow to trust costs less than being fooled.
DOUBT = 0.6
SHARED_MEMORY, OWN_MEMORY = 400.0, 40.0  # trials after which old ones begin to be forgotten


class _Counts:
    """Hits and trials of each bin of confidence, the older ones worth less."""

    __slots__ = ("hits", "memory", "trials")

    def __init__(self, memory: float) -> None:
        self.hits = [0.0] * len(CENTRES)
        self.trials = [0.0] * len(CENTRES)
        self.memory = memory

    def count(self, index: int, hit: bool) -> None:
        if self.trials[index] >= self.memory:
            self.trials[index] *= 0.5
            self.hits[index] *= 0.5
        self.trials[index] += 1.0
        self.hits[index] += hit


class AcceptanceEstimator:
    """Turns a drafter's confidences into probabilities, learning from every node whose outcome is known.

    A node's outcome is known once its parent is on the path, whether the node itself was verified or left out. Each
    bin of confidence is a beta estimate: a request's own trials on top of all requests' on top of the drafter's word.
    """

    def __init__(self) -> None:
        self._shared: dict[str, _Counts] = {}
        self._own: dict[str, dict[str, _Counts]] = {}  # by request, then drafter
        self._tables: dict[str, dict[str, list[float]]] = {}

    def path_probs(self, name: str, request_id: str, tree: TokenTree) -> list[float]:
        """``[num_nodes]`` probability that each node is reached and accepted; the root's is 1."""
        assert tree.confidences is not None, "a tree without confidences cannot be weighed"
        table = self._table(name, request_id)
        probs = [1.0] * tree.num_nodes
        for node in range(1, tree.num_nodes):
            probs[node] = probs[tree.parents[node]] * table[bisect_right(EDGES, tree.confidences[node])]
        return probs

    def observe(self, name: str, request_id: str, tree: TokenTree, new_tokens: Sequence[int]) -> None:
        """Walk a proposed tree along the tokens that came, counting the children of every node on the way."""
        if tree.confidences is None or tree.num_nodes == 1:
            return
        shared = self._shared.setdefault(name, _Counts(SHARED_MEMORY))
        own = self._own.setdefault(request_id, {}).setdefault(name, _Counts(OWN_MEMORY))
        children, node = tree.children(), 0
        for token in new_tokens:
            reached = None
            for child in children[node]:
                hit = tree.tokens[child] == token
                index = bisect_right(EDGES, tree.confidences[child])
                shared.count(index, hit)
                own.count(index, hit)
                if hit and reached is None:
                    reached = child
            if reached is None:
                break
            node = reached
        self._tables.pop(request_id, None)

    def release(self, request_id: str) -> None:
        self._own.pop(request_id, None)
        self._tables.pop(request_id, None)

    def _table(self, name: str, request_id: str) -> list[float]:
        """``[bins]`` probability of each bin for a request, kept until something is learnt."""
        tables = self._tables.setdefault(request_id, {})
        table = tables.get(name)
        if table is None:
            shared = self._shared.get(name)
            own = self._own.get(request_id, {}).get(name)
            table = []
            for index, centre in enumerate(CENTRES):
                estimate = DOUBT * centre
                if shared is not None:
                    estimate = (shared.hits[index] + SHARED_PRIOR * estimate) / (shared.trials[index] + SHARED_PRIOR)
                if own is not None:
                    estimate = (own.hits[index] + OWN_PRIOR * estimate) / (own.trials[index] + OWN_PRIOR)
                table.append(estimate)
            tables[name] = table
        return table
