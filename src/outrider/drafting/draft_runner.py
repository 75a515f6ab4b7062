"""Runs a draft model over requests: its cache follows the committed tokens, and each draft token is read once.

A new node is a row of its own behind the context and its ancestors, whose keys and values are in the cache already:

    slots of node t below s below the root     [ context ... root ][ s ][ t ]
                                                 committed            rows of this step, wherever they stand
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from logging import getLogger
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from outrider.cache.kv_cache import KVCache, SequenceCommit
from outrider.drafting.drafter import DraftContext, FinishedText
from outrider.drafting.growth.tree import GrowingTree, Row
from outrider.kernels.rows import SequenceRows
from outrider.models.batch import ForwardBatch
from outrider.models.model import Model
from outrider.sampling.params import SamplingParams
from outrider.sampling.processors import RowContext, process_logits
from outrider.token_tree import TokenTree


@dataclass(eq=False)
class TreeRows:
    """Where a tree's nodes stand in the draft's cache.

    Attributes:
        slots: ``[num_context + num_rows]`` of the context, then of the rows reserved for draft tokens.
        row_of: reserved row of each node that was read, in the order of reading.
    """

    tree: GrowingTree
    slots: np.ndarray
    num_context: int
    row_of: dict[int, int] = field(default_factory=dict)

    @property
    def num_left(self) -> int:
        return len(self.slots) - self.num_context - len(self.row_of)


class TreeReader(Protocol):
    """What a draft model's drafter needs: someone who reads tokens and says what follows; see `DraftRunner`."""

    def has_room(self, context: DraftContext, num_rows: int, depth: int) -> bool: ...

    def catch_up(self, contexts: Sequence[DraftContext]) -> list[Row]: ...

    def rows_for(self, tree: GrowingTree, num_rows: int) -> TreeRows: ...

    def read(self, wanted: Sequence[tuple[TreeRows, Sequence[int]]]) -> None: ...

    def commit(self, request_id: str, rows: Sequence[int], token_ids: Sequence[int]) -> None: ...

    def release(self, request_id: str, finished: FinishedText | None = None) -> None: ...

    def check_integrity(self) -> None: ...


