"""What a drafter's confidences are worth: acceptance as counted, by drafter, depth and request.

`scripts/replay_planner.py` compares settings on recorded proposals: what the chosen nodes bring, less their rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from outrider.token_tree import TokenTree

EDGES = (0.02, 0.05, 0.1, 0.18, 0.28, 0.4, 0.52, 0.64, 0.76, 0.86, 0.93, 0.97, 0.99)
CENTRES = tuple((a + b) / 2 for a, b in zip((0.0, *EDGES), (*EDGES, 1.0), strict=True))
# Trials that a drafter's word counts for; that all depths count for at one; that other requests count for.
SHARED_PRIOR, DEPTH_PRIOR, OWN_PRIOR = 4.0, 10.0, 24.0
SHARED_MEMORY, OWN_MEMORY = 400.0, 160.0  # trials after which old ones begin to be forgotten


class _Counts:
    """Hits and trials of each bin of confidence, the older ones worth less.

    Args:
        prior: trials that an estimate from elsewhere counts for.
    """

    __slots__ = ("hits", "memory", "prior", "trials")

    def __init__(self, memory: float, prior: float) -> None:
        self.hits = [0.0] * len(CENTRES)
        self.trials = [0.0] * len(CENTRES)
        self.memory, self.prior = memory, prior

    def count(self, index: int, hit: bool) -> None:
        if self.trials[index] >= self.memory:
            self.trials[index] *= 0.5
            self.hits[index] *= 0.5
        self.trials[index] += 1.0
        self.hits[index] += hit

    def refined(self, estimates: Sequence[float]) -> list[float]:
        """``[bins]`` of beta estimates around others."""
        return [
            (hits + self.prior * estimate) / (trials + self.prior)
            for hits, trials, estimate in zip(self.hits, self.trials, estimates, strict=True)
        ]


class _SharedCounts:
    """All requests' outcomes: together, and those of first draft tokens and of deeper ones for themselves.

    A first draft token is judged before it is known whether the source has found the right place; a deeper one of
    equal confidence stands behind tokens that were right.
    """

    def __init__(self) -> None:
        self.together = _Counts(SHARED_MEMORY, SHARED_PRIOR)
        self.first = _Counts(SHARED_MEMORY, DEPTH_PRIOR)
        self.deeper = _Counts(SHARED_MEMORY, DEPTH_PRIOR)

    @property
    def all(self) -> tuple[_Counts, _Counts, _Counts]:
        return self.together, self.first, self.deeper


class AcceptanceEstimator:
    """Turns a drafter's confidences into probabilities, learning from every node whose outcome is known.

    A node's outcome is known once its parent is on the path, whether the node itself was verified or left out. Each
    bin of confidence is a beta estimate: a request's own trials on top of all requests' at that depth, on top of
    theirs at any, on top of the drafter's word.
    """

    def __init__(self) -> None:
        self._shared: dict[str, _SharedCounts] = {}
        self._own: dict[str, dict[str, _Counts]] = {}  # by request, then drafter
        self._tables: dict[str, dict[str, tuple[list[float], list[float]]]] = {}

    def path_probs(self, name: str, request_id: str, tree: TokenTree) -> list[float]:
        """``[num_nodes]`` probability that each node is reached and accepted; the root's is 1."""
        assert tree.confidences is not None, "a tree without confidences cannot be weighed"
        first, deeper = self._table(name, request_id)
        probs = [1.0] * tree.num_nodes
        for node in range(1, tree.num_nodes):
            parent = tree.parents[node]
            table = deeper if parent else first
            probs[node] = probs[parent] * table[bisect_right(EDGES, tree.confidences[node])]
        return probs

    def observe(self, name: str, request_id: str, tree: TokenTree, new_tokens: Sequence[int]) -> None:
        """Walk a proposed tree along the tokens that came, counting the children of every node on the way."""
        if tree.confidences is None or tree.num_nodes == 1:
            return
        shared = self._shared.setdefault(name, _SharedCounts())
        own = self._own.setdefault(request_id, {}).setdefault(name, _Counts(OWN_MEMORY, OWN_PRIOR))
        children, node = tree.children(), 0
        for token in new_tokens:
            reached = None
            concerned = (shared.together, shared.deeper if node else shared.first, own)
            for child in children[node]:
                hit = tree.tokens[child] == token
                index = bisect_right(EDGES, tree.confidences[child])
                for counts in concerned:
                    counts.count(index, hit)
                if hit and reached is None:
                    reached = child
            if reached is None:
                break
            node = reached
        self._tables.pop(request_id, None)

    def release(self, request_id: str) -> None:
        self._own.pop(request_id, None)
        self._tables.pop(request_id, None)

    def shared_counts(self, name: str, most: float) -> tuple[list[list[float]], list[list[float]]]:
        """All requests' hits and trials of a drafter: each ``[3][bins]``, together, of first nodes, of deeper ones.

        Args:
            most: trials of a bin; more count as so many. Nothing is kept of a drafter without confidences.
        """
        shared = self._shared.get(name)
        hits: list[list[float]] = []
        trials: list[list[float]] = []
        for counts in shared.all if shared is not None else ():
            shares = [min(1.0, most / of) if of else 1.0 for of in counts.trials]
            hits.append([share * of for share, of in zip(shares, counts.hits, strict=True)])
            trials.append([share * of for share, of in zip(shares, counts.trials, strict=True)])
        return hits, trials

    def recall(self, name: str, hits: Sequence[Sequence[float]], trials: Sequence[Sequence[float]]) -> None:
        """Begin with what `shared_counts` gave."""
        if hits:
            shared = self._shared[name] = _SharedCounts()
            for counts, of_hits, of_trials in zip(shared.all, hits, trials, strict=True):
                counts.hits, counts.trials = list(of_hits), list(of_trials)

    def _table(self, name: str, request_id: str) -> tuple[list[float], list[float]]:
        """``[bins]`` probability of first and of deeper nodes for a request, kept until something is learnt."""
        tables = self._tables.setdefault(request_id, {})
        table = tables.get(name)
        if table is None:
            shared, own = self._shared.get(name), self._own.get(request_id, {}).get(name)
            first = deeper = list(CENTRES)
            if shared is not None:
                together = shared.together.refined(CENTRES)
                first, deeper = shared.first.refined(together), shared.deeper.refined(together)
            if own is not None:
                first, deeper = own.refined(first), own.refined(deeper)
            table = tables[name] = first, deeper
        return table
