"""Answers of `/v1/completions`, whole and as chunks of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from outrider.outputs import CompletionOutput
from outrider.sampling.logprobs import TokenLogprobs
from outrider.server.answer import Head, decoding_of, finite
from outrider.server.engine_thread import Update
from outrider.server.protocol import CompletionRequest
from outrider.server.responses import Completion, CompletionChoice, CompletionLogprobs, Usage


@dataclass
class CompletionAnswer:
    """Shapes the answer to one request.

    Args:
        echoes: the text of each prompt where the request wants it back, else nothing.
    """

    head: Head
    request: CompletionRequest
    echoes: Sequence[str] = ()
    prompt_token_ids: Sequence[Sequence[int]] = ()
    _offsets: dict[int, int] = field(default_factory=dict)

    def opening(self, usage: Usage | None) -> list[Completion]:
        """The chunks before any token."""
        return []

    def chunks(self, update: Update, usage: Usage | None) -> list[Completion]:
        """The chunk that tells what is new of a choice."""
        return [self._response([self._choice(update.index, update.text, update.sample)], usage)]

    def closing(self, usage: Usage) -> Completion:
        """The chunk that has no choice but the usage."""
        return self._response([], usage)

    def whole(self, samples: Sequence[CompletionOutput], usage: Usage) -> Completion:
        """Everything at once; samples in the order of their indices."""
        choices = [self._choice(index, sample.text, sample) for index, sample in enumerate(samples)]
        return self._response(choices, usage)

    def _response(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        return Completion(
            id=self.head.id,
            created=self.head.created,
            model=self.head.model,
            system_fingerprint=self.head.fingerprint,
            choices=choices,
            usage=usage,
        )

    def _choice(self, index: int, text: str, sample: CompletionOutput) -> CompletionChoice:
        is_first = index not in self._offsets
        prompt = index // self.request.n
        offset = self._offsets.setdefault(index, 0)
        logprobs = None
        if sample.logprobs is not None:
            logprobs = _logprobs(sample.token_ids, sample.logprobs, offset, self.request.logprobs or 0)
            self._offsets[index] += sum(len(token) for token in logprobs.tokens)
        finished = sample.finish_reason is not None
        with_ids = self.request.return_token_ids
        return CompletionChoice(
            index=index,
            text=self.echoes[prompt] + text if self.echoes and is_first else text,
            logprobs=logprobs,
            finish_reason=sample.finish_reason,
            stop_reason=sample.stop_reason,
            token_ids=sample.token_ids if with_ids else None,
            prompt_token_ids=list(self.prompt_token_ids[prompt]) if with_ids and is_first else None,
            outrider=decoding_of(sample) if finished else None,
        )


def _logprobs(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], offset: int, num_top: int
) -> CompletionLogprobs:
    tokens, of_tokens, top, offsets = [], [], [], []
    for token_id, alternatives in zip(token_ids, logprobs, strict=True):
        chosen = alternatives[token_id]
        tokens.append(chosen.decoded_token or "")
        of_tokens.append(finite(chosen.logprob))
        by_text: dict[str, float] = {}
        for of in alternatives.values():  # of tokens with one text, such as parts of characters, the first counts
            by_text.setdefault(of.decoded_token or "", finite(of.logprob))
        top.append(by_text)
        offsets.append(offset)
        offset += len(tokens[-1])
    return CompletionLogprobs(
        tokens=tokens, token_logprobs=of_tokens, top_logprobs=top if num_top else None, text_offset=offsets
    )
