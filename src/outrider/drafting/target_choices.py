"""Reading what the target would choose after drafts that were not accepted."""

from __future__ import annotations

from collections.abc import Sequence

from outrider.drafting.drafter import DraftOutcome


class TargetChoices:
    """The target's choice after every node of a verified tree, found by the tokens that lead to it.

    Where the rule made no choices (rejection rules at a temperature), the most probable tokens stand in for them.
    """

    def __init__(self, outcome: DraftOutcome) -> None:
        self._child_of = outcome.tree.child_of()
        if outcome.choices is not None:
            self._choices: Sequence[int] = outcome.choices
        else:
            assert outcome.target_logits is not None, "a drafter that reads logits got none"
            self._choices = outcome.target_logits.argmax(-1).tolist()

    def along(self, path: Sequence[int]) -> list[int]:
        """Choices after the root and after each token of `path`, as far as the tree holds it."""
        node, found = 0, [self._choices[0]]
        for token in path:
            child = self._child_of.get((node, token))
            if child is None:
                break
            node = child
            found.append(self._choices[node])
        return found
