"""Every setting and its default: one frozen dataclass per component, unknown keys rejected."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from outrider.errors import ConfigError

Exactness = Literal["auto", "numerical", "bitwise"]
Weights = Literal["auto", "fp32", "bf16", "int8", "int4"]
CacheDtype = Literal["auto", "float32", "bfloat16", "int8"]
GROUP_SIZES = (32, 64, 128)
T = TypeVar("T")


@dataclass(frozen=True)
class CacheConfig:
    """The paged KV cache.

    Attributes:
        block_size: positions per block.
        memory_gb: the most memory that keys and values may take, in GiB.
        num_blocks: capacity in blocks; None derives it from `memory_gb` and the scheduler's needs.
        prefix_caching: reuse the blocks of equal prompt prefixes between requests.
        dtype: of keys and values: "auto" (the model's), "float32", "bfloat16" or "int8" (each head of a position
            rounded to integers with a scale of its own; needs the compiled kernels).
    """

    block_size: int = 16
    memory_gb: float = 2.0
    num_blocks: int | None = None
    prefix_caching: bool = True
    dtype: CacheDtype = "auto"

    def __post_init__(self) -> None:
        _check_int("cache.block_size", self.block_size, 1, 4096)
        valid = isinstance(self.memory_gb, int | float) and 0 < self.memory_gb < math.inf
        _require(valid, "cache.memory_gb", self.memory_gb, "a finite number above 0")
        if self.num_blocks is not None:
            _check_int("cache.num_blocks", self.num_blocks, 1, 2**40)
        dtypes = get_args(CacheDtype)
        _require(self.dtype in dtypes, "cache.dtype", self.dtype, f"one of {', '.join(dtypes)}")


@dataclass(frozen=True)
class SchedulerConfig:
    """Continuous batching.

    Attributes:
        max_num_seqs: the most requests that run at once.
        max_batch_tokens: the most rows in one forward; longer prompts are prefilled in chunks.
        max_waiting: the most requests that may wait; more are refused.
    """

    max_num_seqs: int = 64
    max_batch_tokens: int = 512
    max_waiting: int = 100_000

    def __post_init__(self) -> None:
        _check_int("scheduler.max_num_seqs", self.max_num_seqs, 1, 2**20)
        _check_int("scheduler.max_batch_tokens", self.max_batch_tokens, 1, 2**24)
        _require(
            self.max_batch_tokens >= self.max_num_seqs,
            "scheduler.max_batch_tokens",
            self.max_batch_tokens,
            f">= max_num_seqs={self.max_num_seqs}",
        )
        _check_int("scheduler.max_waiting", self.max_waiting, 1, 2**32)


@dataclass(frozen=True)
class NoDrafterConfig:
    """Plain decoding."""

    method: Literal["none"] = "none"


@dataclass(frozen=True)
class NgramConfig:
    """Prompt lookup: copy what followed the longest matching suffix before.

    Attributes:
        max_ngram, min_ngram: lengths of suffix to look for, the longest first.
        num_candidates: how many earlier occurrences become branches of the tree.
        depth: tokens copied from each occurrence.
        max_nodes: the most draft tokens in a tree.
    """

    method: Literal["ngram"] = "ngram"
    max_ngram: int = 4
    min_ngram: int = 1
    num_candidates: int = 3
    depth: int = 8
    max_nodes: int = 12

    def __post_init__(self) -> None:
        _check_int("ngram.max_ngram", self.max_ngram, 1, 64)
        _check_int("ngram.min_ngram", self.min_ngram, 1, self.max_ngram)
        _check_tree_limits("ngram", self.depth, self.max_nodes)
        _check_int("ngram.num_candidates", self.num_candidates, 1, 64)


@dataclass(frozen=True)
class RecyclingConfig:
    """Token Recycling: a tree of the candidates that followed each token when it was last verified.

    Attributes:
        num_candidates: candidates kept per token (columns of the adjacency matrix).
        depth: longest path of the tree.
        max_nodes: draft tokens in a tree.
    """

    method: Literal["recycling"] = "recycling"
    num_candidates: int = 8
    depth: int = 5
    max_nodes: int = 16

    def __post_init__(self) -> None:
        _check_tree_limits("recycling", self.depth, self.max_nodes)
        _check_int("recycling.num_candidates", self.num_candidates, 1, 8)


@dataclass(frozen=True)
class DraftModelConfig:
    """A second, smaller model with the same vocabulary.

    Attributes:
        model: folder or hub id; None is the bundled draft (for the bundled target).
        revision: of a hub id.
        depth: forwards of the draft per step, and the longest path of the tree.
        width: children drawn below each expanded node; 1 is a chain.
        max_expanded: nodes expanded per depth, the most probable paths first.
        min_path_prob: paths that the draft itself finds less probable are not drafted further.
        max_nodes: the most draft tokens in a tree.
        dtype: of the draft's activations and cache; "auto" is the checkpoint's.
        weights, group_size: of the draft's linear layers, as in `EngineConfig`.
    """

    method: Literal["draft_model"] = "draft_model"
    model: str | None = None
    revision: str | None = None
    depth: int = 10
    width: int = 1
    max_expanded: int = 1
    min_path_prob: float = 0.1
    max_nodes: int = 12
    dtype: str = "auto"
    weights: Weights = "auto"
    group_size: int = 64

    def __post_init__(self) -> None:
        _check_tree_limits("draft_model", self.depth, self.max_nodes)
        _check_int("draft_model.width", self.width, 1, 64)
        _check_int("draft_model.max_expanded", self.max_expanded, 1, 64)
        valid = isinstance(self.min_path_prob, int | float) and 0 <= self.min_path_prob < 1
        _require(valid, "draft_model.min_path_prob", self.min_path_prob, "a number in [0, 1)")
        _check_weights("draft_model.", self.weights, self.group_size)


DrafterConfig = NoDrafterConfig | NgramConfig | RecyclingConfig | DraftModelConfig
DRAFTER_CONFIGS: dict[str, type] = {
    "none": NoDrafterConfig,
    "ngram": NgramConfig,
    "recycling": RecyclingConfig,
    "draft_model": DraftModelConfig,
}


@dataclass(frozen=True)
class EngineConfig:
    """Everything that an engine is built from.

    Attributes:
        model: folder or hub id; None is the bundled model.
        revision: of a hub id.
        dtype: of activations and cache: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        weights: of the linear layers: "auto" (as the checkpoint holds them, in `dtype` if it holds them plainly),
            "fp32", "bf16", "int8" (a scale per output) or "int4" (a scale per group of inputs).
        group_size: inputs per scale of int4 weights: 32, 64 or 128.
        device: torch device.
        exactness: "numerical" (equal up to floating-point ties), "bitwise" (every row's bits are independent of
            the batch; proven by a self-test at start) or "auto" (bitwise on a CPU with compiled kernels).
        verification: "coupled", "rejection", "tree_rejection" or "multi_candidate".
    """

    model: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    weights: Weights = "auto"
    group_size: int = 64
    device: str = "cpu"
    exactness: Exactness = "auto"
    verification: str = "coupled"
    drafter: DrafterConfig = field(default_factory=NgramConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    def __post_init__(self) -> None:
        _require(self.model != "", "model", self.model, "a folder or hub id")
        _require(
            self.exactness in get_args(Exactness),
            "exactness",
            self.exactness,
            "'auto', 'numerical' or 'bitwise'",
        )
        _check_weights("", self.weights, self.group_size)
        dtypes = ("auto", "float32", "bfloat16", "float16")
        _require(self.dtype in dtypes, "dtype", self.dtype, f"one of {', '.join(dtypes)}")


def from_mapping(config: type[T], values: Mapping[str, Any], name: str) -> T:
    """Build a config dataclass from user-given keys.

    Raises:
        ConfigError: an unknown key (with the nearest known one), or a value out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name} configuration", got=repr(values)[:60], expected="a mapping")
    known = [f.name for f in dataclasses.fields(config)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(
                f"unknown {name} key",
                got=repr(key),
                expected=f"one of {', '.join(known)}",
                remedy=f"did you mean {near[0]!r}?" if near else None,
            )
    try:
        return config(**values)
    except TypeError as error:
        raise ConfigError(f"{name} configuration", got=repr(dict(values)), expected=str(error)) from error


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


def _check_int(name: str, value: object, low: int, high: int) -> None:
    valid = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    _require(valid, name, value, f"an integer in [{low}, {high}]")


def _require(condition: bool, name: str, got: object, expected: str) -> None:
    if not condition:
        raise ConfigError(name, got=repr(got), expected=expected)


def _check_weights(prefix: str, weights: object, group_size: object) -> None:
    formats = get_args(Weights)
    _require(weights in formats, f"{prefix}weights", weights, f"one of {', '.join(formats)}")
    _require(group_size in GROUP_SIZES, f"{prefix}group_size", group_size, "32, 64 or 128")


def _check_tree_limits(method: str, depth: int, max_nodes: int) -> None:
    _check_int(f"{method}.depth", depth, 1, 128)
    _check_int(f"{method}.max_nodes", max_nodes, 1, 1024)
