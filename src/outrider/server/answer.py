"""What answers of all routes are made of."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import uuid4

from outrider.outputs import CompletionOutput
from outrider.server.engine_thread import Update
from outrider.server.responses import Decoding, PromptTokensDetails, Usage

LOWEST_LOGPROB = -9999.0  # JSON has no minus infinity; vLLM's choice


@dataclass(frozen=True)
class Head:
    """What every piece of one answer begins with."""

    id: str
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid4().hex}"


def decoding_of(sample: CompletionOutput) -> Decoding:
    """How a finished sample came about."""
    metrics = sample.metrics
    return Decoding(
        seed=sample.seed,
        lossless=sample.lossless,
        num_steps=metrics.num_steps,
        num_draft_tokens=metrics.num_draft_tokens,
        num_accepted_tokens=metrics.num_accepted_tokens,
    )


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB


class UsageCount:
    """Tokens of one request, as its choices grow."""

    def __init__(self, prompt_lengths: Sequence[int], n: int) -> None:
        self._num_prompt_tokens = sum(prompt_lengths)
        self._n = n
        self._num_tokens: dict[int, int] = {}
        self._num_cached: dict[int, int] = {}

    def add(self, update: Update) -> None:
        self._num_tokens[update.index] = update.num_tokens
        if update.index % self._n == 0:  # a prompt is counted once, whatever n
            self._num_cached[update.index] = update.sample.metrics.num_cached_tokens

    def usage(self) -> Usage:
        num_tokens = sum(self._num_tokens.values())
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=num_tokens,
            total_tokens=self._num_prompt_tokens + num_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._num_cached.values())),
        )
