"""Hierarchy drafting (Cho et al., arXiv 2502.05609): databases asked in the order of their locality.

What is near in time is asked first: the request's own context, then what the model generated before, then statistics
of a corpus. A level is asked only while the levels before it have not filled the tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


class _Proposal:
    """Which level was the first to propose each path of one request's tree."""

    def __init__(self) -> None:
        self._children: dict[tuple[int, int], int] = {}  # (node, token) -> node; the root is 0
        self._levels = [0]  # [node]; the root's means nothing

    def add(self, path: WeightedPath, level: int, threshold: float) -> int:
        """Take in a level's path; returns how many of its nodes are new, and at least as likely as the threshold."""
        node, product, num_likely = 0, 1.0, 0
        for token, confidence in zip(path.tokens, path.confidences, strict=True):
            product *= confidence
            child = self._children.get((node, token))
            if child is None:
                child = self._children[node, token] = len(self._levels)
                self._levels.append(level)
                num_likely += product >= threshold
            node = child
        return num_likely

    def levels_of(self, tree: TokenTree) -> Iterator[tuple[int, int]]:
        """The tree's nodes that were proposed here, with their levels; the others are another drafter's."""
        found: list[int | None] = [0]
        for node in range(1, tree.num_nodes):
            above = found[tree.parents[node]]
            here = None if above is None else self._children.get((above, tree.tokens[node]))
            found.append(here)
            if here is not None:
                yield node, self._levels[here]


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
        self._proposals: dict[str, _Proposal] = {}

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        return [self._propose(context) for context in contexts]

    def _propose(self, context: DraftContext) -> TokenTree:
        depth = min(self._max_depth, context.max_depth)
        max_nodes = min(self.max_nodes, context.max_nodes)
        threshold = max(MIN_PATH_PROB, context.min_path_prob)
        proposal = _Proposal()
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
            num_likely += sum(proposal.add(path, number, threshold) for path in found)
        self._proposals[context.request_id] = proposal
        if self._chains_only:
            paths = best_chain(paths)
        return merge_paths(context.token_ids[-1], paths, max_nodes, min_path_prob=context.min_path_prob)

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

    def release(self, request_id: str) -> None:
        self._proposals.pop(request_id, None)
        for level in self._levels:
            level.release(request_id)
