"""A request: its tokens, its counters and how it ended."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # a request carries these; it does not use them
    from outrider.engine.detokenizer import IncrementalDetokenizer
    from outrider.sampling.logprobs import TokenLogprobs
    from outrider.sampling.params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass
class RequestMetrics:
    """Times are `time.monotonic()` seconds; counters are of this request alone.

    Attributes:
        num_steps: steps in which it yielded tokens.
        num_draft_tokens, num_accepted_tokens: verified, and accepted, draft tokens.
        num_cached_tokens: prompt tokens found in the prefix index at its first admission.
        num_preemptions: how often its blocks were taken and it was computed again.
    """

    arrival_time: float = field(default_factory=time.monotonic)
    first_token_time: float | None = None
    finish_time: float | None = None
    num_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0

    def count_path(self, num_draft_tokens: int, num_accepted: int, now: float) -> None:
        self.first_token_time = self.first_token_time or now
        self.num_steps += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_tokens += num_accepted


@dataclass(eq=False)
class Request:
    """One sequence to generate.

    Attributes:
        token_ids: prompt and output together; positions ``[num_prompt_tokens, len(token_ids))`` are the output.
        seed: of the keyed noise; with (position, purpose) it determines every random number of the request.
        stop_token_ids: token ids that end the output: end-of-sequence (unless ignored) and the user's own.
        max_length: the most tokens, prompt included, that it may grow to.
        may_draft: False once its drafts have met unsound logits: it then decodes plainly.
        detokenizer: finds stop strings and keeps the text; None where neither is wanted.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]
    max_length: int
    detokenizer: IncrementalDetokenizer | None = None
    may_draft: bool = True
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: Exception | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    metrics: RequestMetrics = field(default_factory=RequestMetrics)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None
