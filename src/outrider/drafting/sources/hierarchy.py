"""Hierarchy drafting (Cho et al., arXiv 2502.05609): databases asked in the order of their locality.

What is near in time is asked first: the request's own context, then what the model generated before, then statistics
of a corpus. A level is asked only while the levels before it have not filled the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outrider.drafting.drafter import DraftContext, DraftOutcome, DraftStyle
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


class HierarchyDrafter:
    """Asks sources in turn until the tree is full.

    Args:
        levels: the nearest first.

    Attributes:
        statistics: one a level, in order, over all requests.
    """

    name = "hierarchy"
    returns_probs = False

    def __init__(self, levels: Sequence[Source], *, max_nodes: int, max_depth: int, style: DraftStyle) -> None:
        self._levels = tuple(levels)
        self.reads_logits = any(level.reads_logits for level in levels)
        self.statistics = tuple(LevelStatistics(level.name) for level in levels)
        self._chains_only = style.chains_only
        self._max_depth = max_depth
        self.max_nodes = min(max_nodes, max_depth) if style.chains_only else max_nodes
        self._level_of: dict[
            str, dict[tuple[int, ...], int]
        ] = {}  # the first to propose each path of a request's tree

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        return [self._propose(context) for context in contexts]

    def _propose(self, context: DraftContext) -> TokenTree:
        depth = min(self._max_depth, context.max_depth)
        max_nodes = min(self.max_nodes, context.max_nodes)
        threshold = max(MIN_PATH_PROB, context.min_path_prob)
        level_of: dict[tuple[int, ...], int] = {}
        paths: list[WeightedPath] = []
        num_likely = 0
        for number, (level, statistics) in enumerate(zip(self._levels, self.statistics, strict=True)):
            if num_likely >= max_nodes or depth <= 0:
                break
            statistics.num_asked += 1
            found = [
                WeightedPath(path.tokens[:depth], path.confidences[:depth]) for path in level.continuations(context)
            ]
            statistics.num_answered += bool(found)
            paths += found
            for path in found:
                product = 1.0
                for length, confidence in enumerate(path.confidences, 1):
                    product *= confidence
                    prefix = tuple(path.tokens[:length])
                    if prefix not in level_of:
                        level_of[prefix] = number
                        num_likely += product >= threshold
        self._level_of[context.request_id] = level_of
        if self._chains_only:
            paths = best_chain(paths)
        return merge_paths(context.token_ids[-1], paths, max_nodes, min_path_prob=context.min_path_prob)

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        for outcome in outcomes:
            self._count(outcome)
        for level in self._levels:
            level.observe(outcomes)

    def _count(self, outcome: DraftOutcome) -> None:
        level_of = self._level_of.pop(outcome.request_id, None)
        if level_of is None:
            return
        tree, accepted = outcome.tree, set(outcome.path.accepted_nodes)
        paths: list[tuple[int, ...]] = [()]
        for node in range(1, tree.num_nodes):
            paths.append((*paths[tree.parents[node]], tree.tokens[node]))
            number = level_of.get(paths[node])
            if number is not None:  # else another drafter's
                self.statistics[number].num_drafted += 1
                self.statistics[number].num_accepted += node in accepted

    def release(self, request_id: str) -> None:
        self._level_of.pop(request_id, None)
        for level in self._levels:
            level.release(request_id)
