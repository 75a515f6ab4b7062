"""References reach drafters as token ids of the target, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from outrider.config import (
    CopyConfig,
    DrafterConfig,
    EditConfig,
    HierarchyConfig,
    MergeConfig,
    NgramConfig,
    drafter_config,
)
from outrider.engine.references import with_token_references
from outrider.errors import ConfigError
from outrider.inputs.tokenizer import Tokenizer


class Letters(Tokenizer):
    """One token a letter."""

    def __init__(self) -> None:
        pass

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens, "a reference is a piece of text, not a prompt"
        return [ord(letter) - ord("a") for letter in text]


def resolve(spec: object, vocab_size: int = 26) -> DrafterConfig:
    return with_token_references(drafter_config(spec), Letters(), vocab_size)  # type: ignore[arg-type]


def test_texts_files_and_ids_become_ids(tmp_path: Path) -> None:
    file = tmp_path / "reference.txt"
    file.write_text("xyz", encoding="utf-8")
    config = resolve({"method": "copy", "references": ["abc", [7, 8]], "reference_files": [str(file)]})
    assert isinstance(config, CopyConfig)
    assert config.references == ((0, 1, 2), (7, 8), (23, 24, 25))
    assert config.reference_files == ()


def test_references_inside_merges_and_hierarchies() -> None:
    edit = {"method": "edit", "references": ["ab"]}
    merged = resolve({"method": "merge", "sources": ["ngram", edit]})
    assert isinstance(merged, MergeConfig)
    assert merged.sources == (NgramConfig(), EditConfig(references=((0, 1),)))
    levels = resolve({"method": "hierarchy", "levels": [edit]})
    assert isinstance(levels, HierarchyConfig)
    assert levels.levels == (EditConfig(references=((0, 1),)),)


def test_what_cannot_be_read_or_is_too_long_is_refused(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\xfa")
    for path in (tmp_path / "missing", tmp_path, binary):
        with pytest.raises(ConfigError, match="reference file"):
            resolve({"method": "edit", "reference_files": [str(path)]})
    with pytest.raises(ConfigError, match="max_reference_tokens"):
        resolve({"method": "copy", "references": ["abcdef", "abcdef"], "max_reference_tokens": 10})
    with pytest.raises(ConfigError, match="token id 30"):
        resolve({"method": "aded", "references": [[1, 30]]})
