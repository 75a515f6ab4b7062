"""What the server answers, in OpenAI's shapes; fields beyond those are ours or vLLM's, and clients ignore them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from outrider.request import FinishReason


def _is_none(value: Any) -> bool:
    return value is None


# Left out where there is nothing to say; fields without it are null, as clients expect.
OMITTED = Field(default=None, exclude_if=_is_none)


class _Shape(BaseModel):
    model_config = ConfigDict(frozen=True)


class PromptTokensDetails(_Shape):
    """cached_tokens: found in the prefix cache."""

    cached_tokens: int


class Usage(_Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Decoding(_Shape):
    """How one choice was decoded: `seed` gives it again, and the counts say what drafting brought.

    Attributes:
        num_steps: forwards that yielded its tokens; plain decoding takes one a token.
        lossless: False if the verification rule changes the output's distribution.
    """

    seed: int
    lossless: bool
    num_steps: int
    num_draft_tokens: int
    num_accepted_tokens: int


class CompletionLogprobs(_Shape):
    """Lists over tokens; `text_offset` counts characters from the beginning of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class ChatTokenLogprob(_Shape):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(ChatTokenLogprob):
    top_logprobs: list[ChatTokenLogprob]


class ChatLogprobs(_Shape):
    content: list[ChatLogprob]


class _Choice(_Shape):
    index: int
    finish_reason: FinishReason | None
    stop_reason: Annotated[int | str | None, OMITTED] = None
    token_ids: Annotated[list[int] | None, OMITTED] = None
    outrider: Annotated[Decoding | None, OMITTED] = None


class CompletionChoice(_Choice):
    """Of a whole response, or of a chunk: then `text` is what is new."""

    text: str
    logprobs: CompletionLogprobs | None
    prompt_token_ids: Annotated[list[int] | None, OMITTED] = None


class ChatMessage(_Shape):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(_Choice):
    message: ChatMessage
    logprobs: ChatLogprobs | None


class ChatDelta(_Shape):
    role: Annotated[Literal["assistant"] | None, OMITTED] = None
    content: Annotated[str | None, OMITTED] = None


class ChatChunkChoice(_Choice):
    delta: ChatDelta
    logprobs: ChatLogprobs | None


class _Response(_Shape):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Annotated[Usage | None, OMITTED] = None


class Completion(_Response):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class ChatCompletion(_Response):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    prompt_token_ids: Annotated[list[int] | None, OMITTED] = None


class ChatCompletionChunk(_Response):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    prompt_token_ids: Annotated[list[int] | None, OMITTED] = None


class EngineDescription(_Shape):
    """How the model runs here."""

    decoding: str
    verification: str
    exactness: str
    lossless: bool
    weights: str
    dtype: str


class Model(_Shape):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["outrider"] = "outrider"
    root: str
    max_model_len: int
    outrider: EngineDescription


class Models(_Shape):
    object: Literal["list"] = "list"
    data: list[Model]


class Version(_Shape):
    version: str
    outrider: EngineDescription


class Health(_Shape):
    status: Literal["ok", "stopping"]


class Tokens(_Shape):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: Annotated[list[str] | None, OMITTED] = None


class Text(_Shape):
    prompt: str


class ErrorDetail(_Shape):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(_Shape):
    error: ErrorDetail
