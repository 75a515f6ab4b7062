"""Engines over toy models, for every drafter and rule; a new drafter joins by one line in `DRAFTERS`."""

from __future__ import annotations

import atexit
import functools
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from outrider.cache.kv_cache import KVCache
from outrider.config import (
    DatastoreConfig,
    DrafterConfig,
    DraftModelConfig,
    NgramConfig,
    NoDrafterConfig,
    RecyclingConfig,
    SchedulerConfig,
    SuffixConfig,
)
from outrider.drafting.build import build_drafter
from outrider.drafting.draft_model import DraftModelDrafter
from outrider.drafting.drafter import DraftStyle
from outrider.drafting.sources.datastore_build import DatastoreWriter
from outrider.engine.detokenizer import IncrementalDetokenizer
from outrider.engine.engine import Engine
from outrider.engine.scheduler import Scheduler
from outrider.request import Request
from outrider.sampling.params import SamplingParams
from outrider.verification.build import build_rule
from tests.toy_model import ToyModel

VOCAB_FINGERPRINT = bytes(range(32))


@functools.cache
def toy_datastore(vocab_size: int) -> DatastoreConfig:
    """Texts of a toy model's tokens, for as long as the process lives."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    path = Path(folder.name) / "store"
    rng = random.Random(0)
    with DatastoreWriter(
        path, vocab_size=vocab_size, fingerprint=VOCAB_FINGERPRINT, max_memory_bytes=1 << 16
    ) as writer:
        for _ in range(50):
            writer.add([rng.randrange(vocab_size) for _ in range(60)])
            writer.end_document()
    return DatastoreConfig(path=str(path))


DRAFTERS: dict[str, DrafterConfig] = {
    "none": NoDrafterConfig(),
    "ngram": NgramConfig(),
    "recycling": RecyclingConfig(),
    "draft_model": DraftModelConfig(),
    "draft_model-chain": DraftModelConfig(depth=4, min_path_prob=0.0),
    "draft_model-tree": DraftModelConfig(depth=3, width=3, max_expanded=2, max_nodes=12, min_path_prob=0.0),
    "suffix": SuffixConfig(history_tokens=200),
    "datastore": DatastoreConfig(),
}


def decode(token_ids: Sequence[int]) -> str:
    return "".join(chr(ord("a") + token) for token in token_ids)


def make_engine(
    drafter: str = "none",
    *,
    rule: str = "coupled",
    model: ToyModel | None = None,
    num_blocks: int = 400,
    block_size: int = 4,
    scheduler: SchedulerConfig | None = None,
    draft_blocks: int = 400,
    prefix_caching: bool = True,
) -> Engine:
    model = model or ToyModel()
    scheduler = scheduler or SchedulerConfig(max_num_seqs=16, max_batch_tokens=256)
    verification = build_rule(rule)

    def cache(num_blocks: int) -> KVCache:
        return KVCache(
            model.layer_shapes,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=model.cache_dtype,
            prefix_caching=prefix_caching,
        )

    def build_draft_model(config: DraftModelConfig, style: DraftStyle) -> DraftModelDrafter:
        draft = ToyModel(model.vocab_size, model.context_length, memory=0.3)
        return DraftModelDrafter(
            config,
            style,
            model=draft,
            cache=cache(draft_blocks),
            vocab_size=model.vocab_size,
            max_batch_tokens=scheduler.max_batch_tokens,
        )

    config = DRAFTERS[drafter]
    built = build_drafter(
        toy_datastore(model.vocab_size) if isinstance(config, DatastoreConfig) else config,
        DraftStyle(verification.draft_noise, verification.sibling_draws, verification.chains_only),
        vocab_size=model.vocab_size,
        vocab_fingerprint=lambda: VOCAB_FINGERPRINT,
        build_draft_model=build_draft_model,
    )
    target_cache = cache(num_blocks)
    return Engine(model, built, verification, target_cache, Scheduler(scheduler, target_cache, built.max_nodes))


def make_request(
    request_id: str, prompt: Sequence[int], params: SamplingParams, model: ToyModel | None = None
) -> Request:
    model = model or ToyModel()
    eos = () if params.ignore_eos else model.eos_token_ids
    return Request(
        request_id=request_id,
        token_ids=list(prompt),
        num_prompt_tokens=len(prompt),
        params=params,
        seed=params.seed or 0,
        stop_token_ids=frozenset(eos) | frozenset(params.stop_token_ids),
        max_length=min(model.context_length, len(prompt) + (params.max_tokens or model.context_length)),
        detokenizer=IncrementalDetokenizer(decode, stop=params.stop) if params.stop else None,
    )


def check_engine(engine: Engine) -> None:
    """Nothing is left behind, and every structure is sound."""
    engine.cache.check_integrity()
    if isinstance(engine.drafter, DraftModelDrafter):
        engine.drafter.check_integrity()


def run(engine: Engine, requests: Sequence[Request], *, each_step: Callable[[], None] | None = None) -> None:
    for request in requests:
        engine.add(request)
    while engine.has_unfinished:
        engine.step()
        check_engine(engine)
        if each_step is not None:
            each_step()
    assert engine.cache.pool.num_used == 0, "a finished request still holds blocks"
