"""The one step that every decoding method is: propose, run the target once, verify, commit."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.cache.kv_cache import KVCache, SequenceCommit
from outrider.drafting.drafter import DraftContext, Drafter, DraftOutcome, FinishedText
from outrider.engine.scheduler import ScheduledSequence, Scheduler
from outrider.engine.stats import EngineStats
from outrider.engine.stopping import append_tokens
from outrider.errors import NumericsError
from outrider.kernels import native
from outrider.kernels.rows import KeyedDraw, SequenceRows
from outrider.models.batch import ForwardBatch, rows_of
from outrider.models.model import Choices, Model
from outrider.request import Request
from outrider.sampling.logprobs import token_logprobs
from outrider.sampling.params import SamplingParams
from outrider.sampling.processors import RowContext, process_logits
from outrider.sampling.sampler import KeyedDecisions, check_finite
from outrider.token_tree import TokenTree, TokenTreeBatch, VerifiedPath
from outrider.verification.coupled import follow_choices
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

    def on_its_cores(self) -> AbstractContextManager[None]:
        """What a step holds of the process; a loop of steps that holds it saves each the trouble."""
        return native.cores_for_kernels(self.model.runs_on_kernels)

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Run one step; returns the requests that got tokens or ended."""
        stats = self.stats
        stats.begin_step()
        with self.on_its_cores():
            plan = self.scheduler.schedule()
            stats.num_cut_rows += self.scheduler.num_cut_rows
            if not plan:
                return []
            drafting = [scheduled for scheduled in plan if scheduled.yields_token]
            stats.lap("other")
            trees = self._propose(drafting, sum(scheduled.chunk_size for scheduled in plan))
            stats.num_without_room += self.drafter.num_without_room if drafting else 0
            stats.lap("draft")
            batch = self._build_batch(plan, trees)
            stats.lap("other")
            target = self._run_target(drafting, batch)
            stats.kernel_s += self.model.kernel_seconds
            stats.lap("target")
            verified = self._verify(drafting, trees, target)
            stats.lap("verify")
            self._commit(plan, verified)
            stats.lap("other")
            self._observe(verified)
            stats.lap("draft")
            requests = self._update(verified)
        stats.lap("other")
        return requests

    def _propose(self, drafting: Sequence[ScheduledSequence], num_step_rows: int) -> TokenTreeBatch:
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
                num_step_rows=num_step_rows,
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
            params = request.params
            draw = KeyedDraw(params.temperature, request.seed) if params.samples_raw_logits else None
            sequences.append(SequenceRows(token_ids, parents, start, slots, logits_rows, draw))
        return ForwardBatch(sequences, self.model.device, row_invariant=self._row_invariant)

    def _run_target(self, drafting: Sequence[ScheduledSequence], batch: ForwardBatch) -> Tensor | Choices:
        """The one forward: whole rows of logits, or what follows each where choices are all that the rule needs."""
        if all(self._takes_choices(scheduled.request.params) for scheduled in drafting):
            choices = self.model.choose(batch, self.cache, with_logits=self.drafter.reads_logits)
            if choices is not None:
                return choices
        return self.model.forward(batch, self.cache)

    def _takes_choices(self, params: SamplingParams) -> bool:
        return params.takes_argmax or (params.samples_raw_logits and self.rule.follows_choices)

    def _verify(
        self, drafting: Sequence[ScheduledSequence], trees: TokenTreeBatch, target: Tensor | Choices
    ) -> list[_Verified]:
        if not drafting:
            return []
        if isinstance(target, Choices):
            return _follow(drafting, trees, target)
        return self._apply_rule(drafting, trees, target)

    def _apply_rule(
        self, drafting: Sequence[ScheduledSequence], trees: TokenTreeBatch, logits: Tensor
    ) -> list[_Verified]:
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
        sound_rows = check_finite(logits)
        if processed is not logits:  # parameters may leave no token to choose
            sound_rows &= check_finite(processed)
        sound = [True] * len(requests)
        if not bool(sound_rows.all()):
            processed = processed.masked_fill(~sound_rows[:, None], 0.0)  # no rule has to bear them
            sound = [bool(sound_rows[trees.rows(i)].all()) for i in range(len(requests))]
        result = self.rule.verify(trees, processed, decisions)
        return [
            _Verified(request, trees.trees[i], path, choices, logits[trees.rows(i)], sound[i])
            for i, (request, path, choices) in enumerate(zip(requests, result.paths, result.choices, strict=True))
        ]

    def _commit(self, plan: Sequence[ScheduledSequence], verified: Sequence[_Verified]) -> None:
        """Keep every chunk and the accepted path behind it; nothing of a request with unsound logits."""
        outcomes = iter(verified)
        commits: dict[str, SequenceCommit] = {}
        for scheduled in plan:
            request, start, size = scheduled.request, scheduled.num_computed, scheduled.chunk_size
            kept, token_ids = list(range(size)), request.token_ids[start : start + size]
            if scheduled.yields_token:
                outcome = next(outcomes)
                if not outcome.sound:  # its keys and values may be NaN, and must not reach the prefix index
                    self.cache.rollback(request.request_id)
                    continue
                kept += [size - 1 + node for node in outcome.path.accepted_nodes]  # the root is the chunk's last row
                token_ids += outcome.new_tokens[:-1]
            commits[request.request_id] = SequenceCommit(kept, token_ids)
        self.cache.commit(commits)

    def _observe(self, verified: Sequence[_Verified]) -> None:
        outcomes = [
            DraftOutcome(v.request.request_id, v.tree, v.path, v.logits, v.choices, v.maxima)
            for v in verified
            if v.sound
        ]
        if outcomes:
            self.drafter.observe(outcomes)

    def _update(self, verified: Sequence[_Verified]) -> list[Request]:
        """Hand the new tokens to their requests and take out those that end."""
        now = time.monotonic()
        for outcome in verified:
            request, num_drafted = outcome.request, outcome.tree.num_nodes - 1
            if outcome.sound:
                num_appended = append_tokens(request, outcome.new_tokens)
                num_accepted = min(num_appended, len(outcome.path.accepted_nodes))
                self.stats.count_path(num_drafted, num_accepted, num_appended)
                request.metrics.count_path(num_drafted, num_accepted, now)
                if request.params.logprobs is not None:
                    assert outcome.logits is not None, "no logits for a request that asks for logprobs"
                    rows = outcome.logits[[0, *outcome.path.accepted_nodes][:num_appended]]
                    chosen = outcome.new_tokens[:num_appended]
                    request.logprobs.extend(token_logprobs(rows, chosen, request.params.logprobs))
            elif num_drafted:
                # Perhaps only a draft is to blame, which plain decoding would never have seen: go on without.
                request.may_draft = False
                self.drafter.release(request.request_id)
            else:
                request.finish_reason = "error"
                request.error = NumericsError(
                    f"logits of request {request.request_id}",
                    got=f"NaN, infinity or no allowed token for output token {request.num_output_tokens}",
                    expected="finite numbers",
                    remedy="check the weights and logit_bias/min_tokens, or load with dtype='float32'",
                )
            if request.finished:
                request.metrics.finish_time = now
                self._release(request)
        return [outcome.request for outcome in verified]

    def _release(self, request: Request) -> None:
        self.scheduler.finish(request)
        self.drafter.release(request.request_id, FinishedText(request.token_ids, request.num_prompt_tokens))


