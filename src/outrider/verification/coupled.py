"""The coupled rule: the target chooses with its own keyed noise, and the walk follows its choices."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from outrider.sampling.noise import Purpose
from outrider.token_tree import (
    DraftNoise,
    SiblingDraws,
    TokenTree,
    TokenTreeBatch,
    VerifiedPath,
    VerifyResult,
)
from outrider.verification.rule import Decisions


class CoupledRule:
    """Emits, token for token, what plain decoding with the same seed gives, whatever the drafter proposes.

    Drafters that draw with the same noise tend to the same choice: Gumbel-max sampling coupled by common
    random numbers (Daliri et al., arXiv 2408.07978).
    """

    name = "coupled"
    lossless = True
    follows_choices = True
    draft_noise: DraftNoise = "shared"
    sibling_draws: SiblingDraws = "without_replacement"
    chains_only = False

    def verify(self, trees: TokenTreeBatch, target_log_probs: Tensor, decisions: Decisions) -> VerifyResult:
        """See `VerificationRule.verify`; the target's choice of every node is drawn at once."""
        choices = decisions.sample(target_log_probs, range(trees.num_nodes), Purpose.TARGET)
        of_tree = [tuple(choices[trees.rows(index)]) for index in range(len(trees.trees))]
        paths = [follow_choices(tree, chosen) for tree, chosen in zip(trees.trees, of_tree, strict=True)]
        return VerifyResult(tuple(paths), tuple(of_tree))


def follow_choices(tree: TokenTree, choices: Sequence[int]) -> VerifiedPath:
    """Walk while the choice at the current node is one of its children; the first that is not ends the path.

    Args:
        choices: ``[tree.num_nodes]`` the target's choice of each node's successor.
    """
    child_of = tree.child_of()
    accepted: list[int] = []
    node = 0
    while (child := child_of.get((node, choices[node]))) is not None:
        accepted.append(child)
        node = child
    return VerifiedPath(tuple(accepted), choices[node])
