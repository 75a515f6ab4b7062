"""The catalogue of drafters: the one place that knows them by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from outrider.config import (
    AdedConfig,
    AnpdConfig,
    AutoConfig,
    CopyConfig,
    DatastoreConfig,
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
    SuffixConfig,
    drafter_config,
    source_config,
)
from outrider.drafting.auto import AutoDrafter
from outrider.drafting.context_recycling import ContextRecyclingDrafter
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
from outrider.drafting.sources.calibration import CalibratedSource
from outrider.drafting.sources.copy import CopySource
from outrider.drafting.sources.datastore import DatastoreSource
from outrider.drafting.sources.edit import EditSource
from outrider.drafting.sources.hierarchy import HierarchyDrafter
from outrider.drafting.sources.history import HistorySource
from outrider.drafting.sources.ngram import NgramSource
from outrider.drafting.sources.suffix_tree import SuffixSource


@dataclass(frozen=True)
class TargetParts:
    """What drafters need of the target and of what is built around it.

    Attributes:
        vocab_size: width of its logits.
        vocab_fingerprint: digest of what its token ids mean, 32 bytes; asked for only where a file holds token ids.
        build_draft_model: loads a second model of any kind, with a cache of its own; called only where one is needed.
        forward_cost: what its forwards cost; called only where something is planned by it.
    """

    vocab_size: int
    vocab_fingerprint: Callable[[], bytes]
    build_draft_model: Callable[[DraftModelConfig, DraftStyle], Drafter]
    forward_cost: Callable[[], ForwardCost]


def build_drafter(  # noqa: PLR0911 - a catalogue: one case, one return
    config: DrafterConfig,
    style: DraftStyle,
    target: TargetParts,
) -> Drafter:
    """A drafter from its configuration.

    Args:
        style: how the verification rule wants trees drawn.

    Raises:
        ConfigError: references that are not token ids, or files that do not fit the target.
    """
    match config:
        case AutoConfig():
            drafters = [build_drafter(drafter_config(spec), style, target) for spec in config.drafters or ()]
            return AutoDrafter(config, drafters, target.forward_cost())
        case NoDrafterConfig():
            return PlainDrafter()
        case RecyclingConfig(shape="grown"):
            return ContextRecyclingDrafter(config, style, target.vocab_size)
        case RecyclingConfig():
            return RecyclingDrafter(config, style, target.vocab_size)
        case JacobiConfig():
            return JacobiDrafter(config, style, target.vocab_size)
        case LookaheadConfig():
            return LookaheadDrafter(config, style, target.vocab_size)
        case DraftModelConfig():
            drafter = target.build_draft_model(config, style)
            if config.plans_shapes and isinstance(drafter, DraftModelDrafter):
                drafter.plan_for(target.forward_cost())
            return drafter
        case HierarchyConfig():
            levels = [CalibratedSource(build_source(source_config(spec), target)) for spec in config.levels]
            return HierarchyDrafter(levels, max_nodes=config.max_nodes, max_depth=config.depth, style=style)
        case MergeConfig():
            sources = [CalibratedSource(build_source(source_config(spec), target)) for spec in config.sources]
        case EditConfig(lookup=True):
            lookup = NgramSource(NgramConfig(depth=config.depth))
            sources = [CalibratedSource(build_source(config, target)), CalibratedSource(lookup)]
        case _:
            sources = [build_source(config, target)]
    return SourceDrafter(config.method, sources, max_nodes=config.max_nodes, max_depth=config.depth, style=style)


def build_source(  # noqa: PLR0911 - likewise
    config: SourceConfig, target: TargetParts
) -> Source:
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
        case SuffixConfig():
            return SuffixSource(config, vocab_size=target.vocab_size, vocab_fingerprint=target.vocab_fingerprint)
        case DatastoreConfig():
            return DatastoreSource(config, vocab_size=target.vocab_size, vocab_fingerprint=target.vocab_fingerprint)
