"""The one thread that owns the model: requests come to it from the event loop, and tokens go back.

    event loop                           engine thread
    submit(jobs) ── commands ──────────> prepare, add            between two steps: requests join the running batch
                                         step, step, ...         sleeps while there is nothing to step
    run.updates() <── call_soon_threadsafe ── new text, tokens
    run.abort()  ── commands ──────────> abort                   the others do not notice

Nothing else may touch the `LLM` while the thread runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from logging import getLogger
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING

from outrider.errors import CacheError, OutriderError
from outrider.inputs.prompt import Prompt
from outrider.outputs import CompletionOutput
from outrider.sampling.params import SamplingParams
from outrider.server.failures import EngineFailedError, ServerStoppingError
from outrider.server.metrics import Metrics

if TYPE_CHECKING:
    from outrider.llm import LLM, Generation

log = getLogger("outrider")
MAX_ABORTED_TIME_S = 30.0  # that the last step may take when the thread is told to stop


@dataclass(frozen=True)
class Job:
    """A prompt, encoded already, and how to continue it."""

    prompt: Prompt
    params: SamplingParams


@dataclass(frozen=True)
class Update:
    """What is new of one choice.

    Attributes:
        index: of the choice in its request: prompt x n + sample.
        text: new text; the texts of all updates are the choice's text.
        sample: its new tokens and their logprobs, and all else so far; its text is all of the text.
        num_tokens: output tokens so far.
    """

    index: int
    text: str
    sample: CompletionOutput
    num_tokens: int


class Run:
    """One request that the engine works at, as its handler in the event loop sees it.

    Attributes:
        prompt_token_ids: of each job, once it was accepted.
    """

    def __init__(self, jobs: Sequence[Job], *, streaming: bool, abort: Callable[[Run], None]) -> None:
        self.jobs = jobs
        self.streaming = streaming
        self.arrival_time = time.monotonic()
        self.prompt_token_ids: list[list[int]] = []
        self._loop = asyncio.get_running_loop()
        self._accepted: asyncio.Future[None] = self._loop.create_future()
        self._events: asyncio.Queue[list[Update] | Exception] = asyncio.Queue()
        self._num_unfinished = sum(job.params.n for job in jobs)
        self._abort = abort
        self._ended = False

    async def accepted(self) -> None:
        """Wait until the engine has taken the request.

        Raises:
            OutriderError: it cannot, or not now.
            EngineFailedError, ServerStoppingError: it takes no more.
        """
        await self._accepted

    async def updates(self) -> AsyncIterator[list[Update]]:
        """What is new after every step that brought something, until all choices are finished.

        Raises:
            NumericsError, EngineFailedError, ServerStoppingError: the request ends here.
        """
        while self._num_unfinished:
            event = await self._events.get()
            if isinstance(event, Exception):
                self._ended = True
                raise event
            self._num_unfinished -= sum(update.sample.finish_reason is not None for update in event)
            yield event
        self._ended = True

    def abort(self) -> None:
        """Nobody wants the rest any more; does nothing to a request that has ended."""
        if not self._ended:
            self._ended = True
            self._abort(self)

    # What the engine thread calls. The loop is gone where a server was ended by force.

    def accept(self) -> None:
        self._call(self._settle, None)

    def fail(self, error: Exception) -> None:
        self._call(self._settle, error)
        self._call(self._events.put_nowait, error)

    def put(self, updates: list[Update]) -> None:
        self._call(self._events.put_nowait, updates)

    def _settle(self, error: Exception | None) -> None:
        if self._accepted.done():
            return
        if error is None:
            self._accepted.set_result(None)
        else:
            self._accepted.set_exception(error)

    def _call(self, callback: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *arguments)


@dataclass
class _Cursor:
    """How far a choice has been told to its run."""

    num_tokens: int = 0
    num_shown_tokens: int = 0
    num_chars: int = 0
    last_time: float | None = None
    finished: bool = False


@dataclass(eq=False)
class _Active:
    """A run in the engine; `first_index` is of each generation's first choice."""

    run: Run
    generations: list[Generation] = field(default_factory=list)
    cursors: dict[Generation, list[_Cursor]] = field(default_factory=dict)

    def first_index(self, generation: Generation) -> int:
        return sum(len(of.requests) for of in self.generations[: self.generations.index(generation)])


