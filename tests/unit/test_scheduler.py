"""Who runs, with how many rows: budgets are kept, nobody starves, drafts never cost another request its step."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from outrider.cache.kv_cache import KVCache, LayerShape
from outrider.config import SchedulerConfig
from outrider.engine.scheduler import Scheduler
from outrider.errors import CacheError, ConfigError
from outrider.sampling.params import SamplingParams
from tests.losslessness.engine_harness import make_engine, make_request
from tests.toy_model import ToyModel

PARAMS = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


def test_no_forward_exceeds_the_budget_and_all_finish() -> None:
    rng = random.Random(1)
    for drafter in ["none", "ngram", "draft_model-tree"]:
        model = ToyModel()
        engine = make_engine(drafter, model=model, scheduler=SchedulerConfig(max_num_seqs=5, max_batch_tokens=17))
        requests = [
            make_request(f"r{i}", [rng.randrange(24) for _ in range(rng.randint(1, 60))], PARAMS) for i in range(12)
        ]
        for request in requests:
            engine.add(request)
        while engine.has_unfinished:
            engine.step()
            assert len(engine.scheduler.running) <= 5
        assert max(model.num_rows) <= 17
        assert all(len(request.output_token_ids) == 20 for request in requests)


def test_every_running_request_gets_a_row_in_every_step() -> None:
    engine = make_engine("ngram", scheduler=SchedulerConfig(max_num_seqs=4, max_batch_tokens=8))
    requests = [make_request(f"r{i}", [1, 2, 1, 2, 1, 2, 1], PARAMS) for i in range(4)]
    for request in requests:
        engine.add(request)
    while not all(request.num_output_tokens for request in requests):
        engine.step()
    while engine.has_unfinished:
        before = {r.request_id: r.num_output_tokens for r in engine.scheduler.running}
        running = list(engine.scheduler.running)
        engine.step()
        assert all(request.num_output_tokens > before[request.request_id] for request in running)


def test_requests_are_admitted_in_order() -> None:
    engine = make_engine(scheduler=SchedulerConfig(max_num_seqs=2, max_batch_tokens=64))
    requests = [make_request(f"r{i}", [1, 2, 3], PARAMS) for i in range(5)]
    for request in requests:
        engine.add(request)
    finished = []
    while engine.has_unfinished:
        finished += [request.request_id for request in engine.step() if request.finished]
    assert finished == [request.request_id for request in requests]


def test_a_preempted_request_is_the_youngest_and_comes_back_first() -> None:
    engine = make_engine(num_blocks=16)
    requests = [make_request(f"r{i}", [1 + i, 2, 3], PARAMS) for i in range(5)]
    for request in requests:
        engine.add(request)
    seen = False
    while engine.has_unfinished:
        engine.step()
        if engine.scheduler.preempted:
            seen = True
            running = [int(r.request_id[1:]) for r in engine.scheduler.running]
            waiting = [int(r.request_id[1:]) for r in engine.scheduler.waiting]
            assert waiting == sorted(waiting)
            assert max(running) < min(waiting)
    assert seen


def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    engine = make_engine(num_blocks=4, block_size=4)
    with pytest.raises(CacheError, match="at most the cache's 16 positions"):
        engine.add(make_request("r", [1] * 10, PARAMS))
    assert not engine.has_unfinished


def test_a_full_queue_refuses() -> None:
    engine = make_engine(scheduler=SchedulerConfig(max_num_seqs=1, max_batch_tokens=64, max_waiting=2))
    for i in range(2):
        engine.add(make_request(f"r{i}", [1], PARAMS))
    with pytest.raises(ConfigError, match="queue"):
        engine.add(make_request("late", [1], PARAMS))


def test_an_aborted_request_leaves_waiting_or_running() -> None:
    engine = make_engine(scheduler=SchedulerConfig(max_num_seqs=1, max_batch_tokens=64))
    requests = [make_request(f"r{i}", [1, 2], PARAMS) for i in range(2)]
    for request in requests:
        engine.add(request)
    engine.step()
    for request in requests:
        engine.abort(request)
        assert request.finish_reason == "abort"
    assert not engine.has_unfinished
    assert engine.cache.pool.num_used == 0


@pytest.mark.parametrize("num_blocks", [14, 200])
def test_rows_that_a_full_cache_takes_from_drafts_are_counted_and_said_once(
    num_blocks: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Two of 9 blocks each, where there are 14 or enough: what was offered and what was cut is what was wanted."""
    engine = make_engine("ngram", num_blocks=num_blocks, prefix_caching=False)
    wanted = engine.drafter.max_nodes
    requests = [make_request(f"r{i}", [1 + i, 2, 1 + i, 2], PARAMS) for i in range(2)]
    for request in requests:
        engine.add(request)
    offered, right = [], engine.drafter.propose

    def propose(contexts):
        offered.extend(context.max_nodes for context in contexts if context.max_depth > 0)
        return right(contexts)

    engine.drafter.propose = propose  # type: ignore[method-assign]
    while engine.has_unfinished:
        engine.step()
    assert engine.stats.num_cut_rows == sum(wanted - nodes for nodes in offered)
    assert (engine.stats.num_cut_rows > 0) == (num_blocks == 14)
    said = [record for record in caplog.records if "draft tokens" in record.message]
    assert len(said) == (num_blocks == 14)
    assert all(len(request.output_token_ids) == 20 for request in requests)


