"""Speculative sampling of chains (Leviathan et al., arXiv 2211.17192; Chen et al., 2302.01318).

A draft token x drawn from q is accepted with probability ``min(1, p(x) / q(x))``; after a rejection the token
is drawn from the residual ``norm(max(p - q, 0))``. A draft without a distribution is a point mass: q(x) = 1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outrider.errors import TokenTreeError
from outrider.sampling.noise import Purpose
from outrider.token_tree import (
    DraftNoise,
    SiblingDraws,
    TokenTree,
    TokenTreeBatch,
    VerifiedPath,
    VerifyResult,
)
from outrider.verification.coupled import follow_choices
from outrider.verification.rule import Decisions

Probs = NDArray[np.float64]  # [vocab], sums to 1
# (tree, its rows of target_log_probs, its first row, decisions) -> accepted nodes, the next token's p
Walk = Callable[[TokenTree, Tensor, int, Decisions], tuple[tuple[int, ...], Probs]]


class RejectionRule:
    """Preserves the target's distribution; drafts must be independent of the decisions."""

    name = "rejection"
    lossless = True
    follows_choices = False
    draft_noise: DraftNoise = "independent"
    sibling_draws: SiblingDraws = "without_replacement"
    chains_only = True

    def verify(self, trees: TokenTreeBatch, target_log_probs: Tensor, decisions: Decisions) -> VerifyResult:
        """See `VerificationRule.verify`.

        Raises:
            TokenTreeError: a tree is not a chain.
        """
        return verify_by(_walk_chain, trees, target_log_probs, decisions)


def verify_by(walk: Walk, trees: TokenTreeBatch, target_log_probs: Tensor, decisions: Decisions) -> VerifyResult:
    """Walk each tree, then draw all their next tokens at once.

    A greedy target is a point mass on its argmax and leaves nothing to chance: such trees follow that choice.
    """
    paths: dict[int, VerifiedPath] = {}
    of_tree: dict[int, tuple[int, ...]] = {}
    walked: list[tuple[int, tuple[int, ...]]] = []
    weights: list[Probs] = []
    for index, tree in enumerate(trees.trees):
        rows = trees.rows(index)
        if decisions.greedy(rows.start):
            choices = decisions.sample(target_log_probs[rows], range(rows.start, rows.stop), Purpose.TARGET)
            of_tree[index] = tuple(choices)
            paths[index] = follow_choices(tree, choices)
        else:
            accepted, next_probs = walk(tree, target_log_probs[rows], rows.start, decisions)
            walked.append((index, accepted))
            weights.append(next_probs)
    if walked:
        with np.errstate(divide="ignore"):  # log 0 = -inf is what is meant
            log_weights = torch.from_numpy(np.log(np.stack(weights)))
        nodes = [trees.cu_nodes[index] + (accepted[-1] if accepted else 0) for index, accepted in walked]
        next_tokens = decisions.sample(log_weights, nodes, Purpose.RESIDUAL)
        for (index, accepted), token in zip(walked, next_tokens, strict=True):
            paths[index] = VerifiedPath(accepted, token)
    indices = range(len(trees.trees))
    return VerifyResult(tuple(paths[index] for index in indices), tuple(map(of_tree.get, indices)))


def probabilities(log_weights: Tensor) -> Probs:
    """Softmax of one row ``[vocab]`` in float64, on the CPU, where walks are decided."""
    row = log_weights.double().cpu().numpy()
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def acceptance(p: Probs, q: Probs | None, token: int) -> float:
    """Probability that `token`, drawn from q, is accepted."""
    if q is None or q[token] <= 0.0:
        return float(p[token])
    return min(1.0, float(p[token] / q[token]))


def residual(p: Probs, q: Probs | None, token: int) -> Probs:
    """What p becomes once `token`, drawn from q, is rejected.

    A token that q rules out cannot have been drawn from it. Like a draft without a distribution it counts as
    a point mass, which is exact for any token chosen without regard to the decisions.
    """
    if q is None or q[token] <= 0.0:
        rest = p.copy()
        rest[token] = 0.0
    else:
        rest = np.maximum(p - q, 0.0)
    total = rest.sum()
    # All zero means p <= q throughout: p == q but for rounding, and the rejection itself was as improbable as
    # a rounding error is small. Any choice is as exact as the arithmetic; p keeps to the allowed tokens.
    return rest / total if total > 0.0 else p


def _walk_chain(
    tree: TokenTree, target_log_probs: Tensor, first_row: int, decisions: Decisions
) -> tuple[tuple[int, ...], Probs]:
    if tree.parents != tuple(range(-1, tree.num_nodes - 1)):
        raise TokenTreeError(
            "rejection rule",
            got=f"a tree with parents {list(tree.parents)}",
            expected="a chain",
            remedy="draft chains, or use verification='tree_rejection' or 'coupled'",
        )
    for node in range(1, tree.num_nodes):
        parent = node - 1
        p = probabilities(target_log_probs[parent])
        q = probabilities(tree.draft.log_probs[parent]) if tree.draft else None
        if not decisions.accept(acceptance(p, q, tree.tokens[node]), first_row + parent, 0):
            return tuple(range(1, node)), residual(p, q, tree.tokens[node])
    return tuple(range(1, tree.num_nodes)), probabilities(target_log_probs[-1])
