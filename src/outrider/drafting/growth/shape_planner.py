"""Which fixed shape is best now: from the acceptance that was counted, and for the machine that it runs on."""

from __future__ import annotations

from outrider.drafting.drafter import DraftOutcome
from outrider.drafting.dynamic_tree import candidate_tree
from outrider.drafting.forward_cost import ForwardCost
from outrider.drafting.growth.tree import GrowthLimits
from outrider.drafting.positional_acceptance import AcceptanceCounter
from outrider.drafting.sequoia import LatencyTable, hardware_aware_shape, sequoia_shape
from outrider.drafting.tree_shape import Acceptance, TreeShape, acceptance_rows
from outrider.token_tree import TokenTree

# What acceptance is taken to be until it is counted: that of the bundled pair on held-out code, about.
PRIOR = (0.6, 0.12, 0.05, 0.03, 0.02, 0.015, 0.01, 0.008)
PRIOR_TRIALS = 16
FIRST_REBUILD, MAX_REBUILD = 16, 512  # steps between two plans: twice as many each time, up to the second

MAX_SIZE_CLASS = 64
ONE_NODE = TreeShape.from_paths([(0,)])


class ShapePlanner:
    """Plans shapes from what has come true before the step, never from what a step draws.

    So the shape of a step is given before its first draw, and drawn trees of it are exact under rejection rules. All
    requests count together. Under rejection rules, whose outputs depend on the trees, others thereby have a part in
    what a seed gives, though none in its distribution.

    Args:
        acceptance: of children by rank, or by depth and rank; None counts it.
        draft_cost: time of a forward of the draft, in forwards of the target over one row for each request; None
            reads `own_cost`.
        first_rebuild: steps after which counted acceptance makes new shapes for the first time.

    Attributes:
        cost: of the target's forwards; None plans the largest trees.
        own_cost: of the draft's forwards, one of which a level takes.
        max_depth: of its shapes.
    """

    def __init__(
        self,
        limits: GrowthLimits,
        acceptance: Acceptance | None,
        draft_cost: float | None,
        *,
        first_rebuild: int = FIRST_REBUILD,
    ) -> None:
        self._limits = limits
        self._counter = AcceptanceCounter(limits.depth, len(PRIOR)) if acceptance is None else None
        self._rows = acceptance_rows(PRIOR if acceptance is None else acceptance, limits.depth)
        self._draft_cost = draft_cost
        self.max_depth = len(self._rows)
        self._interval = self._num_steps_left = first_rebuild
        self.cost: ForwardCost | None = None
        self.own_cost: ForwardCost | None = None
        self._shapes: dict[int, TreeShape] = {}  # by the class of rows in the step
        self._by_depth: dict[tuple[int, int], TreeShape] = {}

    def shape(self, num_step_rows: int) -> TreeShape:
        """The tree of the most tokens per time, each level of which costs a forward of the draft.

        Drafts were asked for, so it has at least one node, whose outcomes say when more would pay.

        Args:
            num_step_rows: of the step without draft tokens; taken to be one of each request, all with such a tree.
        """
        size = _size_class(num_step_rows)
        found = self._shapes.get(size)
        if found is None:
            limits, table = self._limits, self._table(size)
            if table is None:
                found = sequoia_shape(limits.num_nodes, limits.depth, self._rows)
            else:
                level_ms = self._level_ms(size, table)
                choice = hardware_aware_shape(
                    self._rows, table, level_ms, max_nodes=limits.num_nodes, max_depth=limits.depth
                )
                found = choice.shape
            found = self._shapes[size] = found if found.parents else ONE_NODE
        return found

    def shape_of_depth(self, depth: int, num_step_rows: int) -> TreeShape:
        """The tree of the most tokens per time where guesses for `depth` levels are there already; not empty."""
        key = depth, _size_class(num_step_rows)
        found = self._by_depth.get(key)
        if found is None:
            tree = candidate_tree(depth, self._rows, self._table(key[1]), max_nodes=self._limits.num_nodes)
            found = self._by_depth[key] = tree.shape if tree.shape.parents else ONE_NODE
        return found

    def count(self, tree: TokenTree, outcome: DraftOutcome) -> None:
        """Learn from what became of a tree of this planner's, whichever part of it, or which other, was verified."""
        if self._counter is None:
            return
        if outcome.tree.tokens == tree.tokens and outcome.tree.parents == tree.parents:
            self._counter.count([outcome])
            return
        nodes = tree.nodes_along(outcome.new_tokens)
        self._counter.count_path(tree, nodes, is_open=len(nodes) == len(outcome.new_tokens))

    def end_step(self) -> None:
        if self._counter is None:
            return
        self._num_steps_left -= 1
        if self._num_steps_left == 0:
            self._interval = self._num_steps_left = min(2 * self._interval, MAX_REBUILD)
            self._rows = [tuple(row) for row in self._counter.estimates(PRIOR, PRIOR_TRIALS)]
            self._shapes, self._by_depth = {}, {}

    def _level_ms(self, num_requests: int, target: LatencyTable) -> float:
        """What a level of all requests' trees takes: a forward of the draft over a row of each."""
        if self._draft_cost is not None:
            return self._draft_cost * target.ms_of(1)
        assert self.own_cost is not None, "the cost of the draft is to be measured, and was not"
        return 1e3 * self.own_cost.seconds(num_requests, self.own_cost.contexts[0], num_requests)

    def _table(self, num_requests: int) -> LatencyTable | None:
        """Times of a step in which each request has so many rows."""
        if self.cost is None:
            return None
        rows, context = range(1, self._limits.num_nodes + 2), self.cost.contexts[0]
        seconds = [self.cost.seconds(num_requests * count, context, num_requests) for count in rows]
        return LatencyTable(tuple(rows), tuple(1e3 * of for of in seconds))


def _size_class(num_rows: int) -> int:
    """Steps of about as many rows share their shapes: the next power of two; beyond the last, rows cost the same."""
    return min(MAX_SIZE_CLASS, 1 << max(0, num_rows - 1).bit_length())