class DraftRunner:
    """Args:
    vocab_size: of the target; the draft's logits are made as wide.
    max_batch_tokens: the most rows of one forward.
    """

    def __init__(self, model: Model, cache: KVCache, *, vocab_size: int, max_batch_tokens: int) -> None:
        self._model = model
        self._cache = cache
        self._vocab_size = vocab_size
        self._max_batch_tokens = max_batch_tokens
        self._said: set[str] = set()

    def has_room(self, context: DraftContext, num_rows: int, depth: int) -> bool:
        """Whether the draft may run for a request: within its context, and with cache blocks to be had.

        Args:
            num_rows: draft tokens to be read, each in a row of its own.
            depth: of the longest path.
        """
        length, request_id = len(context.token_ids), context.request_id
        if length + depth > self._model.context_length:
            self._say_once(
                "draft model's context",
                f"got {length} tokens and drafts of up to {depth}, expected at most {self._model.context_length} "
                "in all; longer texts are not drafted for, and slower, not different; use a draft with a longer "
                "context, or a smaller depth",
            )
            return False
        if request_id in self._cache and self._cache.num_computed(request_id) >= length:
            self._cache.release(request_id)  # a step failed after the draft had run: start again
        if request_id not in self._cache:
            self._cache.admit(request_id, context.token_ids)
        rows = length - self._cache.num_computed(request_id) + num_rows
        if not self._cache.can_reserve(request_id, rows):
            self._say_once(
                "draft model's KV cache",
                f"got no blocks for {rows} rows of a request, expected room for every request; those without are not "
                "drafted for while it is full, and slower, not different; raise cache.memory_gb or cache.num_blocks, "
                "or lower scheduler.max_num_seqs",
            )
            self.release(request_id)
            return False
        self._cache.reserve(request_id, rows)  # held, so that requests of one step do not count the same blocks
        return True

    def catch_up(self, contexts: Sequence[DraftContext]) -> list[Row]:
        """Read the committed tokens that the draft has not seen.

        Returns:
            ``[vocab]`` of each context: log q after its last token, up to a constant.
        """
        if not contexts:
            return []
        logits = self._read_committed({context.request_id: context.token_ids for context in contexts})
        return log_weights_of(torch.cat([logits[c.request_id] for c in contexts]), [(c, ()) for c in contexts])

    def rows_for(self, tree: GrowingTree, num_rows: int) -> TreeRows:
        """Rows for the draft tokens of a request that has caught up."""
        slots = self._cache.reserve(tree.context.request_id, num_rows)
        return TreeRows(tree, slots, len(tree.context.token_ids))

    def read(self, wanted: Sequence[tuple[TreeRows, Sequence[int]]]) -> None:
        """Have the draft read nodes whose ancestors it has read, and give their trees what it says.

        Args:
            wanted: trees, and nodes of them.
        """
        families = [(rows, family) for rows, nodes in wanted for family in _families(rows.tree, nodes)]
        start = 0
        while start < len(families):
            end, size = start, 0
            while end < len(families) and (end == start or size + len(families[end][1]) <= self._max_batch_tokens):
                size += len(families[end][1])
                end += 1
            self._read_families(families[start:end])
            start = end

    def commit(self, request_id: str, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        self._cache.commit({request_id: SequenceCommit(rows, token_ids)})

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        if request_id in self._cache:
            self._cache.release(request_id)

    def check_integrity(self) -> None:
        self._cache.check_integrity()

    def _say_once(self, what: str, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            getLogger("outrider").warning("%s: %s", what, message)

    def _read_committed(self, sequences: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Read what is missing of the given tokens, and keep it; logits ``[1, vocab]`` after the last of each."""
        found: dict[str, Tensor] = {}
        pending = dict(sequences)
        while pending:
            budget = self._max_batch_tokens
            chunks: list[tuple[str, Sequence[int], int, int]] = []
            for request_id, token_ids in pending.items():
                start = self._cache.num_computed(request_id)
                end = min(len(token_ids), start + budget)
                if end > start:
                    chunks.append((request_id, token_ids, start, end))
                    budget -= end - start
            complete = [request_id for request_id, token_ids, _, end in chunks if end == len(token_ids)]
            logits = self._forward(
                [
                    SequenceRows(
                        token_ids=token_ids[start:end],
                        parents=range(-1, end - start - 1),
                        num_context=start,
                        slots=self._cache.reserve(request_id, end - start),
                        logits_rows=[end - start - 1] if end == len(token_ids) else [],
                    )
                    for request_id, token_ids, start, end in chunks
                ]
            )
            self._cache.commit(
                {
                    request_id: SequenceCommit(range(end - start), token_ids[start:end])
                    for request_id, token_ids, start, end in chunks
                }
            )
            found.update({request_id: logits[row : row + 1] for row, request_id in enumerate(complete)})
            pending = {request_id: tokens for request_id, tokens in pending.items() if request_id not in found}
        return found

    def _read_families(self, families: Sequence[tuple[TreeRows, Sequence[int]]]) -> None:
        logits = self._forward([self._sibling_rows(rows, family) for rows, family in families])
        nodes = [(rows.tree, node) for rows, family in families for node in family]
        log_weights = log_weights_of(logits, [(tree.context, tree.path_tokens(node)) for tree, node in nodes])
        for (tree, node), row in zip(nodes, log_weights, strict=True):
            tree.set_log_weights(node, row)

    def _sibling_rows(self, rows: TreeRows, family: Sequence[int]) -> SequenceRows:
        return sibling_rows(rows, family)

    def _forward(self, sequences: Sequence[SequenceRows]) -> Tensor:
        """The draft's logits, as wide as the target's: embeddings may be padded differently."""
        logits = self._model.forward(ForwardBatch(sequences, self._model.device), self._cache)
        missing = self._vocab_size - logits.shape[-1]
        if missing > 0:
            return torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
        return logits if missing == 0 else logits[:, : self._vocab_size]


def _families(tree: GrowingTree, nodes: Sequence[int]) -> list[list[int]]:
    """Nodes by their parents: siblings share all the keys before them."""
    families: dict[int, list[int]] = {}
    for node in nodes:
        families.setdefault(tree.parents[node], []).append(node)
    return list(families.values())


def sibling_rows(rows: TreeRows, family: Sequence[int]) -> SequenceRows:
    """Siblings as rows behind the context and their ancestors; they take the next reserved rows."""
    tree, num_context = rows.tree, rows.num_context
    ancestors: list[int] = []
    node = tree.parents[family[0]]
    while node > 0:
        ancestors.append(rows.row_of[node])
        node = tree.parents[node]
    first = len(rows.row_of)
    for row, node in enumerate(family, first):
        rows.row_of[node] = row
    if len(ancestors) == first:  # a chain so far: all rows before are ancestors
        slots = rows.slots[: num_context + first + len(family)]
    else:
        offsets = np.array([*reversed(ancestors), *range(first, first + len(family))]) + num_context
        slots = np.concatenate((rows.slots[:num_context], rows.slots[offsets]))
    return SequenceRows(
        token_ids=[tree.tokens[node] for node in family],
        parents=(-1,) * len(family),
        num_context=num_context + len(ancestors),
        slots=slots,
        logits_rows=range(len(family)),
    )


def log_weights_of(logits: Tensor, paths: Sequence[tuple[DraftContext, Sequence[int]]]) -> list[Row]:
    """Log q of each row up to a constant, after the request's processors, on the host.

    Args:
        paths: each row's request, and the draft tokens between its root and the row.
    """
    if all(context.params.takes_argmax for context, _ in paths):  # nothing to process
        return list(logits.float().cpu().numpy())
    contexts = [
        RowContext(
            rows=slice(row, row + 1),
            params=context.params,
            # What edits tokens goes by the tokens before them, and those of the path are as good as committed.
            token_ids=[*context.token_ids, *path] if path and _looks_back(context.params) else context.token_ids,
            num_prompt_tokens=context.num_prompt_tokens,
            tree=TokenTree.root_only(context.token_ids[-1]),
            stop_ids=context.stop_token_ids,
        )
        for row, (context, path) in enumerate(paths)
    ]
    return list(process_logits(logits, contexts).cpu().numpy())


def _looks_back(params: SamplingParams) -> bool:
    return params.has_penalties or params.min_tokens > 0


def accepted_rows(rows: TreeRows, token_ids: Sequence[int]) -> list[int]:
    """Reserved rows of the nodes along `token_ids`, as far as the tree has them and they were read."""
    children: Mapping[tuple[int, int], int] = {
        (rows.tree.parents[node], rows.tree.tokens[node]): node for node in reversed(rows.row_of)
    }
    node, found = 0, []
    for token in token_ids:
        child = children.get((node, token))
        if child is None:
            break
        found.append(rows.row_of[child])
        node = child
    return found
