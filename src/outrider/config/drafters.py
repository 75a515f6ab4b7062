"""The catalogue of drafters' settings: the one place that knows them by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from outrider.config.checks import check_int, check_path, check_tree_limits, from_mapping, require
from outrider.config.draft_models import (
    DraftModelConfig,
    SelfDraftConfig,
    SortedDraftConfig,
    StagedConfig,
    UniversalDraftConfig,
)
from outrider.config.jacobi import JacobiConfig, LookaheadConfig
from outrider.config.lookup import (
    AdedConfig,
    AnpdConfig,
    CopyConfig,
    DatastoreConfig,
    EditConfig,
    HistoryConfig,
    NgramConfig,
    RecyclingConfig,
    SuffixConfig,
)
from outrider.errors import ConfigError


@dataclass(frozen=True)
class NoDrafterConfig:
    """Plain decoding."""

    method: Literal["none"] = "none"


# Drafters that are one source of continuations each, and may stand together in a merge or a hierarchy.
SourceConfig = (
    NgramConfig | AnpdConfig | AdedConfig | CopyConfig | EditConfig | HistoryConfig | SuffixConfig | DatastoreConfig
)
SourceSpec = str | Mapping[str, Any] | SourceConfig


@dataclass(frozen=True)
class MergeConfig:
    """Several sources' continuations in one tree, the likeliest first.

    Attributes:
        sources: their specifications: names, mappings with key ``method``, or configs.
        depth: the longest path.
        max_nodes: the most draft tokens in a tree.
    """

    method: Literal["merge"] = "merge"
    sources: Sequence[SourceSpec] = ("ngram", "aded")
    depth: int = 16
    max_nodes: int = 12

    def __post_init__(self) -> None:
        check_tree_limits("merge", self.depth, self.max_nodes)
        _check_sources("merge.sources", self.sources)


@dataclass(frozen=True)
class HierarchyConfig:
    """Sources asked in turn, the nearest in time first, until the tree is full.

    Attributes:
        levels: their specifications, the nearest first: context, history, statistics. A corpus joins as references of
            the last level.
        depth: the longest path.
        max_nodes: the most draft tokens in a tree.
    """

    method: Literal["hierarchy"] = "hierarchy"
    levels: Sequence[SourceSpec] = ("ngram", "history", "aded")
    depth: int = 16
    max_nodes: int = 12

    def __post_init__(self) -> None:
        check_tree_limits("hierarchy", self.depth, self.max_nodes)
        _check_sources("hierarchy.levels", self.levels)


@dataclass(frozen=True)
class AutoConfig:
    """The planner: in every step the drafter and the draft tokens that pay, or none.

    Attributes:
        drafters: what to choose from: names, mappings with key ``method``, or configs; None is "suffix" and
            "recycling", and the bundled draft for the bundled target.
        draft_model: folder or hub id of a draft model to choose from too, if `drafters` is None.
        max_nodes: the most draft tokens in a tree.
        exploration: share of the time that drafters may cost beyond what they win, all of them together.
        calibrate: measure at start what a forward costs (some seconds, kept for the next start); False learns it from
            the steps alone.
        remember: begin with what earlier runs of the same target and drafters have learnt, and keep what is learnt.
    """

    method: Literal["auto"] = "auto"
    drafters: Sequence[str | Mapping[str, Any] | Any] | None = None
    draft_model: str | None = None
    max_nodes: int = 48
    exploration: float = 0.004
    calibrate: bool = True
    remember: bool = True

    def __post_init__(self) -> None:
        check_int("auto.max_nodes", self.max_nodes, 1, 1024)
        check_path("auto.draft_model", self.draft_model)
        both = self.draft_model is not None and self.drafters is not None
        require(not both, "auto.draft_model", "drafters too", "one of the two: name it among the drafters")
        valid = isinstance(self.exploration, int | float) and 0 <= self.exploration <= 1
        require(valid, "auto.exploration", self.exploration, "a number in [0, 1]")
        require(isinstance(self.calibrate, bool), "auto.calibrate", self.calibrate, "true or false")
        require(isinstance(self.remember, bool), "auto.remember", self.remember, "true or false")
        if self.drafters is None:
            return
        listed = isinstance(self.drafters, Sequence) and not isinstance(self.drafters, str)
        require(listed, "auto.drafters", repr(self.drafters)[:60], "a list of drafters")
        check_int("number of auto.drafters", len(self.drafters), 1, 16)
        for spec in self.drafters:
            inner = drafter_config(spec)
            require(not isinstance(inner, AutoConfig), "auto.drafters", "'auto' inside", "other drafters")


DrafterConfig = (
    AutoConfig
    | NoDrafterConfig
    | NgramConfig
    | AnpdConfig
    | AdedConfig
    | CopyConfig
    | EditConfig
    | HistoryConfig
    | SuffixConfig
    | DatastoreConfig
    | MergeConfig
    | HierarchyConfig
    | RecyclingConfig
    | JacobiConfig
    | LookaheadConfig
    | DraftModelConfig
    | SelfDraftConfig
    | UniversalDraftConfig
    | StagedConfig
    | SortedDraftConfig
)
DRAFTER_CONFIGS: dict[str, type] = {
    "auto": AutoConfig,
    "none": NoDrafterConfig,
    "ngram": NgramConfig,
    "anpd": AnpdConfig,
    "aded": AdedConfig,
    "copy": CopyConfig,
    "edit": EditConfig,
    "history": HistoryConfig,
    "merge": MergeConfig,
    "hierarchy": HierarchyConfig,
    "recycling": RecyclingConfig,
    "jacobi": JacobiConfig,
    "lookahead": LookaheadConfig,
    "draft_model": DraftModelConfig,
    "self_draft": SelfDraftConfig,
    "universal_draft": UniversalDraftConfig,
    "staged": StagedConfig,
    "sorted_draft": SortedDraftConfig,
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
    config = from_mapping(DRAFTER_CONFIGS[method], values, f"{method} drafter")
    if isinstance(config, StagedConfig):
        drafter_config(config.drafter)  # said now, before anything is loaded
    return config


def source_config(spec: SourceSpec) -> SourceConfig:
    """Resolve the specification of a source inside a merge or a hierarchy.

    Raises:
        ConfigError: unknown method or key, or a method that is no single source.
    """
    config = drafter_config(spec)
    if not isinstance(config, SourceConfig):
        methods = [name for name, known in DRAFTER_CONFIGS.items() if known in get_args(SourceConfig)]
        raise ConfigError("source", got=repr(config.method), expected=f"one of {', '.join(methods)}")
    return config


def _check_sources(name: str, specs: Sequence[SourceSpec]) -> None:
    valid = isinstance(specs, Sequence) and not isinstance(specs, str)
    require(valid, name, repr(specs)[:60], "a list of drafters")
    check_int(f"number of {name}", len(specs), 1, 16)
    for spec in specs:
        source_config(spec)
