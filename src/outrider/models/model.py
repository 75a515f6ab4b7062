"""What the engine asks of a model: logits for the rows of one flattened batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from outrider.cache.kv_cache import KVCache, LayerShape
from outrider.models.batch import ForwardBatch


@dataclass(frozen=True, eq=False)
class Choices:
    """What follows each of the wanted rows: of equal logits the lowest token.

    Attributes:
        token_ids: ``[R]``.
        log_weights: ``[R]`` the greatest of each row, its logits divided by the draw's temperature; NaN where any is.
        logits: ``[R, vocab]`` float32 raw logits; None where they were not asked for.
        maxima: ``[R, num_maxima(vocab)]`` float32, the greatest of each `MAXIMA_BLOCK` of these, NaN there where
            any is; None where nobody has looked.
    """

    token_ids: list[int]
    log_weights: list[float]
    logits: Tensor | None = None
    maxima: Tensor | None = None


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

    def choose(self, batch: ForwardBatch, cache: KVCache, *, with_logits: bool = False) -> Choices | None:
        """As `forward`, but what follows each row, as its sequence's draw says; None where `forward` has to be asked.

        A model may do so always, because whole rows are what it computes, or where rounding could decide.
        """
        ...
