"""The server as its users meet it: uvicorn on a loopback port, the `openai` client, and clients that go away."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from typer.testing import CliRunner

import outrider.llm
from outrider import LLM, SamplingParams
from outrider.cli.app import app
from outrider.config import EngineConfig, SchedulerConfig, ServerConfig
from tests.server_harness import TIMEOUT_S, Running, make_chat_model, serving, wait_until

PROMPTS = [
    "def read_lines(path, encoding=None):\n    ",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, ",
    "for i in range(",
    "#",
]
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9, "seed": 7},
    {"temperature": 1.0, "seed": 1, "n": 2, "presence_penalty": 0.5, "top_k": 50, "logit_bias": {65: 2.0}},
    {"temperature": 0.0, "stop": ["\n\n", "return"], "repetition_penalty": 1.1, "logprobs": 2},
    {"temperature": 1.2, "min_p": 0.02, "seed": 2**63, "min_tokens": 5, "frequency_penalty": 0.1},
]
MAX_TOKENS = 32
VLLM_FIELDS = {"top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos"}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM()


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Running]:
    with serving(llm, served_model_names=("python",)) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[OpenAI]:
    with client_of(server) as client:
        yield client


def client_of(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=TIMEOUT_S)


def complete(client: OpenAI, prompt: Any, settings: dict[str, Any], **more: Any) -> Any:
    own = {name: value for name, value in settings.items() if name not in VLLM_FIELDS}
    extra = {name: value for name, value in settings.items() if name in VLLM_FIELDS}
    own["logit_bias"] = {str(token): bias for token, bias in settings.get("logit_bias", {}).items()}
    extra = {**extra, "return_token_ids": True}
    return client.completions.create(
        model="python", prompt=prompt, max_tokens=MAX_TOKENS, extra_body=extra, **{**own, **more}
    )


def streamed(chunks: Any) -> dict[int, tuple[str, list[int], Any]]:
    """Of each choice its text, its tokens and its last chunk."""
    choices: dict[int, tuple[str, list[int], Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            text, tokens, last = choices.get(choice.index, ("", [], None))
            assert last is None or last.finish_reason is None, "a chunk after the last one"
            choices[choice.index] = (text + choice.text, tokens + choice.token_ids, choice)
    return choices


def nothing_runs(server: Running) -> bool:
    engine = server.llm.engine
    return not engine.has_unfinished and engine.cache.pool.num_used == 0 and not server.service.engine._active


@pytest.mark.parametrize("decoding", ["auto", "suffix"])
def test_what_comes_is_what_the_library_gives_whatever_runs_beside_it(llm: LLM, decoding: str) -> None:
    """Token for token, against plain decoding one by one; streamed and not, joining and leaving at any step."""
    plain = llm.with_decoding("none")
    jobs = [(prompt, settings) for settings in SETTINGS for prompt in PROMPTS[:3]]
    expected = [
        plain.generate(prompt, SamplingParams(max_tokens=MAX_TOKENS, **settings))[0].outputs
        for prompt, settings in jobs
    ]
    with serving(llm.with_decoding(decoding), served_model_names=("python",)) as server, client_of(server) as client:
        with ThreadPoolExecutor(len(jobs)) as pool:
            whole = pool.map(lambda job: complete(client, *job), jobs)
            streams = pool.map(lambda job: streamed(complete(client, *job, stream=True)), jobs)
            for (prompt, settings), outputs, answer, stream in zip(jobs, expected, whole, streams, strict=True):
                where = f"{prompt!r} {settings}"
                assert [choice.token_ids for choice in answer.choices] == [o.token_ids for o in outputs], where
                assert [choice.text for choice in answer.choices] == [o.text for o in outputs], where
                assert [choice.finish_reason for choice in answer.choices] == [o.finish_reason for o in outputs], (
                    where
                )
                assert [stream[i][1] for i in sorted(stream)] == [o.token_ids for o in outputs], where
                assert [stream[i][0] for i in sorted(stream)] == [o.text for o in outputs], where
                assert answer.usage.completion_tokens == sum(len(o.token_ids) for o in outputs)
                for choice, output in zip(answer.choices, outputs, strict=True):
                    assert choice.outrider["lossless"] is True
                    assert settings.get("seed") is None or choice.outrider["seed"] == output.seed
        wait_until(lambda: nothing_runs(server))
        server.llm.engine.cache.check_integrity()
        # What auto drafts depends on the machine; it may find that nothing pays.
        assert decoding == "auto" or server.llm.engine.stats.num_draft_tokens > 0, "nothing was drafted"


def test_the_seed_of_an_answer_gives_it_again(client: OpenAI) -> None:
    first = complete(client, PROMPTS[0], {"temperature": 1.0})
    seed = first.choices[0].outrider["seed"]
    again = complete(client, PROMPTS[0], {"temperature": 1.0, "seed": seed})
    assert again.choices[0].token_ids == first.choices[0].token_ids
    assert again.system_fingerprint == first.system_fingerprint


def test_several_prompts_and_samples_interleave_by_index(llm: LLM, client: OpenAI) -> None:
    settings = {"temperature": 0.9, "seed": 3, "n": 2}
    outputs = llm.with_decoding("none").generate(PROMPTS[:3], SamplingParams(max_tokens=MAX_TOKENS, **settings))
    expected = [sample.text for output in outputs for sample in output.outputs]
    answer = complete(client, PROMPTS[:3], settings)
    assert [choice.text for choice in answer.choices] == expected
    stream = list(complete(client, PROMPTS[:3], settings, stream=True, stream_options={"include_usage": True}))
    order = [choice.index for chunk in stream for choice in chunk.choices]
    assert order != sorted(order), "one after the other"
    assert [text for _, (text, _, _) in sorted(streamed(stream).items())] == expected
    assert stream[-1].choices == []
    assert stream[-1].usage.total_tokens == answer.usage.total_tokens
    ids = [llm.tokenizer.encode(prompt) for prompt in PROMPTS[:3]]
    assert [choice.text for choice in complete(client, ids, settings).choices] == expected


def test_what_the_client_lists(client: OpenAI, llm: LLM) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve("python").id == model.id == "python"
    assert model.model_dump()["outrider"]["decoding"] == EngineConfig().decoding.method == "auto"


def test_errors_as_the_client_raises_them(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-5", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature") as wrong:
        client.completions.create(model="python", prompt="a", temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="chat template"):
        client.chat.completions.create(model="python", messages=[{"role": "user", "content": "a"}])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_goes_away_frees_its_place(llm: LLM, server: Running, stream: bool) -> None:
    body = {"prompt": PROMPTS[0], "max_tokens": 900, "ignore_eos": True, "temperature": 0.0, "n": 4, "stream": stream}
    before = server.llm.engine.stats.num_output_tokens
    with httpx2.Client(timeout=TIMEOUT_S) as http:
        if stream:
            with http.stream("POST", f"{server.url}/v1/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx2.ReadTimeout):
                http.post(f"{server.url}/v1/completions", json=body, timeout=httpx2.Timeout(TIMEOUT_S, read=0.05))
    wait_until(lambda: nothing_runs(server))
    server.llm.engine.cache.check_integrity()
    assert server.llm.engine.stats.num_output_tokens - before < 4 * 900, "it was generated to the end"
    aborted = [
        line
        for line in httpx2.get(f"{server.url}/metrics", timeout=TIMEOUT_S).text.splitlines()
        if 'reason="abort"' in line
    ]
    assert float(aborted[0].split()[-1]) >= 1


# --- chats


@pytest.fixture(scope="module")
def chat_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    llm = LLM(make_chat_model(tmp_path_factory.mktemp("model") / "tiny"), decoding="recycling")
    with serving(llm, api_key="key", served_model_names=("tiny",)) as running:
        yield running


def test_chats_by_the_client(chat_server: Running) -> None:
    client = OpenAI(base_url=f"{chat_server.url}/v1", api_key="key", max_retries=0, timeout=TIMEOUT_S)
    chat = functools.partial(
        client.chat.completions.create,
        model="tiny",
        messages=[{"role": "user", "content": [{"type": "text", "text": "print"}]}],
        max_completion_tokens=30,
        seed=5,
        n=2,
        logprobs=True,
        top_logprobs=2,
        user="someone",
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )
    whole = chat()
    llm = chat_server.llm.with_decoding("none")
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=30, n=2, ignore_eos=True, skip_special_tokens=False)
    (expected,) = llm.chat([{"role": "user", "content": "print"}], params)
    texts = [choice.message.content for choice in whole.choices]
    assert texts == [output.text for output in expected.outputs]
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].logprobs is not None
    content = whole.choices[0].logprobs.content or []
    assert len(content) == 30
    assert b"".join(bytes(of.bytes or []) for of in content).decode(errors="replace") == texts[0]
    assert all(len(of.top_logprobs) == 2 for of in content)

    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant"] * 2
    for index in range(2):
        of = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in of) == texts[index]
        assert [choice.finish_reason for choice in of] == [None] * (len(of) - 1) + ["length"]
        assert sum(len(c.logprobs.content or []) for c in of if c.logprobs is not None) == 30
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_a_wrong_key_by_the_client(chat_server: Running) -> None:
    client = OpenAI(base_url=f"{chat_server.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


# --- stopping


def test_stopping_gives_running_requests_their_time(tmp_path: Any) -> None:
    llm = LLM(make_chat_model(tmp_path / "tiny"), decoding="none")
    body = {"prompt": "def", "max_tokens": 200, "ignore_eos": True, "temperature": 0.0, "stream": True}
    with serving(llm, grace_s=TIMEOUT_S) as server:
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=TIMEOUT_S) as response:
            lines = response.iter_lines()
            next(lines)
            server.stop()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        server.thread.join(TIMEOUT_S)
        assert not server.thread.is_alive()


def test_after_the_grace_requests_end_with_an_error(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(make_chat_model(tmp_path / "tiny"), decoding="none")
    right = llm.engine.step

    def endless() -> Any:
        changed = right()
        for request in changed:
            request.max_length = len(request.token_ids) + 2
        del changed[1:]
        return changed

    monkeypatch.setattr(llm.engine, "step", endless)
    monkeypatch.setattr(llm.model, "context_length", 10**6)
    body = {"prompt": "def", "max_tokens": 10**4, "ignore_eos": True, "stream": True}
    with serving(llm, grace_s=0.3) as server:
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=TIMEOUT_S) as response:
            lines = response.iter_lines()
            next(lines)
            server.stop()
            *_, error, done = [line for line in lines if line]
        assert '"code":"stopping"' in error
        assert done == "data: [DONE]"
        server.thread.join(TIMEOUT_S)
        assert not llm.has_unfinished
        assert llm.engine.cache.pool.num_used == 0


@pytest.mark.parametrize(
    ("signal_number", "decoding", "given"),
    [(signal.SIGINT, "auto", []), (signal.SIGTERM, "ngram", ["--decoding", "ngram"])],
    ids=["SIGINT", "SIGTERM"],
)
def test_the_command_serves_and_stops_with_status_0(
    signal_number: int, decoding: str, given: list[str], llm: LLM
) -> None:
    assert llm.config.decoding.method == "auto", "this one has measured forwards already, and the command's need not"
    code = "from outrider.cli.app import main; main()"
    options = ["--served-model-name", "tiny", "--port", "0", "--grace", "0.2", *given]
    environment = {**os.environ, "OUTRIDER_API_KEY": "key", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, "serve", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("outrider serves tiny at http://127.0.0.1:"), line
            assert f"decoding {decoding}" in line
            url = line.split(" at ")[1].split()[0]
            assert httpx2.get(f"{url}/models", timeout=TIMEOUT_S).status_code == 401
            answer = httpx2.get(f"{url}/models", headers={"Authorization": "Bearer key"}, timeout=TIMEOUT_S).json()
            assert answer["data"][0]["outrider"]["decoding"] == decoding
            process.send_signal(signal_number)
            out, err = process.communicate(timeout=TIMEOUT_S)
            assert (process.returncode, out, err) == (0, "", "")
        finally:
            process.kill()


# --- the command's errors


def run(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(app, ["serve", *arguments], env=environment)


def assert_one_error_line(result: Any, *words: str) -> None:
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line, line


def test_an_address_in_use_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outrider.llm, "load_target", lambda config: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert_one_error_line(run("--port", port), port, "--port")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/no/such/folder"], ["/no/such/folder"]),
        (["--decoding", "medusa"], ["medusa"]),
        (["--port", "70000"], ["port", "70000"]),
        (["--grace", "-1"], ["grace"]),
        (["--host", "no.such.host.invalid"], ["no.such.host.invalid"]),
        (["--max-waiting", "0"], ["max_waiting"]),
        (["--api-key", "two words"], ["api_key"]),
    ],
    ids=str,
)
def test_what_users_get_wrong_is_one_line(arguments: list[str], words: list[str]) -> None:
    port = [] if "--port" in arguments else ["--port", "0"]
    assert_one_error_line(run(*arguments, *port), *words)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "outrider.server.run")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert_one_error_line(run(), "uvicorn", "outrider[server]")
    assert CliRunner().invoke(app, ["--help"]).exit_code == 0


def test_a_public_address_without_a_key_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    import outrider.server.run

    monkeypatch.setattr(outrider.server.run, "serve_until_stopped", lambda server, sock: None)
    monkeypatch.setattr(outrider.server.run, "Server", lambda llm, config, say: None)
    monkeypatch.setattr("outrider.cli.options.EngineOptions.load", lambda engine: None)
    assert "warning" in run("--host", "0.0.0.0", "--port", "0").stderr
    assert run("--host", "0.0.0.0", "--port", "0", OUTRIDER_API_KEY="key").stderr == ""
    assert run("--port", "0").stderr == ""


def test_options_have_the_defaults_of_the_one_configuration() -> None:
    import inspect

    from outrider.cli.generate import generate
    from outrider.cli.serve import serve

    options = {name: of.default for name, of in inspect.signature(serve).parameters.items()}
    shared = {name: of.default for name, of in inspect.signature(generate).parameters.items() if name in options}
    assert {name: options[name] for name in shared} == shared
    assert {"model", "weights", "drafter", "draft_model", "exactness", "cache_gb", "max_num_seqs"} <= set(shared)
    assert (options["host"], options["port"], options["grace"]) == (
        ServerConfig.host, ServerConfig.port, ServerConfig.grace_s,
    )  # fmt: skip
    assert options["max_waiting"] == SchedulerConfig.max_waiting
    assert ServerConfig.host == "127.0.0.1"
    assert ServerConfig.api_key is None
