"""A nested draft model: each token is read by the smallest sub-model that is confident about what follows.

Sorted speculative decoding (S2D; Kavehzadeh et al., arXiv 2407.01955): one draft whose first layers are drafts of
their own serves several targets, and its confidence, the probability of the likeliest token, says how many layers a
token takes. The authors' code has a threshold for each sub-model (0.5 behind 6 and 9 of 12 layers), and a larger one
goes on from the hidden states of the smaller. Here one threshold is for all, and a sub-model is a model of its own
over shared weights, with its own cache: a token that a smaller one is unsure about is read again from the first layer
on, together with those that the larger one has not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np

from outrider.drafting.draft_runner import DraftRunner, TreeRows, accepted_rows, log_weights_of
from outrider.drafting.drafter import DraftContext, FinishedText
from outrider.drafting.growth.tree import GrowingTree, Row
from outrider.kernels.rows import SequenceRows
from outrider.models.model import Model


class SubModelRunner(DraftRunner):
    """A runner that may have left out some of a tree's tokens, and some of the committed ones."""

    def read_paths(self, wanted: Sequence[tuple[TreeRows, int]]) -> list[Row]:
        """Read nodes of different trees, with those above them that this model has not read.

        Returns:
            Log q after each node.
        """
        logits = self._forward([_path_rows(rows, node) for rows, node in wanted])
        return log_weights_of(logits, [(rows.tree.context, rows.tree.path_tokens(node)) for rows, node in wanted])

    def rows_when_caught_up(self, tree: GrowingTree, num_rows: int) -> TreeRows:
        context = tree.context
        if self._cache.num_computed(context.request_id) < len(context.token_ids):
            self._read_committed({context.request_id: context.token_ids})
        return self.rows_for(tree, num_rows)

    def drop_reserved(self, request_id: str) -> None:
        self.commit(request_id, (), ())


class SortedRunner:
    """`TreeReader` over several sub-models.

    Args:
        levels: of the sub-models, the smallest first.
        min_confidence: probability of the likeliest token from which on a sub-model's word counts; the largest one's
            always does.
        whole: the model that they are parts of, held for other drafters that name it.

    Attributes:
        num_exits: how many tokens each level had the last word on.
    """

    def __init__(self, levels: Sequence[SubModelRunner], min_confidence: float, whole: Model | None) -> None:
        self._levels = levels
        self._whole = whole
        self._min_confidence = min_confidence
        self._num_rows: dict[str, int] = {}
        self._rows: dict[str, list[TreeRows | None]] = {}
        self.num_exits = [0] * len(levels)

    def has_room(self, context: DraftContext, num_rows: int, depth: int) -> bool:
        if all(level.has_room(context, num_rows, depth) for level in self._levels):
            return True
        self.release(context.request_id)
        return False

    def catch_up(self, contexts: Sequence[DraftContext]) -> list[Row]:
        found: dict[str, Row] = {}
        pending = list(contexts)
        for number, level in enumerate(self._levels):
            unsure = []
            for context, row in zip(pending, level.catch_up(pending), strict=True):
                found[context.request_id] = row
                if self._is_unsure(number, row):
                    unsure.append(context)
            pending = unsure
        return [found[context.request_id] for context in contexts]

    def rows_for(self, tree: GrowingTree, num_rows: int) -> TreeRows:
        request_id, rows = tree.context.request_id, self._levels[0].rows_for(tree, num_rows)
        self._num_rows[request_id] = num_rows
        self._rows[request_id] = [rows, *[None] * (len(self._levels) - 1)]
        return rows

    def read(self, wanted: Sequence[tuple[TreeRows, Sequence[int]]]) -> None:
        for nodes in zip_longest(*(nodes for _, nodes in wanted)):  # siblings' paths must not be read at once
            self._read([(rows.tree, node) for (rows, _), node in zip(wanted, nodes, strict=True) if node is not None])

    def commit(self, request_id: str, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        for level, of_level in zip(self._levels, self._rows.pop(request_id), strict=True):
            if of_level is None:
                level.drop_reserved(request_id)
            else:
                kept = accepted_rows(of_level, token_ids)
                level.commit(request_id, kept, token_ids[: len(kept)])

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._rows.pop(request_id, None)
        for level in self._levels:
            level.release(request_id)

    def check_integrity(self) -> None:
        for level in self._levels:
            level.check_integrity()

    def _read(self, wanted: Sequence[tuple[GrowingTree, int]]) -> None:
        pending = list(wanted)
        for number, level in enumerate(self._levels):
            if not pending:
                break
            rows = [(self._rows_at(number, tree), node) for tree, node in pending]
            unsure = []
            for (tree, node), row in zip(pending, level.read_paths(rows), strict=True):
                if self._is_unsure(number, row):
                    unsure.append((tree, node))
                else:
                    tree.set_log_weights(node, row)
            pending = unsure

    def _rows_at(self, number: int, tree: GrowingTree) -> TreeRows:
        request_id = tree.context.request_id
        rows = self._rows[request_id][number]
        if rows is None:
            rows = self._levels[number].rows_when_caught_up(tree, self._num_rows[request_id])
            self._rows[request_id][number] = rows
        return rows

    def _is_unsure(self, number: int, row: Row) -> bool:
        """Whether a larger sub-model is to be asked."""
        if number < len(self._levels) - 1 and not _confidence(row) >= self._min_confidence:
            return True
        self.num_exits[number] += 1
        return False


def _confidence(row: Row) -> float:
    """Probability of the likeliest token; NaN where none can be chosen."""
    with np.errstate(invalid="ignore"):
        return float(1.0 / np.exp(row - row.max()).sum())


def _path_rows(rows: TreeRows, node: int) -> SequenceRows:
    """The nodes above `node` that were not read, and it, as a chain behind those that were."""
    tree, num_context = rows.tree, rows.num_context
    unread, read = [], []
    while node > 0:
        if node in rows.row_of:
            read.append(rows.row_of[node])
        else:
            unread.append(node)
        node = tree.parents[node]
    first = len(rows.row_of)
    rows.row_of.update(zip(reversed(unread), range(first, first + len(unread)), strict=True))
    offsets = np.array([*reversed(read), *range(first, first + len(unread))]) + num_context
    return SequenceRows(
        token_ids=[tree.tokens[above] for above in reversed(unread)],
        parents=range(-1, len(unread) - 1),
        num_context=num_context + len(read),
        slots=np.concatenate((rows.slots[:num_context], rows.slots[offsets])),
        logits_rows=[len(unread) - 1],
    )
