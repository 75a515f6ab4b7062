"""Every route of the application: keys, origins, bodies, errors in OpenAI's shape, and what it says of itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from outrider import LLM, SamplingParams
from outrider.config import EngineConfig, ServerConfig
from outrider.errors import ConfigError
from outrider.server.app import build_app
from tests.server_harness import CONTEXT_LENGTH, make_chat_model, wait_until
from tests.tiny_models import make_tiny

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "def", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3},
    "/tokenize": {"prompt": "def"},
    "/detokenize": {"tokens": [65, 66]},
}
KEY = "s3cret-key"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(make_chat_model(tmp_path_factory.mktemp("model") / "tiny"), decoding="ngram")


@contextmanager
def client_of(llm: LLM, **config: Any) -> Iterator[TestClient]:
    settings = ServerConfig(**{"served_model_names": ("tiny", "alias"), **config})
    with TestClient(build_app(llm, settings), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def client(llm: LLM) -> Iterator[TestClient]:
    with client_of(llm) as client:
        yield client


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


def requests_of(app: Any) -> list[tuple[str, str, dict[str, Any] | None]]:
    """One right request for each route that there is, the ones that FastAPI adds included."""
    found = []
    for route in app.routes:
        path = route.path.replace("{name:path}", "tiny")
        methods = route.methods if isinstance(route, APIRoute) else {"GET"}
        found += [(method, path, BODIES[path] if method == "POST" else None) for method in sorted(methods)]
    return found


def test_a_key_is_asked_on_every_route(llm: LLM) -> None:
    with client_of(llm, api_key=KEY) as client:
        requests = requests_of(client.app)
        assert {path for _, path, _ in requests} == {
            *BODIES, "/v1/models", "/v1/models/tiny", "/health", "/version", "/metrics", "/openapi.json",
        }  # fmt: skip
        for method, path, body in [*requests, ("GET", "/nowhere", None)]:
            wrong = [{}, {"Authorization": f"Basic {KEY}"}, {"Authorization": KEY}]
            wrong += [{"Authorization": f"Bearer {of}"} for of in ("", KEY[:-1], KEY + "x", "\xe9")]
            for headers in wrong:
                encoded = {name: value.encode("latin-1") for name, value in headers.items()}
                refused = client.request(method, path, json=body, headers=encoded)
                error = error_of(refused, 401)
                assert error["code"] == "invalid_api_key"
                assert KEY not in refused.text
            right = client.request(method, path, json=body, headers={"Authorization": f"Bearer {KEY}"})
            assert right.status_code == (404 if path == "/nowhere" else 200), (path, right.text)


def test_the_key_stays_out_of_messages() -> None:
    assert KEY not in repr(ServerConfig(api_key=KEY))
    with pytest.raises(ConfigError) as raised:
        ServerConfig(api_key=f"{KEY} two words")
    assert KEY not in str(raised.value)


def test_pages_of_other_origins_are_refused(llm: LLM, client: TestClient) -> None:
    page = {"Origin": "https://page.example"}
    assert error_of(client.get("/v1/models", headers=page), 403)["code"] == "origin_not_allowed"
    preflight = {**page, "Access-Control-Request-Method": "POST"}
    refused = client.options("/v1/completions", headers=preflight)
    assert "access-control-allow-origin" not in refused.headers
    with client_of(llm, allowed_origins=("https://page.example",), api_key=KEY) as allowing:
        answered = allowing.options("/v1/completions", headers=preflight)
        assert answered.headers["access-control-allow-origin"] == "https://page.example"
        assert allowing.get("/v1/models", headers=page).status_code == 401, "a key is still asked for"
        error_of(allowing.get("/v1/models", headers={"Origin": "https://other.example"}), 401)
        key = {"Authorization": f"Bearer {KEY}"}
        error_of(allowing.get("/v1/models", headers={**key, "Origin": "https://other.example"}), 403)


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b'{"prompt": "a"', "application/json", 400),
        (b"[]", "application/json", 400),
        (b"", "application/json", 400),
        (b'"' + b"\xff" * 4 + b'"', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"prompt": "a"}', "text/plain", 415),
        (b'{"prompt": "a"}', "application/jsonp", 415),
        (b'{"prompt": "a", "temperature": NaN}', "application/json", 400),
        (b'{"prompt": "\\ud800"}', "application/json", 400),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bad_bodies(client: TestClient, content: bytes, kind: str, status: int) -> None:
    error_of(client.post("/v1/completions", content=content, headers={"Content-Type": kind}), status)


def test_bodies_are_bounded_whether_they_say_their_length_or_not(llm: LLM) -> None:
    body = b'{"prompt": "' + b"a" * 5000 + b'"}'
    kind = {"Content-Type": "application/json"}
    with client_of(llm, max_body_bytes=4096) as client:
        error_of(client.post("/v1/completions", content=body, headers=kind), 413)
        error_of(client.post("/v1/completions", content=iter([body[:3000], body[3000:]]), headers=kind), 413)
        assert client.post("/v1/completions", json=BODIES["/v1/completions"]).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperture": 1}, "temperture"),
        ({"stream_options": {"usage": True}, "stream": True}, "stream_options"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"stop": ["x"] * 17}, None),
        ({"logit_bias": {str(i): 1.0 for i in range(1025)}}, "logit_bias"),
        ({"logit_bias": {"399999": 1.0}}, None),
        ({"seed": -1}, "seed"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[65], [10**7]]}, None),
        ({"prompt": [65] * CONTEXT_LENGTH}, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals_name_the_field(client: TestClient, fields: dict[str, Any], param: str | None) -> None:
    for stream in (False, True):
        response = client.post("/v1/completions", json={"prompt": "def", "stream": stream, **fields})
        error = error_of(response, 400)
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param, error


def test_too_long_a_prompt_has_openais_code(client: TestClient) -> None:
    error = error_of(client.post("/v1/completions", json={"prompt": [65] * CONTEXT_LENGTH}), 400)
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("path", BODIES)
def test_models_have_names(client: TestClient, path: str) -> None:
    for name in ("tiny", "alias"):
        assert client.post(path, json={**BODIES[path], "model": name}).status_code == 200
    error = error_of(client.post(path, json={**BODIES[path], "model": "gpt-5"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_unknown_paths_and_methods(client: TestClient) -> None:
    error_of(client.get("/v1/nothing"), 404)
    error_of(client.get("/v1/completions"), 405)
    error_of(client.get("/v1/models/other/model"), 404)
    assert [client.get(path).status_code for path in ("/docs", "/redoc")] == [404, 404]


def test_auto_is_the_default_and_every_page_says_so(tmp_path: Any) -> None:
    llm = LLM(make_chat_model(tmp_path / "tiny"))
    assert EngineConfig().decoding.method == llm.config.decoding.method == "auto"
    with client_of(llm) as client:
        described = client.get("/v1/models").json()["data"][0]["outrider"]
        assert described == client.get("/version").json()["outrider"]
        assert (described["decoding"], described["verification"]) == ("auto", "coupled")
        assert described["lossless"] is True
        assert 'decoding="auto"' in client.get("/metrics").text


def test_lossy_and_fingerprints(llm: LLM, client: TestClient) -> None:
    def fingerprint(of: LLM) -> str:
        with client_of(of) as served:
            return served.post("/v1/completions", json=BODIES["/v1/completions"]).json()["system_fingerprint"]

    same = llm.with_decoding("none")
    assert fingerprint(same) == fingerprint(llm), "under the coupled rule the drafter changes no token"
    assert fingerprint(llm.with_decoding("ngram", verification="rejection")) != fingerprint(llm)


def test_tokenize_and_detokenize(llm: LLM, client: TestClient) -> None:
    text = "def main():\n  é"
    tokens = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert tokens["tokens"] == llm.tokenizer.encode(text)
    assert (tokens["count"], tokens["max_model_len"]) == (len(tokens["tokens"]), CONTEXT_LENGTH)
    assert tokens["token_strs"][0] == llm.tokenizer.token(tokens["tokens"][0])
    assert client.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": text}
    of_chat = client.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).json()["tokens"]
    assert llm.tokenizer.decode(of_chat, skip_special_tokens=False) == "<|user|>user: x\n<|user|>assistant: "
    error_of(client.post("/detokenize", json={"tokens": [-1]}), 400)
    error_of(client.post("/tokenize", json={}), 400)


def test_chats_are_the_librarys(llm: LLM, client: TestClient) -> None:
    messages = [{"role": "user", "content": "print"}]
    params = SamplingParams(temperature=0.8, seed=4, max_tokens=12)
    expected = llm.with_decoding("none").chat(messages, params, suffix="!!")[0]
    body = {"messages": messages, "temperature": 0.8, "seed": 4, "max_completion_tokens": 12}
    answer = client.post(
        "/v1/chat/completions", json={**body, "return_token_ids": True, "chat_template_kwargs": {"suffix": "!!"}}
    ).json()
    assert answer["choices"][0]["message"]["content"] == expected.outputs[0].text
    assert answer["choices"][0]["token_ids"] == expected.outputs[0].token_ids
    assert answer["prompt_token_ids"] == expected.prompt_token_ids
    assert answer["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)


def test_a_chat_without_a_maximum_goes_to_the_end_of_the_context(client: TestClient) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "ignore_eos": True, "temperature": 0}
    answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["usage"]["total_tokens"] == CONTEXT_LENGTH
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_model_without_a_template_does_not_chat(tmp_path: Any) -> None:
    with client_of(LLM(make_tiny("llama", tmp_path / "plain"), decoding="none")) as client:
        response = client.post("/v1/chat/completions", json=BODIES["/v1/chat/completions"])
        assert "template" in error_of(response, 400)["message"]


def test_echo_gives_the_prompt_back(client: TestClient) -> None:
    body = {"prompt": ["def", "in"], "n": 2, "max_tokens": 4, "seed": 1}
    plain, echoed = (client.post("/v1/completions", json={**body, "echo": echo}).json() for echo in (False, True))
    for index, (without, with_echo) in enumerate(zip(plain["choices"], echoed["choices"], strict=True)):
        assert with_echo["text"] == body["prompt"][index // 2] + without["text"]
    of_ids = client.post(
        "/v1/completions", json={**BODIES["/v1/completions"], "prompt": [65, 66], "echo": True}
    ).json()
    detokenized = client.post("/detokenize", json={"tokens": [65, 66]}).json()["prompt"]
    assert of_ids["choices"][0]["text"].startswith(detokenized)


def test_a_failed_engine_is_seen_in_health(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = llm.with_decoding("none")
    monkeypatch.setattr(broken.engine, "step", lambda: 1 / 0)
    with client_of(broken) as client:
        assert client.get("/health").json() == {"status": "ok"}
        error_of(client.post("/v1/completions", json=BODIES["/v1/completions"]), 500)
        assert error_of(client.get("/health"), 503)["code"] == "engine_failed"
        streamed = client.post("/v1/completions", json={**BODIES["/v1/completions"], "stream": True})
        assert error_of(streamed, 500)["code"] == "engine_failed"


def test_an_error_in_a_stream_is_an_event(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = llm.with_decoding("none")
    right, count = broken.engine.step, iter(range(3))

    def step() -> Any:
        if next(count, None) is None:
            raise RuntimeError("/secret")
        return right()

    monkeypatch.setattr(broken.engine, "step", step)
    with client_of(broken) as client:
        body = {**BODIES["/v1/completions"], "stream": True, "max_tokens": 30, "ignore_eos": True}
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 200
        *_, error, done = [line for line in response.text.splitlines() if line]
        assert '"code":"engine_failed"' in error
        assert "secret" not in response.text
        assert done == "data: [DONE]"


def test_what_nobody_foresaw_stays_in_the_log(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with client_of(llm.with_decoding("none")) as client, caplog.at_level(logging.ERROR, "outrider"):
        monkeypatch.setattr(client.app.state.service.model, "check", lambda name: 1 / 0)  # type: ignore[attr-defined]
        error_of(client.post("/tokenize", json=BODIES["/tokenize"]), 500)
        assert "ZeroDivisionError" in caplog.text


def limited(llm: LLM, **settings: Any) -> LLM:
    """The same model with another cache or scheduler."""
    other = llm.with_decoding("none")
    parts = {name: replace(getattr(other.config, name), **of) for name, of in settings.items()}
    other.config = replace(other.config, **parts)
    return other.with_decoding("none")


def test_a_full_queue_is_429_with_a_time_to_come_back(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    small = limited(llm, scheduler={"max_num_seqs": 1, "max_waiting": 1})
    monkeypatch.setattr(small.engine, "step", lambda: time.sleep(0.001) or [])  # what waits goes on waiting
    body = BODIES["/v1/completions"]
    with client_of(small) as client, ThreadPoolExecutor(1) as pool:
        two = client.post("/v1/completions", json={**body, "n": 2})
        assert "max_waiting" in error_of(two, 400)["message"], "that will never fit"
        waiting = pool.submit(client.post, "/v1/completions", json=body)
        wait_until(lambda: bool(small.engine.scheduler.waiting))
        for stream in (False, True):
            refused = client.post("/v1/completions", json={**body, "stream": stream})
            assert error_of(refused, 429)["code"] == "queue_full"
            assert refused.headers["Retry-After"] == "1"
        client.app.state.service.engine.abort_all()  # type: ignore[attr-defined]
        assert error_of(waiting.result(), 503)["code"] == "stopping"


def test_what_the_cache_could_never_hold_is_refused(llm: LLM) -> None:
    with client_of(limited(llm, cache={"num_blocks": 4})) as client:
        body = {**BODIES["/v1/completions"], "max_tokens": 100}
        assert error_of(client.post("/v1/completions", json=body), 400)["code"] == "context_length_exceeded"
        assert client.post("/v1/completions", json={**body, "max_tokens": 20}).status_code == 200


def test_a_stopping_server_says_so(llm: LLM) -> None:
    with client_of(llm.with_decoding("none")) as client:
        client.app.state.service.engine.drain()  # type: ignore[attr-defined]
        assert client.get("/health").status_code == 503
        refused = client.post("/v1/completions", json=BODIES["/v1/completions"])
        assert error_of(refused, 503)["code"] == "stopping"
        assert refused.headers["Retry-After"] == "1"


def test_metrics_count(llm: LLM) -> None:
    names = {
        "time_to_first_token_seconds_count", "inter_token_latency_seconds_count", "e2e_request_latency_seconds_count",
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total",
        "generation_tokens_total", "spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total",
        "spec_decode_num_accepted_tokens_total",
    }  # fmt: skip
    counted = llm.with_decoding("ngram")
    counted.engine.stats.count_path(4, 2, 3)
    with client_of(counted) as client:
        body = {"prompt": "t t t t t t t t", "max_tokens": 30, "temperature": 0, "ignore_eos": True, "n": 2}
        usage = client.post("/v1/completions", json=body).json()["usage"]
        lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
        values = {line.split("{")[0].removeprefix("outrider:"): float(line.split()[-1]) for line in lines}
        assert names <= set(values)
        assert all('model_name="tiny"' in line for line in lines)
        assert values["prompt_tokens_total"] == usage["prompt_tokens"]
        assert values["generation_tokens_total"] == usage["completion_tokens"] == 60
        assert values["time_to_first_token_seconds_count"] == values["e2e_request_latency_seconds_count"] == 2
        assert values["inter_token_latency_seconds_count"] == 58
        assert values["spec_decode_num_draft_tokens_total"] > 0
        assert 'outrider:request_success_total{finished_reason="length",model_name="tiny"} 2.0' in lines
        assert values["num_requests_running"] == values["kv_cache_usage_perc"] == 0
        per_position = 'outrider:spec_decode_num_accepted_tokens_per_pos_total{model_name="tiny",position="1"} 1.0'
        assert per_position in lines
