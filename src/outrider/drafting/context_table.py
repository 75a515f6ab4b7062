"""The latest candidates after contexts of several lengths, for Token Recycling (`context_recycling.py`).

Compiled where there is a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from operator import itemgetter
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from outrider.kernels.drafting import compiled
from outrider.sampling.noise import Purpose, rank_with_noise
from outrider.token_tree import TokenTree

LENGTHS = (1, 2, 3, 4, 8, 16, 32, 64)  # of contexts, as far as they are allowed

Context = tuple[int, ...]
Row = NDArray[np.float32]


class Origin(IntEnum):
    """Where predicted tokens are from: the request's own table (of the target, or only seen), or the shared one."""

    OWN_CHOSEN = 0
    OWN_SEEN = 1
    SHARED = 2


# What contexts propose, the longest first, each without what longer ones have proposed: the origin, the index of the
# context's length, the tokens.
Proposals = Sequence[tuple[int, int, Sequence[int]]]


@dataclass(slots=True)
class PlaceNoise:
    """The noise that the target will choose the token at `position` with."""

    seed: int
    position: int
    temperature: float
    vocab_size: int

    def behind(self, depth: int) -> PlaceNoise:
        """That of the token so many positions later."""
        return PlaceNoise(self.seed, self.position + depth, self.temperature, self.vocab_size)

    def ranked(self, tokens: ArrayLike, logits: ArrayLike, count: int) -> list[int]:
        """The first `count` tokens as the target will rank them."""
        return rank_with_noise(
            np.asarray(tokens, dtype=np.int64),
            np.asarray(logits, dtype=np.float32),
            count,
            temperature=self.temperature,
            seed=self.seed,
            position=self.position,
            purpose=Purpose.TARGET,
            vocab_size=self.vocab_size,
        )


class ContextTable(Protocol):
    """What `PythonTable` is, in Python or compiled."""

    @property
    def lengths(self) -> Sequence[int]:
        """Of contexts, from 1 on."""
        ...

    def __len__(self) -> int:
        """Contexts of more than one token; one that stands in both halves counts twice."""
        ...


def new_table(max_context: int, num_candidates: int, capacity: int) -> ContextTable:
    """An empty table; see `PythonTable`."""
    module = compiled()
    kind = PythonTable if module is None else module.ContextTable
    return kind(max_context, num_candidates, capacity)


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


class PythonTable:
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

    def predict(
        self, shared: PythonTable, place: Context, num_lengths: int, count: int, noise: PlaceNoise | None
    ) -> tuple[Proposals, int]:
        """What may follow a place of the request whose own table this is; at most `count` tokens.

        Args:
            shared: the table that is asked where this one knows nothing.
            num_lengths: how many lengths of context may be known there.
            noise: that the target's candidates are ranked with; None goes by their logits.

        Returns:
            The proposals, and how many lengths may be known one token later: what a context there begins with was
            learnt one token before it was.
        """
        found: list[tuple[int, int, Sequence[int]]] = []
        proposed: set[int] = set()
        last: Candidates | None = None
        num_known = 0
        contexts = self.contexts_at(place)
        for index in range(min(num_lengths, len(contexts)) - 1, -1, -1):
            origin = Origin.OWN_CHOSEN
            candidates = self.get(contexts[index])
            if candidates is None:
                origin = Origin.SHARED
                candidates = shared.get(contexts[index])
                if candidates is None:
                    continue
            elif candidates.logits is None:
                origin = Origin.OWN_SEEN
            num_known = num_known or index + 1
            if candidates is last:
                continue
            last = candidates
            if noise is None or candidates.token_row is None or candidates.logits is None:
                tokens = candidates.tokens
            else:
                tokens = noise.ranked(candidates.token_row, candidates.logits, count)
            new = [token for token in tokens if token not in proposed][:count] if proposed else tokens[:count]
            if new:
                found.append((origin, index, new))
                proposed.update(new)
                if len(proposed) >= count:
                    break
        return found, num_known + 1

    def _make_room(self, num_contexts: int) -> None:
        if len(self._newer) + num_contexts > self.half:
            self._older, self._newer = self._newer, {}


def learn_chosen(
    tables: Sequence[ContextTable],
    tail: Context,
    tree: TokenTree,
    token_rows: NDArray[np.int64],
    logits: NDArray[np.float32],
) -> None:
    """Let tables of one kind learn the target's candidates after a tree's nodes; of equal contexts the last node's.

    Args:
        tail: the text up to the root, the root included, as far as it is known.
        token_rows, logits: ``[num_nodes, num_candidates]`` of the candidates, the likeliest first.
    """
    python = [table for table in tables if isinstance(table, PythonTable)]
    if not python:
        module = compiled()
        assert module is not None, "a compiled table without compiled code"
        module.learn_chosen(tables, tail, tree.tokens, tree.parents, token_rows, logits)
        return
    longest = python[0].lengths[-1]
    places = [tail[-longest:]]
    for token, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True):
        places.append((*places[parent], token)[-longest:])
    _learn_places(python, places, list(map(Candidates, token_rows.tolist(), token_rows, logits)))


def _learn_places(tables: Sequence[PythonTable], places: Sequence[Context], candidates: Sequence[Candidates]) -> None:
    """Contexts are collected before: what a dictionary takes over from another one is not hashed again."""
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
