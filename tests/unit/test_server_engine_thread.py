"""The engine thread with a scripted engine: what comes back, what is refused, and what nothing may hang on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from outrider import LLM, SamplingParams
from outrider.errors import CacheError, NumericsError, PromptError, QueueFullError
from outrider.server.engine_thread import EngineThread, Job, Run
from outrider.server.failures import EngineFailedError, ServerStoppingError
from outrider.server.metrics import Metrics
from outrider.server.streaming import collect
from tests.tiny_models import make_tiny

TIMEOUT_S = 30.0
PROMPT = {"prompt_token_ids": [5, 6, 7, 8, 9]}
LONG = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(make_tiny("llama", tmp_path_factory.mktemp("model") / "tiny"), decoding="none")


@pytest.fixture
def llm(loaded: LLM) -> LLM:
    return loaded.with_decoding("ngram")


def run(of: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(of, TIMEOUT_S))


@asynccontextmanager
async def started(llm: LLM) -> AsyncIterator[EngineThread]:
    engine = EngineThread(llm, Metrics(llm, "tiny"))
    engine.start()
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.stop)
        assert not engine._thread.is_alive()


async def submitted(engine: EngineThread, *jobs: Job, streaming: bool = False) -> Run:
    taken = engine.submit(jobs or [Job(PROMPT, LONG)], streaming=streaming)
    await taken.accepted()
    return taken


def assert_nothing_left(llm: LLM) -> None:
    assert not llm.has_unfinished
    assert not llm._owners
    assert llm.engine.cache.pool.num_used == 0
    llm.engine.cache.check_integrity()


def samples_of(llm: LLM, params: SamplingParams) -> list[list[int]]:
    (output,) = llm.with_decoding("none").generate(PROMPT, params)
    return [sample.token_ids for sample in output.outputs]


def test_jobs_and_samples_come_by_their_index(llm: LLM) -> None:
    first = SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=9, ignore_eos=True)
    second = SamplingParams(n=2, temperature=0.0, max_tokens=9, ignore_eos=True)  # ends in the same step

    async def scenario() -> None:
        async with started(llm) as engine:
            taken = await submitted(engine, Job(PROMPT, first), Job(PROMPT, second))
            samples, count = await collect(taken, 2)
            assert [sample.token_ids for sample in samples] == samples_of(llm, first) + samples_of(llm, second)
            assert count.usage().completion_tokens == 36
            assert count.usage().prompt_tokens == 10

    run(scenario())
    assert_nothing_left(llm)


def test_updates_of_a_stream_add_up(llm: LLM) -> None:
    params = SamplingParams(
        temperature=1.0, seed=5, max_tokens=40, logprobs=1, stop=["t99", "t5 t6"], ignore_eos=True
    )

    async def scenario() -> None:
        async with started(llm) as engine:
            taken = await submitted(engine, Job(PROMPT, params), streaming=True)
            updates = [update async for batch in taken.updates() for update in batch]
            assert len(updates) > 5
            last = updates[-1].sample
            assert "".join(update.text for update in updates) == last.text
            tokens = [token for update in updates for token in update.sample.token_ids]
            assert [tokens] == samples_of(llm, params)
            assert sum(len(update.sample.logprobs or ()) for update in updates) == len(tokens)
            assert updates[-1].num_tokens == len(tokens)

    run(scenario())


@pytest.mark.parametrize("num_updates", [0, 1, 3])
def test_an_abort_frees_the_cache_and_leaves_the_others(llm: LLM, num_updates: int) -> None:
    async def scenario() -> None:
        async with started(llm) as engine:
            other = await submitted(engine, Job(PROMPT, LONG))
            taken = await submitted(engine, streaming=True)
            stream = taken.updates()
            for _ in range(num_updates):
                await anext(stream)
            taken.abort()
            taken.abort()
            samples, _ = await collect(other, 1)
            assert [samples[0].token_ids] == samples_of(llm, LONG)

    run(scenario())
    assert_nothing_left(llm)


@pytest.mark.parametrize(
    ("jobs", "error"),
    [
        ([Job({"prompt_token_ids": []}, LONG)], PromptError),
        ([Job(PROMPT, LONG), Job({"prompt_token_ids": [10**6]}, LONG)], PromptError),
        ([Job(PROMPT, SamplingParams(n=9))], CacheError),
    ],
    ids=["empty", "second of two", "more than may ever wait"],
)
def test_what_cannot_run_is_refused_whole(loaded: LLM, jobs: list[Job], error: type[Exception]) -> None:
    llm = limited(loaded, max_waiting=8)

    async def scenario() -> None:
        async with started(llm) as engine:
            with pytest.raises(error):
                await submitted(engine, *jobs)
            assert not engine.failed
            await collect(await submitted(engine), 1)

    run(scenario())
    assert_nothing_left(llm)


def limited(loaded: LLM, **scheduler: int) -> LLM:
    """The same model with other limits."""
    llm = loaded.with_decoding("none")
    llm.config = replace(llm.config, scheduler=replace(llm.config.scheduler, **scheduler))
    return llm.with_decoding("none")


def test_a_full_queue_refuses_and_then_takes_again(loaded: LLM) -> None:
    llm = limited(loaded, max_waiting=3, max_num_seqs=1)
    two = Job(PROMPT, SamplingParams(n=2, temperature=0.0, max_tokens=200, ignore_eos=True))

    async def scenario() -> None:
        async with started(llm) as engine:
            running = await submitted(engine, streaming=True)
            await anext(running.updates())
            waiting = await submitted(engine, two)
            with pytest.raises(QueueFullError):
                await submitted(engine, two)
            waiting.abort()
            taken = await submitted(engine, two)
            assert len((await collect(taken, 2))[0]) == 2
            running.abort()

    run(scenario())
    assert_nothing_left(llm)


def failing_step(llm: LLM, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    right, left = llm.engine.step, iter(range(after))

    def step() -> Any:
        if next(left, None) is None:
            raise RuntimeError("out of order")
        return right()

    monkeypatch.setattr(llm.engine, "step", step)


def test_a_step_that_raises_ends_everything_with_an_error(llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    failing_step(llm, monkeypatch, after=3)

    async def scenario() -> None:
        async with started(llm) as engine:
            runs = [engine.submit([Job(PROMPT, LONG)], streaming=streaming) for streaming in (True, False)]
            for taken in runs:
                await taken.accepted()
                with pytest.raises(EngineFailedError):
                    await collect(taken, 1)
            assert engine.failed
            with pytest.raises(EngineFailedError):
                await submitted(engine)

    run(scenario())
    assert "out of order" in caplog.text
    assert_nothing_left(llm)


def test_bad_logits_end_their_own_request_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    right = llm.model.forward

    def forward(batch: Any, cache: Any) -> Any:
        logits = right(batch, cache)
        rows = batch.token_ids if batch.logits_rows is None else batch.token_ids[batch.logits_rows]
        logits[rows == 77] = float("nan")
        return logits

    monkeypatch.setattr(llm.model, "forward", forward)
    monkeypatch.setattr(llm.model, "choose", lambda *_, **__: None)
    bad = Job({"prompt_token_ids": [5, 77]}, SamplingParams(n=2, temperature=0.0))
    expected = samples_of(llm, SamplingParams(temperature=0.0, max_tokens=8))

    async def scenario() -> None:
        async with started(llm) as engine:
            other = await submitted(engine, Job(PROMPT, SamplingParams(temperature=0.0, max_tokens=8)))
            taken = await submitted(engine, Job(PROMPT, LONG), bad)
            with pytest.raises(NumericsError):
                await collect(taken, 2)
            assert [(await collect(other, 1))[0][0].token_ids] == expected
            assert not engine.failed

    run(scenario())
    assert_nothing_left(llm)


@pytest.mark.parametrize("end", [EngineThread.abort_all, EngineThread.stop], ids=["abort_all", "stop"])
def test_stopping_ends_what_runs(llm: LLM, end: Callable[[EngineThread], None]) -> None:
    async def scenario() -> None:
        async with started(llm) as engine:
            taken = await submitted(engine, streaming=True)
            stream = taken.updates()
            await anext(stream)
            engine.drain()
            with pytest.raises(ServerStoppingError):
                await submitted(engine)
            await asyncio.to_thread(end, engine)
            with pytest.raises(ServerStoppingError):
                async for _ in stream:
                    pass

    run(scenario())
    assert_nothing_left(llm)


def test_an_idle_thread_sleeps(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    right = llm.engine.step
    monkeypatch.setattr(llm.engine, "step", lambda: (steps.append(1), right())[1])

    async def scenario() -> None:
        async with started(llm) as engine:
            await collect(await submitted(engine, Job(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True))), 1)
            num_steps = len(steps)
            await asyncio.sleep(0.2)
            assert len(steps) == num_steps
            assert engine._commands.empty()

    run(scenario())
