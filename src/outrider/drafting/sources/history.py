"""What the model generated before, in any request: a level of hierarchy drafting (Cho et al., arXiv 2502.05609)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from outrider.config import HistoryConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome
from outrider.drafting.sources.hash_index import HashIndex
from outrider.drafting.sources.matches import END_OF_TEXT, continuation, match_length, weighted_paths
from outrider.drafting.tree_merge import WeightedPath


class HistoryStore:
    """Generated texts in two halves: when the newer is full, the older is forgotten and takes its place.

    Args:
        capacity: the most tokens kept, texts' ends included.
    """

    def __init__(self, lengths: Sequence[int], capacity: int) -> None:
        self._lengths, self._half = tuple(lengths), capacity // 2
        self._halves = [self._new(), self._new()]  # the newer first

    def _new(self) -> tuple[array[int], HashIndex]:
        return array("q"), HashIndex(self._lengths)

    def __len__(self) -> int:
        return sum(len(text) for text, _ in self._halves)

    def add(self, segment: Sequence[int]) -> None:
        """Keep a text; of one longer than half the capacity its end."""
        segment = segment[-(self._half - 1) :]
        text, index = self._halves[0]
        if len(text) + len(segment) + 1 > self._half:
            self._halves = [self._new(), self._halves[0]]
            text, index = self._halves[0]
        text.extend(segment)
        text.append(END_OF_TEXT)
        index.extend(text)

    def candidates(self, tokens: Sequence[int], depth: int, limit: int) -> list[tuple[Sequence[int], int]]:
        """Continuations of the places that agree with the end of `tokens`, with the length of agreement."""
        query = HashIndex(self._lengths)
        query.extend(tokens[-max(self._lengths) :])
        hashes = query.suffix_hashes()
        found: list[tuple[Sequence[int], int]] = []
        for text, index in self._halves:
            for end, _ in index.ends(hashes, limit):
                length = match_length(text, end, tokens, 0)
                path = continuation(text, end, depth, periodic=False)
                if length >= self._lengths[-1] and path:
                    found.append((path, length))
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
        self._outputs: dict[str, list[int]] = {}  # the overlap and what is not stored yet

    def continuations(self, context: DraftContext) -> list[WeightedPath]:
        depth = min(self._config.depth, context.max_depth, context.max_nodes)
        if depth <= 0:
            return []
        candidates = self.store.candidates(context.token_ids, depth, self._config.num_candidates)
        return weighted_paths(candidates, self._config.num_candidates)

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        for outcome in outcomes:
            output = self._outputs.get(outcome.request_id)
            if output is None:
                output = self._outputs[outcome.request_id] = [outcome.tree.tokens[0]]
            output += outcome.new_tokens
            if len(output) >= self._overlap + self._config.segment:
                self.store.add(output)
                self._outputs[outcome.request_id] = output[-self._overlap :]

    def release(self, request_id: str) -> None:
        output = self._outputs.pop(request_id, None)
        if output and len(output) > self._config.lengths[0]:
            self.store.add(output)