@pytest.mark.parametrize("drafter", ["draft_model", "sorted_draft", "auto"])
@pytest.mark.parametrize("draft_blocks", [12, 400])
def test_requests_that_a_draft_models_full_cache_leaves_out_are_counted_and_said_once(
    drafter: str, draft_blocks: int, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(drafter, draft_blocks=draft_blocks, prefix_caching=False)
    requests = [make_request(f"r{i}", [1 + i, 2, 3, 4 + i], PARAMS) for i in range(8)]
    for request in requests:
        engine.add(request)
    while engine.has_unfinished:
        engine.step()
    said = [record.message for record in caplog.records if "draft model's KV cache" in record.message]
    if draft_blocks == 400:
        assert engine.stats.num_without_room == 0
        assert not said
    else:
        assert 0 < engine.stats.num_without_room < engine.stats.num_verifications
        assert len(said) == 1
        assert all(part in said[0] for part in ("got", "expected", "raise cache.memory_gb"))
    assert all(len(request.output_token_ids) == 20 for request in requests)


def test_a_text_longer_than_the_drafts_context_is_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine("draft_model")
    engine.drafter._runner._model.context_length = 14  # type: ignore[attr-defined]
    request = make_request("r", [1, 2, 3], PARAMS)
    engine.add(request)
    while engine.has_unfinished:
        engine.step()
    assert 0 < engine.stats.num_without_room < 20
    (said,) = [record.message for record in caplog.records if "draft model's context" in record.message]
    assert "expected at most 14" in said


# Rows of drafts: what nobody else wants, promised and not yet taken


def scheduler_of(
    num_requests: int, *, num_blocks: int, max_draft_nodes: int, max_batch_tokens: int = 512
) -> tuple[Scheduler, KVCache]:
    """A scheduler with requests of three tokens, over blocks of four."""
    cache = KVCache([LayerShape(1, 2, 2)], num_blocks=num_blocks, block_size=4, dtype=torch.float32)
    config = SchedulerConfig(max_num_seqs=num_requests, max_batch_tokens=max_batch_tokens)
    scheduler = Scheduler(config, cache, max_draft_nodes)
    for index in range(num_requests):
        scheduler.add(make_request(f"r{index}", [1, 2, 3], replace(PARAMS, max_tokens=10)))
    return scheduler, cache


def test_draft_rows_take_no_block_before_there_are_drafts() -> None:
    scheduler, cache = scheduler_of(2, num_blocks=20, max_draft_nodes=9)
    plan = scheduler.schedule()
    assert [scheduled.max_draft_nodes for scheduled in plan] == [9, 9]
    assert cache.pool.num_used == 2, "a block for each prompt"


def test_all_that_is_promised_can_be_had() -> None:
    """The first takes the only spare block; the others have the rest of their last blocks."""
    scheduler, cache = scheduler_of(3, num_blocks=6, max_draft_nodes=5)
    plan = scheduler.schedule()
    assert [scheduled.max_draft_nodes for scheduled in plan] == [5, 5, 5]
    scheduler, cache = scheduler_of(3, num_blocks=5, max_draft_nodes=5)
    plan = scheduler.schedule()
    assert [scheduled.max_draft_nodes for scheduled in plan] == [5, 5, 1]
    for scheduled in plan:
        cache.reserve(scheduled.request.request_id, scheduled.chunk_size + scheduled.max_draft_nodes)
    cache.check_integrity()


def test_the_rows_of_a_step_are_shared() -> None:
    scheduler, _ = scheduler_of(3, num_blocks=60, max_draft_nodes=40, max_batch_tokens=3 * 3 + 10)
    assert [scheduled.max_draft_nodes for scheduled in scheduler.schedule()] == [3, 3, 4]
