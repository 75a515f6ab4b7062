"""The catalogue of drafters' settings: the one place that knows them by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from outrider.config.checks import from_mapping
from outrider.config.draft_models import DraftModelConfig
from outrider.config.lookup import DatastoreConfig, NgramConfig, RecyclingConfig, SuffixConfig
from outrider.errors import ConfigError


@dataclass(frozen=True)
class NoDrafterConfig:
    """Plain decoding."""

    method: Literal["none"] = "none"


DrafterConfig = NoDrafterConfig | NgramConfig | RecyclingConfig | DraftModelConfig | SuffixConfig | DatastoreConfig
DRAFTER_CONFIGS: dict[str, type] = {
    "none": NoDrafterConfig,
    "ngram": NgramConfig,
    "recycling": RecyclingConfig,
    "draft_model": DraftModelConfig,
    "suffix": SuffixConfig,
    "datastore": DatastoreConfig,
}


def drafter_config(spec: str | Mapping[str, Any] | DrafterConfig) -> DrafterConfig:
    """Resolve what a user gave for the drafter: a method's name, a mapping with key ``method``, or a config.

    Raises:
        ConfigError: unknown method or key.
    """
    if isinstance(spec, DrafterConfig):
        return spec
    if not isinstance(spec, str | Mapping):
        raise ConfigError("drafter", got=repr(spec)[:60], expected="a method's name or a mapping with key 'method'")
    values = {"method": spec} if isinstance(spec, str) else dict(spec)
    method = values.get("method")
    if not isinstance(method, str) or method not in DRAFTER_CONFIGS:
        raise ConfigError("unknown drafter", got=repr(method), expected=f"one of {', '.join(DRAFTER_CONFIGS)}")
    return from_mapping(DRAFTER_CONFIGS[method], values, f"{method} drafter")
