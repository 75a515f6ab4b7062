"""The catalogue of drafters: the one place that knows them by name."""

from __future__ import annotations

from collections.abc import Callable

from outrider.config import DrafterConfig, DraftModelConfig, NgramConfig, NoDrafterConfig, RecyclingConfig
from outrider.drafting.drafter import Drafter, DraftStyle
from outrider.drafting.ngram import NgramDrafter
from outrider.drafting.plain import PlainDrafter
from outrider.drafting.recycling import RecyclingDrafter


def build_drafter(
    config: DrafterConfig,
    style: DraftStyle,
    *,
    vocab_size: int,
    build_draft_model: Callable[[DraftModelConfig, DraftStyle], Drafter],
) -> Drafter:
    """A drafter from its configuration.

    Args:
        style: how the verification rule wants trees drawn.
        vocab_size: of the target.
        build_draft_model: loads a second model of any kind, with a cache of its own; called only where one is needed.
    """
    match config:
        case NoDrafterConfig():
            return PlainDrafter()
        case NgramConfig():
            return NgramDrafter(config, style)
        case RecyclingConfig():
            return RecyclingDrafter(config, style, vocab_size)
        case DraftModelConfig():
            return build_draft_model(config, style)
