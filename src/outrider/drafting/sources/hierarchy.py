"""Hierarchy drafting (Cho et al., arXiv 2502.05609): databases asked in the order of their locality.

What is near in time is asked first: the request's own context, then what the model generated before, then statistics
of a corpus (the paper's context-, model- and statistics-dependent databases). A level is asked only while the levels
before it have not filled the tree; it learns in every step.

The authors' code keeps what followed single tokens in the first two, the second one made beforehand from the model's
outputs, and has REST's datastore as the third, which is the level `datastore` here. Which sources stand here is a
setting; by default all of them see more than one token and learn while decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from outrider.drafting.drafter import DraftContext, DraftOutcome, DraftStyle, FinishedText
from outrider.drafting.source import Source, best_chain
from outrider.drafting.tree_merge import WeightedPath, merge_paths
from outrider.token_tree import TokenTree

# Less likely guesses of a level do not count as filling the tree: the next level may know better ones.
MIN_PATH_PROB = 0.05


@dataclass
class LevelStatistics:
    """What one level of the hierarchy came to.

    Attributes:
        num_asked: steps in which it was asked.
        num_answered: steps in which it knew a continuation.
        num_drafted: draft tokens in verified trees that it was the first level to propose.
        num_accepted: of these.
    """

    name: str
    num_asked: int = 0
    num_answered: int = 0
    num_drafted: int = 0
    num_accepted: int = 0


class _Proposal:
    """One request's paths, and which level was the first to propose each node of its tree."""

    def __init__(self) -> None:
        self.paths: list[WeightedPath] = []
        self._levels: list[int] = []  # of each path, ascending
        self._likely: dict[tuple[int, int], int] = {}  # (node, token) -> node; the root is 0
        self.num_likely = 0  # nodes that a path finds at least as likely as its threshold

    def add(self, path: WeightedPath, level: int, depth: int, threshold: float) -> None:
        """Take in a path of a level that is not nearer than those before; its nodes below `depth` do not count."""
        self.paths.append(path)
        self._levels.append(level)
        likely, node, product = self._likely, 0, 1.0
        for token, confidence in islice(zip(path.tokens, path.confidences, strict=True), depth):
            product *= confidence
            if product < threshold:
                break
            child = likely.get((node, token))
            if child is None:
                self.num_likely += 1
                child = likely[node, token] = self.num_likely
            node = child

    def levels_of(self, tree: TokenTree) -> Iterator[tuple[int, int]]:
        """The tree's nodes that were proposed here, with their levels; the others are another drafter's."""
        # By node: the levels and the tokens of the paths that lead there.
        leading = [[(level, path.tokens) for level, path in zip(self._levels, self.paths, strict=True)]]
        depths = [0]
        for token, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True):
            depth = depths[parent]
            here = [of for of in leading[parent] if len(of[1]) > depth and of[1][depth] == token]
            if here:
                yield len(leading), here[0][0]
            leading.append(here)
            depths.append(depth + 1)


class HierarchyDrafter:
    """Asks sources in turn until the tree is full.

    Args:
        levels: the nearest first.

    Attributes:
        statistics: one a level, in order, over all requests.
    """

    name = "hierarchy"
    returns_probs = False
    num_without_room = 0

    def __init__(self, levels: Sequence[Source], *, max_nodes: int, max_depth: int, style: DraftStyle) -> None:
        self._levels = tuple(levels)
        self.reads_logits = any(level.reads_logits for level in levels)
        self.statistics = tuple(LevelStatistics(level.name) for level in levels)
        self._chains_only = style.chains_only
        self._max_depth = max_depth
        self.max_nodes = min(max_nodes, max_depth) if style.chains_only else max_nodes
        self._proposals: dict[str, _Proposal] = {}

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        return [self._propose(context) for context in contexts]

    def _propose(self, context: DraftContext) -> TokenTree:
        depth = min(self._max_depth, context.max_depth)
        max_nodes = min(self.max_nodes, context.max_nodes)
        threshold = max(MIN_PATH_PROB, context.min_path_prob)
        proposal = _Proposal()
        unasked: DraftContext | None = None
        for number, (level, statistics) in enumerate(zip(self._levels, self.statistics, strict=True)):
            if proposal.num_likely >= max_nodes or depth <= 0:
                unasked = unasked or replace(context, max_nodes=0)
                level.continuations(unasked)  # so that there is no backlog to read when it is asked
                continue
            statistics.num_asked += 1
            found = level.continuations(context)
            statistics.num_answered += bool(found)
            for path in found:
                proposal.add(path, number, depth, threshold)
        self._proposals[context.request_id] = proposal
        paths = best_chain(proposal.paths, depth) if self._chains_only else proposal.paths
        return merge_paths(
            context.token_ids[-1], paths, max_nodes, max_depth=depth, min_path_prob=context.min_path_prob
        )

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        for outcome in outcomes:
            self._count(outcome)
        for level in self._levels:
            level.observe(outcomes)

    def _count(self, outcome: DraftOutcome) -> None:
        proposal = self._proposals.pop(outcome.request_id, None)
        if proposal is None:
            return
        accepted = set(outcome.path.accepted_nodes)
        for node, number in proposal.levels_of(outcome.tree):
            self.statistics[number].num_drafted += 1
            self.statistics[number].num_accepted += node in accepted

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._proposals.pop(request_id, None)
        for level in self._levels:
            level.release(request_id, finished)
