"""Who runs in a step and with how many rows: continuous batching with one counter and no phases.

Every request is scheduled from its computed towards its known tokens. What is missing is its *chunk*: a piece of
the prompt, everything after a preemption, or the single last token of a decode step. Where the chunk reaches the
last known token the request may have a tree behind it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from logging import getLogger

from outrider.cache.kv_cache import KVCache
from outrider.config import SchedulerConfig
from outrider.errors import CacheError, QueueFullError
from outrider.request import Request


@dataclass(eq=False, slots=True)
class ScheduledSequence:
    """One request's share of a step.

    Attributes:
        num_computed: committed positions in the cache.
        chunk_size: known tokens to compute, from `num_computed` on; cache room for them is reserved.
        max_draft_nodes: draft tokens that may follow, given last; there is room for all requests' together, and who
            drafts less reserves less.
    """

    request: Request
    num_computed: int
    chunk_size: int
    max_draft_nodes: int = 0

    @property
    def yields_token(self) -> bool:
        return self.num_computed + self.chunk_size == len(self.request.token_ids)


class Scheduler:
    """Attributes:
    preempted: ids that lost their place in the last call of `schedule`.
    num_cut_rows: rows that its requests could have had for draft tokens, had the cache had blocks for them.
    """

    def __init__(self, config: SchedulerConfig, cache: KVCache, max_draft_nodes: int) -> None:
        self._config = config
        self._cache = cache
        self._max_draft_nodes = max_draft_nodes
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission: the last one is preempted first
        self.preempted: list[str] = []
        self.num_cut_rows = 0
        self._warned = False

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            QueueFullError: as many wait as may.
            CacheError: see `check_fits`.
        """
        if len(self.waiting) >= self._config.max_waiting:
            raise QueueFullError(
                "request queue",
                got=f"{len(self.waiting)} waiting",
                expected=f"fewer than scheduler.max_waiting={self._config.max_waiting}",
                remedy="try again later",
            )
        self.check_fits(request)
        self.waiting.append(request)

    def check_fits(self, request: Request) -> None:
        """Refuse what the cache could not hold even alone.

        Raises:
            CacheError: the request may grow beyond the cache's capacity.
        """
        capacity = self._cache.num_positions
        if request.max_length > capacity:
            raise CacheError(
                "request length",
                got=f"{request.num_prompt_tokens} prompt tokens, up to {request.max_length} in all",
                expected=f"at most the cache's {capacity} positions",
                remedy="shorten the prompt, lower max_tokens or raise cache.memory_gb",
            )

    def schedule(self) -> list[ScheduledSequence]:
        """The sequences of the next step; their rows are reserved in the cache."""
        self.preempted, self.num_cut_rows = [], 0
        budget = self._config.max_batch_tokens
        plan: list[ScheduledSequence] = []
        queue = deque(self.running)
        while queue and budget > 0:
            request = queue.popleft()
            scheduled = self._place(request, budget, num_behind=len(queue))
            while scheduled is None and queue:
                self._preempt(queue.pop())
                scheduled = self._place(request, budget, num_behind=len(queue))
            if scheduled is None:  # every younger request has given way: make it wait itself
                self._preempt(request)
                break
            plan.append(scheduled)
            budget -= scheduled.chunk_size
        if not self.preempted:
            budget = self._admit(plan, budget)
        self._give_rows_to_drafts(plan, budget)
        assert plan or not self.has_unfinished, "nothing could be scheduled"
        return plan

    def finish(self, request: Request) -> None:
        """Take a finished or aborted request out and release its blocks."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        if request.request_id in self._cache:
            self._cache.release(request.request_id)

    def _admit(self, plan: list[ScheduledSequence], budget: int) -> int:
        """Take waiting requests in as long as there is room; returns what is left of the budget."""
        while self.waiting and budget > 0 and len(self.running) < self._config.max_num_seqs:
            request = self.waiting[0]
            num_cached = self._cache.admit(request.request_id, request.token_ids)
            if self.running and not self._has_room(request):
                self._cache.release(request.request_id)
                return budget
            scheduled = self._place(request, budget, num_behind=0, num_spare_blocks=len(self.running))
            if scheduled is None:
                self._cache.release(request.request_id)
                return budget
            if request.metrics.num_preemptions == 0:
                request.metrics.num_cached_tokens = num_cached
            self.waiting.popleft()
            self.running.append(request)
            plan.append(scheduled)
            budget -= scheduled.chunk_size
        return budget

    def _has_room(self, request: Request) -> bool:
        """Whether all that a request and the running ones know fits, with a block each to grow into.

        Admitting a long prompt when its first chunk fits would only get it preempted, again and again.
        """
        known = sum(
            self._cache.num_new_blocks(r.request_id, len(r.token_ids) - self._cache.num_computed(r.request_id))
            for r in (*self.running, request)
        )
        return known + len(self.running) <= self._cache.pool.num_available

    def _place(
        self, request: Request, budget: int, *, num_behind: int, num_spare_blocks: int = 0
    ) -> ScheduledSequence | None:
        """Reserve rows for what a request knows and has not computed; None if they do not fit.

        Args:
            num_behind: running requests still to be placed in this step; each is left a row.
            num_spare_blocks: blocks that must stay available for running requests to grow into.
        """
        cache, request_id = self._cache, request.request_id
        num_computed = cache.num_computed(request_id)
        chunk_size = min(len(request.token_ids) - num_computed, budget - min(num_behind, budget - 1))
        if cache.num_new_blocks(request_id, chunk_size) > cache.pool.num_available - num_spare_blocks:
            return None
        cache.reserve(request_id, chunk_size)
        return ScheduledSequence(request, num_computed, chunk_size)

    def _give_rows_to_drafts(self, plan: Sequence[ScheduledSequence], budget: int) -> None:
        """Share what rows and blocks nobody else wants among the requests that may have drafts.

        Last of all, so that drafts never cost another request, or a prompt, its rows. No block is taken yet: in most
        steps of a planner that has nothing to draft it would be given back at once.
        """
        drafting = [
            scheduled
            for scheduled in plan
            if scheduled.yields_token
            and scheduled.request.may_draft
            and scheduled.request.max_length - len(scheduled.request.token_ids) > 1
        ]
        cache, num_blocks = self._cache, self._cache.pool.num_available
        for done, scheduled in enumerate(drafting):
            request_id, chunk_size = scheduled.request.request_id, scheduled.chunk_size
            room = cache.most_rows(request_id, num_blocks) - chunk_size
            wanted = min(self._max_draft_nodes, budget // (len(drafting) - done))
            max_nodes = min(wanted, room)
            self.num_cut_rows += wanted - max_nodes
            num_blocks -= cache.num_new_blocks(request_id, chunk_size + max_nodes)
            budget -= max_nodes
            scheduled.max_draft_nodes = max_nodes
        if self.num_cut_rows and not self._warned:
            self._warned = True
            getLogger("outrider").warning(
                "KV cache: got no block for %d of a step's draft tokens, expected one for each; drafts are cut while "
                "it is full, and requests are slower, not different; raise cache.memory_gb or cache.num_blocks, or "
                "lower scheduler.max_num_seqs",
                self.num_cut_rows,
            )

    def _preempt(self, request: Request) -> None:
        """Take a request's blocks; it starts again from its known tokens, so its output does not change."""
        self._cache.release(request.request_id)
        self.running.remove(request)
        self.waiting.appendleft(request)
        request.metrics.num_preemptions += 1
        self.preempted.append(request.request_id)
