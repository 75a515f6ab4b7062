"""What the engine needs to know from a model's configuration, whoever runs the model."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from outrider.errors import ModelLoadError

UNDECLARED_CONTEXT_LENGTH = 32768
"""Context length of a model whose configuration names none (it has no position table that could end)."""


def context_length_of(config: PretrainedConfig) -> int:
    """The most positions that a model of this configuration computes right."""
    names = (
        "max_position_embeddings",
        "n_positions",
        "n_ctx",
        "max_seq_len",
        "max_sequence_length",
        "seq_length",
    )
    declared = [getattr(config, name, None) for name in names]
    length = next((value for value in declared if isinstance(value, int) and value > 0), None)
    if length is None:
        return UNDECLARED_CONTEXT_LENGTH
    rope = getattr(config, "rope_parameters", None) or {}
    variants = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for variant in variants:
        # Beyond the original length longrope changes all rows' frequencies, of other sequences in the batch
        # and of cached keys, too; "dynamic" does so beyond the declared length, which is never exceeded.
        if variant.get("rope_type") == "longrope":
            original = variant.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            length = min(length, original or length)
    return length


def eos_token_ids_of(*sources: Any) -> tuple[int, ...]:
    """Tokens that end a text by the first of the configurations that names any.

    Args:
        sources: the generation configuration, then the model's; None is skipped.

    Raises:
        ModelLoadError: something else than token ids.
    """
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            ids = tuple(ids) if isinstance(ids, list | tuple) else (ids,)
            if not all(isinstance(token, int) for token in ids):
                raise ModelLoadError("eos_token_id", got=repr(ids)[:60], expected="a token id, or a list of them")
            return ids
    return ()
