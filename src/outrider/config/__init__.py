"""Every setting and its default: one frozen dataclass per component, unknown keys rejected."""

from outrider.config.checks import GROUP_SIZES, Weights, from_mapping
from outrider.config.draft_models import (
    DraftModelConfig,
    SelfDraftConfig,
    SortedDraftConfig,
    StagedConfig,
    UniversalDraftConfig,
)
from outrider.config.drafters import (
    DRAFTER_CONFIGS,
    AutoConfig,
    DrafterConfig,
    HierarchyConfig,
    MergeConfig,
    NoDrafterConfig,
    SourceConfig,
    SourceSpec,
    drafter_config,
    source_config,
)
from outrider.config.engine import CacheConfig, CacheDtype, EngineConfig, Exactness, SchedulerConfig
from outrider.config.jacobi import InitialTokens, JacobiConfig, LookaheadConfig
from outrider.config.lookup import (
    AdedConfig,
    AnpdConfig,
    CopyConfig,
    DatastoreConfig,
    EditConfig,
    HistoryConfig,
    NgramConfig,
    RecyclingConfig,
    ReferenceConfig,
    SuffixConfig,
)
from outrider.config.server import ServerConfig

__all__ = [
    "DRAFTER_CONFIGS",
    "GROUP_SIZES",
    "AdedConfig",
    "AnpdConfig",
    "AutoConfig",
    "CacheConfig",
    "CacheDtype",
    "CopyConfig",
    "DatastoreConfig",
    "DraftModelConfig",
    "DrafterConfig",
    "EditConfig",
    "EngineConfig",
    "Exactness",
    "HierarchyConfig",
    "HistoryConfig",
    "InitialTokens",
    "JacobiConfig",
    "LookaheadConfig",
    "MergeConfig",
    "NgramConfig",
    "NoDrafterConfig",
    "RecyclingConfig",
    "ReferenceConfig",
    "SchedulerConfig",
    "SelfDraftConfig",
    "ServerConfig",
    "SortedDraftConfig",
    "SourceConfig",
    "SourceSpec",
    "StagedConfig",
    "SuffixConfig",
    "UniversalDraftConfig",
    "Weights",
    "drafter_config",
    "from_mapping",
    "source_config",
]
