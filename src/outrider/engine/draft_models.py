"""Drafters that run a second model: which checkpoint, in which form, and whether it speaks the target's language."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from weakref import WeakValueDictionary

from outrider.cache.kv_cache import KVCache
from outrider.config import (
    AutoConfig,
    DraftModelConfig,
    EngineConfig,
    SelfDraftConfig,
    SortedDraftConfig,
    StagedConfig,
    UniversalDraftConfig,
    drafter_config,
)
from outrider.drafting.build import TargetParts, build_drafter
from outrider.drafting.draft_kinds import DraftParts, plain_draft, sorted_draft, staged_draft, translated_draft
from outrider.drafting.drafter import Drafter, DraftStyle
from outrider.drafting.forward_cost import ForwardCost
from outrider.drafting.text_draft import TextDrafter
from outrider.drafting.translated_runner import Translation
from outrider.engine.bundled import BUNDLED_DRAFT, BUNDLED_TARGET
from outrider.engine.calibration import forward_cost_of, identity_of
from outrider.engine.tokenizer_pair import TokenizerPair
from outrider.errors import ConfigError, VocabularyMismatchError
from outrider.inputs.tokenizer import Tokenizer
from outrider.models.loader import load_model, load_tokenizer
from outrider.models.model import Model
from outrider.models.sub_models import sub_model
from outrider.models.transformers_model import TransformersModel

_NESTED_DRAFTS: WeakValueDictionary[tuple[object, ...], Model] = WeakValueDictionary()
"""Loaded nested drafts by path and form: as long as an LLM uses one, others that name it use it too."""


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

    def build(self, drafter: DraftModelConfig, style: DraftStyle) -> Drafter:
        """Load what `drafter` names, with a cache of its own.

        Raises:
            ConfigError: no draft model is named, or the format cannot be had on this device.
            ModelLoadError: the draft model cannot be loaded.
            VocabularyMismatchError: the draft's token ids are not the target's.
        """
        match drafter:
            case SelfDraftConfig():
                return plain_draft(drafter, style, self._parts(self._load_self(drafter), drafter))
            case StagedConfig():
                inner_config = drafter_config(drafter.drafter)
                parts = self._parts(self._load(drafter), drafter)
                measured = not isinstance(inner_config, AutoConfig) or inner_config.calibrate
                as_target = TargetParts(
                    vocab_size=self._target.vocab_size,
                    vocab_fingerprint=lambda: self._tokenizer.fingerprint,
                    build_draft_model=self.build,
                    forward_cost=parts.forward_cost if measured else ForwardCost.unknown,
                )
                inner = build_drafter(inner_config, style, as_target)
                return staged_draft(drafter, style, parts, inner, inner_config)
            case SortedDraftConfig():
                whole = self._load_shared(drafter)
                num_layers = len(whole.layer_shapes)
                depths = drafter.layers or sorted({max(1, num_layers // 2), num_layers})
                levels = [self._parts(sub_model(whole, depth), drafter) for depth in depths]
                return sorted_draft(drafter, style, levels, whole)
            case UniversalDraftConfig():
                return self._build_universal(drafter, style)
            case _:
                return plain_draft(drafter, style, self._parts(self._load(drafter), drafter))

    def _parts(self, model: Model, drafter: DraftModelConfig) -> DraftParts:
        return DraftParts(
            model,
            self._new_cache(model),
            self._target.vocab_size,
            self._config.scheduler.max_batch_tokens,
            lambda: self._cost_of(model, drafter),
        )

    def _cost_of(self, model: Model, drafter: DraftModelConfig) -> ForwardCost:
        """What a draft's forwards cost: measured once, as those of targets are."""
        is_target = isinstance(drafter, SelfDraftConfig)
        path = (self._config.model or BUNDLED_TARGET) if is_target else self._path_of(drafter)
        form = {name: getattr(drafter, name) for name in ("revision", "weights", "group_size")}
        identity = identity_of(str(path), {**form, "device": self._config.device}, model)
        return forward_cost_of(model, identity, row_invariant=False)

    def _build_universal(self, drafter: UniversalDraftConfig, style: DraftStyle) -> Drafter:
        path = self._path_of(drafter)
        tokenizer = Tokenizer(load_tokenizer(path, revision=drafter.revision))
        model = self._load_model(path, drafter.revision, drafter.dtype, drafter)
        pair = TokenizerPair(self._tokenizer, tokenizer, self._target.vocab_size, model.vocab_size)
        alignment = drafter.alignment
        if alignment == "auto":
            alignment = "vocabulary" if pair.overlap >= drafter.min_overlap else "text"
        if alignment == "text":
            own = replace(self._parts(model, drafter), vocab_size=model.vocab_size)
            draft = plain_draft(drafter, DraftStyle(chains_only=True), own)
            return TextDrafter(
                draft, pair.target_side, pair.draft_side, depth=drafter.depth, max_nodes=drafter.max_nodes
            )
        if len(pair.shared_ids) == 0:
            raise VocabularyMismatchError(
                f"vocabulary of {path}",
                got="no token that the target has too",
                expected="some",
                remedy="set alignment to 'text'",
            )
        translation = Translation(pair.shared_ids, pair.encode_for_draft, pair.spell_for_draft)
        return translated_draft(drafter, style, self._parts(model, drafter), translation)

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

    def _load_shared(self, drafter: SortedDraftConfig) -> Model:
        """The whole nested draft, of which LLMs that name it in the same form have one copy."""
        config = self._config
        path = self._path_of(drafter)
        form = (
            drafter.revision,
            drafter.dtype,
            drafter.weights,
            drafter.group_size,
            config.cache.dtype,
            config.device,
        )
        model = _NESTED_DRAFTS.get((path, *form))
        if model is None:
            model = self._load_model(path, drafter.revision, drafter.dtype, drafter)
            _NESTED_DRAFTS[path, *form] = model
        check_same_vocabulary(self._tokenizer, Tokenizer(load_tokenizer(path, revision=drafter.revision)))
        return model

    def _path_of(self, drafter: DraftModelConfig) -> str:
        if drafter.model is None and self._config.model is not None:
            raise ConfigError(
                f"{drafter.method} drafter",
                got="no draft model",
                expected="a folder or hub id",
                remedy=f"pass decoding={{'method': '{drafter.method}', 'model': ...}}, or --draft-model",
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
        remedy="use decoding='universal_draft' for it, a draft with the target's tokenizer, or decoding='ngram'",
    )
