"""Texts that drafters copy from or learn from, made token ids by the target's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from outrider.config import (
    AdedConfig,
    AutoConfig,
    CopyConfig,
    DrafterConfig,
    EditConfig,
    HierarchyConfig,
    MergeConfig,
    ReferenceConfig,
    drafter_config,
    source_config,
)
from outrider.errors import ConfigError
from outrider.inputs.tokenizer import Tokenizer


def with_token_references(config: DrafterConfig, tokenizer: Tokenizer, vocab_size: int) -> DrafterConfig:
    """The same configuration with every reference, also inside merges and hierarchies, as token ids.

    Raises:
        ConfigError: a file that cannot be read, more tokens than `max_reference_tokens`, or unknown token ids.
    """
    match config:
        case MergeConfig():
            sources = [with_token_references(source_config(spec), tokenizer, vocab_size) for spec in config.sources]
            return replace(config, sources=tuple(sources))
        case HierarchyConfig():
            levels = [with_token_references(source_config(spec), tokenizer, vocab_size) for spec in config.levels]
            return replace(config, levels=tuple(levels))
        case AutoConfig() if config.drafters is not None:
            drafters = [
                with_token_references(drafter_config(spec), tokenizer, vocab_size) for spec in config.drafters
            ]
            return replace(config, drafters=tuple(drafters))
        case CopyConfig() | EditConfig() | AdedConfig():
            references = _token_references(config, tokenizer, vocab_size)
            return replace(config, references=references, reference_files=())
        case _:
            return config


def _token_references(config: ReferenceConfig, tokenizer: Tokenizer, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    texts: list[str | Sequence[int]] = [*config.references, *(_read(config, path) for path in config.reference_files)]
    references: list[tuple[int, ...]] = []
    left = config.max_reference_tokens
    for text in texts:
        token_ids = tokenizer.encode(text, add_special_tokens=False) if isinstance(text, str) else text
        unknown = [token for token in token_ids if token >= vocab_size]
        if unknown:
            raise ConfigError(
                f"{config.method} reference", got=f"token id {unknown[0]}", expected=f"below vocab_size={vocab_size}"
            )
        left -= len(token_ids)
        if left < 0:
            raise ConfigError(
                f"{config.method} references",
                got=f"at least {config.max_reference_tokens - left} tokens",
                expected=f"at most max_reference_tokens={config.max_reference_tokens}",
                remedy="give shorter references, or a greater max_reference_tokens",
            )
        references.append(tuple(token_ids))
    return tuple(references)


def _read(config: ReferenceConfig, path: str) -> str:
    try:
        if not Path(path).is_file():
            raise FileNotFoundError("no such file")
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(
            f"{config.method} reference file {path!r}", got=str(error), expected="a UTF-8 text file that can be read"
        ) from error