@dataclass(frozen=True, eq=False)
class _Verified:
    """What a step made of one request's tree.

    Attributes:
        choices: ``[tree.num_nodes]`` the target's choices; None where the rule made them along the path alone.
        logits: ``[tree.num_nodes, vocab]`` raw logits; None where only choices were computed.
        sound: False if any of the tree's rows had NaN or infinite logits, or no token to choose.
        maxima: of the logits, as `Choices` has them.
    """

    request: Request
    tree: TokenTree
    path: VerifiedPath
    choices: Sequence[int] | None
    logits: Tensor | None
    sound: bool
    maxima: Tensor | None = None

    @property
    def new_tokens(self) -> list[int]:
        return [*(self.tree.tokens[node] for node in self.path.accepted_nodes), self.path.next_token]


def _follow(drafting: Sequence[ScheduledSequence], trees: TokenTreeBatch, choices: Choices) -> list[_Verified]:
    """What rules do with choices that are made: walk along them."""
    verified = []
    for index, (scheduled, tree) in enumerate(zip(drafting, trees.trees, strict=True)):
        rows = trees.rows(index)
        chosen = choices.token_ids[rows]
        logits = None if choices.logits is None else choices.logits[rows]
        maxima = None if choices.maxima is None else choices.maxima[rows]
        sound = all(map(math.isfinite, choices.log_weights[rows]))
        path = follow_choices(tree, chosen)
        verified.append(_Verified(scheduled.request, tree, path, chosen, logits, sound, maxima))
    return verified
