"""The shapes that attention kernels take: rows of many sequences and their trees over a slotted KV cache.

Legend: N rows of the step, H query heads, K key/value heads, D head width, S cache slots, L keys of a
sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

ROW_BUCKET = 16
"""Rows of one fixed-shape unit of the bitwise mode: 16 rows cost little more than one on CPUs and GPUs."""

KEY_SPLIT = 64
"""Keys of one split of a row's key sequence in the bitwise mode."""


@dataclass(frozen=True, eq=False)
class SequenceAttention:
    """One sequence's share of a step.

    Rows [start, end) of the batch attend to `num_context` cached positions and to their ancestors among the
    sequence's own rows, whose keys and values stand in the last ``end - start`` of `slots`.

    Attributes:
        slots: ``[num_context + end - start]`` int64 cache slots, context first, in position order, then this
            step's rows; a `slice` where they are consecutive (a view instead of a gather).
        row_mask: ``[end - start, end - start]`` bool, ancestors-or-self; None for a single row.
        is_chain: True if the rows are a chain (row_mask is lower triangular).
        key_positions: ``[num_context + end - start]`` int64 positions in the sequence (tree rows:
            context + depth).
        bias_memo: additive masks that a kernel derived from this, for reuse in the step's other layers.
    """

    start: int
    end: int
    num_context: int
    slots: Tensor | slice
    row_mask: Tensor | None
    is_chain: bool
    key_positions: Tensor
    bias_memo: dict[tuple[object, ...], Tensor | None] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, eq=False)
class RowBucket:
    """Up to ROW_BUCKET rows, each with the keys that plain decoding would see, padded to fixed shapes.

    A row's key j stands at position j, so a row with n keys is at position n - 1. Rows after
    ``end - start`` are padding: they repeat row 0 and their results are not read.

    Attributes:
        slots: ``[ROW_BUCKET, P]`` int64, P a multiple of KEY_SPLIT; from `num_keys` on a row's own slot is
            repeated, so that masked keys are finite whenever the row is.
        num_keys: ``[ROW_BUCKET]`` int64 context, ancestors and self.
        write_slots: ``[end - start]`` int64.
    """

    start: int
    end: int
    slots: Tensor
    num_keys: Tensor
    write_slots: Tensor

    @cached_property
    def flat(self) -> FlatSequences:
        """The bucket's own rows, each as a sequence of one row."""
        num_rows, num_keys = self.end - self.start, self.num_keys[: self.end - self.start].cpu().numpy()
        slots = self.slots[:num_rows].cpu().numpy()
        return FlatSequences(
            cu_rows=np.arange(num_rows + 1),
            num_context=num_keys - 1,
            slots=np.concatenate([row[:count] for row, count in zip(slots, num_keys, strict=True)]),
            cu_slots=np.concatenate(([0], num_keys.cumsum())),
            parents=np.full(num_rows, -1, dtype=np.int32),
            is_chain=np.ones(num_rows, dtype=np.uint8),
        )


@dataclass(frozen=True, eq=False)
class FlatSequences:
    """All sequences of a step in a few arrays on the host, for compiled kernels; s sequences.

    Attributes:
        cu_rows: ``[s + 1]`` int64 first row of each sequence, and the end.
        num_context: ``[s]`` int64 cached positions.
        slots: ``[sum of num_context and rows]`` int64, per sequence its context, then its rows.
        cu_slots: ``[s + 1]`` int64 first slot of each sequence.
        parents: ``[N]`` int32 parent among the sequence's own rows, -1 for the context.
        is_chain: ``[s]`` uint8, 1 where each row's parent is the row before it.
    """

    cu_rows: np.ndarray
    num_context: np.ndarray
    slots: np.ndarray
    cu_slots: np.ndarray
    parents: np.ndarray
    is_chain: np.ndarray


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """Attention of one step; the same for all layers.

    Attributes:
        flat: the sequences in row order, covering all rows.
        write_slots: ``[N]`` int64 slots that this step's keys and values are written to.
        describe_sequences: gives the same as `flat` in the form of the reference kernels.
        row_invariant: attend per query over its own key sequence in fixed splits (bitwise mode).
    """

    flat: FlatSequences
    write_slots: Tensor
    describe_sequences: Callable[[], tuple[SequenceAttention, ...]]
    row_invariant: bool = False

    @cached_property
    def sequences(self) -> tuple[SequenceAttention, ...]:
        """In row order, covering all rows."""
        return self.describe_sequences()

    @cached_property
    def row_buckets(self) -> tuple[RowBucket, ...]:
        """All rows in row order, so that ancestors stand in the same bucket or an earlier one."""
        rows = [keys for sequence in self.sequences for keys in _key_slots_of_rows(sequence)]
        return tuple(
            _row_bucket(rows[start : start + ROW_BUCKET], start, self.write_slots)
            for start in range(0, len(rows), ROW_BUCKET)
        )


@dataclass(frozen=True)
class AttentionParams:
    """What a layer's attention does beside softmax(q k^T scaling) v.

    Attributes:
        scaling: factor on q k^T.
        sliding_window: a row at position t attends to positions > t - sliding_window; None for all.
        softcap: scores become ``softcap * tanh(scores / softcap)``; None for no cap.
        sinks: ``[H]`` logits that join each row's softmax denominator only (gpt-oss); None for none.
    """

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def _key_slots_of_rows(sequence: SequenceAttention) -> list[Tensor]:
    """Slots of each row's keys in position order: the context, then its ancestors and itself."""
    slots = sequence.slots
    if isinstance(slots, slice):
        slots = torch.arange(slots.start, slots.stop, device=sequence.key_positions.device)
    num_rows, context = sequence.end - sequence.start, sequence.num_context
    if sequence.is_chain or sequence.row_mask is None:
        return [slots[: context + row + 1] for row in range(num_rows)]
    step = slots[context:]
    return [torch.cat((slots[:context], step[sequence.row_mask[row]])) for row in range(num_rows)]


def _row_bucket(rows: list[Tensor], start: int, write_slots: Tensor) -> RowBucket:
    padded = rows + [rows[0]] * (ROW_BUCKET - len(rows))
    num_keys = [len(keys) for keys in padded]
    width = -(-max(num_keys) // KEY_SPLIT) * KEY_SPLIT
    slots = torch.stack([keys[-1:].expand(width) for keys in padded])
    for row, keys in enumerate(padded):
        slots[row, : len(keys)] = keys
    end = start + len(rows)
    return RowBucket(start, end, slots, torch.tensor(num_keys, device=slots.device), write_slots[start:end])
