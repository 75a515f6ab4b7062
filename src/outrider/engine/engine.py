"""The one step that every decoding method is: propose, run the target once, verify, commit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.cache.kv_cache import KVCache, SequenceCommit
from outrider.drafting.drafter import DraftContext, Drafter, DraftOutcome
from outrider.engine.scheduler import ScheduledSequence, Scheduler
from outrider.engine.stats import EngineStats
from outrider.engine.stopping import append_tokens
from outrider.errors import NumericsError
from outrider.models.batch import SequenceRows, build_forward_batch, rows_of
from outrider.models.model import ForwardBatch, Model
from outrider.request import Request
from outrider.sampling.logprobs import token_logprobs
from outrider.sampling.processors import RowContext, process_logits
from outrider.sampling.sampler import KeyedDecisions, check_finite
from outrider.token_tree import TokenTree, TokenTreeBatch, VerifiedPath
from outrider.verification.rule import VerificationRule


class Engine:
    """Runs requests together, step by step; knows tokens, not text."""

    def __init__(
        self,
        model: Model,
        drafter: Drafter,
        rule: VerificationRule,
        cache: KVCache,
        scheduler: Scheduler,
        *,
        row_invariant: bool = False,
    ) -> None:
        self.model = model
        self.drafter = drafter
        self.rule = rule
        self.cache = cache
        self.scheduler = scheduler
        self.stats = EngineStats()
        self._row_invariant = row_invariant

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    def add(self, request: Request) -> None:
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """End a request where it stands; the others do not notice."""
        request.finish_reason = "abort"
        self._release(request)

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Run one step; returns the requests that got tokens or ended."""
        stats = self.stats
        stats.num_steps += 1
        with stats.timed("step"):
            plan = self.scheduler.schedule()
            drafting = [scheduled for scheduled in plan if scheduled.yields_token]
            with stats.timed("draft"):
                trees = self._propose(drafting)
            batch = self._build_batch(plan, trees)
            with stats.timed("target"):
                logits = self.model.forward(batch, self.cache)
            with stats.timed("verify"):
                verified = self._verify(drafting, trees, logits)
            self._commit(plan, verified)
            with stats.timed("draft"):
                self._observe(verified)
            return self._update(verified)

    def _propose(self, drafting: Sequence[ScheduledSequence]) -> TokenTreeBatch:
        for request_id in self.scheduler.preempted:
            self.drafter.release(request_id)
        contexts = [
            DraftContext(
                request_id=request.request_id,
                token_ids=request.token_ids,
                num_prompt_tokens=request.num_prompt_tokens,
                max_nodes=scheduled.max_draft_nodes,
                max_depth=request.max_length - len(request.token_ids) - 1,  # the bonus token needs a place too
                params=request.params,
                seed=request.seed,
                stop_token_ids=request.stop_token_ids,
            )
            for scheduled in drafting
            for request in (scheduled.request,)
        ]
        return TokenTreeBatch.from_trees(self.drafter.propose(contexts) if contexts else [])

    def _build_batch(self, plan: Sequence[ScheduledSequence], trees: TokenTreeBatch) -> ForwardBatch:
        proposals = iter(trees.trees)
        sequences: list[SequenceRows] = []
        for scheduled in plan:
            request, start = scheduled.request, scheduled.num_computed
            chunk = request.token_ids[start : start + scheduled.chunk_size]
            if scheduled.yields_token:  # the chunk's last token is the root
                token_ids, parents = rows_of(next(proposals), chunk[:-1])
                logits_rows = range(len(chunk) - 1, len(token_ids))
            else:
                token_ids, parents, logits_rows = chunk, range(-1, len(chunk) - 1), ()
            slots = self.cache.reserve(request.request_id, len(token_ids))
            sequences.append(SequenceRows(token_ids, parents, start, slots, logits_rows))
        return build_forward_batch(sequences, self.model.device, row_invariant=self._row_invariant)

    def _verify(
        self, drafting: Sequence[ScheduledSequence], trees: TokenTreeBatch, logits: Tensor
    ) -> list[_Verified]:
        if not drafting:
            return []
        requests = [scheduled.request for scheduled in drafting]
        contexts = [
            RowContext(
                rows=trees.rows(i),
                params=request.params,
                token_ids=request.token_ids,
                num_prompt_tokens=request.num_prompt_tokens,
                tree=trees.trees[i],
                stop_ids=request.stop_token_ids,
            )
            for i, request in enumerate(requests)
        ]
        decisions = KeyedDecisions(
            trees,
            seeds=[request.seed for request in requests],
            positions=[len(request.token_ids) for request in requests],
            greedy=[request.params.greedy for request in requests],
        )
        processed = process_logits(logits, contexts)
        sound = check_finite(logits)
        if processed is not logits:  # parameters may leave no token to choose
            sound &= check_finite(processed)
        if not bool(sound.all()):
            # Whoever reaches such a row ends there, see `_update`; no rule has to bear it.
            processed = processed.masked_fill(~sound[:, None], 0.0)
        result = self.rule.verify(trees, processed, decisions)
        return [
            _Verified(request, trees.trees[i], path, logits[trees.rows(i)], sound[trees.rows(i)])
            for i, (request, path) in enumerate(zip(requests, result.paths, strict=True))
        ]

    def _commit(self, plan: Sequence[ScheduledSequence], verified: Sequence[_Verified]) -> None:
        """Keep every chunk and the accepted path behind it."""
        outcomes = iter(verified)
        commits: dict[str, SequenceCommit] = {}
        for scheduled in plan:
            request, start, size = scheduled.request, scheduled.num_computed, scheduled.chunk_size
            kept, token_ids = list(range(size)), request.token_ids[start : start + size]
            if scheduled.yields_token:
                outcome = next(outcomes)
                kept += [size - 1 + node for node in outcome.path.accepted_nodes]  # the root is the chunk's last row
                token_ids += outcome.new_tokens[:-1]
            commits[request.request_id] = SequenceCommit(kept, token_ids)
        self.cache.commit(commits)

    def _observe(self, verified: Sequence[_Verified]) -> None:
        if verified:
            self.drafter.observe([DraftOutcome(v.request.request_id, v.tree, v.path, v.logits) for v in verified])

    def _update(self, verified: Sequence[_Verified]) -> list[Request]:
        """Hand the new tokens to their requests and take out those that end."""
        now = time.monotonic()
        for outcome in verified:
            request, num_drafted = outcome.request, outcome.tree.num_nodes - 1
            num_sound = outcome.num_sound
            num_appended = append_tokens(request, outcome.new_tokens[:num_sound])
            if num_sound < len(outcome.new_tokens) and not request.finished:
                request.finish_reason = "error"
                request.error = NumericsError(
                    f"logits of request {request.request_id}",
                    got=f"NaN, infinity or no allowed token for output token {request.num_output_tokens}",
                    expected="finite numbers",
                    remedy="check the weights and logit_bias/min_tokens, or load with dtype='float32'",
                )
            num_accepted = min(num_appended, len(outcome.path.accepted_nodes))
            self.stats.count_path(num_drafted, num_accepted, num_appended)
            request.metrics.count_path(num_drafted, num_accepted, now)
            if request.params.logprobs is not None:
                rows = outcome.logits[outcome.path_rows[:num_appended]]
                chosen = outcome.new_tokens[:num_appended]
                request.logprobs.extend(token_logprobs(rows, chosen, request.params.logprobs))
            if request.finished:
                request.metrics.finish_time = now
                self._release(request)
        return [outcome.request for outcome in verified]

    def _release(self, request: Request) -> None:
        self.scheduler.finish(request)
        self.drafter.release(request.request_id)


@dataclass(frozen=True, eq=False)
class _Verified:
    """What a step made of one request's tree.

    Attributes:
        logits: ``[tree.num_nodes, vocab]`` raw logits.
        sound: ``[tree.num_nodes]`` bool; False for rows with NaN or infinite logits.
    """

    request: Request
    tree: TokenTree
    path: VerifiedPath
    logits: Tensor
    sound: Tensor

    @property
    def path_rows(self) -> list[int]:
        """The nodes whose logits chose each of the new tokens."""
        return [0, *self.path.accepted_nodes]

    @property
    def new_tokens(self) -> list[int]:
        return [*(self.tree.tokens[node] for node in self.path.accepted_nodes), self.path.next_token]

    @property
    def num_sound(self) -> int:
        """New tokens before the first that was chosen from unsound logits; rejected drafts do not count."""
        sound = self.sound.tolist()
        return next((i for i, row in enumerate(self.path_rows) if not sound[row]), len(self.path_rows))
