"""What the engine asks of a model: logits for the rows of one flattened batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from outrider.cache.kv_cache import KVCache, LayerShape
from outrider.kernels.attention import AttentionBatch


@dataclass(frozen=True, eq=False)
class ForwardBatch:
    """Rows of many sequences in one flattened forward; no padding.

    Attributes:
        token_ids: ``[N]`` int64.
        positions: ``[N]`` int64 positions in their sequences.
        attention: who attends to whom, and where keys and values go.
        logits_rows: ``[R]`` int64 rows whose logits are wanted; None for all rows.
    """

    token_ids: Tensor
    positions: Tensor
    attention: AttentionBatch
    logits_rows: Tensor | None


@dataclass(frozen=True, eq=False)
class Choices:
    """The argmax of the wanted rows.

    Attributes:
        token_ids: ``[R]`` int64, the lowest of equals.
        logits: ``[R]`` float32 of those tokens; NaN where any of a row's logits is.
    """

    token_ids: Tensor
    logits: Tensor


class Model(Protocol):
    """Attributes:
    vocab_size: width of the logits.
    context_length: the most positions a sequence may have.
    layer_shapes: the cache that each attention layer needs.
    dtype: that it computes in.
    cache_dtype: of keys and values.
    runs_on_kernels: True if a forward is one call of the compiled kernels, and torch has next to nothing to do.
    kernel_seconds: wall time of the last forward in that call; 0 for other models.
    eos_token_ids: tokens that end a text, from the model's own configuration.
    """

    name: str
    vocab_size: int
    context_length: int
    layer_shapes: tuple[LayerShape, ...]
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    cache_dtype: torch.dtype
    runs_on_kernels: bool
    device: torch.device

    @property
    def kernel_seconds(self) -> float: ...

    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Logits ``[R, vocab]`` float32 of the wanted rows; writes the rows' keys and values into `cache`."""
        ...

    def choose(self, batch: ForwardBatch, cache: KVCache) -> Choices | None:
        """As `forward`, but only each row's argmax; None, and nothing done, if that would save no work."""
        ...
