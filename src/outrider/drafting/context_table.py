"""The latest candidates after contexts of several lengths, for Token Recycling (`context_recycling.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

LENGTHS = (1, 2, 3, 4, 8, 16, 32, 64)  # of contexts, as far as they are allowed

Context = tuple[int, ...]
Row = NDArray[np.float32]


class Candidates:
    """What may follow a context, the likeliest or latest first.

    Attributes:
        token_row, logits: ``[len(tokens)]`` the tokens again, and the target's logits; None if the tokens were only
            seen to follow.
    """

    __slots__ = ("logits", "token_row", "tokens")

    def __init__(
        self, tokens: Sequence[int], token_row: NDArray[np.int64] | None = None, logits: Row | None = None
    ) -> None:
        self.tokens = tokens
        self.token_row = token_row
        self.logits = logits


class ContextTable:
    """The latest candidates after each context.

    Those of single tokens are kept for good. Longer contexts are kept in two halves: when the newer is full, the
    older is forgotten and takes its place.

    Args:
        max_context: the longest context, in tokens.
        num_candidates: the most tokens kept of those that were only seen to follow a context.
        capacity: the most contexts of more than one token.

    Attributes:
        lengths: of contexts, from 1 on.
        half: the most contexts of more than one token that are learnt at once.
    """

    def __init__(self, max_context: int, num_candidates: int, capacity: int) -> None:
        self.lengths = tuple(length for length in LENGTHS if length <= max_context)
        self._num_candidates = num_candidates
        self.half = capacity // 2
        self._single: dict[Context, Candidates] = {}
        self._newer: dict[Context, Candidates] = {}
        self._older: dict[Context, Candidates] = {}
        self._cuts = [_cut(size, self.lengths) for size in range(self.lengths[-1] + 1)]

    def __len__(self) -> int:
        """Contexts of more than one token; one that stands in both halves counts twice."""
        return len(self._newer) + len(self._older)

    def contexts_at(self, place: Context) -> Sequence[Context]:
        """What ends at a place, from one token on; a place is no longer than the longest context."""
        return self._cuts[len(place)](place)

    def get(self, context: Context) -> Candidates | None:
        """The candidates after a context.

        Whoever learns a context learns all that it ends with: where one is known, the shorter ones are.
        """
        if len(context) == 1:
            return self._single.get(context)
        return self._newer.get(context) or self._older.get(context)

    def update(self, single: Mapping[Context, Candidates], longer: Mapping[Context, Candidates]) -> None:
        """Learn contexts of one token and contexts of more; the latter at most half of the capacity."""
        self._make_room(len(longer))
        self._single.update(single)
        self._newer.update(longer)

    def learn_seen(self, tokens: Sequence[int], start: int) -> None:
        """A text's tokens from `start` on, each as what follows the contexts before it."""
        longest = self.lengths[-1]
        for position in range(max(start, 1), len(tokens)):
            self._make_room(len(self.lengths))
            token = tokens[position]
            alone = Candidates((token,))
            of_length, is_known = self._single, True
            for context in self.contexts_at(tuple(tokens[max(0, position - longest) : position])):
                made = alone
                known = self.get(context) if is_known else None
                if known is None:
                    is_known = False
                elif known.tokens[0] != token:
                    others = [other for other in known.tokens if other != token]
                    made = Candidates([token, *others][: self._num_candidates])
                else:
                    made = None
                if made is not None:
                    of_length[context] = made
                of_length = self._newer

    def _make_room(self, num_contexts: int) -> None:
        if len(self._newer) + num_contexts > self.half:
            self._older, self._newer = self._newer, {}


def learn_chosen(tables: Sequence[ContextTable], places: Sequence[Context], candidates: Sequence[Candidates]) -> None:
    """Let tables of one kind learn the target's candidates after places; of equal contexts the last place's.

    Contexts are collected before: what a dictionary takes over from another one is not hashed again.
    """
    first = tables[0]
    single: dict[Context, Candidates] = {}
    longer: dict[Context, Candidates] = {}
    for place, of_place in zip(places, candidates, strict=True):
        shortest, *others = first.contexts_at(place)
        if len(longer) + len(others) > first.half:
            for table in tables:
                table.update(single, longer)
            single, longer = {}, {}
        single[shortest] = of_place
        for context in others:
            longer[context] = of_place
    for table in tables:
        table.update(single, longer)


def _cut(size: int, lengths: Sequence[int]) -> Callable[[Context], Sequence[Context]]:
    """Cuts what ends at a place out of it, the shortest first.

    Args:
        size: of the place.
    """
    slices = [slice(size - length, None) for length in lengths if length <= size]
    if len(slices) < 2:  # an itemgetter of one item gives no tuple
        return lambda place: [place[of] for of in slices]
    return itemgetter(*slices)
