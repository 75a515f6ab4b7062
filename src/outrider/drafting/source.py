"""Sources of continuations, one or several behind a drafter: what has been seen to follow is proposed again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Protocol

from outrider.drafting.drafter import DraftContext, DraftOutcome, DraftStyle, FinishedText
from outrider.drafting.tree_merge import WeightedPath, merge_paths
from outrider.token_tree import TokenTree


class Source(Protocol):
    """Knows texts, and where in them a sequence stands; point masses only.

    Attributes:
        name: as statistics name it.
        reads_logits: True if `observe` looks at the target's logits.
    """

    name: str
    reads_logits: bool

    def continuations(self, context: DraftContext) -> Sequence[WeightedPath]:
        """What may follow ``context.token_ids``, the best first; none longer than ``context.max_depth`` need be.

        New tokens of the request are learnt here, incrementally: never in time proportional to its length.
        """
        ...

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        """Learn what was accepted; the accepted tokens also stand in the next context, with those of other steps."""
        ...

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        """Forget a request; see `Drafter.release`."""
        ...


class SourceDrafter:
    """One drafter from sources: their continuations merged by expected acceptance.

    Args:
        name: as users spell it.
        max_nodes: the most draft tokens for one request.
        max_depth: the longest path.
    """

    returns_probs = False
    num_without_room = 0

    def __init__(
        self, name: str, sources: Sequence[Source], *, max_nodes: int, max_depth: int, style: DraftStyle
    ) -> None:
        self.name = name
        self.sources = tuple(sources)
        self.reads_logits = any(source.reads_logits for source in sources)
        self._chains_only = style.chains_only
        self._max_depth = max_depth
        self.max_nodes = min(max_nodes, max_depth) if style.chains_only else max_nodes

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        return [self._propose(context) for context in contexts]

    def _propose(self, context: DraftContext) -> TokenTree:
        depth = min(self._max_depth, context.max_depth)
        max_nodes = min(self.max_nodes, context.max_nodes)
        paths = [path for source in self.sources for path in source.continuations(context)]
        root = context.token_ids[-1]
        if self._chains_only:
            paths = best_chain(paths, depth)
        return merge_paths(root, paths, max_nodes, max_depth=depth, min_path_prob=context.min_path_prob)

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        for source in self.sources:
            source.observe(outcomes)

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        for source in self.sources:
            source.release(request_id, finished)


def best_chain(paths: Sequence[WeightedPath], depth: int) -> list[WeightedPath]:
    """Of several paths the one whose first `depth` tokens promise the most accepted ones; none of none."""
    if not paths:
        return []
    return [max(paths, key=lambda path: sum(accumulate(path.confidences[:depth], mul)))]