class EngineThread:
    """Runs an `LLM` for the handlers of an event loop.

    Attributes:
        failed: a step raised; every request, running or to come, is answered by an error.
        stopping: no request is taken any more.
    """

    def __init__(self, llm: LLM, metrics: Metrics) -> None:
        self._llm = llm
        self._metrics = metrics
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._active: dict[Run, _Active] = {}
        self._owners: dict[Generation, _Active] = {}
        self._thread = Thread(target=self._main, name="outrider-engine", daemon=True)
        self._stop = Event()
        self.failed = False
        self.stopping = False

    def start(self) -> None:
        self._thread.start()

    def submit(self, jobs: Sequence[Job], *, streaming: bool) -> Run:
        """Hand a request to the engine; `Run.accepted` says what it makes of it."""
        run = Run(jobs, streaming=streaming, abort=lambda run: self._commands.put(partial(self._abort, run)))
        self._commands.put(partial(self._admit, run))
        return run

    def drain(self) -> None:
        """Take no more requests; the running ones go on."""
        self.stopping = True

    def abort_all(self) -> None:
        """End all requests with an error."""
        self._commands.put(self._abort_all)

    def stop(self) -> None:
        """End the thread, and what still runs with an error; returns when it is done."""
        self.stopping = True
        self._commands.put(self._abort_all)
        self._commands.put(self._stop.set)
        self._thread.join(MAX_ABORTED_TIME_S)

    def _main(self) -> None:
        while not self._stop.is_set():
            try:
                self._work()
            except Exception:
                log.exception("the engine failed; it takes no more requests")
                self.failed = True
                self._end_all(EngineFailedError())

    def _work(self) -> None:
        """Obey what the event loop wants, asleep while there is nothing to do, then run a step."""
        while not self._commands.empty() or not self._active:
            self._commands.get()()
            if self._stop.is_set():
                return
        changed = self._llm.step()
        now = time.monotonic()
        for generation in changed:
            self._tell(generation, now)

    def _admit(self, run: Run) -> None:
        if self.failed or self.stopping:
            run.fail(EngineFailedError() if self.failed else ServerStoppingError())
            return
        active = _Active(run)
        try:
            self._check_may_wait(run)
            for number, job in enumerate(run.jobs, 1):
                name = f"prompt {number} of {len(run.jobs)}" if len(run.jobs) > 1 else "prompt"
                generation = self._llm.prepare(job.prompt, job.params, streaming=run.streaming, name=name)
                active.generations.append(generation)
            for generation in active.generations:
                self._llm.add(generation)
        except Exception as error:
            if not isinstance(error, OutriderError):
                log.exception("a request could not be prepared")
            run.fail(error)
            self._abort_generations(active)
            return
        run.prompt_token_ids = [generation.prompt_token_ids for generation in active.generations]
        active.cursors = {of: [_Cursor() for _ in of.requests] for of in active.generations}
        self._active[run] = active
        self._owners.update(dict.fromkeys(active.generations, active))
        self._metrics.count_prompts([len(token_ids) for token_ids in run.prompt_token_ids])
        run.accept()

    def _check_may_wait(self, run: Run) -> None:
        most, wanted = self._llm.config.scheduler.max_waiting, sum(job.params.n for job in run.jobs)
        if wanted > most:
            raise CacheError("request", got=f"{wanted} choices", expected=f"at most scheduler.max_waiting={most}")

    def _tell(self, generation: Generation, now: float) -> None:
        """Send a run what a step has brought to one of its generations."""
        active = self._owners.get(generation)
        if active is None:  # aborted because of another one of the same run
            return
        if generation.error is not None:
            self._metrics.count_finished("error", now - active.run.arrival_time)
            self._end(active, generation.error)
            return
        first, updates = active.first_index(generation), []
        for index, cursor in enumerate(active.cursors[generation]):
            if not cursor.finished and (update := self._advance(active, generation, index, cursor, now)) is not None:
                updates.append(Update(first + index, *update))
        if updates:
            active.run.put(updates)
        if all(cursor.finished for cursors in active.cursors.values() for cursor in cursors):
            self._forget(active)  # told all, that is: several of its generations may have finished in this step

    def _advance(
        self, active: _Active, generation: Generation, index: int, cursor: _Cursor, now: float
    ) -> tuple[str, CompletionOutput, int] | None:
        """New text of a choice, the sample and its number of tokens; None while there is nothing to show."""
        request = generation.requests[index]
        num_new = request.num_output_tokens - cursor.num_tokens
        if num_new:
            since = active.run.arrival_time if cursor.last_time is None else cursor.last_time
            self._metrics.count_tokens(num_new, now - since, first=cursor.last_time is None)
            cursor.num_tokens, cursor.last_time = request.num_output_tokens, now
        if request.finish_reason is None and (not active.run.streaming or not num_new):
            return None
        sample = self._llm.sample(generation, index, first_token=cursor.num_shown_tokens)
        text = sample.text[cursor.num_chars :]
        if request.finish_reason is None and not text:
            return None
        cursor.num_chars, cursor.num_shown_tokens = len(sample.text), cursor.num_tokens
        if request.finish_reason is not None:
            cursor.finished = True
            self._metrics.count_finished(request.finish_reason, now - active.run.arrival_time)
        return text, sample, cursor.num_tokens

    def _abort(self, run: Run) -> None:
        active = self._active.get(run)
        if active is not None:
            self._metrics.count_finished("abort", time.monotonic() - run.arrival_time)
            self._forget(active)
            self._abort_generations(active)

    def _abort_all(self) -> None:
        self._end_all(ServerStoppingError())

    def _end_all(self, error: Exception) -> None:
        for active in list(self._active.values()):
            self._end(active, error)

    def _end(self, active: _Active, error: Exception) -> None:
        """End a whole run with an error."""
        active.run.fail(error)
        self._forget(active)
        self._abort_generations(active)

    def _abort_generations(self, active: _Active) -> None:
        # Of an engine that failed this frees what can be freed; one that cannot abort has failed, too.
        with contextlib.suppress(Exception) if self.failed else contextlib.nullcontext():
            for generation in active.generations:
                self._llm.abort(generation)

    def _forget(self, active: _Active) -> None:
        del self._active[active.run]
        for generation in active.generations:
            del self._owners[generation]
