"""Engines over toy models, for every drafter and rule; a new drafter joins by one line in `DRAFTERS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from outrider.cache.kv_cache import KVCache
from outrider.config import (
    DrafterConfig,
    DraftModelConfig,
    NgramConfig,
    NoDrafterConfig,
    RecyclingConfig,
    SchedulerConfig,
    SelfDraftConfig,
    SortedDraftConfig,
    StagedConfig,
    UniversalDraftConfig,
    drafter_config,
)
from outrider.drafting.build import build_drafter
from outrider.drafting.draft_kinds import DraftParts, plain_draft, sorted_draft, staged_draft, translated_draft
from outrider.drafting.drafter import Drafter, DraftStyle
from outrider.drafting.text_draft import TextDrafter
from outrider.engine.detokenizer import IncrementalDetokenizer
from outrider.engine.engine import Engine
from outrider.engine.scheduler import Scheduler
from outrider.request import Request
from outrider.sampling.params import SamplingParams
from outrider.verification.build import build_rule
from tests.toy_model import ToyModel
from tests.toy_vocabulary import TARGET_SIDE, RenamedToyModel, draft_side, toy_translation

DRAFTERS: dict[str, DrafterConfig] = {
    "none": NoDrafterConfig(),
    "ngram": NgramConfig(),
    "recycling": RecyclingConfig(),
    "draft_model": DraftModelConfig(),
    "draft_model-chain": DraftModelConfig(depth=4, min_path_prob=0.0),
    "draft_model-tree": DraftModelConfig(depth=3, width=3, max_expanded=2, max_nodes=12, min_path_prob=0.0),
    "draft_model-cape": DraftModelConfig(growth="cape", depth=3, max_nodes=10, min_path_prob=0.0),
    "draft_model-rsd_s": DraftModelConfig(growth="rsd_s", depth=3, width=3, max_nodes=9, min_path_prob=0.0),
    "draft_model-dyspec": DraftModelConfig(growth="dyspec", max_nodes=10, max_expanded=2, min_path_prob=0.01),
    "draft_model-specexec": DraftModelConfig(growth="specexec", max_nodes=20, max_expanded=4, min_path_prob=0.0),
    "self_draft": SelfDraftConfig(depth=2),
    "universal_draft": UniversalDraftConfig(alignment="vocabulary", depth=3, width=2, max_expanded=2),
    "universal_draft-text": UniversalDraftConfig(alignment="text", depth=5),
    "staged": StagedConfig(depth=3, width=2, min_path_prob=0.0, drafter="ngram"),
    "staged-models": StagedConfig(depth=5, min_path_prob=0.01, drafter={"method": "draft_model", "depth": 3}),
    "sorted_draft": SortedDraftConfig(depth=4, layers=[1, 2], min_confidence=0.5),
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

    def parts(draft: ToyModel) -> DraftParts:
        return DraftParts(draft, cache(draft_blocks), model.vocab_size, scheduler.max_batch_tokens)

    def toy(memory: float) -> DraftParts:
        return parts(ToyModel(model.vocab_size, model.context_length, memory=memory))

    def build_draft_model(config: DraftModelConfig, style: DraftStyle) -> Drafter:
        match config:
            case SelfDraftConfig():
                return plain_draft(config, style, toy(0.8 * model.memory))
            case StagedConfig():
                inner_config = drafter_config(config.drafter)
                inner = build_drafter(
                    inner_config, style, vocab_size=model.vocab_size, build_draft_model=build_draft_model
                )
                return staged_draft(config, style, toy(0.3), inner, inner_config)
            case SortedDraftConfig():
                return sorted_draft(config, style, [toy(0.1), toy(0.3)])
            case UniversalDraftConfig(alignment="vocabulary"):
                renamed = RenamedToyModel(model.vocab_size, model.context_length, memory=0.3)
                return translated_draft(config, style, parts(renamed), toy_translation(model.vocab_size))
            case UniversalDraftConfig():
                renamed = RenamedToyModel(model.vocab_size, model.context_length, memory=0.3)
                draft = plain_draft(config, DraftStyle(chains_only=True), parts(renamed))
                sides = TARGET_SIDE, draft_side(model.vocab_size)
                return TextDrafter(draft, *sides, depth=config.depth, max_nodes=config.max_nodes)
            case _:
                return plain_draft(config, style, toy(0.3))

    built = build_drafter(
        DRAFTERS[drafter],
        DraftStyle(verification.draft_noise, verification.sibling_draws, verification.chains_only),
        vocab_size=model.vocab_size,
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
    check_integrity = getattr(engine.drafter, "check_integrity", None)
    if check_integrity is not None:
        check_integrity()


def run(engine: Engine, requests: Sequence[Request], *, each_step: Callable[[], None] | None = None) -> None:
    for request in requests:
        engine.add(request)
    while engine.has_unfinished:
        engine.step()
        check_engine(engine)
        if each_step is not None:
            each_step()
    assert engine.cache.pool.num_used == 0, "a finished request still holds blocks"
