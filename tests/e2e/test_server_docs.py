"""Every example of the server's page runs as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import httpx2
import pytest

from outrider import LLM
from outrider.server.protocol import NEUTRAL, ChatRequest, CompletionRequest
from tests.server_harness import TIMEOUT_S, serving

PAGE = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def call(line: str, url: str) -> Any:
    """What curl would do."""
    words = shlex.split(line)
    assert words[:2] == ["curl", "-s"]
    address = words[2].replace(ADDRESS, url)
    if len(words) == 3:
        return httpx2.get(address, timeout=TIMEOUT_S)
    assert words[3::2] == ["-H", "-d"]
    name, value = words[4].split(": ")
    return httpx2.post(address, content=words[6], headers={name: value}, timeout=TIMEOUT_S)


def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM(decoding="ngram")
    with serving(llm) as server:
        lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("curl")]
        assert len(lines) == 6
        for line in lines:
            response = call(line, server.url)
            assert response.status_code == 200, (line, response.text)
        (code,) = blocks("python")
        exec(compile(code.replace(ADDRESS, server.url), "server.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "'lossless': True" in printed
    assert "'seed': 7" in printed


def test_the_page_names_every_field_and_every_refusal() -> None:
    missing = [
        name
        for name in {*CompletionRequest.model_fields, *ChatRequest.model_fields} - {"best_of"}
        if f"`{name}`" not in PAGE
    ]
    assert not missing
    undocumented = {"parallel_tool_calls", "function_call", "modalities", "verbosity", "web_search_options"}
    undocumented |= {"length_penalty", "continue_final_message", "truncate_prompt_tokens", "bad_words"}
    undocumented |= {"allowed_token_ids", "logits_processors"}  # under "every other field"
    known = {name for name in NEUTRAL if not name.startswith("guided_")} - undocumented
    assert not [name for name in known if f"`{name}`" not in PAGE]
