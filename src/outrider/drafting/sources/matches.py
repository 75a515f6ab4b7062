"""From places where a text agreed with the end of a sequence to weighted guesses of what comes next."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from itertools import starmap

from outrider.drafting.tree_merge import WeightedPath
from outrider.kernels.drafting import compiled

END_OF_TEXT = -1  # stands between two texts in one store; no token has this id
MAX_LENGTH = 16  # of a match; longer ones are no surer
MAX_MATCHES = 16  # looked at in a step: periodic text matches everywhere, with the same continuation

# What a continuation seen once loses to all that was not seen, by the length of the match (absolute discounting, Ney
# et al. 1994). Measured on 2,900 recorded matches of code, chat, summaries and edits: after a lone match of n tokens
# the next one was right in 1 - DISCOUNTS[n] of all cases, and (votes - DISCOUNTS[n]) / matches fitted the others.
DISCOUNTS = (1.0, 0.68, 0.45, 0.37, 0.3, 0.25, 0.24, 0.2, 0.16, 0.14, 0.14, 0.13, 0.11, 0.1, 0.09, 0.07, 0.05)
LATER_DISCOUNTS = DISCOUNTS + DISCOUNTS[-1:] * 128  # of matches that grow with the path
VOTES = tuple(2.0**length for length in range(MAX_LENGTH + 1))  # a match one token longer counts twice


class NgramIndex:
    """Where each n-gram of one growing text ended, kept incrementally: O(max_ngram) per new token."""

    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        self._lengths = range(max_ngram, min_ngram - 1, -1)
        self._ends: dict[tuple[int, ...], list[int]] = defaultdict(list)
        self._num_indexed = 0

    def extend(self, text: Sequence[int]) -> None:
        """Index the tokens that are new since the last call."""
        ends = self._ends
        for end in range(self._num_indexed + 1, len(text) + 1):
            for length in self._lengths:
                if length <= end:
                    ends[tuple(text[end - length : end])].append(end)
        self._num_indexed = len(text)

    def nearest(self, sequence: Sequence[int], position: int) -> tuple[int, int] | None:
        """Of the places where the longest suffix stands with a token behind it, the one next to a position.

        Returns:
            The position behind it and the number of tokens of the n-gram; None if not even the shortest stands there.
        """
        for length in self._lengths:
            ends = self._ends.get(tuple(sequence[-length:])) if length <= len(sequence) else None
            if ends:
                after = bisect_left(ends, position)
                near = [end for end in ends[max(after - 1, 0) : after + 1] if end < self._num_indexed]
                if near:
                    return min(near, key=lambda end: abs(end - position)), length
        return None


def match_length(text: Sequence[int], end: int, sequence: Sequence[int], known: int) -> int:
    """How many tokens before `end` agree with the end of the sequence, at most `MAX_LENGTH`; `known` surely do."""
    length, most = known, min(end, len(sequence), MAX_LENGTH)
    while length < most and text[end - 1 - length] == sequence[-1 - length]:
        length += 1
    return min(length, MAX_LENGTH)


def continuation(text: Sequence[int], end: int, depth: int, *, periodic: bool) -> Sequence[int]:
    """The `depth` tokens from `end` on, up to the end of their text.

    Args:
        periodic: the text goes on where the match began: a match that reaches its end repeats itself, so may what
            follows.
    """
    path = text[end : end + depth]
    if periodic and len(path) < depth:
        return [path[i % len(path)] for i in range(depth)]
    if END_OF_TEXT in path:
        return path[: path.index(END_OF_TEXT)]
    return path


def weighted_paths(candidates: Sequence[tuple[Sequence[int], int]], max_paths: int) -> list[WeightedPath]:
    """Distinct continuations with the confidence that their matches' length and agreement give them.

    Args:
        candidates: continuations and the length of the match before each, the longest matches first.
        max_paths: the most to return; the others still vote.
    """
    module = compiled()
    if module is not None:
        return list(starmap(WeightedPath, module.weighted_paths(candidates, max_paths)))
    return _weighted_paths(candidates, max_paths)


def _weighted_paths(candidates: Sequence[tuple[Sequence[int], int]], max_paths: int) -> list[WeightedPath]:
    votes: dict[tuple[int, ...], float] = {}
    lengths: dict[tuple[int, ...], int] = {}
    for path, length in candidates:
        key = tuple(path)
        votes[key] = votes.get(key, 0.0) + VOTES[length]
        lengths.setdefault(key, length)  # of all who share it the longest: they come first
    found: dict[tuple[int, ...], list[float]] = {}
    if votes:
        _weigh(list(votes), votes, lengths, [], found)
    return [WeightedPath(path, found[path]) for path in votes if path in found][:max_paths]


def _weigh(
    paths: Sequence[tuple[int, ...]],
    votes: dict[tuple[int, ...], float],
    lengths: dict[tuple[int, ...], int],
    shared: list[float],
    found: dict[tuple[int, ...], list[float]],
) -> None:
    """Find the confidences of paths whose first ``len(shared)`` tokens are equal.

    Args:
        paths: at least one.
        shared: confidences of these tokens.
    """
    depth = len(shared)
    if len(paths) == 1:
        (path,) = paths
        # Once the path so far is right, the match is longer by it.
        share, length = VOTES[lengths[path]] / votes[path], lengths[path] + depth
        found[path] = [
            *shared,
            *(1.0 - share * discount for discount in LATER_DISCOUNTS[length : lengths[path] + len(path)]),
        ]
        return
    # As long as all agree there is one group; the least and the greatest path differ where any two do.
    least, greatest = min(paths), max(paths)
    first = depth
    while depth < len(least) and least[depth] == greatest[depth]:
        depth += 1
    if depth > first:
        length = lengths[paths[0]]
        share = VOTES[length] / sum([votes[path] for path in paths])
        shared = [
            *shared,
            *[1.0 - share * discount for discount in LATER_DISCOUNTS[length + first : length + depth]],
        ]
    groups: dict[int, list[tuple[int, ...]]] = {}
    for path in paths:
        if len(path) > depth:  # else the others hold all of it
            groups.setdefault(path[depth], []).append(path)
    totals = {token: sum(votes[path] for path in group) for token, group in groups.items()}
    total = sum(totals.values())
    for token, group in groups.items():
        length = lengths[group[0]]
        discount = LATER_DISCOUNTS[length + depth] * VOTES[length] / totals[token]
        _weigh(group, votes, lengths, [*shared, totals[token] / total * (1.0 - discount)], found)
