"""What a request may say: OpenAI's fields as OpenAI spells them, vLLM's where OpenAI has none.

A field whose meaning we do not have is refused unless its value asks for nothing, and so is a field that nobody
knows: a misspelt `temperature` must not be answered as if it had not been given. `null` is a field's default. What
only labels a request (`user`, `metadata`, ...) is accepted and not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from outrider.sampling.params import MAX_LOGPROBS, MAX_N, SamplingParams

MAX_PROMPTS = 256  # of one request
MAX_CHOICES = 512  # of one request: prompts times n
MAX_MESSAGES = 4096
MAX_CONTENT_PARTS = 1024
DEFAULT_MAX_TOKENS = 16  # OpenAI's, of completions

RESERVED_TEMPLATE_VARIABLES = {"messages", "add_generation_prompt", "tokenizer", "chat_template"}
# Labels: they change nothing about the tokens, here or at OpenAI.
LABELS = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "request_id"}
)
# Fields that we do not support, and the values of them that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "prompt_logprobs": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "truncate_prompt_tokens": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
}
REMEDIES = {
    "chat_template": "the model's own is used",
    "response_format": "only {'type': 'text'} is",
    "prompt_logprobs": "logprobs of the output are",
}


def invalid(param: str, message: str) -> PydanticCustomError:
    """An error about the field `param`, raised while a request is parsed."""
    return PydanticCustomError("invalid", "{message}", {"message": message, "param": param})


class _Fields(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return (
            {name: value for name, value in data.items() if value is not None} if isinstance(data, Mapping) else data
        )


class StreamOptions(_Fields):
    """include_usage: a last chunk with the usage; continuous_usage_stats: usage so far in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


def _check_prompt(value: Any) -> Any:
    """Text, texts, token ids or lists of token ids; which ids and how many is the engine's business."""
    wrong = invalid("prompt", "prompt: expected text, a list of texts, a list of token ids or a list of such lists")
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise wrong
    if all(type(part) is int for part in value):
        return value
    texts = all(isinstance(part, str) for part in value)
    if not texts and not all(isinstance(part, list) and all(type(token) is int for token in part) for part in value):
        raise wrong
    if len(value) > MAX_PROMPTS:
        raise invalid("prompt", f"prompt: got {len(value)} prompts, expected at most {MAX_PROMPTS} in one request")
    return value


def _check_token_ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise invalid("tokens", "tokens: expected a list of token ids")
    return value


def _check_logit_bias(value: Any) -> dict[int, float]:
    wrong = invalid("logit_bias", 'logit_bias: expected an object of token ids and numbers, such as {"42": -5}')
    if not isinstance(value, dict):
        raise wrong
    try:
        return {int(token): bias for token, bias in value.items()}
    except ValueError:
        raise wrong from None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


PromptField = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(_check_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
TokenIds = Annotated[list[int], PlainValidator(_check_token_ids, json_schema_input_type=list[int])]
LogitBias = Annotated[dict[int, float], PlainValidator(_check_logit_bias, json_schema_input_type=dict[str, float])]
Stop = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]


class GenerationRequest(_Fields):
    """What completions and chats have in common; `SamplingParams` has the meaning and the bounds of each field.

    Attributes:
        return_token_ids: also return the prompt's and the output's token ids.
    """

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = SamplingParams.n
    best_of: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = SamplingParams.top_k
    min_p: float = SamplingParams.min_p
    repetition_penalty: float = SamplingParams.repetition_penalty
    presence_penalty: float = SamplingParams.presence_penalty
    frequency_penalty: float = SamplingParams.frequency_penalty
    logit_bias: LogitBias = Field(default_factory=dict)
    max_tokens: int | None = None
    min_tokens: int = SamplingParams.min_tokens
    stop: Stop = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    include_stop_str_in_output: bool = SamplingParams.include_stop_str_in_output
    ignore_eos: bool = SamplingParams.ignore_eos
    skip_special_tokens: bool = SamplingParams.skip_special_tokens
    seed: int | None = None
    return_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_what_changes_nothing(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        kept = {}
        for name, value in data.items():
            if name in LABELS:
                continue
            if name in NEUTRAL:
                if value is not None and value not in NEUTRAL[name]:
                    remedy = f"; {REMEDIES[name]}" if name in REMEDIES else ""
                    raise invalid(name, f"{name}: got {str(value)[:60]}, which is not supported{remedy}")
                continue
            kept[name] = value
        return kept

    @model_validator(mode="after")
    def _check_together(self) -> GenerationRequest:
        if self.best_of is not None and self.best_of != self.n:
            raise invalid("best_of", f"best_of: got {self.best_of}, expected n={self.n}; take n samples and choose")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "stream_options: got no stream, expected stream=true with them")
        if not 1 <= self.n <= MAX_N:
            raise invalid("n", f"n: got {self.n}, expected an integer in [1, {MAX_N}]")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def _params(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        return SamplingParams(
            n=self.n,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            seed=self.seed,
            logprobs=logprobs,
        )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: PromptField
    logprobs: int | None = None
    echo: bool = False
    add_special_tokens: bool = True

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Every prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt  # type: ignore[return-value]

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise invalid(
                "echo", "echo: got logprobs with it, expected one of them; a prompt's logprobs are not supported"
            )
        if len(self.prompts) * self.n > MAX_CHOICES:
            raise invalid("n", f"n: got {len(self.prompts)} prompts times n={self.n}, expected at most {MAX_CHOICES}")
        return self

    def sampling_params(self) -> SamplingParams:
        """Raises:
        SamplingParamsError: a value out of its range.
        """
        max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return self._params(max_tokens=max_tokens, logprobs=self.logprobs)


class TextPart(_Fields):
    """A part of a message's content; others than text (images, audio, files) are refused."""

    type: Literal["text"]
    text: str


class Message(_Fields):
    """One message of a conversation.

    Attributes:
        type: some clients send "text" beside the content.
    """

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_CONTENT_PARTS)] = ""
    name: str | None = None
    type: Literal["text"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_says_nothing(cls, data: Any) -> Any:
        """Clients send an answer back as they got it, with fields that are empty."""
        if not isinstance(data, Mapping):
            return data
        for name in ("tool_calls", "function_call", "audio"):
            if data.get(name):
                raise invalid("messages", f"messages: got {name}, which are not supported")
        empty = {"tool_calls", "function_call", "audio", "refusal", "annotations", "reasoning_content", "reasoning"}
        return {name: value for name, value in data.items() if name not in empty or value}

    def as_mapping(self) -> dict[str, str]:
        """What chat templates take."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        message = {"role": self.role, "content": text}
        return message if self.name is None else {**message, "name": self.name}


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs", "top_logprobs: got no logprobs, expected logprobs=true with it")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            expected = f"an integer in [0, {MAX_LOGPROBS}]"
            raise invalid("top_logprobs", f"top_logprobs: got {self.top_logprobs}, expected {expected}")
        reserved = RESERVED_TEMPLATE_VARIABLES & self.chat_template_kwargs.keys()
        if reserved:
            raise invalid("chat_template_kwargs", f"chat_template_kwargs: got {min(reserved)}, which is set already")
        return self

    def sampling_params(self) -> SamplingParams:
        """Raises:
        SamplingParamsError: a value out of its range.
        """
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._params(max_tokens=max_tokens, logprobs=(self.top_logprobs or 0) if self.logprobs else None)


class TokenizeRequest(_Fields):
    """POST /tokenize: a prompt, or a conversation as its template writes it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise invalid("prompt", "prompt: expected a prompt or messages")
        return self


class DetokenizeRequest(_Fields):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds
