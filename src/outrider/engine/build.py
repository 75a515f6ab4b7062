"""From a configuration to a running engine: models, caches, drafter, rule, scheduler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from logging import getLogger
from typing import Any

from outrider.cache.kv_cache import KVCache, LayerShape
from outrider.config import (
    AutoConfig,
    CacheConfig,
    DrafterConfig,
    DraftModelConfig,
    EngineConfig,
    Exactness,
    RecyclingConfig,
    SchedulerConfig,
    SuffixConfig,
)
from outrider.config import drafter_config as resolve
from outrider.drafting.auto import AutoDrafter
from outrider.drafting.build import TargetParts, build_drafter
from outrider.drafting.drafter import DraftStyle
from outrider.drafting.forward_cost import ForwardCost
from outrider.engine.bundled import BUNDLED_TARGET
from outrider.engine.cache_files import cache_file
from outrider.engine.calibration import Progress, forward_cost_of, identity_of, machine
from outrider.engine.draft_models import DraftModels
from outrider.engine.engine import Engine
from outrider.engine.planner_memory import remember
from outrider.engine.references import with_token_references
from outrider.engine.scheduler import Scheduler
from outrider.errors import ConfigError, ExactnessError
from outrider.inputs.tokenizer import Tokenizer
from outrider.kernels import native
from outrider.models.loader import load_model, load_tokenizer
from outrider.models.model import Model
from outrider.models.row_invariance import check_row_invariance
from outrider.token_tree import DraftNoise
from outrider.verification.build import build_rule


def load_target(config: EngineConfig) -> tuple[Model, Tokenizer, Exactness]:
    """Load the target and its tokenizer.

    Returns:
        The model, the tokenizer, and "bitwise" or "numerical": what "auto" came to.

    Raises:
        ModelLoadError: it cannot be loaded, or its outputs would be wrong.
        ConfigError: OUTRIDER_ISA names what this machine does not have.
        ExactnessError: bitwise mode was asked for, on a model or device that is not row-invariant.
    """
    path = config.model or BUNDLED_TARGET
    try:
        on_kernels = config.device == "cpu" and native.is_available()
    except native.IsaError as error:
        raise ConfigError(str(error)) from error
    bitwise = config.exactness == "bitwise" or (config.exactness == "auto" and on_kernels)
    model = load_model(
        path,
        revision=config.revision,
        dtype=config.dtype,
        weights=config.weights,
        group_size=config.group_size,
        cache_dtype=config.cache.dtype,
        device=config.device,
        row_invariant=bitwise,
    )
    if bitwise:
        try:
            check_row_invariance(model)
        except ExactnessError as error:
            if config.exactness == "bitwise":
                raise
            getLogger("outrider").warning("%s; running in numerical mode", error)
            bitwise = False
    tokenizer = Tokenizer(load_tokenizer(path, revision=config.revision))
    return model, tokenizer, "bitwise" if bitwise else "numerical"


def build_engine(
    config: EngineConfig, model: Model, tokenizer: Tokenizer, *, on_calibration: Progress | None = None
) -> Engine:
    """Put drafter, rule, caches and scheduler around a loaded target.

    Args:
        on_calibration: told how far measuring the target has come, where a planner needs it and it is not known yet.

    Raises:
        ConfigError: settings that do not go together, or references that cannot be read.
        ModelLoadError: the draft model cannot be loaded.
        VocabularyMismatchError: the draft's token ids are not the target's.
    """
    rule = build_rule(config.verification)
    cache = build_cache(config.cache, config.scheduler, model)

    drafter_config = config.decoding
    if isinstance(drafter_config, AutoConfig) and drafter_config.drafters is None:
        drafter_config = replace(
            drafter_config,
            drafters=_drafters_for_any_text(config, drafter_config.draft_model, rule.draft_noise),
            draft_model=None,
        )
    draft_models = DraftModels(
        config, model, tokenizer, lambda draft: build_cache(config.cache, config.scheduler, draft)
    )
    drafter = build_drafter(
        with_token_references(drafter_config, tokenizer, model.vocab_size),
        DraftStyle(rule.draft_noise, rule.sibling_draws, rule.chains_only),
        TargetParts(
            vocab_size=model.vocab_size,
            vocab_fingerprint=lambda: tokenizer.fingerprint,
            build_draft_model=draft_models.build,
            forward_cost=lambda: cost_of_target(config, model, on_calibration),
        ),
    )
    if isinstance(drafter, AutoDrafter) and isinstance(drafter_config, AutoConfig) and drafter_config.remember:
        drafters = [asdict(resolve(spec)) for spec in drafter_config.drafters or ()]
        identity = {**_identity(config, model), **machine(), "rule": config.verification, "drafters": drafters}
        remember(drafter, cache_file("planner", identity))
    return Engine(
        model,
        drafter,
        rule,
        cache,
        Scheduler(config.scheduler, cache, drafter.max_nodes),
        row_invariant=config.exactness == "bitwise",
    )


def _drafters_for_any_text(
    config: EngineConfig, draft_model: str | None, noise: DraftNoise
) -> tuple[DrafterConfig, ...]:
    """What the planner chooses from unless told otherwise; it cuts trees and paths itself, so they may be large.

    A draft that knows the target's noise grows a tree, which is a chain where rows are dear. Under independent noise
    a drawn tree may not be cut, and a chain ends by itself where it is no longer likely.
    """
    lookups = (SuffixConfig(max_nodes=24), RecyclingConfig(max_nodes=24))
    if config.model is None or draft_model is not None:
        draft = DraftModelConfig(model=draft_model, depth=16, max_nodes=24, min_path_prob=0.0)
        return (*lookups, replace(draft, growth="specexec", max_expanded=3) if noise == "shared" else draft)
    return lookups


def cost_of_target(
    config: EngineConfig, model: Model, on_progress: Progress | None = None, *, recalibrate: bool = False
) -> ForwardCost:
    """What the target's forwards cost, measured now if it is not known; for a planner that should not, unknown.

    Args:
        recalibrate: measure it now in any case.
    """
    if isinstance(config.decoding, AutoConfig) and not config.decoding.calibrate:
        return ForwardCost.unknown()
    return forward_cost_of(
        model,
        _identity(config, model),
        row_invariant=config.exactness == "bitwise",
        recalibrate=recalibrate,
        on_progress=on_progress,
    )


def _identity(config: EngineConfig, model: Model) -> dict[str, Any]:
    """What tells the target and its format from others, as JSON."""
    form = {name: getattr(config, name) for name in ("revision", "weights", "group_size", "device")}
    return identity_of(str(config.model or BUNDLED_TARGET), form, model)


def build_cache(cache: CacheConfig, scheduler: SchedulerConfig, model: Model) -> KVCache:
    """A cache within the memory limit, no larger than the scheduler could ever fill."""
    block_bytes = cache.block_size * _bytes_per_position(model.layer_shapes, model.cache_dtype.itemsize)
    affordable = int(cache.memory_gb * 2**30 / block_bytes)
    useful = scheduler.max_num_seqs * math.ceil(model.context_length / cache.block_size)
    num_blocks = cache.num_blocks or min(affordable, useful)
    if num_blocks < 1:
        raise ConfigError(
            "cache.memory_gb", got=cache.memory_gb, expected=f"at least one block of {block_bytes} bytes"
        )
    return KVCache(
        model.layer_shapes,
        num_blocks=num_blocks,
        block_size=cache.block_size,
        dtype=model.cache_dtype,
        device=model.device,
        prefix_caching=cache.prefix_caching,
    )


def _bytes_per_position(layers: Sequence[LayerShape], itemsize: int) -> int:
    return sum(s.num_heads * (s.key_dim + s.value_dim) for s in layers) * itemsize
