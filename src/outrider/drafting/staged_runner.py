"""A draft model that is itself decoded speculatively (staged speculative decoding; Spector and Re, arXiv 2308.04623).

Whenever a token is to be read, a cheaper drafter guesses what the draft model will say next, and one forward reads
the token and the guesses. Guesses that turn out to be the tree's own tokens are read already. The tree and its
distributions are what the draft model alone would give: only the number of its forwards falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch

from outrider.cache.kv_cache import KVCache, SequenceCommit
from outrider.drafting.draft_runner import DraftRunner, TreeRows, log_weights_of
from outrider.drafting.drafter import DraftContext, FinishedText
from outrider.drafting.growth.tree import GrowingTree, Row
from outrider.drafting.guesser import Guess, Guesser
from outrider.kernels.rows import SequenceRows
from outrider.models.batch import rows_of
from outrider.models.model import Model

MIN_CHUNK = 8  # committed tokens that are always read together with guesses, however many requests there are


@dataclass(eq=False)
class _Step:
    """One request in one step.

    Attributes:
        depth: of the longest path.
        num_tree_rows: how many draft tokens are read at most.
        num_rows: reserved for draft tokens and guesses.
        chunk: committed tokens that the model had not read, the root last; kept together with the accepted path.
        slots: ``[all committed tokens + num_rows]``.
        ahead: row and log q of each guess that was read, by its path from the root.
        next_row: the first row that nothing was written to.
    """

    context: DraftContext
    depth: int
    num_tree_rows: int
    num_rows: int
    chunk: Sequence[int] = ()
    slots: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    ahead: dict[tuple[int, ...], tuple[int, Row]] = field(default_factory=dict)
    next_row: int = 0
    num_claimed: int = 0

    def num_guesses(self, num_nodes: int) -> int:
        """Rows to spare for guesses while `num_nodes` tokens are read."""
        return self.num_rows - self.next_row - max(num_nodes, self.num_tree_rows - self.num_claimed)

    def guess_depth(self, path: Sequence[int]) -> int:
        """How far below a path tokens may have to be read: the last of a tree are not."""
        return self.depth - 1 - len(path)


@dataclass(frozen=True, eq=False)
class _Reading:
    """Rows of one forward: committed tokens or one draft token, then guesses below it.

    Attributes:
        path: from the root to the token that the guesses follow.
        first_row: reserved row of the draft token, or else of the first guess.
    """

    step: _Step
    path: tuple[int, ...]
    guess: Guess
    first_row: int
    rows: SequenceRows

    @property
    def paths(self) -> list[tuple[int, ...]]:
        """From the root to each of the guess's nodes."""
        tree = self.guess.tree
        return [(*self.path, *(tree.tokens[above] for above in tree.path(node))) for node in range(tree.num_nodes)]


