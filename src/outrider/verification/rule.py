"""What a verification rule is: a pure function from trees, target distributions and decisions to paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from outrider.sampling.noise import Purpose
from outrider.token_tree import DraftNoise, SiblingDraws, TokenTreeBatch, VerifyResult


class Decisions(Protocol):
    """Where a rule's random decisions come from: keyed noise in the engine, enumeration in the proofs."""

    def greedy(self, node: int) -> bool:
        """Whether the target at batch-flat `node` is a point mass on its argmax, which `sample` returns."""
        ...

    def sample(self, log_weights: Tensor, nodes: Sequence[int], purpose: Purpose) -> list[int]:
        """Draw one token per row from ``softmax(log_weights)``.

        Args:
            log_weights: ``[num_rows, vocab]``; -inf marks impossible tokens; need not be normalised.
            nodes: ``[num_rows]`` batch-flat tree nodes, each telling whose successor is drawn.
            purpose: TARGET or RESIDUAL.
        """
        ...

    def accept(self, probability: float, node: int, trial: int) -> bool:
        """True with `probability`; `trial` counts the siblings tried below batch-flat `node`."""
        ...


class VerificationRule(Protocol):
    """Attributes:
    name: as users spell it.
    lossless: False where the output's distribution differs from the target's; results say so.
    follows_choices: True if it walks along the target's own choices, drawn as `Decisions.sample` draws them.
    draft_noise: "shared" if drafters should draw with the target's own noise, "independent" if they must not.
    sibling_draws: how a drafter with probabilities must draw the children of one node.
    chains_only: True if a tree of width above one is refused.
    """

    name: str
    lossless: bool
    follows_choices: bool
    draft_noise: DraftNoise
    sibling_draws: SiblingDraws
    chains_only: bool

    def verify(self, trees: TokenTreeBatch, target_log_probs: Tensor, decisions: Decisions) -> VerifyResult:
        """Walk every tree along the target's choices.

        Args:
            trees: the proposals of the step.
            target_log_probs: ``[trees.num_nodes, vocab]`` the target's log p of each node's successor, after
                all processors; -inf marks excluded tokens; normalised up to a constant per row. A greedy
                request's row is its processed logits too, and `decisions` knows that it is greedy.
            decisions: the only source of randomness.
        """
        ...
