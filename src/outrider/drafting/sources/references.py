"""Texts that a user gives for a drafter to copy from or to learn from, as token ids."""

from __future__ import annotations

from outrider.config import ReferenceConfig
from outrider.errors import ConfigError


def token_references(config: ReferenceConfig) -> list[tuple[int, ...]]:
    """The references of a configuration whose texts have been tokenised.

    Raises:
        ConfigError: a text or a file is left, which no drafter can read.
    """
    references = [tuple(reference) for reference in config.references if not isinstance(reference, str)]
    if len(references) < len(config.references) or config.reference_files:
        raise ConfigError(
            f"{config.method} references",
            got="text or files",
            expected="token ids",
            remedy="build the drafter through LLM or build_engine, which tokenise them",
        )
    return references
