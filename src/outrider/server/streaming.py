"""Server-sent events of a run, and its end when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from logging import getLogger
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from outrider.errors import OutriderError
from outrider.outputs import CompletionOutput
from outrider.server.answer import UsageCount
from outrider.server.chats import ChatAnswer
from outrider.server.completions import CompletionAnswer
from outrider.server.engine_thread import Run
from outrider.server.failures import EngineFailedError, ServerStoppingError, failure_of

DONE = "data: [DONE]\n\n"
T = TypeVar("T")


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class EventStream(StreamingResponse):
    """A run's answer as it comes; whatever ends the response ends the run."""

    def __init__(self, answer: CompletionAnswer | ChatAnswer, run: Run) -> None:
        self._run = run
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events(answer, run), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._run.abort()


async def events(answer: CompletionAnswer | ChatAnswer, run: Run) -> AsyncIterator[str]:
    """A run's events: chunks as they come, perhaps the usage, then the end; an error stands in their place."""
    request = answer.request
    count = UsageCount([len(token_ids) for token_ids in run.prompt_token_ids], request.n)

    def usage_so_far() -> Any:
        return count.usage() if request.continuous_usage else None

    try:
        for chunk in answer.opening(usage_so_far()):
            yield event(chunk)
        async for updates in run.updates():
            for update in updates:
                count.add(update)
                for chunk in answer.chunks(update, usage_so_far()):
                    yield event(chunk)
        if request.include_usage:
            yield event(answer.closing(count.usage()))
    except (OutriderError, EngineFailedError, ServerStoppingError) as error:
        yield event(failure_of(error).body)
    except Exception as error:
        getLogger("outrider").exception("a stream could not be written")
        yield event(failure_of(error).body)
    yield DONE


def event(of: BaseModel) -> str:
    return f"data: {of.model_dump_json()}\n\n"


async def collect(run: Run, n: int) -> tuple[list[CompletionOutput], UsageCount]:
    """Wait for all choices of a run that is not streamed; samples in the order of their indices.

    Raises:
        NumericsError, EngineFailedError, ServerStoppingError: the request ends here.
    """
    count = UsageCount([len(token_ids) for token_ids in run.prompt_token_ids], n)
    samples: dict[int, CompletionOutput] = {}
    try:
        async for updates in run.updates():
            for update in updates:
                count.add(update)
                samples[update.index] = update.sample
    finally:
        run.abort()
    return [samples[index] for index in sorted(samples)], count


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client goes away before.

    Raises:
        ClientGoneError: it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnection(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()  # does nothing to what is done
        gone.cancel()


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
