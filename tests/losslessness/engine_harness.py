"""Engines over toy models, for every drafter and rule; a new drafter joins by one line in `DRAFTERS`.

A growth of the draft model that is like others joins by one line in `GROWTHS`, which takes fewer tests.
"""

from __future__ import annotations

import atexit
import functools
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from outrider.cache.kv_cache import KVCache
from outrider.config import (
    AdedConfig,
    AnpdConfig,
    AutoConfig,
    CopyConfig,
    DatastoreConfig,
    DrafterConfig,
    DraftModelConfig,
    EditConfig,
    HierarchyConfig,
    HistoryConfig,
    JacobiConfig,
    LookaheadConfig,
    MergeConfig,
    NgramConfig,
    NoDrafterConfig,
    RecyclingConfig,
    SchedulerConfig,
    SelfDraftConfig,
    SortedDraftConfig,
    StagedConfig,
    SuffixConfig,
    UniversalDraftConfig,
    drafter_config,
)
from outrider.drafting.auto import AutoDrafter
from outrider.drafting.build import TargetParts, build_drafter
from outrider.drafting.draft_kinds import DraftParts, plain_draft, sorted_draft, staged_draft, translated_draft
from outrider.drafting.drafter import Drafter, DraftStyle
from outrider.drafting.forward_cost import ForwardCost
from outrider.drafting.sources.datastore_build import DatastoreWriter
from outrider.drafting.text_draft import TextDrafter
from outrider.engine.detokenizer import IncrementalDetokenizer
from outrider.engine.engine import Engine
from outrider.engine.scheduler import Scheduler
from outrider.request import Request
from outrider.sampling.params import SamplingParams
from outrider.verification.build import build_rule
from tests.toy_model import ToyModel
from tests.toy_vocabulary import TARGET_SIDE, RenamedToyModel, draft_side, toy_translation

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
    "auto": AutoConfig(drafters=["ngram", "recycling", "draft_model"], exploration=1.0),
    "auto-sparing": AutoConfig(
        drafters=[
            {"method": "draft_model", "depth": 3, "width": 2, "max_expanded": 2, "min_path_prob": 0.0},
            "merge",
        ],
        exploration=0.1,
    ),
    "ngram": NgramConfig(),
    "anpd": AnpdConfig(),
    "aded": AdedConfig(exploration=0.5, capacity=40),
    "copy": CopyConfig(gammas=(2, 1), references=((3, 1, 0, 1, 2, 2, 3), (1, 2, 3, 1, 1))),
    "edit": EditConfig(),
    "edit-reference": EditConfig(references=((1, 2, 3, 0, 2, 1, 1, 3, 3, 2, 3),)),
    "history": HistoryConfig(lengths=(2, 1), capacity=256, segment=8, depth=4),
    "hierarchy": HierarchyConfig(levels=("ngram", {"method": "history", "lengths": (2, 1)}, "aded")),
    "merge": MergeConfig(sources=("ngram", "anpd", "aded", "edit")),
    "recycling": RecyclingConfig(),
    "recycling-sequoia": RecyclingConfig(num_candidates=4, depth=6, max_nodes=20, shape="sequoia"),
    "jacobi": JacobiConfig(mode="jacobi", initial="last"),
    "jacobi-gs": JacobiConfig(block_size=5, initial="random"),
    "jacobi-hybrid": JacobiConfig(mode="hybrid", block_size=4, parallel_length=90, initial="prompt"),
    "lookahead": LookaheadConfig(window=4, ngram=3),
    "lookahead-bigrams": LookaheadConfig(window=6, ngram=2, guesses=2, initial="last", max_keys=8),
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
    "suffix": SuffixConfig(history_tokens=200),
    "datastore": DatastoreConfig(),
}

# Of draft models, beside those above: `test_engine_growths.py`.
GROWTHS: dict[str, DraftModelConfig] = {
    "draft_model-mcsd": DraftModelConfig(growth="mcsd", branching=(3, 2, 1), min_path_prob=0.0),
    "draft_model-mcsd_improved": DraftModelConfig(growth="mcsd_improved", width=3, depth=4, min_path_prob=0.05),
    "draft_model-rsd_c": DraftModelConfig(growth="rsd_c", branching=(2, 2, 1), min_path_prob=0.0),
    "draft_model-dyspec_threshold": DraftModelConfig(growth="dyspec_threshold", min_path_prob=0.05),
    "draft_model-opt_tree": DraftModelConfig(growth="opt_tree", depth=4, min_path_prob=0.0),
    "draft_model-static": DraftModelConfig(growth="static", depth=4, min_path_prob=0.0),
    "draft_model-static-table": DraftModelConfig(
        growth="static", rank_paths=([0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0])
    ),
    "draft_model-static-measured": DraftModelConfig(
        growth="static", rank_probs="measured", depth=4, min_path_prob=0.0
    ),
    "draft_model-ppd": DraftModelConfig(growth="ppd", rank_probs="measured", depth=4, min_path_prob=0.05),
}


CATALOGUE: dict[str, DrafterConfig] = DRAFTERS | GROWTHS


class CheapRows(ForwardCost):
    """Rows that cost next to nothing.

    Args:
        one_s: seconds of a forward of one row.
    """

    def __init__(self, one_s: float = 1.0) -> None:
        super().__init__((1, 64), (0,), [(one_s, 1.1 * one_s)])

    def observe(self, num_rows: int, context: float, num_sequences: int, seconds: float) -> None:
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

    def parts(draft: ToyModel) -> DraftParts:
        tokens = scheduler.max_batch_tokens
        return DraftParts(draft, cache(draft_blocks), model.vocab_size, tokens, lambda: CheapRows(0.1))

    def toy(memory: float) -> DraftParts:
        return parts(ToyModel(model.vocab_size, model.context_length, memory=memory))

    def build_draft_model(config: DraftModelConfig, style: DraftStyle) -> Drafter:
        match config:
            case SelfDraftConfig():
                return plain_draft(config, style, toy(0.8 * model.memory))
            case StagedConfig():
                inner_config = drafter_config(config.drafter)
                inner = build_drafter(inner_config, style, target)
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

    target = TargetParts(model.vocab_size, lambda: VOCAB_FINGERPRINT, build_draft_model, CheapRows)
    config = CATALOGUE[drafter]
    built = build_drafter(
        toy_datastore(model.vocab_size) if isinstance(config, DatastoreConfig) else config,
        DraftStyle(verification.draft_noise, verification.sibling_draws, verification.chains_only),
        target,
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
