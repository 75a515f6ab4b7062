"""The catalogue of drafters: the one place that knows them by name."""

from __future__ import annotations

from collections.abc import Callable

from outrider.config import (
    AdedConfig,
    AnpdConfig,
    AutoConfig,
    CopyConfig,
    DrafterConfig,
    DraftModelConfig,
    EditConfig,
    HierarchyConfig,
    HistoryConfig,
    JacobiConfig,
    LookaheadConfig,
    MergeConfig,
    NgramConfig,
    NoDrafterConfig,
    RecyclingConfig,
    SourceConfig,
    drafter_config,
    source_config,
)
from outrider.drafting.auto import AutoDrafter
from outrider.drafting.draft_model import DraftModelDrafter
from outrider.drafting.drafter import Drafter, DraftStyle
from outrider.drafting.forward_cost import ForwardCost
from outrider.drafting.jacobi import JacobiDrafter
from outrider.drafting.lookahead import LookaheadDrafter
from outrider.drafting.plain import PlainDrafter
from outrider.drafting.recycling import RecyclingDrafter
from outrider.drafting.source import Source, SourceDrafter
from outrider.drafting.sources.aded import AdedSource
from outrider.drafting.sources.anpd import AnpdSource
from outrider.drafting.sources.copy import CopySource
from outrider.drafting.sources.edit import EditSource
from outrider.drafting.sources.hierarchy import HierarchyDrafter
from outrider.drafting.sources.history import HistorySource
from outrider.drafting.sources.ngram import NgramSource


def build_drafter(
    config: DrafterConfig,
    style: DraftStyle,
    *,
    vocab_size: int,
    build_draft_model: Callable[[DraftModelConfig, DraftStyle], DraftModelDrafter],
    forward_cost: Callable[[], ForwardCost],
) -> Drafter:
    """A drafter from its configuration.

    Args:
        style: how the verification rule wants trees drawn.
        vocab_size: of the target.
        build_draft_model: loads a second model with a cache of its own; called only where one is needed.
        forward_cost: what the target's forwards cost; called only by a planner.

    Raises:
        ConfigError: references that are not token ids.
    """
    match config:
        case AutoConfig():
            drafters = [
                build_drafter(
                    drafter_config(spec),
                    style,
                    vocab_size=vocab_size,
                    build_draft_model=build_draft_model,
                    forward_cost=forward_cost,
                )
                for spec in config.drafters or ()
            ]
            return AutoDrafter(config, drafters, forward_cost())
        case NoDrafterConfig():
            return PlainDrafter()
        case RecyclingConfig():
            return RecyclingDrafter(config, style, vocab_size)
        case JacobiConfig():
            return JacobiDrafter(config, style, vocab_size)
        case LookaheadConfig():
            return LookaheadDrafter(config, style, vocab_size)
        case DraftModelConfig():
            return build_draft_model(config, style)
        case HierarchyConfig():
            levels = [build_source(source_config(spec)) for spec in config.levels]
            return HierarchyDrafter(levels, max_nodes=config.max_nodes, max_depth=config.depth, style=style)
        case MergeConfig():
            sources = [build_source(source_config(spec)) for spec in config.sources]
        case EditConfig(lookup=True):
            sources = [build_source(config), NgramSource(NgramConfig(depth=config.depth))]
        case _:
            sources = [build_source(config)]
    return SourceDrafter(config.method, sources, max_nodes=config.max_nodes, max_depth=config.depth, style=style)


def build_source(config: SourceConfig) -> Source:
    """A source of continuations from the configuration of the drafter that it is by itself.

    Raises:
        ConfigError: references that are not token ids.
    """
    match config:
        case NgramConfig():
            return NgramSource(config)
        case AnpdConfig():
            return AnpdSource(config)
        case AdedConfig():
            return AdedSource(config)
        case CopyConfig():
            return CopySource(config)
        case EditConfig():
            return EditSource(config)
        case HistoryConfig():
            return HistorySource(config)
