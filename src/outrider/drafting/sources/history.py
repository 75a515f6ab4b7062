"""What the model generated before, in any request: a level of hierarchy drafting (Cho et al., arXiv 2502.05609).

There this database is made before decoding, from outputs of the model; here it grows with every request.
"""

from __future__ import annotations

from collections.abc import Sequence

from outrider.config import HistoryConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, FinishedText
from outrider.drafting.sources.hash_index import new_index
from outrider.drafting.sources.matches import END_OF_TEXT, weighted_paths
from outrider.drafting.tree_merge import WeightedPath


class HistoryStore:
    """Generated texts in two halves: when the newer is full, the older is forgotten and takes its place.

    Args:
        capacity: the most tokens kept, texts' ends included.
    """

    def __init__(self, lengths: Sequence[int], capacity: int) -> None:
        self._lengths, self._half = tuple(lengths), capacity // 2
        self._halves = [new_index(self._lengths), new_index(self._lengths)]  # the newer first

    def __len__(self) -> int:
        return sum(map(len, self._halves))

    def add(self, segment: Sequence[int]) -> None:
        """Keep a text; of one longer than half the capacity its end."""
        segment = segment[-(self._half - 1) :]
        newer = self._halves[0]
        if len(newer) + len(segment) + 1 > self._half:
            self._halves = [new_index(self._lengths), newer]
        self._halves[0].append([*segment, END_OF_TEXT])

    def candidates(self, tokens: Sequence[int], depth: int, limit: int) -> list[tuple[Sequence[int], int]]:
        """Continuations of the places that agree with the end of `tokens`, with the length of agreement."""
        most = len(self._lengths) * (limit + 1)
        found = [
            candidate
            for half in self._halves
            for candidate in half.copies(tokens, depth, per_length=limit, most=most, periodic=False)
            if candidate[0]
        ]
        found.sort(key=lambda candidate: -candidate[1])
        return found[:limit]


class HistorySource:
    name = "history"
    reads_logits = False

    def __init__(self, config: HistoryConfig) -> None:
        self._config = config
        self.store = HistoryStore(config.lengths, config.capacity)
        # Stretches of a request overlap, so that every place but the last has a match and all that follows in one.
        self._overlap = config.lengths[0] + config.depth
        self._stored: dict[str, range] = {}  # of running requests: positions from the first root on that are stored

    def continuations(self, context: DraftContext) -> list[WeightedPath]:
        self._store_segment(context)
        depth = min(self._config.depth, context.max_depth, context.max_nodes)
        if depth <= 0:
            return []
        candidates = self.store.candidates(context.token_ids, depth, self._config.num_candidates)
        return weighted_paths(candidates, self._config.num_candidates)

    def _store_segment(self, context: DraftContext) -> None:
        """Store what has come since the last segment, in whichever steps, if it is enough for another one."""
        tokens = context.token_ids
        root = len(tokens) - 1
        stored = self._stored.setdefault(context.request_id, range(root, root))
        if len(tokens) - stored.stop >= self._config.segment:
            self.store.add(tokens[max(stored.start, stored.stop - self._overlap) :])
            self._stored[context.request_id] = range(stored.start, len(tokens))

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        pass  # the accepted tokens are read from the next context

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        """Store what is not stored yet of a finished output; twice where it had lost its place and begun again."""
        stored = self._stored.pop(request_id, None)
        if finished is None:
            return
        tokens, start = finished.token_ids, finished.num_prompt_tokens - 1
        stored = stored or range(len(tokens), len(tokens))
        if start < stored.start:
            self._store_rest(tokens[start : stored.start + self._overlap])
        if stored.stop < len(tokens):
            self._store_rest(tokens[max(stored.start, stored.stop - self._overlap) :])

    def _store_rest(self, tokens: Sequence[int]) -> None:
        if len(tokens) > self._config.lengths[0]:
            self.store.add(tokens)
