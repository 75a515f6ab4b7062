"""A second, smaller model drafts a chain or a tree (Leviathan et al., arXiv 2211.17192; Chen et al., 2302.01318).

The runner (`draft_runner.py`) has the model read each draft token once; the growth (`growth/`) says which tokens
there are to be. Under the coupled rule children are drawn with the target's own noise, so that draft and target tend
to the same choice; under rejection rules the noise is independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from logging import getLogger

from outrider.cache.kv_cache import KVCache
from outrider.config import DraftModelConfig
from outrider.drafting.draft_runner import DraftRunner, TreeReader, TreeRows, accepted_rows
from outrider.drafting.drafter import DraftContext, DraftOutcome, DraftStyle, FinishedText
from outrider.drafting.forward_cost import ForwardCost
from outrider.drafting.growth.build import build_growth
from outrider.drafting.growth.policy import PlannedGrowth
from outrider.drafting.growth.tree import GrowingTree
from outrider.models.model import Model
from outrider.token_tree import TokenTree


class DraftModelDrafter:
    reads_logits = False

    def __init__(
        self,
        config: DraftModelConfig,
        style: DraftStyle,
        *,
        model: Model,
        cache: KVCache,
        vocab_size: int,
        max_batch_tokens: int,
        forward_cost: Callable[[], ForwardCost],
        make_runner: Callable[..., TreeReader] = DraftRunner,
    ) -> None:
        self.name: str = config.method
        self._growth = build_growth(config, style)
        self._forward_cost = forward_cost if config.plans_by_draft_cost else None
        self._planner = self._growth.planner if isinstance(self._growth, PlannedGrowth) else None
        self._runner = make_runner(model, cache, vocab_size=vocab_size, max_batch_tokens=max_batch_tokens)
        self.returns_probs = style.noise == "independent" and self._growth.draws.siblings is not None
        self.max_nodes = self._growth.limits.num_nodes
        self._rows: dict[str, TreeRows] = {}
        self.num_without_room = 0
        self._warn_of_limits(max_batch_tokens, cache.num_positions)

    def plan_for(self, cost: ForwardCost) -> None:
        """Fit trees to what the target's forwards cost, and the draft's own, where the growth plans them."""
        if self._planner is not None:
            self._planner.cost = cost
            self._planner.own_cost = self._forward_cost() if self._forward_cost else None

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        self.num_without_room = 0
        active = [context for context in contexts if self._has_room(context)]
        rows: dict[str, TreeRows] = {}
        growing: list[tuple[TreeRows, Iterator[Sequence[int]]]] = []
        for context, log_weights in zip(active, self._runner.catch_up(active), strict=True):
            tree = GrowingTree(context, self._growth.draws, self._growth.limits)
            tree.set_log_weights(0, log_weights)
            rows[context.request_id] = self._runner.rows_for(tree, self._growth.num_rows)
            growing.append((rows[context.request_id], self._growth.grow(tree)))
        while growing:
            wanted = [(tree_rows, growth, next(growth, None)) for tree_rows, growth in growing]
            self._runner.read([(tree_rows, nodes) for tree_rows, _, nodes in wanted if nodes is not None])
            growing = [(tree_rows, growth) for tree_rows, growth, nodes in wanted if nodes is not None]
        self._rows.update(rows)
        return [
            rows[context.request_id].tree.finished()
            if context.request_id in rows
            else TokenTree.root_only(context.token_ids[-1])
            for context in contexts
        ]

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        for outcome in outcomes:
            rows = self._rows.pop(outcome.request_id, None)
            if rows is not None:
                accepted = outcome.new_tokens[:-1]  # what follows them is the next root, whose logits are wanted
                kept = accepted_rows(rows, accepted)
                self._runner.commit(outcome.request_id, kept, accepted[: len(kept)])
                if self._planner is not None:
                    grown = rows.tree
                    self._planner.count(TokenTree(tuple(grown.tokens), tuple(grown.parents)), outcome)
        if self._planner is not None:
            self._planner.end_step()

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._rows.pop(request_id, None)
        self._runner.release(request_id, finished)

    def check_integrity(self) -> None:
        self._runner.check_integrity()

    def _warn_of_limits(self, max_batch_tokens: int, num_positions: int) -> None:
        """Say so where trees could never be as large as they were asked for, or never be drafted."""
        name, wanted, num_rows = f"{self.name}.max_nodes", self.max_nodes, self._growth.num_rows
        if wanted >= max_batch_tokens:
            getLogger("outrider").warning(
                "%s: got %d, expected at most %d, the rows of a step without the root; trees will be smaller; "
                "raise scheduler.max_batch_tokens",
                name,
                wanted,
                max_batch_tokens - 1,
            )
        if num_rows >= num_positions:
            getLogger("outrider").warning(
                "%s: got %d, of which the draft reads up to %d, expected fewer than its cache's %d positions; "
                "nothing will be drafted; raise cache.memory_gb, cache.num_blocks or scheduler.max_num_seqs",
                name,
                wanted,
                num_rows,
                num_positions,
            )

    def _has_room(self, context: DraftContext) -> bool:
        depth = min(self._growth.limits.depth, context.max_depth)
        if context.max_nodes < 1 or depth < 1:
            return False
        has_room = self._runner.has_room(context, self._growth.num_rows, depth)
        self.num_without_room += not has_room
        return has_room
