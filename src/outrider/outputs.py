"""What a generation returns; names as vLLM's users know them."""

from __future__ import annotations

from dataclasses import dataclass, field

from outrider.request import FinishReason, RequestMetrics
from outrider.sampling.logprobs import TokenLogprobs


@dataclass(frozen=True)
class CompletionOutput:
    """One sampled sequence.

    Attributes:
        text: the output without the stop string or end-of-sequence token.
        token_ids: all output tokens, up to the one that ended the output.
        finish_reason: "stop", "length", "abort" or "error"; None while it is still running.
        stop_reason: the stop string or stop token id; None for end-of-sequence.
        seed: of its keyed noise; under the coupled rule, giving it again gives the same tokens.
        logprobs: per output token, where asked for.
        lossless: False if the verification rule changes the output's distribution.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    seed: int
    logprobs: list[TokenLogprobs] | None
    metrics: RequestMetrics
    lossless: bool = True

    @property
    def cumulative_logprob(self) -> float | None:
        if self.logprobs is None:
            return None
        return sum(of[token].logprob for of, token in zip(self.logprobs, self.token_ids, strict=False))


@dataclass(frozen=True)
class RequestOutput:
    """Everything generated for one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)
