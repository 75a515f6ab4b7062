"""The catalogue of drafters: the one place that knows them by name."""

from __future__ import annotations

from collections.abc import Callable

from outrider.config import (
    DrafterConfig,
    DraftModelConfig,
    JacobiConfig,
    LookaheadConfig,
    NgramConfig,
    NoDrafterConfig,
    RecyclingConfig,
)
from outrider.drafting.draft_model import DraftModelDrafter
from outrider.drafting.drafter import Drafter, DraftStyle
from outrider.drafting.jacobi import JacobiDrafter
from outrider.drafting.lookahead import LookaheadDrafter
from outrider.drafting.ngram import NgramDrafter
from outrider.drafting.plain import PlainDrafter
from outrider.drafting.recycling import RecyclingDrafter


def build_drafter(
    config: DrafterConfig,
    style: DraftStyle,
    *,
    vocab_size: int,
    build_draft_model: Callable[[DraftModelConfig, DraftStyle], DraftModelDrafter],
) -> Drafter:
    """A drafter from its configuration.

    Args:
        style: how the verification rule wants trees drawn.
        vocab_size: of the target.
        build_draft_model: loads a second model with a cache of its own; called only where one is needed.
    """
    match config:
        case NoDrafterConfig():
            return PlainDrafter()
        case NgramConfig():
            return NgramDrafter(config, style)
        case RecyclingConfig():
            return RecyclingDrafter(config, style, vocab_size)
        case JacobiConfig():
            return JacobiDrafter(config, style, vocab_size)
        case LookaheadConfig():
            return LookaheadDrafter(config, style, vocab_size)
        case DraftModelConfig():
            return build_draft_model(config, style)
