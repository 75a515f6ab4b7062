"""Drafters that run a second model: which checkpoint, in which form, and whether it speaks the target's language."""

from __future__ import annotations

from collections.abc import Callable

from outrider.cache.kv_cache import KVCache
from outrider.config import DraftModelConfig, EngineConfig, SelfDraftConfig
from outrider.drafting.draft_model import DraftModelDrafter
from outrider.drafting.drafter import DraftStyle
from outrider.engine.bundled import BUNDLED_DRAFT, BUNDLED_TARGET
from outrider.errors import ConfigError, VocabularyMismatchError
from outrider.inputs.tokenizer import Tokenizer
from outrider.models.loader import load_model, load_tokenizer
from outrider.models.model import Model
from outrider.models.transformers_model import TransformersModel


class DraftModels:
    """Builds drafters for one target.

    Args:
        config: of the engine; a draft has its device and its cache's settings.
        tokenizer: of the target.
        new_cache: an empty cache for a model.
    """

    def __init__(
        self, config: EngineConfig, target: Model, tokenizer: Tokenizer, new_cache: Callable[[Model], KVCache]
    ) -> None:
        self._config = config
        self._target = target
        self._tokenizer = tokenizer
        self._new_cache = new_cache

    def build(self, drafter: DraftModelConfig, style: DraftStyle) -> DraftModelDrafter:
        """Load what `drafter` names, with a cache of its own.

        Raises:
            ConfigError: no draft model is named, or the format cannot be had on this device.
            ModelLoadError: the draft model cannot be loaded.
            VocabularyMismatchError: the draft's token ids are not the target's.
        """
        model = self._load_self(drafter) if isinstance(drafter, SelfDraftConfig) else self._load(drafter)
        return DraftModelDrafter(
            drafter,
            style,
            model=model,
            cache=self._new_cache(model),
            vocab_size=self._target.vocab_size,
            max_batch_tokens=self._config.scheduler.max_batch_tokens,
        )

    def _load(self, drafter: DraftModelConfig) -> Model:
        path = self._path_of(drafter)
        draft = self._load_model(path, drafter.revision, drafter.dtype, drafter)
        check_same_vocabulary(self._tokenizer, Tokenizer(load_tokenizer(path, revision=drafter.revision)))
        return draft

    def _load_self(self, drafter: SelfDraftConfig) -> Model:
        """The target's checkpoint again in another format.

        Embeddings have no second copy: the lean path maps them from the same file, a module borrows the target's.
        """
        config = self._config
        dtype = config.dtype if drafter.dtype == "auto" else drafter.dtype
        draft = self._load_model(config.model or BUNDLED_TARGET, config.revision, dtype, drafter)
        if isinstance(draft, TransformersModel) and isinstance(self._target, TransformersModel):
            draft.share_embeddings(self._target)
        return draft

    def _path_of(self, drafter: DraftModelConfig) -> str:
        if drafter.model is None and self._config.model is not None:
            raise ConfigError(
                f"{drafter.method} drafter",
                got="no draft model",
                expected="a folder or hub id",
                remedy=f"pass drafter={{'method': '{drafter.method}', 'model': ...}}, or --draft-model",
            )
        return drafter.model or BUNDLED_DRAFT

    def _load_model(self, path: str, revision: str | None, dtype: str, drafter: DraftModelConfig) -> Model:
        return load_model(
            path,
            revision=revision,
            dtype=dtype,
            weights=drafter.weights,
            group_size=drafter.group_size,
            cache_dtype=self._config.cache.dtype,
            device=self._config.device,
        )


def check_same_vocabulary(target: Tokenizer, draft: Tokenizer) -> None:
    """Token ids must mean the same to both models; padding of the embedding beyond the tokenizer may differ.

    Raises:
        VocabularyMismatchError: a token has another id, or is missing.
    """
    if target.vocab == draft.vocab:
        return
    differing = sorted(target.vocab.items() ^ draft.vocab.items())[:2]
    raise VocabularyMismatchError(
        f"draft vocabulary of {len(draft.vocab)} tokens differs from the target's {len(target.vocab)}",
        got=f"tokens such as {differing}",
        expected="the same token ids in both",
        remedy="use a draft with the target's tokenizer, or drafter='ngram' or 'recycling'",
    )
