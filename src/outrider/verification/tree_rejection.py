"""Recursive rejection sampling of trees: siblings are tried in the order drawn, each against what p has left.

Siblings drawn with replacement: SpecInfer (Miao et al., arXiv 2305.09781), multi-candidate sampling (Yang et
al., 2401.06706, which has a form without too). Without: recursive rejection sampling (Jeon et al., 2402.14160),
Sequoia (Chen et al., 2402.12374v3, algorithm 2). Where the draft gives no other token any probability, Sequoia goes
on with tokens drawn uniformly; here there is no further sibling, and the last token comes from what p has left.
"""

from __future__ import annotations

from torch import Tensor

from outrider.token_tree import DraftNoise, SiblingDraws, TokenTree, TokenTreeBatch, VerifyResult
from outrider.verification.rejection import Probs, acceptance, probabilities, residual, verify_by
from outrider.verification.rule import Decisions


class TreeRejectionRule:
    """Preserves the target's distribution; drafts must be independent of the decisions.

    How siblings were drawn is read from the tree. A token drawn twice must be in it twice, as siblings: what
    a drafter leaves out must not depend on the siblings it drew.

    Args:
        name: as users spell it.
        sibling_draws: what drafters are asked for.
    """

    lossless = True
    follows_choices = False
    draft_noise: DraftNoise = "independent"
    chains_only = False

    def __init__(self, name: str, sibling_draws: SiblingDraws) -> None:
        self.name = name
        self.sibling_draws: SiblingDraws = sibling_draws

    def verify(self, trees: TokenTreeBatch, target_log_probs: Tensor, decisions: Decisions) -> VerifyResult:
        """See `VerificationRule.verify`."""
        return verify_by(_walk_tree, trees, target_log_probs, decisions)


def _walk_tree(
    tree: TokenTree, target_log_probs: Tensor, first_row: int, decisions: Decisions
) -> tuple[tuple[int, ...], Probs]:
    children = tree.children()
    accepted: list[int] = []
    node = 0
    while True:
        p = probabilities(target_log_probs[node])
        q = probabilities(tree.draft.log_probs[node]) if tree.draft and children[node] else None
        for trial, child in enumerate(children[node]):
            token = tree.tokens[child]
            if decisions.accept(acceptance(p, q, token), first_row + node, trial):
                accepted.append(child)
                node = child
                break
            p = residual(p, q, token)
            if q is not None and tree.draft and tree.draft.draws == "without_replacement":
                q = _without(q, token)
        else:
            return tuple(accepted), p


def _without(q: Probs, token: int) -> Probs | None:
    """q once `token` has been drawn from it; None, a point mass for what follows, if nothing is left."""
    rest = q.copy()
    rest[token] = 0.0
    total = rest.sum()
    return rest / total if total > 0.0 else None
