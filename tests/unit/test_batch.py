"""Flattening sequences, chunks and trees into one batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from outrider.kernels.attention import KEY_SPLIT, ROW_BUCKET
from outrider.kernels.rows import SequenceRows
from outrider.models.batch import ForwardBatch, rows_of
from outrider.token_tree import TokenTree, ancestor_mask

TREE = TokenTree((10, 11, 12, 13), (-1, 0, 0, 1))


def rows(
    tree: TokenTree = TREE,
    chunk: tuple[int, ...] = (),
    context: int = 5,
    first_slot: int = 40,
    wanted: tuple[int, ...] | None = None,
) -> SequenceRows:
    tokens, parents = rows_of(tree, chunk)
    slots = np.arange(first_slot, first_slot + context + len(tokens), dtype=np.int64)
    return SequenceRows(tokens, parents, context, slots, range(len(tokens)) if wanted is None else wanted)


def test_rows_of_puts_the_chunk_before_the_tree() -> None:
    assert rows_of(TREE) == (TREE.tokens, TREE.parents)
    assert rows_of(TREE, [7, 8]) == ((7, 8, 10, 11, 12, 13), (-1, 0, 1, 2, 2, 3))


def test_positions_are_context_plus_depth() -> None:
    batch = ForwardBatch([rows(), rows(chunk=(7, 8), context=3), rows(TokenTree.root_only(1), context=9)])
    assert batch.token_ids.tolist() == [10, 11, 12, 13, 7, 8, 10, 11, 12, 13, 1]
    assert batch.positions.tolist() == [5, 6, 6, 7, 3, 4, 5, 6, 6, 7, 9]
    assert [(s.start, s.end) for s in batch.attention.sequences] == [(0, 4), (4, 10), (10, 11)]
    assert batch.attention.sequences[1].key_positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 6, 7]
    assert batch.token_ids.dtype == batch.positions.dtype == batch.attention.write_slots.dtype == torch.int64


def test_masks_and_chains() -> None:
    tree, chain, single = ForwardBatch(
        [rows(chunk=(7,)), rows(TokenTree.chain(1, [2, 3])), rows(TokenTree.root_only(1))]
    ).attention.sequences
    assert tree.row_mask is not None
    assert torch.equal(tree.row_mask, ancestor_mask((-1, 0, 1, 1, 2)))
    assert not tree.is_chain
    assert chain.is_chain
    assert chain.row_mask is not None
    assert torch.equal(chain.row_mask, torch.ones(3, 3).tril().bool())
    assert chain.key_positions.tolist() == list(range(8))
    assert single.row_mask is None
    assert single.is_chain


@pytest.mark.parametrize("num_rows", [100, 128, 129, 300])
def test_long_chains_and_trees(num_rows: int) -> None:
    """Beyond the remembered layouts, too."""
    chain = ForwardBatch([rows(TokenTree.chain(0, [1] * (num_rows - 1)))]).attention.sequences[0]
    assert chain.is_chain
    assert chain.row_mask is not None
    assert torch.equal(chain.row_mask, torch.ones(num_rows, num_rows).tril().bool())
    star = ForwardBatch([rows(TokenTree((0,) * num_rows, (-1, *(0,) * (num_rows - 1))))])
    assert star.positions.tolist() == [5] + [6] * (num_rows - 1)


def test_wanted_rows_count_from_the_batch() -> None:
    batch = ForwardBatch([rows(wanted=(3,)), rows(wanted=()), rows(wanted=(0, 2))])
    assert batch.logits_rows is not None
    assert batch.logits_rows.tolist() == [3, 8, 10]
    assert ForwardBatch([rows(), rows()]).logits_rows is None
    nothing = ForwardBatch([rows(wanted=())]).logits_rows
    assert nothing is not None
    assert nothing.tolist() == []


def test_consecutive_slots_are_a_slice_and_others_are_not() -> None:
    assert ForwardBatch([rows(first_slot=40)]).attention.sequences[0].slots == slice(40, 49)
    shuffled = np.array([40, 42, 41, 43, 44, 45, 46, 47, 48])  # the ends alone would look consecutive
    batch = ForwardBatch([SequenceRows(TREE.tokens, TREE.parents, 5, shuffled, ())])
    slots = batch.attention.sequences[0].slots
    assert isinstance(slots, torch.Tensor)
    assert slots.tolist() == shuffled.tolist()
    assert batch.attention.write_slots.tolist() == [45, 46, 47, 48]


def test_row_buckets_list_each_rows_own_keys() -> None:
    """The last row, node 3, has the context, the chunk, the root, node 1 and itself as keys."""
    long = rows(TokenTree.chain(1, [2] * 13), context=70, first_slot=200)
    batch = ForwardBatch([long, rows(chunk=(7, 8), first_slot=40)], row_invariant=True).attention
    first, second = batch.row_buckets
    assert (first.start, first.end, second.start, second.end) == (0, 16, 16, 20)
    assert first.slots.shape == (ROW_BUCKET, 2 * KEY_SPLIT)
    assert first.num_keys.tolist() == [*range(71, 85), 6, 7]
    assert second.slots.shape == (ROW_BUCKET, KEY_SPLIT)
    assert second.num_keys.tolist() == [8, 9, 9, 10, *[8] * 12]
    assert second.slots[3, :10].tolist() == [40, 41, 42, 43, 44, 45, 46, 47, 48, 50]
    assert set(second.slots[3, 10:].tolist()) == {50}
    assert second.write_slots.tolist() == [47, 48, 49, 50]
