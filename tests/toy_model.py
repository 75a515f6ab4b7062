"""A model of one line of arithmetic, for proofs: fast, exact, and unforgiving.

Its logits are a hash of the very tokens that a row attends to, read back from the cache in the order of their
slots. So a wrong slot, position, mask, commit or rollback changes the output at once, and equality is bitwise.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from outrider.cache.kv_cache import KVCache, LayerShape
from outrider.models.batch import ForwardBatch
from outrider.models.model import Choices


class ToyModel:
    """Logits from the last `order` tokens, plus `memory` times a part from the whole sequence."""

    name = "toy"
    layer_shapes = (LayerShape(1, 1, 1),)
    dtype = torch.float32
    cache_dtype = torch.float32
    runs_on_kernels = False
    kernel_seconds = 0.0
    device = torch.device("cpu")

    def __init__(
        self,
        vocab_size: int = 24,
        context_length: int = 256,
        memory: float = 1.0,
        eos_token_ids: tuple[int, ...] = (0,),
        poison: int | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.eos_token_ids = eos_token_ids
        self.memory = memory
        self.poison = poison
        self.num_rows: list[int] = []

    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        keys, values = cache.keys[0].view(-1), cache.values[0].view(-1)
        slots = batch.attention.write_slots
        keys[slots] = batch.token_ids.float()
        values[slots] = batch.positions.float()
        self.num_rows.append(len(batch.token_ids))
        rows: list[Tensor] = []
        for sequence in batch.attention.sequences:
            tokens = keys[sequence.slots].numpy().astype(np.int64)
            positions = values[sequence.slots].numpy().astype(np.int64)
            context, num_rows = sequence.num_context, sequence.end - sequence.start
            mask = np.ones((1, 1), bool) if sequence.row_mask is None else sequence.row_mask.numpy()
            for row in range(num_rows):
                own = np.flatnonzero(mask[row, : row + 1]) + context
                seen = (*tokens[:context].tolist(), *tokens[own].tolist())
                seen_positions = [*positions[:context].tolist(), *positions[own].tolist()]
                assert seen_positions == list(range(len(seen))), "positions have gaps"
                rows.append(torch.from_numpy(self._logits(seen)))
        logits = torch.stack(rows)
        return logits if batch.logits_rows is None else logits[batch.logits_rows]

    def choose(self, batch: ForwardBatch, cache: KVCache, *, with_logits: bool = False) -> Choices | None:
        if any(rows.draw is not None for rows in batch.sequences):
            return None
        logits = self.forward(batch, cache)
        best = logits.numpy().argmax(-1).tolist()
        return Choices(best, logits.amax(-1).tolist(), logits if with_logits else None)

    def _logits(self, seen: tuple[int, ...]) -> np.ndarray:
        near = _hashed(seen[-2:], self.vocab_size) * 3.0
        logits = near + self.memory * _hashed(seen, self.vocab_size)
        if self.poison is not None and seen[-1] == self.poison:
            logits = np.full_like(logits, np.nan)
        return logits.astype(np.float32)


@lru_cache(maxsize=200_000)
def _hashed(tokens: tuple[int, ...], vocab_size: int) -> np.ndarray:
    return np.random.default_rng([len(tokens), *tokens]).standard_normal(vocab_size)
