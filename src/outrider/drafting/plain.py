"""Plain decoding: the empty proposal."""

from __future__ import annotations

from collections.abc import Sequence

from outrider.drafting.drafter import DraftContext, DraftOutcome, FinishedText
from outrider.token_tree import TokenTree


class PlainDrafter:
    name = "none"
    max_nodes = 0
    returns_probs = False
    num_without_room = 0
    reads_logits = False

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        return [TokenTree.root_only(context.token_ids[-1]) for context in contexts]

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        pass

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        pass
