"""What requests may say, without a model: every field, every refusal, and what becomes of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from outrider.errors import CacheError, NumericsError, PromptError, QueueFullError, SamplingParamsError
from outrider.outputs import CompletionOutput
from outrider.request import RequestMetrics
from outrider.sampling.logprobs import Logprob
from outrider.sampling.params import SamplingParams
from outrider.server.answer import Head, UsageCount
from outrider.server.chats import ChatAnswer
from outrider.server.completions import CompletionAnswer
from outrider.server.engine_thread import Update
from outrider.server.failures import EngineFailedError, ServerStoppingError, failure_of
from outrider.server.protocol import LABELS, MAX_PROMPTS, NEUTRAL, ChatRequest, CompletionRequest, TokenizeRequest

USER = [{"role": "user", "content": "hi"}]
HEAD = Head("id", "m", "f", created=1)


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "a", **fields})


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": USER, **fields})


def refusal(make: Any, **fields: Any) -> dict[str, Any]:
    with pytest.raises(ValidationError) as raised:
        make(**fields)
    return raised.value.errors()[0]  # type: ignore[return-value]


def test_defaults_are_openais_and_the_rest_sampling_params() -> None:
    assert completion().sampling_params() == SamplingParams(temperature=1.0, max_tokens=16)
    assert chat().sampling_params() == SamplingParams(temperature=1.0, max_tokens=None)


def test_every_field_reaches_the_sampling_parameters() -> None:
    fields: dict[str, Any] = {
        "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2,
        "presence_penalty": 0.3, "frequency_penalty": -0.4, "min_tokens": 2, "stop_token_ids": [3], "seed": 11,
        "include_stop_str_in_output": True, "ignore_eos": True, "skip_special_tokens": False, "max_tokens": 9,
    }  # fmt: skip
    expected = SamplingParams(**fields, stop=["x"], logit_bias={5: -1.0}, logprobs=3)
    assert completion(**fields, stop="x", logit_bias={"5": -1}, logprobs=3).sampling_params() == expected
    of_chat = chat(**fields, stop=["x"], logit_bias={"5": -1}, logprobs=True, top_logprobs=3)
    assert of_chat.sampling_params() == expected
    assert {*fields, "stop", "logit_bias", "logprobs"} == set(vars(expected)), "a parameter that no field sets"


def test_null_is_the_default_and_labels_are_not_looked_at() -> None:
    nulls = dict.fromkeys([*CompletionRequest.model_fields, *NEUTRAL], None)
    assert completion(**{**nulls, "prompt": "a"}) == completion()
    assert completion(**dict.fromkeys(LABELS, "x")) == completion()
    assert chat(max_completion_tokens=5, max_tokens=None).sampling_params().max_tokens == 5


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_what_is_not_supported_is_refused_by_its_name_unless_it_asks_for_nothing(name: str) -> None:
    for value in NEUTRAL[name]:
        assert chat(**{name: value}) == chat()
    assert refusal(chat, **{name: {"some": "thing"}})["ctx"]["param"] == name
    assert "not supported" in refusal(completion, **{name: {"some": "thing"}})["msg"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperture": 1.0}, "Extra inputs"),
        ({"temperature": "0.5"}, "number"),
        ({"n": True}, "integer"),
        ({"n": 0}, "n: got 0"),
        ({"n": 129}, "n: got 129"),
        ({"n": 100, "prompt": ["a"] * 6}, "at most 512"),
        ({"best_of": 4}, "best_of"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "Extra inputs"),
        ({"prompt": 3}, "prompt: expected"),
        ({"prompt": []}, "prompt: expected"),
        ({"prompt": [1, "a"]}, "prompt: expected"),
        ({"prompt": [True]}, "prompt: expected"),
        ({"prompt": [[1], [1.5]]}, "prompt: expected"),
        ({"prompt": ["a"] * (MAX_PROMPTS + 1)}, "at most 256"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"stop": 3}, "list"),
    ],
    ids=str,
)
def test_bad_completions(fields: dict[str, Any], words: str) -> None:
    assert words in refusal(completion, **fields)["msg"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, "at least 1"),
        ({"messages": [{"content": "x"}]}, "required"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "'text'"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "tool_calls"),
        ({"messages": [{"role": "user", "content": "x", "colour": "red"}]}, "Extra inputs"),
        ({"top_logprobs": 3}, "logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "boolean"),
        ({"chat_template_kwargs": {"messages": []}}, "messages"),
        ({"chat_template": "{{ 1 }}"}, "not supported"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_chats(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as raised:
        chat(**fields)
    messages = [error["msg"] for error in raised.value.errors()]
    assert any(words in message for message in messages), messages


def test_prompts_in_all_their_forms() -> None:
    assert completion(prompt="a").prompts == ["a"]
    assert completion(prompt=["a", "b"]).prompts == ["a", "b"]
    assert completion(prompt=[1, 2]).prompts == [[1, 2]]
    assert completion(prompt=[[1], [2, 3]]).prompts == [[1], [2, 3]]


def test_messages_as_clients_send_them() -> None:
    answered = {
        "role": "assistant",
        "content": "ok",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
        "audio": None,
    }
    parts = {"role": "user", "name": "me", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    request = chat(messages=[{"role": "system", "content": "s", "type": "text"}, answered, parts])
    assert [message.as_mapping() for message in request.messages] == [
        {"role": "system", "content": "s"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "a\nb", "name": "me"},
    ]


def test_tokenize_takes_one_of_prompt_and_messages() -> None:
    with pytest.raises(ValidationError, match="prompt or messages"):
        TokenizeRequest.model_validate({})


@pytest.mark.parametrize(
    ("error", "status", "code", "param"),
    [
        (SamplingParamsError("top_p", got=3, expected="less"), 400, None, "top_p"),
        (PromptError("prompt 2 of 3 length", got=3, expected="less"), 400, "context_length_exceeded", None),
        (CacheError("request length", got=3, expected="less"), 400, "context_length_exceeded", None),
        (QueueFullError("request queue", got=3, expected="less"), 429, "queue_full", None),
        (NumericsError("logits\nof it", got="NaN", expected="numbers"), 500, "numerics", None),
        (EngineFailedError(), 500, "engine_failed", None),
        (ServerStoppingError(), 503, "stopping", None),
        (RuntimeError("/secret/path"), 500, None, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_failures_have_openais_shape(error: Exception, status: int, code: str | None, param: str | None) -> None:
    failed = failure_of(error)
    detail = failed.body.error
    assert (failed.status, detail.code, detail.param) == (status, code, param)
    assert "\n" not in detail.message
    assert "secret" not in detail.message
    assert ("Retry-After" in failed.headers) == (status in (429, 503))


# --- answers


def sample(text: str, tokens: list[int], reason: Any = None, logprobs: Any = None) -> CompletionOutput:
    metrics = RequestMetrics(num_steps=2, num_draft_tokens=5, num_accepted_tokens=1, num_cached_tokens=4)
    return CompletionOutput(0, text, tokens, reason, None, 7, logprobs, metrics)


def logprobs_of(*tokens: tuple[int, str, float]) -> list[dict[int, Logprob]]:
    return [{token: Logprob(value, 1, text)} for token, text, value in tokens]


def test_chunks_of_a_completion() -> None:
    answer = CompletionAnswer(HEAD, completion(stream=True, n=2, logprobs=1), (), [[1, 2]])
    (first,) = answer.chunks(Update(1, "ab", sample("ab", [5], None, logprobs_of((5, "ab", -1.0))), 1), None)
    end = sample("abc", [6], "stop", logprobs_of((6, "c", -math.inf)))
    (last,) = answer.chunks(Update(1, "c", end, 2), None)
    assert first.choices[0].model_dump() == {
        "index": 1, "text": "ab", "finish_reason": None,
        "logprobs": {
            "tokens": ["ab"], "token_logprobs": [-1.0], "top_logprobs": [{"ab": -1.0}], "text_offset": [0],
        },
    }  # fmt: skip
    assert last.choices[0].logprobs is not None
    assert last.choices[0].logprobs.text_offset == [2]
    assert last.choices[0].logprobs.token_logprobs == [-9999.0]
    decoding = {"seed": 7, "lossless": True, "num_steps": 2, "num_draft_tokens": 5, "num_accepted_tokens": 1}
    assert last.choices[0].model_dump()["outrider"] == decoding


def test_an_echo_comes_once_and_before_the_text() -> None:
    answer = CompletionAnswer(HEAD, completion(echo=True, prompt=["a", "b"]), ["a", "b"], [[1], [2]])
    texts = [answer.chunks(Update(1, text, sample(text, [5]), 1), None)[0].choices[0].text for text in ("x", "y")]
    assert texts == ["bx", "y"]


def test_chunks_of_a_chat() -> None:
    answer = ChatAnswer(HEAD, chat(stream=True, n=2), lambda token: b"", [[1, 2]])
    opening = [chunk.choices[0] for chunk in answer.opening(None)]
    assert [(choice.index, choice.delta.model_dump()) for choice in opening] == [
        (0, {"role": "assistant", "content": ""}),
        (1, {"role": "assistant", "content": ""}),
    ]
    chunks = [chunk.choices[0] for chunk in answer.chunks(Update(1, "ab", sample("ab", [5, 6], "length"), 2), None)]
    assert [(choice.delta.model_dump(), choice.finish_reason) for choice in chunks] == [
        ({"content": "ab"}, None),
        ({}, "length"),
    ]
    (silent,) = answer.chunks(Update(0, "", sample("", [2], "stop"), 1), None)
    assert silent.choices[0].delta.model_dump() == {}, "an end-of-sequence token is no content"


def test_chat_logprobs_have_bytes_and_the_best_by_rank() -> None:
    alternatives = {5: Logprob(-2.0, 3, "\ufffd"), 6: Logprob(-0.5, 1, "a"), 7: Logprob(-1.0, 2, "b")}
    answer = ChatAnswer(HEAD, chat(logprobs=True, top_logprobs=2), lambda token: bytes([token]), [[1]])
    whole = answer.whole([sample("?", [5], "stop", [alternatives])], UsageCount([1], 1).usage())
    assert whole.choices[0].logprobs is not None
    (entry,) = whole.choices[0].logprobs.content
    assert (entry.logprob, entry.bytes) == (-2.0, [5])
    assert [of.token for of in entry.top_logprobs] == ["a", "b"]


def test_usage_counts_a_prompt_once() -> None:
    count = UsageCount([3, 4], n=2)
    for index, num_tokens in enumerate([1, 2, 3, 4]):
        count.add(Update(index, "", sample("", []), num_tokens))
    usage = count.usage()
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 10, 17)
    assert usage.prompt_tokens_details.cached_tokens == 8
