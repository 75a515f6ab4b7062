"""Attention over slotted keys and values in readable PyTorch: the truth for faster kernels.

Legend: N rows of the step, n rows of one sequence, H query heads, K key/value heads, G = H // K query heads
per key/value head, D key width, E value width, S cache slots, L keys, B = ROW_BUCKET, P = KEY_SPLIT.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.kernels.attention import (
    KEY_SPLIT,
    AttentionBatch,
    AttentionParams,
    RowBucket,
    SequenceAttention,
)

_CHAIN_BLOCK = 128
"""Query rows of a long chain that attend at once: bounds the scores' memory, skips keys after it."""

_FOLDED_ROWS = 8
"""Up to so many rows, the G query heads of a key head are rows of one product: faster on CPUs."""


def write_rows(keys: Tensor, values: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Store the rows' keys ``[N, K, D]`` and values ``[N, K, E]`` at `slots` ``[N]`` of the caches."""
    key_cache.index_copy_(0, slots, keys)
    value_cache.index_copy_(0, slots, values)


def attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, batch: AttentionBatch, params: AttentionParams
) -> Tensor:
    """Attention sequence by sequence (numerical mode); the step's keys and values are written already.

    Args:
        query: ``[N, H, D]``.
        key_cache: ``[S, K, D]``; value_cache: ``[S, K, E]``.

    Returns:
        ``[N, H, E]`` in the dtype of `query`.
    """
    blocks = [
        _attend_block(query, key_cache, value_cache, sequence=sequence, first=first, last=last, params=params)
        for sequence in batch.sequences
        for first, last in _row_blocks(sequence)
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def row_bucket_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, bucket: RowBucket, params: AttentionParams
) -> Tensor:
    """Attention of each row over its own key sequence, split after split, in fixed shapes (bitwise mode).

    A row's splits start at fixed offsets of its own keys, and a split without a key that the row sees
    changes none of the row's bits: neither the other rows of the bucket nor their number of keys can reach
    its result.

    Args:
        query: ``[B, H, D]``; rows after the bucket's are padding.
        key_cache: ``[S, K, D]``; value_cache: ``[S, K, E]``.

    Returns:
        ``[B, H, E]`` in the dtype of `query`.
    """
    rows, num_heads, width = query.shape
    kv_heads, value_width = value_cache.shape[1:]
    queries = query.float().reshape(rows * kv_heads, num_heads // kv_heads, width)  # [B*K, G, D]
    # Minus the largest float, not minus infinity: exp(-inf - m) is then 0 and never NaN.
    top = torch.full((*queries.shape[:2], 1), torch.finfo(torch.float32).min, device=query.device)
    total = torch.zeros_like(top)
    mixed = torch.zeros(*queries.shape[:2], value_width, device=query.device)
    last_visible = (bucket.num_keys - 1).repeat_interleave(kv_heads)[:, None, None]  # [B*K, 1, 1]
    for start in range(0, bucket.slots.shape[1], KEY_SPLIT):
        slots = bucket.slots[:, start : start + KEY_SPLIT].reshape(-1)
        keys, values = _split_of(key_cache, slots, rows), _split_of(value_cache, slots, rows)
        scores = torch.bmm(queries, keys.transpose(1, 2))
        scores = _capped(scores * params.scaling, params.softcap)
        positions = torch.arange(start, start + KEY_SPLIT, device=query.device)
        hidden = positions > last_visible
        if params.sliding_window is not None:
            hidden |= positions <= last_visible - params.sliding_window
        scores = scores.masked_fill(hidden, float("-inf"))
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        weights, decay = torch.exp(scores - new_top), torch.exp(top - new_top)
        total = total * decay + weights.sum(-1, keepdim=True)
        mixed, top = mixed * decay + torch.bmm(weights, values), new_top
    if params.sinks is not None:
        sinks = params.sinks.float().view(1, kv_heads, -1).expand(rows, -1, -1).reshape(*queries.shape[:2], 1)
        new_top = torch.maximum(top, sinks)
        decay = torch.exp(top - new_top)
        total, mixed = total * decay + torch.exp(sinks - new_top), mixed * decay
    # Adding zero turns -0.0, which depends on how many masked splits followed, into 0.0.
    return (mixed / total + 0.0).view(rows, num_heads, value_width).to(query.dtype)


def _split_of(cache: Tensor, slots: Tensor, rows: int) -> Tensor:
    """Each row's split of keys or values ``[B * K, P, D or E]`` float32."""
    split = cache.index_select(0, slots).float().view(rows, KEY_SPLIT, *cache.shape[1:])
    return split.transpose(1, 2).reshape(rows * cache.shape[1], KEY_SPLIT, cache.shape[2])


def _row_blocks(sequence: SequenceAttention) -> list[tuple[int, int]]:
    num_rows = sequence.end - sequence.start
    if not sequence.is_chain or num_rows <= _CHAIN_BLOCK:
        return [(0, num_rows)]
    return [(first, min(first + _CHAIN_BLOCK, num_rows)) for first in range(0, num_rows, _CHAIN_BLOCK)]


def _attend_block(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    sequence: SequenceAttention,
    first: int,
    last: int,
    params: AttentionParams,
) -> Tensor:
    """Rows [first, last) of a sequence over the keys that any of them may see: ``[last - first, H, E]``."""
    low, high = _key_range(sequence, first, last, params.sliding_window)
    if isinstance(sequence.slots, slice):
        visible = slice(sequence.slots.start + low, sequence.slots.start + high)
        keys, values = key_cache[visible], value_cache[visible]
    else:
        slots = sequence.slots[low:high]
        keys, values = key_cache.index_select(0, slots), value_cache.index_select(0, slots)
    rows = query[sequence.start + first : sequence.start + last]
    num_rows, num_heads, width = rows.shape
    kv_heads = keys.shape[1]
    fold = num_rows <= _FOLDED_ROWS and num_heads != kv_heads
    repeats = num_heads // kv_heads if fold else 1
    bias = _bias(
        sequence,
        first=first,
        last=last,
        low=low,
        high=high,
        window=params.sliding_window,
        dtype=query.dtype,
        repeats=repeats,
    )
    keys, values, rows = keys.transpose(0, 1)[None], values.transpose(0, 1)[None], rows.transpose(0, 1)
    rows = rows.reshape(1, kv_heads, repeats * num_rows, width) if fold else rows[None]
    if params.softcap is None and params.sinks is None:
        mixed = F.scaled_dot_product_attention(
            rows, keys, values, bias, scale=params.scaling, enable_gqa=not fold and num_heads != kv_heads
        )
    else:
        mixed = _explicit_attention(rows, keys, values, bias, params)
    return mixed.reshape(num_heads, num_rows, -1).transpose(0, 1)


def _explicit_attention(
    rows: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, params: AttentionParams
) -> Tensor:
    """Attention with softcap or sinks: rows ``[1, K or H, n, D]`` -> ``[1, K or H, n, E]``."""
    kv_heads, num_keys = keys.shape[1:3]
    heads = rows.shape[1]
    if heads != kv_heads:
        keys = keys.repeat_interleave(heads // kv_heads, dim=1)
        values = values.repeat_interleave(heads // kv_heads, dim=1)
    scores = _capped(torch.matmul(rows, keys.transpose(2, 3)).float() * params.scaling, params.softcap)
    if bias is not None:
        scores = scores + bias
    if params.sinks is not None:
        sinks = params.sinks.float().view(1, heads, -1, 1)
        # Folded rows stand head after head.
        sinks = sinks.repeat_interleave(rows.shape[2] // sinks.shape[2], dim=2)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :num_keys]
    return torch.matmul(weights.to(values.dtype), values)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _key_range(sequence: SequenceAttention, first: int, last: int, window: int | None) -> tuple[int, int]:
    """Keys outside [low, high) are seen by none of the rows [first, last)."""
    context, num_rows = sequence.num_context, sequence.end - sequence.start
    high = context + (last if sequence.is_chain else num_rows)
    if window is None:
        return 0, high
    # Key j is at position j in the context and along a chain; a tree's rows are at `context` or later.
    lowest_row = context + (first if sequence.is_chain else 0)
    return max(0, lowest_row - window + 1), high


def _bias(
    sequence: SequenceAttention,
    *,
    first: int,
    last: int,
    low: int,
    high: int,
    window: int | None,
    dtype: torch.dtype,
    repeats: int,
) -> Tensor | None:
    """Additive mask ``[repeats * (last - first), high - low]`` of 0 and -inf; None: all seen."""
    if sequence.row_mask is None:  # one row sees its whole context from `low` on
        return None
    memo = (first, window, dtype, repeats)
    if memo not in sequence.bias_memo:
        context = sequence.num_context
        seen = torch.ones(last - first, high, dtype=torch.bool, device=sequence.row_mask.device)
        seen[:, context:] = sequence.row_mask[first:last, : high - context]
        seen = seen[:, low:]
        if window is not None:
            rows = sequence.key_positions[context + first : context + last]
            seen &= sequence.key_positions[low:high] > rows[:, None] - window
        bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
        sequence.bias_memo[memo] = bias.repeat(repeats, 1)
    return sequence.bias_memo[memo]
