"""Prompts of public data sets, read from files that the user has; none is part of outrider."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError, PromptError

DATA_SETS = ("spec_bench", "humaneval")
_FILES = {
    "spec_bench": "question.jsonl of Spec-Bench (github.com/hemingkx/Spec-Bench)",
    "humaneval": "HumanEval.jsonl or HumanEval.jsonl.gz (github.com/openai/human-eval)",
}


def data_set_prompts(name: str, path: str | None) -> tuple[list[str], str]:
    """All prompts of a data set, and a description of their source.

    Spec-Bench's first turns, the categories in turn; HumanEval's prompts, in order.

    Args:
        name: one of DATA_SETS.
        path: its file, or a folder that holds it.

    Raises:
        ConfigError: no path.
        PromptError: no such file, or one of another form.
    """
    if path is None:
        raise ConfigError(
            f"workload {name!r}", got="no file", expected=_FILES[name], remedy="download it and pass --data PATH"
        )
    file = _find(name, Path(path).expanduser())
    records = _read_lines(name, file)
    try:
        if name == "spec_bench":
            prompts = _in_turns([(str(record["category"]), str(record["turns"][0])) for record in records])
        else:
            prompts = [str(record["prompt"]) for record in records]
    except (KeyError, IndexError, TypeError) as error:
        raise PromptError(f"{file}", got=f"a record without {error}", expected=_FILES[name]) from error
    if not prompts:
        raise PromptError(f"{file}", got="no records", expected=_FILES[name])
    return prompts, f"{file.name}, {len(prompts)} prompts"


def _find(name: str, path: Path) -> Path:
    if not path.is_dir():
        return path
    candidates = {"spec_bench": ("question.jsonl",), "humaneval": ("HumanEval.jsonl", "HumanEval.jsonl.gz")}[name]
    found = [path / candidate for candidate in candidates if (path / candidate).is_file()]
    if not found:
        raise PromptError(f"{path}", got="none of " + ", ".join(candidates), expected=_FILES[name])
    return found[0]


def _read_lines(name: str, file: Path) -> list[Any]:
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise PromptError(f"{file}", got=error.strerror or str(error), expected=_FILES[name]) from error
    except (ValueError, EOFError, zlib.error, RecursionError) as error:
        raise PromptError(f"{file}", got=f"{type(error).__name__}: {error}", expected=_FILES[name]) from error


def _in_turns(prompts: Sequence[tuple[str, str]]) -> list[str]:
    """The first of each category, then the second of each, so that a few are of every kind."""
    by_category: dict[str, list[str]] = {}
    for category, prompt in prompts:
        by_category.setdefault(category, []).append(prompt)
    return [prompt for prompt in chain.from_iterable(zip_longest(*by_category.values())) if prompt is not None]
