"""Settings of the engine and of its parts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from outrider.config.checks import Weights, check_int, check_weights, require
from outrider.config.drafters import AutoConfig, DrafterConfig

Exactness = Literal["auto", "numerical", "bitwise"]
CacheDtype = Literal["auto", "float32", "bfloat16", "int8"]


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
        check_int("cache.block_size", self.block_size, 1, 4096)
        valid = isinstance(self.memory_gb, int | float) and 0 < self.memory_gb < math.inf
        require(valid, "cache.memory_gb", self.memory_gb, "a finite number above 0")
        if self.num_blocks is not None:
            check_int("cache.num_blocks", self.num_blocks, 1, 2**40)
        dtypes = get_args(CacheDtype)
        require(self.dtype in dtypes, "cache.dtype", self.dtype, f"one of {', '.join(dtypes)}")


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
        check_int("scheduler.max_num_seqs", self.max_num_seqs, 1, 2**20)
        check_int("scheduler.max_batch_tokens", self.max_batch_tokens, 1, 2**24)
        require(
            self.max_batch_tokens >= self.max_num_seqs,
            "scheduler.max_batch_tokens",
            self.max_batch_tokens,
            f">= max_num_seqs={self.max_num_seqs}",
        )
        check_int("scheduler.max_waiting", self.max_waiting, 1, 2**32)


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
    decoding: DrafterConfig = field(default_factory=AutoConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    def __post_init__(self) -> None:
        require(self.model != "", "model", self.model, "a folder or hub id")
        require(
            self.exactness in get_args(Exactness),
            "exactness",
            self.exactness,
            "'auto', 'numerical' or 'bitwise'",
        )
        check_weights("", self.weights, self.group_size)
        dtypes = ("auto", "float32", "bfloat16", "float16")
        require(self.dtype in dtypes, "dtype", self.dtype, f"one of {', '.join(dtypes)}")