class StagedRunner(DraftRunner):
    """Args:
    guesser: guesses what the model will say.
    """

    def __init__(
        self, model: Model, cache: KVCache, *, vocab_size: int, max_batch_tokens: int, guesser: Guesser
    ) -> None:
        super().__init__(model, cache, vocab_size=vocab_size, max_batch_tokens=max_batch_tokens)
        self._guesser = guesser
        self._steps: dict[str, _Step] = {}

    def has_room(self, context: DraftContext, num_rows: int, depth: int) -> bool:
        # Guesses that fail leave holes between the rows of a path, which must stay in order.
        step = _Step(context, depth, num_rows, num_rows + 2 * self._guesser.max_nodes)
        self._guesser.start(context)
        if not super().has_room(context, step.num_rows, depth):
            return False
        self._steps[context.request_id] = step
        return True

    def catch_up(self, contexts: Sequence[DraftContext]) -> list[Row]:
        steps = [self._steps[context.request_id] for context in contexts]
        if not contexts:
            return []
        most = max(MIN_CHUNK, self._max_batch_tokens // len(contexts))
        long = {c.request_id: c.token_ids[:-1] for c in contexts if self._num_missing(c) > most}
        if long:
            self._read_committed(long)
        wanted = [(step.context, (), step.num_guesses(0), step.guess_depth(())) for step in steps]
        readings = [
            self._root_reading(step, guess) for step, guess in zip(steps, self._guesser.guess(wanted), strict=True)
        ]
        return [row for row, _ in self._read_ahead(readings)]

    def rows_for(self, tree: GrowingTree, num_rows: int) -> TreeRows:
        step = self._steps[tree.context.request_id]
        return TreeRows(tree, step.slots, len(tree.context.token_ids))

    def read(self, wanted: Sequence[tuple[TreeRows, Sequence[int]]]) -> None:
        missing: list[tuple[TreeRows, int]] = []
        for rows, nodes in wanted:
            step = self._steps[rows.tree.context.request_id]
            for node in nodes:
                known = step.ahead.get(tuple(rows.tree.path_tokens(node)))
                if known is None:
                    missing.append((rows, node))
                else:
                    self._claim(rows, node, *known)
        if missing:
            readings = self._readings(missing)
            for (rows, node), (log_weights, row) in zip(missing, self._read_ahead(readings), strict=True):
                self._claim(rows, node, row, log_weights)

    def commit(self, request_id: str, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        chunk = self._steps.pop(request_id).chunk
        kept = [*range(len(chunk)), *(len(chunk) + row for row in rows)]
        self._cache.commit({request_id: SequenceCommit(kept, [*chunk, *token_ids])})

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._steps.pop(request_id, None)
        self._guesser.release(request_id, finished)
        super().release(request_id)

    def _num_missing(self, context: DraftContext) -> int:
        return len(context.token_ids) - self._cache.num_computed(context.request_id)

    def _claim(self, rows: TreeRows, node: int, row: int, log_weights: Row) -> None:
        rows.row_of[node] = row
        rows.tree.set_log_weights(node, log_weights)
        self._steps[rows.tree.context.request_id].num_claimed += 1

    def _readings(self, missing: Sequence[tuple[TreeRows, int]]) -> list[_Reading]:
        """One forward for all these nodes, with guesses below the first one of each tree."""
        counts: dict[str, int] = {}
        for rows, _ in missing:
            counts[rows.tree.context.request_id] = counts.get(rows.tree.context.request_id, 0) + 1
        wanted, guessed = [], set()
        for rows, node in missing:
            request_id, path = rows.tree.context.request_id, rows.tree.path_tokens(node)
            step = self._steps[request_id]
            num_guesses = 0 if request_id in guessed else step.num_guesses(counts[request_id])
            guessed.add(request_id)
            wanted.append((step.context, path, num_guesses, step.guess_depth(path)))
        return [
            self._reading(rows, node, path, guess)
            for (rows, node), (_, path, _, _), guess in zip(missing, wanted, self._guesser.guess(wanted), strict=True)
        ]

    def _root_reading(self, step: _Step, guess: Guess) -> _Reading:
        """The committed tokens that the model has not read, the root last, and guesses below it."""
        context, num_missing, tree = step.context, self._num_missing(step.context), guess.tree
        num_context = len(context.token_ids) - num_missing
        step.chunk = context.token_ids[num_context:]
        step.slots = self._cache.reserve(context.request_id, num_missing + step.num_rows)
        step.next_row = tree.num_nodes - 1
        token_ids, parents = rows_of(tree, step.chunk[:-1])
        rows = SequenceRows(
            token_ids=token_ids,
            parents=parents,
            num_context=num_context,
            slots=step.slots[: num_context + len(token_ids)],
            logits_rows=range(num_missing - 1, len(token_ids)),
        )
        return _Reading(step, (), guess, 0, rows)

    def _reading(self, rows: TreeRows, node: int, path: Sequence[int], guess: Guess) -> _Reading:
        step, num_context = self._steps[rows.tree.context.request_id], rows.num_context
        ancestors = []
        above = rows.tree.parents[node]
        while above > 0:
            ancestors.append(rows.row_of[above])
            above = rows.tree.parents[above]
        first = step.next_row
        step.next_row += guess.tree.num_nodes
        offsets = np.array([*reversed(ancestors), *range(first, step.next_row)]) + num_context
        sequence = SequenceRows(
            token_ids=guess.tree.tokens,
            parents=guess.tree.parents,
            num_context=num_context + len(ancestors),
            slots=np.concatenate((step.slots[:num_context], step.slots[offsets])),
            logits_rows=range(guess.tree.num_nodes),
        )
        return _Reading(step, tuple(path), guess, first, sequence)

    def _read_ahead(self, readings: Sequence[_Reading]) -> list[tuple[Row, int]]:
        """Read all rows; log q and row of each reading's own token. What follows the guesses is kept for later."""
        logits = self._forward([reading.rows for reading in readings])
        wanted = [(reading.step.context, path) for reading in readings for path in reading.paths]
        log_weights = iter(log_weights_of(logits, wanted))
        found = []
        for reading in readings:
            rows = list(islice(log_weights, reading.guess.tree.num_nodes))
            first = reading.first_row if reading.path else reading.first_row - 1  # the root is none of these rows
            found.append((rows[0], first))
            for node, path in enumerate(reading.paths[1:], 1):
                reading.step.ahead[path] = (first + node, rows[node])
            if self._guesser.reads_logits:
                reading.guess.log_weights = torch.from_numpy(np.stack(rows))
        return found
