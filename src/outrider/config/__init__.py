"""Every setting and its default: one frozen dataclass per component, unknown keys rejected."""

from outrider.config.checks import GROUP_SIZES, Weights, from_mapping
from outrider.config.draft_models import DraftModelConfig
from outrider.config.drafters import DRAFTER_CONFIGS, DrafterConfig, NoDrafterConfig, drafter_config
from outrider.config.engine import CacheConfig, CacheDtype, EngineConfig, Exactness, SchedulerConfig
from outrider.config.lookup import DatastoreConfig, NgramConfig, RecyclingConfig, SuffixConfig

__all__ = [
    "DRAFTER_CONFIGS",
    "GROUP_SIZES",
    "CacheConfig",
    "CacheDtype",
    "DatastoreConfig",
    "DraftModelConfig",
    "DrafterConfig",
    "EngineConfig",
    "Exactness",
    "NgramConfig",
    "NoDrafterConfig",
    "RecyclingConfig",
    "SchedulerConfig",
    "SuffixConfig",
    "Weights",
    "drafter_config",
    "from_mapping",
]
