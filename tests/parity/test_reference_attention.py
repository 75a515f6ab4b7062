"""Both attentions of models, of the reference and of the level that runs here, against a dense one in float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from outrider.kernels import native, ops
from outrider.kernels.attention import AttentionBatch, AttentionParams
from outrider.kernels.rows import SequenceRows
from outrider.models.batch import ForwardBatch
from tests.parity.attention_checks import dense_attention, sequence_of
from tests.parity.kernel_levels import use_level

NUM_SLOTS = 700
TREE = (-1, 0, 0, 1, 1, 2, 5, 3)
FOREST = (-1, -1, 0, 1, 2)  # several rows hang off the context
CHUNK_AND_TREE = (-1, 0, 1, *(parent + 3 for parent in TREE))

# parents and context of each sequence, and whether its slots are consecutive
BATCHES = {
    "decode": [((-1,), 40, True)],
    "first token": [((-1,), 0, False)],
    "tree": [(TREE, 21, False)],
    "wide tree": [((-1, *(0,) * 11), 30, True)],
    "ragged": [(TREE, 9, False), ((-1,), 70, True), (CHUNK_AND_TREE, 5, True), (FOREST, 12, False)],
    "prefill": [(tuple(range(-1, 19)), 0, True), (tuple(range(-1, 9)), 3, False)],
    "long prefill": [(tuple(range(-1, 139)), 17, False)],
}
PARAMS = {
    "plain": {},
    "window": {"sliding_window": 5},
    "window of one": {"sliding_window": 1},
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": True},
    "all": {"sliding_window": 6, "softcap": 2.0, "sinks": True},
}
HEADS = {"gqa": (8, 2, 16, 16), "mha": (3, 3, 8, 8), "mqa": (5, 1, 8, 8), "wide values": (4, 2, 8, 24)}


@pytest.fixture(params=[native.REFERENCE, "as it is"], autouse=True)
def level(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param != native.REFERENCE:
        yield
    else:
        with use_level(native.REFERENCE):
            yield


def build(name: str, row_invariant: bool) -> tuple[tuple[SequenceRows, ...], AttentionBatch]:
    """Sequences in disjoint slots (consecutive ones below 300, scattered ones above) and their batch."""
    scattered = np.random.default_rng(0).permutation(np.arange(300, NUM_SLOTS))
    regions = {True: np.arange(300), False: scattered}
    sequences = []
    for parents, context, consecutive in BATCHES[name]:
        num_keys = context + len(parents)
        slots, regions[consecutive] = np.split(regions[consecutive], [num_keys])
        assert len(slots) == num_keys
        sequences.append(sequence_of(parents, context, slots))
    return tuple(sequences), ForwardBatch(sequences, row_invariant=row_invariant).attention


@pytest.mark.parametrize("row_invariant", [False, True], ids=["numerical", "bitwise"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("options", PARAMS)
@pytest.mark.parametrize("name", BATCHES)
def test_equals_dense_attention(name: str, options: str, heads: str, row_invariant: bool) -> None:
    num_heads, kv_heads, width, value_width = HEADS[heads]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sequences, batch = build(name, row_invariant)
    num_rows = len(batch.write_slots)
    query, rows_k = random(num_rows, num_heads, width) * 2, random(num_rows, kv_heads, width)
    rows_v = random(num_rows, kv_heads, value_width)
    keys, values = random(NUM_SLOTS, kv_heads, width), random(NUM_SLOTS, kv_heads, value_width)
    chosen = dict(PARAMS[options])
    sinks = random(num_heads) if chosen.pop("sinks", False) else None
    params = AttentionParams(scaling=0.4, sinks=sinks, **chosen)
    out = ops.attention(query, rows_k, rows_v, key_cache=keys, value_cache=values, batch=batch, params=params)
    assert torch.equal(keys[batch.write_slots], rows_k)
    assert torch.equal(values[batch.write_slots], rows_v)
    truth = dense_attention(query, keys.double(), values.double(), sequences, params)
    torch.testing.assert_close(out.double(), truth.out, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("row_invariant", [False, True], ids=["numerical", "bitwise"])
def test_masked_slots_cannot_leak(row_invariant: bool) -> None:
    """NaN in every slot that a row does not see (other sequences, unused pages, siblings) stays there."""
    (sequence,), batch = build("tree", row_invariant)
    keys = torch.full((NUM_SLOTS, 2, 8), float("nan"))
    values = keys.clone()
    keys[sequence.slots], values[sequence.slots] = 1.0, 1.0
    rows = torch.ones(len(TREE), 2, 8)
    query = torch.ones(len(TREE), 4, 8)
    params = AttentionParams(1.0)
    out = ops.attention(query, rows, rows, key_cache=keys, value_cache=values, batch=batch, params=params)
    assert torch.equal(out, torch.ones_like(out))
