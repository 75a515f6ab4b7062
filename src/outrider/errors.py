"""Typed errors. Each says what is wrong, what was got, what was expected and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence


class OutriderError(Exception):
    """Base of every error that a user can cause and mend."""

    def __init__(self, what: str, *, got: object = None, expected: object = None, remedy: str | None = None) -> None:
        self.what, self.got, self.expected, self.remedy = what, got, expected, remedy
        parts = [what]
        if got is not None:
            parts.append(f"got {got}")
        if expected is not None:
            parts.append(f"expected {expected}")
        message = ": ".join([parts[0], ", ".join(parts[1:])]) if len(parts) > 1 else what
        super().__init__(f"{message}; {remedy}" if remedy else message)


class ConfigError(OutriderError, ValueError):
    """A configuration value, or a combination of them, that cannot work."""


class QueueFullError(ConfigError):
    """As many requests wait as may; the same one can be taken later."""


class SamplingParamsError(OutriderError, ValueError):
    """A sampling parameter outside its range."""


class PromptError(OutriderError, ValueError):
    """A prompt that cannot be generated from: empty, too long, or of unknown tokens."""


class ModelLoadError(OutriderError):
    """A model folder or hub id that cannot be loaded."""


class UnsupportedModelError(ModelLoadError):
    """A model whose outputs would be wrong, or which is no causal language model."""


class VocabularyMismatchError(ConfigError):
    """A draft model whose token ids do not mean what the target's mean."""


class LookupFileError(OutriderError, ValueError):
    """A datastore or a history of outputs that is damaged, or a file that is something else."""


class TokenTreeError(OutriderError, ValueError):
    """A proposal that is not a tree: parents after children, empty, or wider than the rule takes."""


class ExactnessError(OutriderError):
    """The bitwise self-test failed: this model on this device is not row-invariant."""


class NumericsError(OutriderError):
    """The model produced logits that no token may be chosen from (NaN or infinite).

    Attributes:
        outputs: the outputs of the whole call where one was cut short, those of the sound prompts complete.
    """

    outputs: Sequence[object] = ()


class CacheError(OutriderError):
    """The KV cache cannot hold what was asked of it."""
