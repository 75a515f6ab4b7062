"""Engines over toy models, for every drafter and rule; a new drafter joins by one line in `DRAFTERS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from outrider.cache.kv_cache import KVCache
from outrider.config import (
    AutoConfig,
    DrafterConfig,
    DraftModelConfig,
    JacobiConfig,
    LookaheadConfig,
    NgramConfig,
    NoDrafterConfig,
    RecyclingConfig,
    SchedulerConfig,
)
from outrider.drafting.auto import AutoDrafter
from outrider.drafting.build import build_drafter
from outrider.drafting.draft_model import DraftModelDrafter
from outrider.drafting.drafter import DraftStyle
from outrider.drafting.forward_cost import ForwardCost
from outrider.engine.detokenizer import IncrementalDetokenizer
from outrider.engine.engine import Engine
from outrider.engine.scheduler import Scheduler
from outrider.request import Request
from outrider.sampling.params import SamplingParams
from outrider.verification.build import build_rule
from tests.toy_model import ToyModel

DRAFTERS: dict[str, DrafterConfig] = {
    "none": NoDrafterConfig(),
    "auto": AutoConfig(drafters=["ngram", "recycling", "draft_model"], exploration=1.0),
    "auto-sparing": AutoConfig(drafters=["draft_model", "merge"]),
    "ngram": NgramConfig(),
    "recycling": RecyclingConfig(),
    "recycling-sequoia": RecyclingConfig(num_candidates=4, depth=6, max_nodes=20, shape="sequoia"),
    "jacobi": JacobiConfig(mode="jacobi", initial="last"),
    "jacobi-gs": JacobiConfig(block_size=5, initial="random"),
    "jacobi-hybrid": JacobiConfig(mode="hybrid", block_size=4, parallel_length=90, initial="prompt"),
    "lookahead": LookaheadConfig(),
    "lookahead-bigrams": LookaheadConfig(window=6, ngram=2, guesses=2, initial="last", max_keys=8),
    "draft_model": DraftModelConfig(),
    "draft_model-chain": DraftModelConfig(depth=4, min_path_prob=0.0),
    "draft_model-tree": DraftModelConfig(depth=3, width=3, max_expanded=2, max_nodes=12, min_path_prob=0.0),
    "draft_model-cape": DraftModelConfig(growth="cape", depth=3, max_nodes=10, min_path_prob=0.0),
    "draft_model-rsd_s": DraftModelConfig(growth="rsd_s", depth=3, width=3, max_nodes=9, min_path_prob=0.0),
    "draft_model-dyspec": DraftModelConfig(growth="dyspec", max_nodes=10, max_expanded=2, min_path_prob=0.01),
    "draft_model-specexec": DraftModelConfig(growth="specexec", max_nodes=20, max_expanded=4, min_path_prob=0.0),
}


class CheapRows(ForwardCost):
    """Rows that cost next to nothing."""

    def __init__(self) -> None:
        super().__init__((1, 64), (0,), [(1.0, 1.1)])

    def observe(self, num_rows: int, context: int, seconds: float) -> None:
        pass


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

    built = build_drafter(
        DRAFTERS[drafter],
        DraftStyle(verification.draft_noise, verification.sibling_draws, verification.chains_only),
        vocab_size=model.vocab_size,
        build_draft_model=build_draft_model,
        forward_cost=CheapRows,
    )
    if isinstance(built, AutoDrafter):
        built.clock = lambda: 0.0  # drafting is free: it drafts as much as it can
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
    if isinstance(engine.drafter, DraftModelDrafter | AutoDrafter):
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
