"""From per-sequence rows to the one flattened batch of a step.

sequence a: context 5, chunk [x y], tree root r with children s, t       rows   x  y  r  s  t
positions  = context + depth of the row among this step's rows                  5  6  7  8  8
parents    = the chunk is a chain, the tree hangs off its end                  -1  0  1  2  2
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from outrider.kernels.attention import AttentionBatch, FlatSequences, SequenceAttention
from outrider.kernels.rows import SequenceRows
from outrider.token_tree import TokenTree, ancestor_mask

_MAX_REMEMBERED_ROWS = 128  # layouts of longer steps (prefill) hardly recur, and their masks are large


class ForwardBatch:
    """Rows of many sequences in one flattened forward; no padding.

    Kernels that run a whole forward take the `sequences`; the tensors are made for models that run in Python.

    Args:
        sequences: at least one, each with at least one row; in the order of the rows.
        row_invariant: ask for the bitwise mode's attention.
    """

    def __init__(
        self,
        sequences: Sequence[SequenceRows],
        device: torch.device | str = "cpu",
        *,
        row_invariant: bool = False,
    ) -> None:
        self.sequences = sequences
        self.device = device
        self.row_invariant = row_invariant

    @cached_property
    def token_ids(self) -> Tensor:
        """``[N]`` int64."""
        return self._on_device(
            np.array([token for rows in self.sequences for token in rows.token_ids], dtype=np.int64)
        )

    @cached_property
    def positions(self) -> Tensor:
        """``[N]`` int64 positions in their sequences."""
        return self._on_device(
            _joined(
                [layout.depths + rows.num_context for rows, layout in zip(self.sequences, self._layouts, strict=True)]
            )
        )

    @cached_property
    def attention(self) -> AttentionBatch:
        """Who attends to whom, and where keys and values go."""
        flat = FlatSequences(
            cu_rows=_offsets(len(rows.token_ids) for rows in self.sequences),
            num_context=np.array([rows.num_context for rows in self.sequences], dtype=np.int64),
            slots=_joined([rows.slots for rows in self.sequences]),
            cu_slots=_offsets(len(rows.slots) for rows in self.sequences),
            parents=_joined([layout.parents for layout in self._layouts]),
            is_chain=np.array([layout.is_chain for layout in self._layouts], dtype=np.uint8),
        )
        write_slots = self._on_device(_joined([rows.slots[rows.num_context :] for rows in self.sequences]))
        return AttentionBatch(flat, write_slots, self._describe_sequences, self.row_invariant)

    @cached_property
    def logits_rows(self) -> Tensor | None:
        """``[R]`` int64 rows whose logits are wanted; None for all rows."""
        rows = [
            start + row
            for sequence, start in zip(self.sequences, self._starts, strict=False)
            for row in sequence.logits_rows
        ]
        return None if len(rows) == self._starts[-1] else self._on_device(np.array(rows, dtype=np.int64))

    @cached_property
    def _layouts(self) -> list[_Layout]:
        layouts = [_layout_of(tuple(rows.parents)) for rows in self.sequences]
        for rows, layout in zip(self.sequences, layouts, strict=True):
            assert len(rows.token_ids) == len(layout.depths), "token ids and parents differ"
            assert len(rows.slots) == rows.num_context + len(rows.token_ids), "rows and slots differ"
        return layouts

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(len(rows.token_ids) for rows in self.sequences)]

    def _on_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if torch.device(self.device).type == "cpu" else tensor.to(self.device, non_blocking=True)

    def _describe_sequences(self) -> tuple[SequenceAttention, ...]:
        return tuple(
            _sequence_attention(rows, layout, start, self.device)
            for rows, layout, start in zip(self.sequences, self._layouts, self._starts, strict=False)
        )


@dataclass(frozen=True, eq=False)
class _Layout:
    """How a sequence's rows hang together: the same for all steps with equal parents."""

    parents: np.ndarray  # [num_rows] int32
    depths: np.ndarray  # [num_rows] int64
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


def _offsets(lengths: Iterable[int]) -> np.ndarray:
    return np.array([0, *accumulate(lengths)], dtype=np.int64)


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(arrays[0]) if len(arrays) == 1 else np.concatenate(arrays)


def _sequence_attention(
    rows: SequenceRows, layout: _Layout, start: int, device: torch.device | str
) -> SequenceAttention:
    num_rows, num_keys = len(rows.token_ids), len(rows.slots)
    if layout.is_chain:
        key_positions = _positions_up_to(1 << (num_keys - 1).bit_length(), str(device))[:num_keys]
    else:
        row_positions = layout.depths + rows.num_context
        host = np.concatenate((np.arange(rows.num_context, dtype=np.int64), row_positions))
        key_positions = torch.from_numpy(host).to(device)
    return SequenceAttention(
        start=start,
        end=start + num_rows,
        num_context=rows.num_context,
        slots=_slots_or_slice(rows.slots, device),
        row_mask=_row_mask(layout, str(device)),
        is_chain=layout.is_chain,
        key_positions=key_positions,
    )


def _row_mask(layout: _Layout, device: str) -> Tensor | None:
    """``[num_rows, num_rows]`` bool, ancestors-or-self; None for a single row."""
    num_rows = len(layout.parents)
    if not layout.is_chain:
        remembered = num_rows <= _MAX_REMEMBERED_ROWS
        return (_remembered_tree_mask if remembered else _tree_mask)(tuple(layout.parents.tolist()), device)
    if num_rows == 1:
        return None
    return _chain_mask(1 << (num_rows - 1).bit_length(), device)[:num_rows, :num_rows]


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


def _tree_mask(parents: tuple[int, ...], device: str) -> Tensor:
    return ancestor_mask(parents).to(device)


_remembered_tree_mask = lru_cache(maxsize=1024)(_tree_mask)


def _layout_of(parents: tuple[int, ...]) -> _Layout:
    return (_remembered_layout if len(parents) <= _MAX_REMEMBERED_ROWS else _layout)(parents)


def _layout(parents: tuple[int, ...]) -> _Layout:
    num_rows = len(parents)
    flat = np.array(parents, dtype=np.int32)
    if parents == tuple(range(-1, num_rows - 1)):
        return _Layout(flat, np.arange(num_rows, dtype=np.int64), is_chain=True)
    depths = np.zeros(num_rows, dtype=np.int64)
    for row, parent in enumerate(parents):
        assert parent < row, "a row before its parent"
        depths[row] = depths[parent] + 1 if parent >= 0 else 0
    return _Layout(flat, depths, is_chain=False)


_remembered_layout = lru_cache(maxsize=1024)(_layout)
