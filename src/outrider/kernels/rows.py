"""The rows of a step, sequence by sequence, as models and their kernels take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class KeyedDraw:
    """A sample at a temperature with the noise that a seed and the token's position name (`sampling/noise.py`).

    Attributes:
        temperature: above 0.
    """

    temperature: float
    seed: int


@dataclass(eq=False, slots=True)
class SequenceRows:
    """One sequence's rows of a step.

    Attributes:
        token_ids: ``[num_rows]``.
        parents: ``[num_rows]`` parent row, -1 where a row hangs off the cached context.
        num_context: cached positions.
        slots: ``[num_context + num_rows]`` int64, context first (what `KVCache.reserve` returns).
        logits_rows: offsets of the rows whose logits are wanted, increasing.
        draw: how the wanted rows' successors are chosen; None: the greatest logit.
    """

    token_ids: Sequence[int]
    parents: Sequence[int]
    num_context: int
    slots: np.ndarray
    logits_rows: Sequence[int]
    draw: KeyedDraw | None = None
