"""From per-sequence rows to the one flattened batch of a step.

sequence a: context 5, chunk [x y], tree root r with children s, t       rows   x  y  r  s  t
positions  = context + depth of the row among this step's rows                  5  6  7  8  8
parents    = the chunk is a chain, the tree hangs off its end                  -1  0  1  2  2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from outrider.kernels.attention import AttentionBatch, SequenceAttention
from outrider.models.model import ForwardBatch
from outrider.token_tree import TokenTree, ancestor_mask

_MAX_REMEMBERED_ROWS = 128  # layouts of longer steps (prefill) hardly recur, and their masks are large


@dataclass(frozen=True, eq=False)
class SequenceRows:
    """One sequence's rows of a step.

    Attributes:
        token_ids: ``[num_rows]``.
        parents: ``[num_rows]`` parent row, -1 where a row hangs off the cached context.
        num_context: cached positions.
        slots: ``[num_context + num_rows]`` int64, context first (what `KVCache.reserve` returns).
        logits_rows: offsets of the rows whose logits are wanted, increasing.
    """

    token_ids: Sequence[int]
    parents: Sequence[int]
    num_context: int
    slots: np.ndarray
    logits_rows: Sequence[int]


@dataclass(frozen=True, eq=False)
class _Layout:
    """Who is whose ancestor among a sequence's rows: the same for all steps with equal parents."""

    depths: np.ndarray  # [num_rows] int64
    row_mask: Tensor | None  # [num_rows, num_rows] bool; None for a single row
    is_chain: bool


def rows_of(tree: TokenTree, chunk: Sequence[int] = ()) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids and parents of the rows of a step: the chunk as a chain, then the tree's nodes.

    Args:
        tree: the proposal; node i is row ``len(chunk) + i``.
        chunk: committed tokens before the root that are not computed yet.
    """
    if not chunk:
        return tree.tokens, tree.parents
    shift = len(chunk)
    return (*chunk, *tree.tokens), (*range(-1, shift - 1), *(parent + shift for parent in tree.parents))


def build_forward_batch(
    sequences: Sequence[SequenceRows], device: torch.device | str = "cpu", row_invariant: bool = False
) -> ForwardBatch:
    """Flatten the rows of all sequences, in order.

    Args:
        sequences: at least one, each with at least one row.
        row_invariant: ask for the bitwise mode's attention.
    """
    on_cpu = torch.device(device).type == "cpu"
    attention: list[SequenceAttention] = []
    token_ids: list[int] = []
    logits_rows: list[int] = []
    positions: list[np.ndarray] = []
    write_slots: list[np.ndarray] = []
    start = 0
    for rows in sequences:
        layout = _layout_of(tuple(rows.parents), str(device))
        row_positions = layout.depths + rows.num_context
        positions.append(row_positions)
        write_slots.append(rows.slots[rows.num_context :])
        token_ids.extend(rows.token_ids)
        logits_rows.extend([start + row for row in rows.logits_rows] if start else rows.logits_rows)
        attention.append(_sequence_attention(rows, layout, start, row_positions, device))
        start += len(rows.token_ids)
    one = len(sequences) == 1
    tensors = [
        torch.from_numpy(array)
        for array in (
            np.array(token_ids, dtype=np.int64),
            positions[0] if one else np.concatenate(positions),
            write_slots[0] if one else np.concatenate(write_slots),
        )
    ]
    wanted = None if len(logits_rows) == start else torch.tensor(logits_rows, dtype=torch.int64)
    if not on_cpu:
        tensors = [tensor.to(device, non_blocking=True) for tensor in tensors]
        wanted = None if wanted is None else wanted.to(device, non_blocking=True)
    return ForwardBatch(
        token_ids=tensors[0],
        positions=tensors[1],
        attention=AttentionBatch(tuple(attention), tensors[2], row_invariant),
        logits_rows=wanted,
    )


def _sequence_attention(
    rows: SequenceRows, layout: _Layout, start: int, row_positions: np.ndarray, device: torch.device | str
) -> SequenceAttention:
    num_rows, num_keys = len(rows.token_ids), len(rows.slots)
    assert num_rows == len(layout.depths), "token ids and parents differ"
    assert num_keys == rows.num_context + num_rows, "rows and slots differ"
    if layout.is_chain:
        key_positions = _positions_up_to(1 << (num_keys - 1).bit_length(), str(device))[:num_keys]
    else:
        host = np.concatenate((np.arange(rows.num_context, dtype=np.int64), row_positions))
        key_positions = torch.from_numpy(host).to(device)
    return SequenceAttention(
        start=start,
        end=start + num_rows,
        num_context=rows.num_context,
        slots=_slots_or_slice(rows.slots, device),
        row_mask=layout.row_mask,
        is_chain=layout.is_chain,
        key_positions=key_positions,
    )


def _slots_or_slice(slots: np.ndarray, device: torch.device | str) -> Tensor | slice:
    first, last = int(slots[0]), int(slots[-1])
    if last - first == len(slots) - 1 and bool((slots[1:] - slots[:-1] == 1).all()):
        return slice(first, last + 1)
    return torch.from_numpy(slots).to(device)


@lru_cache(maxsize=32)
def _positions_up_to(length: int, device: str) -> Tensor:
    return torch.arange(length, device=device)


@lru_cache(maxsize=4)
def _chain_mask(length: int, device: str) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril_()


def _layout_of(parents: tuple[int, ...], device: str) -> _Layout:
    build = _remembered_layout if len(parents) <= _MAX_REMEMBERED_ROWS else _layout
    return build(parents, device)


def _layout(parents: tuple[int, ...], device: str) -> _Layout:
    num_rows = len(parents)
    if parents == tuple(range(-1, num_rows - 1)):
        mask = None
        if num_rows > 1:
            mask = _chain_mask(1 << (num_rows - 1).bit_length(), device)[:num_rows, :num_rows]
        return _Layout(np.arange(num_rows, dtype=np.int64), mask, is_chain=True)
    depths = np.zeros(num_rows, dtype=np.int64)
    for row, parent in enumerate(parents):
        assert parent < row, "a row before its parent"
        depths[row] = depths[parent] + 1 if parent >= 0 else 0
    return _Layout(depths, ancestor_mask(parents).to(device), is_chain=False)


_remembered_layout = lru_cache(maxsize=1024)(_layout)
