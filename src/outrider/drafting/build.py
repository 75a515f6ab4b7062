"""The catalogue of drafters: the one place that knows them by name."""

from __future__ import annotations

from collections.abc import Callable

from outrider.config import (
    DatastoreConfig,
    DrafterConfig,
    DraftModelConfig,
    NgramConfig,
    NoDrafterConfig,
    RecyclingConfig,
    SuffixConfig,
)
from outrider.drafting.draft_model import DraftModelDrafter
from outrider.drafting.drafter import Drafter, DraftStyle
from outrider.drafting.ngram import NgramDrafter
from outrider.drafting.plain import PlainDrafter
from outrider.drafting.recycling import RecyclingDrafter
from outrider.drafting.source import Source, SourceDrafter
from outrider.drafting.sources.datastore import DatastoreSource
from outrider.drafting.sources.suffix_tree import SuffixSource


def build_drafter(
    config: DrafterConfig,
    style: DraftStyle,
    *,
    vocab_size: int,
    vocab_fingerprint: Callable[[], bytes],
    build_draft_model: Callable[[DraftModelConfig, DraftStyle], DraftModelDrafter],
) -> Drafter:
    """A drafter from its configuration.

    Args:
        style: how the verification rule wants trees drawn.
        vocab_size: of the target.
        vocab_fingerprint: digest of what its token ids mean, 32 bytes; asked for only where a file holds token ids.
        build_draft_model: loads a second model with a cache of its own; called only where one is needed.
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
        case SuffixConfig():
            source = SuffixSource(config, vocab_size=vocab_size, vocab_fingerprint=vocab_fingerprint)
            return _source_drafter(config, source, style)
        case DatastoreConfig():
            source = DatastoreSource(config, vocab_size=vocab_size, vocab_fingerprint=vocab_fingerprint)
            return _source_drafter(config, source, style)


def _source_drafter(config: SuffixConfig | DatastoreConfig, source: Source, style: DraftStyle) -> SourceDrafter:
    return SourceDrafter(config.method, [source], max_nodes=config.max_nodes, max_depth=config.depth, style=style)
