"""Answers of `/v1/chat/completions`, whole and as chunks of a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from outrider.outputs import CompletionOutput
from outrider.sampling.logprobs import Logprob
from outrider.server.answer import Head, decoding_of, finite
from outrider.server.engine_thread import Update
from outrider.server.protocol import ChatRequest
from outrider.server.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    Usage,
)


@dataclass
class ChatAnswer:
    """Shapes the answer to one request.

    Args:
        bytes_of: the bytes that a token id stands for.
    """

    head: Head
    request: ChatRequest
    bytes_of: Callable[[int], bytes]
    prompt_token_ids: Sequence[Sequence[int]] = ()

    def opening(self, usage: Usage | None) -> list[ChatCompletionChunk]:
        """The chunks before any token: whose message each choice is."""
        role = ChatDelta(role="assistant", content="")
        chunks = []
        for index in range(self.request.n):
            choice = ChatChunkChoice(index=index, delta=role, logprobs=None, finish_reason=None)
            chunks.append(self._chunk([choice], usage, with_prompt=index == 0))
        return chunks

    def chunks(self, update: Update, usage: Usage | None) -> list[ChatCompletionChunk]:
        """What is new of a choice, then how it ended in a chunk of its own."""
        sample, index = update.sample, update.index
        choices = []
        tells_tokens = sample.token_ids and (sample.logprobs is not None or self.request.return_token_ids)
        if update.text or tells_tokens:
            new = ChatChunkChoice(
                index=index,
                delta=ChatDelta(content=update.text),
                logprobs=self._logprobs(sample),
                finish_reason=None,
                token_ids=sample.token_ids if self.request.return_token_ids else None,
            )
            choices.append(new)
        if sample.finish_reason is not None:
            end = ChatChunkChoice(
                index=index,
                delta=ChatDelta(),
                logprobs=None,
                finish_reason=sample.finish_reason,
                stop_reason=sample.stop_reason,
                outrider=decoding_of(sample),
            )
            choices.append(end)
        return [self._chunk([choice], usage) for choice in choices]

    def closing(self, usage: Usage) -> ChatCompletionChunk:
        """The chunk that has no choice but the usage."""
        return self._chunk([], usage)

    def whole(self, samples: Sequence[CompletionOutput], usage: Usage) -> ChatCompletion:
        """Everything at once; samples in the order of their indices."""
        with_ids = self.request.return_token_ids
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(content=sample.text),
                logprobs=self._logprobs(sample),
                finish_reason=sample.finish_reason,
                stop_reason=sample.stop_reason,
                token_ids=sample.token_ids if with_ids else None,
                outrider=decoding_of(sample),
            )
            for index, sample in enumerate(samples)
        ]
        return ChatCompletion(
            id=self.head.id,
            created=self.head.created,
            model=self.head.model,
            system_fingerprint=self.head.fingerprint,
            choices=choices,
            usage=usage,
            prompt_token_ids=list(self.prompt_token_ids[0]) if with_ids else None,
        )

    def _chunk(
        self, choices: list[ChatChunkChoice], usage: Usage | None, *, with_prompt: bool = False
    ) -> ChatCompletionChunk:
        with_ids = self.request.return_token_ids and with_prompt
        return ChatCompletionChunk(
            id=self.head.id,
            created=self.head.created,
            model=self.head.model,
            system_fingerprint=self.head.fingerprint,
            choices=choices,
            usage=usage,
            prompt_token_ids=list(self.prompt_token_ids[0]) if with_ids else None,
        )

    def _logprobs(self, sample: CompletionOutput) -> ChatLogprobs | None:
        if sample.logprobs is None:
            return None
        content = []
        for token_id, alternatives in zip(sample.token_ids, sample.logprobs, strict=True):
            chosen = self._token(token_id, alternatives[token_id])
            # The chosen token comes first whatever its rank; it is an alternative only if it is among the best.
            best = sorted(alternatives.items(), key=lambda of: of[1].rank)[: self.request.top_logprobs or 0]
            content.append(
                ChatLogprob(
                    token=chosen.token,
                    logprob=chosen.logprob,
                    bytes=chosen.bytes,
                    top_logprobs=[self._token(*of) for of in best],
                )
            )
        return ChatLogprobs(content=content)

    def _token(self, token_id: int, of: Logprob) -> ChatTokenLogprob:
        return ChatTokenLogprob(
            token=of.decoded_token or "", logprob=finite(of.logprob), bytes=list(self.bytes_of(token_id))
        )
