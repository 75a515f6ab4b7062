"""Trees of the most probable nodes: chosen where the draft may look at tokens first, drawn where it may not."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from outrider.drafting.growth.expected import best_nodes, expected_length
from outrider.drafting.growth.tree import Draws, GrowingTree, GrowthLimits


@dataclass(frozen=True)
class MostProbable:
    """The nodes of greatest path probability under a budget.

    SpecExec (Svirschevski et al., arXiv 2406.02532) reads the best unread nodes of the best tree so far, up to a
    beam, until the whole tree is read: the target's sampling then walks it like a cache. OPT-Tree (Wang et al.,
    arXiv 2406.17276, algorithm 1) reads a whole layer at once, and stops when a layer adds too little to the expected
    accepted length. Tokens are chosen, not drawn: to rejection rules they are point masses.

    The authors' code of SpecExec also takes 5% off a path's probability per level and bounds the children of a node;
    neither is done here. OPT-Tree reads the best `num_nodes` of a layer; here only those of them that are in the best
    tree so far, since nothing below the others can enter it. Its threshold is to lie between the time of a forward of
    the draft, in forwards of the target, and 1.

    Attributes:
        max_expanded: the most nodes read in one forward (32 in the authors' code of SpecExec); None reads all that
            may still have a child in the tree.
        min_gain: growth ends when a forward raises the expected accepted length by less.
    """

    limits: GrowthLimits
    draws: Draws
    max_expanded: int | None = None
    min_gain: float = 0.0

    @property
    def num_rows(self) -> int:
        """What is read may leave the tree again: a forward's worth at each depth, or so.

        On code at three temperatures trees of 24 nodes and depth 16 read 38 at most with 3 to a forward, 69 with 8.
        Whoever needs more gets the tree that it has; the rows are held in the draft's cache for every request.
        """
        num_nodes, depth = self.limits.num_nodes, self.limits.depth
        per_forward = num_nodes if self.max_expanded is None else self.max_expanded
        return min(num_nodes * depth, num_nodes + min(256, per_forward * depth))

    def grow(self, tree: GrowingTree) -> Iterator[Sequence[int]]:
        num_nodes, num_read = tree.limits.num_nodes, 0
        known = self._children(tree, 0, num_nodes, -math.inf)
        length = 0.0
        while True:
            scores = [tree.scores[node] for node in known]
            known = [known[index] for index in best_nodes(scores, num_nodes)]
            scores = [tree.scores[node] for node in known]
            gain, length = expected_length(scores) - length, expected_length(scores)
            unread = [node for node in known if tree.is_promising(node) and not tree.is_read(node)]
            unread = sorted(unread, key=lambda node: -tree.scores[node])[: self.max_expanded]
            frontier = sorted(unread[: self.num_rows - num_read])
            if not frontier or gain < self.min_gain:
                break
            yield frontier
            num_read += len(frontier)
            floor = min(scores) if len(known) == num_nodes else -math.inf
            for node in frontier:
                known += self._children(tree, node, num_nodes, floor)
        tree.keep(known)

    def _children(self, tree: GrowingTree, node: int, count: int, floor: float) -> list[int]:
        """Nodes for those of a read node's children that beat `floor`."""
        added = []
        tokens, scores = tree.candidates(node, count), tree.candidate_scores(node, count)
        for token, score in zip(tokens, scores, strict=True):
            if not score > floor or not tree.is_worth(score):
                break
            added.append(tree.add(node, token, score))
        tree.forget(node)
        return added


@dataclass(frozen=True)
class Greedy:
    """The place that is most likely to be reached gets the next node (DySpec, Xiong et al., arXiv 2410.11744v1).

    Under independent noise a place is judged before its token is known: by the probability of its parent's path times
    what the siblings before have left of q (algorithm 1); so the tree is exact under recursive rejection. The paper
    reads a node as soon as it is drawn; here it is read when a child of it would be next, together with others.

    Attributes:
        max_expanded: nodes read in one forward: the best place's parent, and those that are likely to be next.
    """

    limits: GrowthLimits
    draws: Draws
    max_expanded: int = 1

    @property
    def num_rows(self) -> int:
        return self.limits.num_nodes

    def grow(self, tree: GrowingTree) -> Iterator[Sequence[int]]:
        # (-log of how likely the node's next child is reached, node); of a node that is not read: of its path.
        heap = [(-tree.next_score(0), 0)]
        while heap and tree.room > 0:
            if not tree.is_read(heap[0][1]):
                unread = [node for _, node in heapq.nsmallest(self.max_expanded, heap) if not tree.is_read(node)]
                yield sorted(unread)
                heap = [(-tree.next_score(node) if node in unread else score, node) for score, node in heap]
                heapq.heapify(heap)
                continue
            _, node = heapq.heappop(heap)
            for child in tree.draw(node, 1):
                heapq.heappush(heap, (-tree.next_score(node), node))
                if tree.may_extend(child):
                    heapq.heappush(heap, (-tree.scores[child], child))


@dataclass(frozen=True)
class Threshold:
    """Every place that is likely enough to be reached gets a node, depth by depth (DySpec, section 4.4).

    Attributes:
        threshold: probability of being reached, before the place's token is known; in the paper about 1/n for a tree
            of n nodes.
    """

    limits: GrowthLimits
    draws: Draws
    threshold: float

    @property
    def num_rows(self) -> int:
        return self.limits.num_nodes

    def grow(self, tree: GrowingTree) -> Iterator[Sequence[int]]:
        floor = math.log(self.threshold)
        level: Sequence[int] = [0]
        while True:
            drawn: list[int] = []
            for node in level:
                while tree.next_score(node) >= floor and (children := tree.draw(node, 1)):
                    drawn += children
            level = [node for node in drawn if tree.may_extend(node) and tree.scores[node] >= floor]
            if not level:
                return
            yield level
