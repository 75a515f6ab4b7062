"""Prompts from the command line, standard input and files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from outrider.bench.held_out import held_out_prompts
from outrider.bench.workloads import Workload, open_workload
from outrider.errors import ConfigError, PromptError

STDIN = "-"
JSONL_FORM = '{"prompt": "..."} or {"prompt_token_ids": [...]}'

Prompt = str | dict[str, Any]


def read_prompts(argument: str | None, source: str | None) -> list[Prompt]:
    """The prompt given as an argument (``-``: all of stdin), or those of a file (``-``: lines of stdin).

    Raises:
        PromptError: neither or both given, an unreadable or empty file, a line that is no prompt.
    """
    if (argument is None) == (source is None):
        raise PromptError(
            "prompt",
            got="nothing" if argument is None else "an argument and --prompts",
            expected="one as an argument, or --prompts FILE",
            remedy='try: outrider generate "def quicksort("' if argument is None else None,
        )
    if source is not None:
        return prompts_from_file(source)
    text = _read_utf8(STDIN) if argument == STDIN else argument or ""
    if not text:
        raise PromptError("prompt", got="no text", expected="at least one token", remedy="give some text to continue")
    return [_checked_text(text, "prompt")]


def prompts_from_file(source: str) -> list[Prompt]:
    """One prompt per line that is not blank.

    A file that ends in .jsonl, or whose first line is a JSON object with a prompt, holds a JSON object per
    line (its other keys are ignored); every other file is plain text.

    Raises:
        PromptError: the file is missing, empty or not UTF-8, or a line is no prompt.
    """
    name = "standard input" if source == STDIN else source
    text = _read_utf8(source).removeprefix("\ufeff")
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        raise PromptError(f"prompts of {name}", got="no lines", expected="one prompt per line")
    if not source.endswith(".jsonl") and not _looks_like_jsonl(lines[0][1]):
        return [line for _, line in lines]
    return [_prompt_of_line(line, f"{name} line {number}") for number, line in lines]


def prompts_or_held_out(spec: str | None, default_count: int) -> tuple[list[Prompt], str]:
    """Prompts and where they are from: a file's, or as many pieces of held-out code as `spec` says.

    Raises:
        ConfigError: a count below one.
        PromptError: the file holds no prompts.
    """
    count = _count(spec, default_count)
    if count is not None:
        prompts, source = held_out_prompts(count)
        return list(prompts), source
    assert spec is not None, "no prompts given are a count"
    return prompts_from_file(spec), _name_of(spec)


def chosen_workload(name: str | None, spec: str | None, data: str | None, default_count: int) -> Workload:
    """What `--workload`, `--prompts` and `--data` ask for: a file's prompts, or as many as `spec` says of a workload.

    Raises:
        ConfigError: a count below one, an unknown workload, or both a workload and a file of prompts.
        PromptError: the file holds no prompts.
    """
    count = _count(spec, default_count)
    if count is not None:
        return open_workload(name or "code", count, data)
    assert spec is not None, "no prompts given are a count"
    if name is not None or data is not None:
        raise ConfigError("--prompts", got=f"the file {spec} and a workload", expected="one of them")
    prompts = prompts_from_file(spec)
    texts = [prompt if isinstance(prompt, str) else prompt["prompt_token_ids"] for prompt in prompts]
    return Workload("file", _name_of(spec), len(texts), texts)


def _count(spec: str | None, default_count: int) -> int | None:
    """How many prompts are asked for; None where `spec` is a file."""
    if spec is not None and not spec.lstrip("-").isdecimal():
        return None
    count = default_count if spec is None else int(spec)
    if not 1 <= count <= 1000:
        raise ConfigError("--prompts", got=count, expected="a file, or a number from 1 to 1000")
    return count


def _name_of(source: str) -> str:
    return "standard input" if source == STDIN else Path(source).name


def _read_utf8(source: str) -> str:
    """All of a file, or of stdin, as text."""
    name = "standard input" if source == STDIN else source
    try:
        data = sys.stdin.buffer.read() if source == STDIN else Path(source).read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"prompts of {name}",
            got=f"byte {error.object[error.start]:#04x} at offset {error.start}",
            expected="UTF-8 text",
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise PromptError(f"prompts file {name}", got=reason, expected="a readable file of prompts") from error


def _looks_like_jsonl(line: str) -> bool:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and ("prompt" in value or "prompt_token_ids" in value)


def _prompt_of_line(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(where, got=f"invalid JSON ({error})", expected=JSONL_FORM) from error
    if isinstance(value, dict):
        ids = value.get("prompt_token_ids")
        if isinstance(ids, list):
            return {"prompt_token_ids": ids}
        if isinstance(value.get("prompt"), str):
            return _checked_text(value["prompt"], where)
    raise PromptError(where, got=repr(line)[:60], expected=JSONL_FORM)


def _checked_text(text: str, where: str) -> str:
    """Text that a tokenizer can take: no lone surrogates, which broken bytes and JSON escapes may leave."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(where, got=f"broken UTF-8 at character {error.start}", expected="valid text") from error
    return text
