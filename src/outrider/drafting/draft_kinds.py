"""Draft models of several kinds: who reads for the drafter of `draft_model.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from outrider.cache.kv_cache import KVCache
from outrider.config import DraftModelConfig, SortedDraftConfig
from outrider.drafting.draft_model import DraftModelDrafter
from outrider.drafting.drafter import Drafter, DraftStyle
from outrider.drafting.forward_cost import ForwardCost
from outrider.drafting.guesser import Guesser
from outrider.drafting.sorted_runner import SortedRunner, SubModelRunner
from outrider.drafting.staged_runner import StagedRunner
from outrider.drafting.translated_runner import TranslatedRunner, Translation
from outrider.models.model import Model

LOOK_BACK = 128
"""Tokens that a lookup drafter is shown where drafted ones follow: indexed in each step, so not more."""


@dataclass(frozen=True, eq=False)
class DraftParts:
    """A loaded draft model for one target.

    Attributes:
        cache: of the model's own.
        vocab_size: of the target.
        max_batch_tokens: the most rows of one forward.
        forward_cost: what the model's forwards cost; called only where something is planned by it.
    """

    model: Model
    cache: KVCache
    vocab_size: int
    max_batch_tokens: int
    forward_cost: Callable[[], ForwardCost]


def plain_draft(config: DraftModelConfig, style: DraftStyle, parts: DraftParts) -> DraftModelDrafter:
    """The model reads every token by itself."""
    return DraftModelDrafter(config, style, **vars(parts))


def staged_draft(
    config: DraftModelConfig, style: DraftStyle, parts: DraftParts, inner: Drafter, inner_config: object
) -> DraftModelDrafter:
    """The model is decoded speculatively, with the guesses of `inner`."""
    window = None if isinstance(inner_config, DraftModelConfig) else LOOK_BACK  # models find their prefix cached
    runner = partial(StagedRunner, guesser=Guesser(inner, window))
    return DraftModelDrafter(config, style, **vars(parts), make_runner=runner)


def sorted_draft(
    config: SortedDraftConfig, style: DraftStyle, levels: Sequence[DraftParts], whole: Model | None = None
) -> DraftModelDrafter:
    """Sub-models read, the smallest first; `whole` is the model that they share."""

    def runner(*_: object, **__: object) -> SortedRunner:
        readers = [
            SubModelRunner(
                level.model, level.cache, vocab_size=level.vocab_size, max_batch_tokens=level.max_batch_tokens
            )
            for level in levels
        ]
        return SortedRunner(readers, config.min_confidence, whole)

    return DraftModelDrafter(config, style, **vars(levels[-1]), make_runner=runner)


def translated_draft(
    config: DraftModelConfig, style: DraftStyle, parts: DraftParts, translation: Translation
) -> DraftModelDrafter:
    """The model has another vocabulary, and drafts what both can say."""
    return DraftModelDrafter(
        config, style, **vars(parts), make_runner=partial(TranslatedRunner, translation=translation)
    )
