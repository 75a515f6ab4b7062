"""The paged key/value cache: reserve rows for a step, commit the accepted path, drop the rest.

A sequence owns the blocks of its table. Its first `num_computed` positions are committed: their keys and values
equal a fresh prefill of its tokens. A step's rows are written to the positions after them, in row order:

    block table   [ 7 ][ 2 ][ 5 ]            block_size 4
    positions     0..3  4..7  8..11
                  committed ──┤├ rows        [0, num_computed) committed, [num_computed, num_computed + rows) reserved

`commit` moves the rows that stay to the front of the reserved interval and gives the blocks after them back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from outrider.cache.block_pool import BlockPool
from outrider.cache.prefix_index import ROOT, PrefixIndex
from outrider.errors import CacheError
from outrider.kernels.ops import move_slots

CACHE_LINE = 64


@dataclass(frozen=True)
class LayerShape:
    """Keys and values of one attention layer: heads and their widths."""

    num_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class SequenceCommit:
    """What of a sequence's reserved rows stays.

    Attributes:
        kept_rows: increasing offsets into the reserved rows, ancestors first.
        token_ids: the tokens of those rows; the prefix index goes by them.
    """

    kept_rows: Sequence[int]
    token_ids: Sequence[int]


@dataclass
class _Sequence:
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_reserved: int = 0
    index_entry: int = ROOT
    tail: list[int] = field(default_factory=list)  # tokens of the last block, as long as it is not full
    slots: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # of its blocks, then room


class KVCache:
    """Keys and values of many sequences, in blocks of `block_size` positions.

    Args:
        layers: shape of each attention layer's keys and values.
        num_blocks: capacity.
        prefix_caching: share full blocks of equal token prefixes between sequences, and keep them after release.

    Raises:
        CacheError: there is not so much memory.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        prefix_caching: bool = True,
    ) -> None:
        self.block_size = block_size
        # One storage per distinct (heads, width), so that a commit moves all layers' rows in one indexed copy.
        wanted = [(s.num_heads, s.key_dim) for s in layers] + [(s.num_heads, s.value_dim) for s in layers]
        num_slots = num_blocks * block_size
        try:
            self._storages = {
                shape: _zeros((wanted.count(shape), num_slots, *shape), dtype, torch.device(device))
                for shape in dict.fromkeys(wanted)
            }
        except (RuntimeError, MemoryError) as error:  # torch's and NumPy's for memory that is not to be had
            raise CacheError(
                "KV cache",
                got=f"{num_slots} positions, more memory than there is",
                expected="a size that fits",
                remedy="lower cache.memory_gb or cache.num_blocks",
            ) from error
        self._index = PrefixIndex(block_size) if prefix_caching else None
        self.pool = BlockPool(num_blocks, evict=self._forget_block)
        self._sequences: dict[str, _Sequence] = {}
        views = {shape: iter(storage.unbind(0)) for shape, storage in self._storages.items()}
        self.keys: list[Tensor] = [next(views[s.num_heads, s.key_dim]) for s in layers]
        self.values: list[Tensor] = [next(views[s.num_heads, s.value_dim]) for s in layers]

    @property
    def num_positions(self) -> int:
        """Capacity in positions."""
        return self.pool.num_blocks * self.block_size

    def __contains__(self, sequence_id: str) -> bool:
        return sequence_id in self._sequences

    def admit(self, sequence_id: str, token_ids: Sequence[int]) -> int:
        """Start a sequence; returns how many of its first tokens are already computed (a prefix hit).

        At least the last token is left to compute: its logits are needed.
        """
        assert sequence_id not in self._sequences, f"sequence {sequence_id} admitted twice"
        sequence = _Sequence()
        self._sequences[sequence_id] = sequence
        if self._index is None:
            return 0
        for entry, block in self._index.match(token_ids[: len(token_ids) - 1]):
            self.pool.share(block)
            self._append_block(sequence, block)
            sequence.index_entry = entry
        sequence.num_computed = len(sequence.blocks) * self.block_size
        return sequence.num_computed

    def num_computed(self, sequence_id: str) -> int:
        return self._sequences[sequence_id].num_computed

    def num_new_blocks(self, sequence_id: str, num_rows: int) -> int:
        """How many blocks reserving `num_rows` more positions would take from the pool."""
        sequence = self._sequences[sequence_id]
        return max(0, -(-(sequence.num_computed + num_rows) // self.block_size) - len(sequence.blocks))

    def most_rows(self, sequence_id: str, num_blocks: int) -> int:
        """How many rows fit behind the committed positions with so many more blocks."""
        sequence = self._sequences[sequence_id]
        return (len(sequence.blocks) + num_blocks) * self.block_size - sequence.num_computed

    def can_reserve(self, sequence_id: str, num_rows: int) -> bool:
        return self.num_new_blocks(sequence_id, num_rows) <= self.pool.num_available

    def reserve(self, sequence_id: str, num_rows: int) -> np.ndarray:
        """Make room for `num_rows` rows after the committed positions, or after none if already reserved.

        Returns:
            ``[num_computed + num_rows]`` int64 slots of all committed and reserved positions; good until the sequence
            is next reserved for.

        Raises:
            CacheError: the pool has too few blocks (callers ask `can_reserve` first).
        """
        sequence = self._sequences[sequence_id]
        for _ in range(self.num_new_blocks(sequence_id, num_rows)):
            self._append_block(sequence, self.pool.allocate())
        sequence.num_reserved = num_rows
        return sequence.slots[: sequence.num_computed + num_rows]

    def commit(self, commits: Mapping[str, SequenceCommit]) -> None:
        """Keep the given rows of each sequence as its next committed positions and drop the others."""
        sources: list[int] = []
        targets: list[int] = []
        for sequence_id, commit in commits.items():
            sequence, kept = self._sequences[sequence_id], commit.kept_rows
            assert len(kept) == len(commit.token_ids), "a row without its token"
            assert len(kept) == 0 or kept[-1] < sequence.num_reserved, "commit of rows that were not reserved"
            if len(kept) and kept[-1] != len(kept) - 1:  # increasing, so equality means that nothing moves
                base = sequence.num_computed
                moves = [(row, target) for target, row in enumerate(kept) if row != target]
                sources += [self._slot(sequence, base + row) for row, _ in moves]
                targets += [self._slot(sequence, base + target) for _, target in moves]
        if sources:  # first of all: an interruption here leaves every sequence as it was, and nothing indexed
            for storage in self._storages.values():
                move_slots(storage, sources, targets)
        for sequence_id, commit in commits.items():
            sequence = self._sequences[sequence_id]
            sequence.num_computed += len(commit.kept_rows)
            sequence.num_reserved = 0
            self._drop_blocks_after(sequence)
            self._index_full_blocks(sequence, commit.token_ids)

    def rollback(self, sequence_id: str) -> None:
        """Drop all reserved rows: the sequence is as after its last commit."""
        sequence = self._sequences[sequence_id]
        sequence.num_reserved = 0
        self._drop_blocks_after(sequence)

    def release(self, sequence_id: str) -> None:
        """End a sequence; its indexed blocks stay cached until they are evicted."""
        sequence = self._sequences.pop(sequence_id)
        for block in reversed(sequence.blocks):  # the tail is evicted before the prefix that others may share
            self._release_block(block)

    def check_integrity(self) -> None:
        """Every reference is owned by a table, every table covers its positions, every indexed block is alive."""
        owners: dict[int, int] = {}
        for sequence in self._sequences.values():
            assert len(sequence.blocks) * self.block_size >= sequence.num_computed + sequence.num_reserved
            assert len(set(sequence.blocks)) == len(sequence.blocks), "a block twice in one table"
            for block in sequence.blocks:
                owners[block] = owners.get(block, 0) + 1
        for block in range(self.pool.num_blocks):
            assert self.pool.ref_count(block) == owners.get(block, 0), f"references of block {block}"
        self.pool.check_integrity()
        if self._index is not None:
            self._index.check_integrity()

    def _append_block(self, sequence: _Sequence, block: int) -> None:
        size, start = self.block_size, len(sequence.blocks) * self.block_size
        if start == len(sequence.slots):
            grown = np.empty(max(8 * size, 2 * start), dtype=np.int64)
            grown[:start] = sequence.slots
            sequence.slots = grown
        sequence.slots[start : start + size] = np.arange(block * size, (block + 1) * size)
        sequence.blocks.append(block)

    def _slot(self, sequence: _Sequence, position: int) -> int:
        return sequence.blocks[position // self.block_size] * self.block_size + position % self.block_size

    def _drop_blocks_after(self, sequence: _Sequence) -> None:
        needed = -(-sequence.num_computed // self.block_size)
        while len(sequence.blocks) > needed:
            self._release_block(sequence.blocks.pop())

    def _index_full_blocks(self, sequence: _Sequence, token_ids: Sequence[int]) -> None:
        if self._index is None:
            return
        size = self.block_size
        sequence.tail.extend(token_ids)
        first = (sequence.num_computed - len(sequence.tail)) // size
        for block in sequence.blocks[first : first + len(sequence.tail) // size]:
            sequence.index_entry = self._index.insert(sequence.index_entry, sequence.tail[:size], block)
            del sequence.tail[:size]

    def _release_block(self, block: int) -> None:
        self.pool.release(block, indexed=self._index is not None and block in self._index)

    def _forget_block(self, block: int) -> None:
        if self._index is not None:
            self._index.remove(block)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take memory only once they are used: most of a cache never is.

    On the CPU torch would write them all, 2 GiB for every engine; NumPy asks the system for pages that read as zero.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = torch.from_numpy(np.zeros(num_bytes + CACHE_LINE, dtype=np.uint8))
    start = -memory.data_ptr() % CACHE_LINE
    return memory[start : start + num_bytes].view(dtype).view(shape)
