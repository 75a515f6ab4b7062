"""Which kernel computes what: the one place where faster kernels join.

Legend: N rows of the step, H query heads, K key/value heads, D key width, E value width, S cache slots; of a linear
layer: I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outrider.kernels import native, reference, reference_linear
from outrider.kernels.attention import ROW_BUCKET, AttentionBatch, AttentionParams, RowBucket
from outrider.kernels.packed import PackedWeight


class Linear:
    """A linear layer on the kernels that run when it is called.

    Args:
        bias: ``[O]`` of any float type, or None; not to be changed afterwards.
    """

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self._compiled: native.Linear | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """``[N, I]`` of any float type on the CPU -> ``[N, O]`` float32."""
        if not native.is_available():
            return reference_linear.linear(x, self.weight, self.bias)
        if self._compiled is None:
            self._compiled = native.Linear(self.weight, self.bias)
        return self._compiled(x)


def move_slots(storage: Tensor, sources: Sequence[int], targets: Sequence[int]) -> None:
    """Copy slots of every layer of ``[layers, slots, ...]`` to others; all are read before one is written."""
    if storage.device.type == "cpu" and native.is_available():
        native.move_slots(storage, sources, targets)
    else:
        storage[:, torch.tensor(targets)] = storage[:, torch.tensor(sources)]


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    params: AttentionParams,
) -> Tensor:
    """Write the step's keys and values to the cache, then attend.

    Args:
        query: ``[N, H, D]``; keys: ``[N, K, D]``; values: ``[N, K, E]``.
        key_cache: ``[S, K, D]``; value_cache: ``[S, K, E]``; of any float type, or int8 as `native.cache_width` says.

    Returns:
        ``[N, H, E]`` in the dtype of `query`.
    """
    if _run_native(query, key_cache):
        native.write_kv(keys, key_cache, batch.write_slots)
        native.write_kv(values, value_cache, batch.write_slots)
        return native.attention(query, key_cache, value_cache, batch.flat, params).to(query.dtype)
    stored = key_cache.dtype
    reference.write_rows(keys.to(stored), values.to(stored), key_cache, value_cache, batch.write_slots)
    if not batch.row_invariant:
        return reference.attention(query.to(stored), key_cache, value_cache, batch, params).to(query.dtype)
    mixed = []
    for bucket in batch.row_buckets:
        rows = query[bucket.start : bucket.end]
        padded = torch.cat((rows, rows[:1].expand(ROW_BUCKET - len(rows), -1, -1)))
        attended = reference.row_bucket_attention(padded, key_cache, value_cache, bucket, params)
        mixed.append(attended[: len(rows)])
    return torch.cat(mixed)


def row_bucket_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    key_cache: Tensor,
    value_cache: Tensor,
    bucket: RowBucket,
    params: AttentionParams,
) -> Tensor:
    """As `attention`, for one bucket of the bitwise mode that is padded to ROW_BUCKET rows already.

    Only the bucket's own rows are written; the padding's results are not to be read.

    Returns:
        ``[ROW_BUCKET, H, E]`` in the dtype of `query`.
    """
    num_rows = bucket.end - bucket.start
    if _run_native(query, key_cache):
        native.write_kv(keys[:num_rows], key_cache, bucket.write_slots)
        native.write_kv(values[:num_rows], value_cache, bucket.write_slots)
        attended = native.attention(query[:num_rows], key_cache, value_cache, bucket.flat, params)
        return torch.cat((attended, attended[:1].expand(len(query) - num_rows, -1, -1))).to(query.dtype)
    rows, stored = slice(num_rows), key_cache.dtype
    reference.write_rows(keys[rows].to(stored), values[rows].to(stored), key_cache, value_cache, bucket.write_slots)
    return reference.row_bucket_attention(query, key_cache, value_cache, bucket, params)


def _run_native(query: Tensor, cache: Tensor) -> bool:
    return query.device.type == "cpu" and native.can_attend(cache) and native.is_available()
