"""A drafter for a draft model: what it is told is never taken back, though the draft's own tokens may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from outrider.drafting.drafter import DraftContext, Drafter, DraftOutcome, FinishedText
from outrider.token_tree import TokenTree, VerifiedPath

AHEAD = "\0ahead"


@dataclass(eq=False)
class Guess:
    """A tree, and what became of it.

    Attributes:
        token_ids: that it was made behind; its root is the last of them.
        log_weights: ``[num_nodes, vocab]`` of the draft model, for drafters that read logits; None if nobody read it.
    """

    token_ids: Sequence[int]
    tree: TokenTree
    log_weights: Tensor | None = None


class Guesser:
    """Asks a drafter for trees behind committed tokens, and behind those that a draft model has drafted.

    Drafters learn a request's tokens as they are committed. Behind drafted tokens, which may be rejected, they are
    asked under another id, with the end of the text, and forget it after the step; or else under the same id, with
    all of the text, and forget it where the text goes on in another way.

    Args:
        window: how many tokens of the text that is; None is all, for drafters that begin again at little cost.
    """

    def __init__(self, drafter: Drafter, window: int | None) -> None:
        self._drafter = drafter
        self._window = window
        self._asked: dict[str, Guess] = {}
        self.max_nodes = drafter.max_nodes
        self.reads_logits = drafter.reads_logits

    def start(self, context: DraftContext) -> None:
        """A step begins; `context` holds what of the last one's guesses was right."""
        self._settle(context.request_id, context.token_ids)
        if self._window is not None:
            self._forget(context.request_id + AHEAD)

    def guess(self, wanted: Sequence[tuple[DraftContext, Sequence[int], int, int]]) -> list[Guess]:
        """A tree for each request; whoever reads it says so in `Guess.log_weights`, if `reads_logits`.

        Args:
            wanted: the request; drafted tokens behind its committed ones; most nodes and depth of the tree.
        """
        found = [
            Guess((), TokenTree.root_only(drafted[-1] if drafted else context.token_ids[-1]))
            for context, drafted, _, _ in wanted
        ]
        asked = [i for i, (_, _, max_nodes, max_depth) in enumerate(wanted) if min(max_nodes, max_depth) > 0]
        contexts = [self._inner_context(*wanted[i]) for i in asked]
        for i, context, tree in zip(asked, contexts, self._drafter.propose(contexts) if asked else (), strict=True):
            found[i] = self._asked[context.request_id] = Guess(list(context.token_ids), tree)
        return found

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._forget(request_id, finished)
        self._forget(request_id + AHEAD)

    def _inner_context(
        self, context: DraftContext, drafted: Sequence[int], max_nodes: int, max_depth: int
    ) -> DraftContext:
        request_id, token_ids, start = context.request_id, context.token_ids, 0
        if drafted:
            if self._window is not None:
                request_id, start = request_id + AHEAD, max(0, len(token_ids) - self._window)
            token_ids = [*token_ids[start:], *drafted]
            self._settle(request_id, token_ids)
        return DraftContext(
            request_id=request_id,
            token_ids=token_ids,
            num_prompt_tokens=max(0, context.num_prompt_tokens - start),
            max_nodes=min(max_nodes, self.max_nodes),
            max_depth=max_depth,
            params=context.params,
            seed=context.seed,
            stop_token_ids=context.stop_token_ids,
        )

    def _settle(self, request_id: str, token_ids: Sequence[int]) -> None:
        """Tell the drafter what came of its last tree, or have it forget a text that went on in another way."""
        asked = self._asked.pop(request_id, None)
        if asked is None:
            return
        before, tree = asked.token_ids, asked.tree
        followed = token_ids[len(before) :]
        read = asked.log_weights is not None or not self.reads_logits
        if not read or not followed or list(token_ids[: len(before)]) != before:
            self._drafter.release(request_id)
            return
        nodes = tree.nodes_along(followed[:-1])
        path = VerifiedPath(nodes, followed[len(nodes)])
        self._drafter.observe([DraftOutcome(request_id, tree, path, asked.log_weights)])

    def _forget(self, request_id: str, finished: FinishedText | None = None) -> None:
        self._asked.pop(request_id, None)
        self._drafter.release(request_id, finished)
