"""Wrong verification rules, each by one mistake that real systems have made; the proofs must find every one.

A mutant runs a real rule with a part replaced, or with its arguments or its result tampered with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
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
from outrider.verification.build import build_rule
from outrider.verification.rejection import Probs, acceptance, probabilities, residual
from outrider.verification.rule import Decisions

Verify = Callable[[TokenTreeBatch, Tensor, Decisions], VerifyResult]


@dataclass
class Mutant:
    """A `VerificationRule` that is wrong.

    Attributes:
        base: name of the rule that it is made from.
        patches: replaced parts, by their name within `outrider.verification`.
        tamper: given the rule's own verify, what to do instead.
    """

    name: str
    base: str
    patches: Mapping[str, Any] = field(default_factory=dict)
    tamper: Callable[[Verify, TokenTreeBatch, Tensor, Decisions], VerifyResult] | None = None

    def __post_init__(self) -> None:
        base = build_rule(self.base)
        self.lossless = base.lossless
        self.follows_choices = False  # what is mutated must be asked
        self.draft_noise: DraftNoise = base.draft_noise
        self.sibling_draws: SiblingDraws = base.sibling_draws
        self.chains_only = base.chains_only

    def verify(self, trees: TokenTreeBatch, target_log_probs: Tensor, decisions: Decisions) -> VerifyResult:
        verify = build_rule(self.base).verify
        with ExitStack() as stack:
            for name, replacement in self.patches.items():
                stack.enter_context(patch(f"outrider.verification.{name}", replacement))
            if self.tamper is None:
                return verify(trees, target_log_probs, decisions)
            return self.tamper(verify, trees, target_log_probs, decisions)


def _keep_p(p: Probs, q: Probs | None, token: int) -> Probs:
    return p


def _keep_q(q: Probs, token: int) -> Probs:
    return q


def _accept_surely(p: Probs, q: Probs | None, token: int) -> float:
    return 1.0


def _never_accept(p: Probs, q: Probs | None, token: int) -> float:
    return 0.0


def _accept_by_p(p: Probs, q: Probs | None, token: int) -> float:
    return float(p[token])


def _point_mass_residual(p: Probs, q: Probs | None, token: int) -> Probs:
    return residual(p, None, token)


def _walk_judging_by_p(
    tree: TokenTree, target_log_probs: Tensor, first_row: int, decisions: Decisions
) -> tuple[tuple[int, ...], Probs]:
    """Later siblings are tested against p itself, not against what the rejections before have left of it."""
    accepted: list[int] = []
    node = 0
    children = tree.children()
    while True:
        p = rest = probabilities(target_log_probs[node])
        q = probabilities(tree.draft.log_probs[node]) if tree.draft and children[node] else None
        for trial, child in enumerate(children[node]):
            if decisions.accept(acceptance(p, q, tree.tokens[child]), first_row + node, trial):
                break
            rest = residual(rest, q, tree.tokens[child])
        else:
            return tuple(accepted), rest
        accepted.append(child)
        node = child


def _walk_first_child(tree: TokenTree, choices: list[int]) -> VerifiedPath:
    """Looks at the first child of each node alone."""
    accepted: list[int] = []
    node = 0
    while children := tree.children()[node]:
        if tree.tokens[children[0]] != choices[node]:
            break
        node = children[0]
        accepted.append(node)
    return VerifiedPath(tuple(accepted), choices[node])


def _walk_any_child(tree: TokenTree, choices: list[int]) -> VerifiedPath:
    """Goes to the first child whatever the target chose."""
    accepted: list[int] = []
    node = 0
    while children := tree.children()[node]:
        node = children[0]
        accepted.append(node)
    return VerifiedPath(tuple(accepted), choices[node])


def _with_rows(
    row_of: Callable[[TokenTreeBatch, int, int], int],
) -> Callable[[Verify, TokenTreeBatch, Tensor, Decisions], VerifyResult]:
    """Give the rule another row, as told by (trees, tree, node), in place of each node's own."""

    def tamper(verify: Verify, trees: TokenTreeBatch, rows: Tensor, decisions: Decisions) -> VerifyResult:
        index = [
            row_of(trees, tree, node) for tree, nodes in enumerate(trees.trees) for node in range(nodes.num_nodes)
        ]
        return verify(trees, rows[torch.tensor(index)], decisions)

    return tamper


def _bonus_from_parent(verify: Verify, trees: TokenTreeBatch, rows: Tensor, decisions: Decisions) -> VerifyResult:
    """Where all was accepted, the bonus token comes from the row before the last."""
    paths = []
    for index, path in enumerate(verify(trees, rows, decisions).paths):
        tree, accepted = trees.trees[index], path.accepted_nodes
        if accepted and accepted[-1] not in tree.parents:
            row = trees.cu_nodes[index] + tree.parents[accepted[-1]]
            token = decisions.sample(rows[row : row + 1], [row], Purpose.RESIDUAL)[0]
            path = VerifiedPath(accepted, token)  # noqa: PLW2901
        paths.append(path)
    return VerifyResult(tuple(paths), (None,) * len(paths))


def _other_draws(verify: Verify, trees: TokenTreeBatch, rows: Tensor, decisions: Decisions) -> VerifyResult:
    """Takes siblings drawn with replacement for siblings drawn without, and the reverse."""
    changed = []
    for tree in trees.trees:
        if tree.draft is None:
            changed.append(tree)
            continue
        with_replacement = tree.draft.draws == "with_replacement"
        draft = replace(tree.draft, draws="without_replacement" if with_replacement else "with_replacement")
        changed.append(replace(tree, draft=draft))
    return verify(TokenTreeBatch.from_trees(changed), rows, decisions)


def _draft_rows_off_by_one(verify: Verify, trees: TokenTreeBatch, rows: Tensor, decisions: Decisions) -> VerifyResult:
    """Reads row i + 1 of q for node i."""
    changed = []
    for tree in trees.trees:
        draft = tree.draft
        if draft is not None:
            draft = replace(draft, log_probs=draft.log_probs.roll(-1, dims=0))
        changed.append(replace(tree, draft=draft))
    return verify(TokenTreeBatch.from_trees(changed), rows, decisions)


_root_row = _with_rows(lambda trees, tree, node: trees.cu_nodes[tree])
_row_before = _with_rows(lambda trees, tree, node: trees.cu_nodes[tree] + max(node - 1, 0))
_rows_of_first_tree = _with_rows(lambda trees, tree, node: min(node, trees.num_nodes - 1))

MUTANTS = (
    Mutant("chain: resample from p", "rejection", {"rejection.residual": _keep_p}),
    Mutant("chain: accept all", "rejection", {"rejection.acceptance": _accept_surely}),
    Mutant("chain: accept by p, not p / q", "rejection", {"rejection.acceptance": _accept_by_p}),
    Mutant("chain: residual of a point mass", "rejection", {"rejection.residual": _point_mass_residual}),
    Mutant("chain: bonus from the wrong row", "rejection", tamper=_bonus_from_parent),
    Mutant("chain: q one row off", "rejection", tamper=_draft_rows_off_by_one),
    Mutant("tree: no residual", "tree_rejection", {"tree_rejection.residual": _keep_p}),
    Mutant("tree: accept all", "tree_rejection", {"tree_rejection.acceptance": _accept_surely}),
    Mutant(
        "tree: exact, but accepts nothing",
        "tree_rejection",
        {"tree_rejection.acceptance": _never_accept, "tree_rejection.residual": _keep_p},
    ),
    Mutant("tree: q not updated", "tree_rejection", {"tree_rejection._without": _keep_q}),
    Mutant(
        "tree: later siblings judged by p",
        "tree_rejection",
        {"tree_rejection._walk_tree": _walk_judging_by_p},
    ),
    Mutant("tree: mistakes how siblings were drawn", "multi_candidate", tamper=_other_draws),
    Mutant("tree: bonus from the wrong row", "tree_rejection", tamper=_bonus_from_parent),
    Mutant("tree: the root's row for all", "tree_rejection", tamper=_root_row),
    Mutant("tree: target rows off by one", "multi_candidate", tamper=_row_before),
    Mutant("tree: rows of the first tree for all", "tree_rejection", tamper=_rows_of_first_tree),
    Mutant("coupled: the root's row for all", "coupled", tamper=_root_row),
    Mutant("coupled: rows off by one", "coupled", tamper=_row_before),
    Mutant("coupled: rows of the first tree for all", "coupled", tamper=_rows_of_first_tree),
    Mutant("coupled: bonus from the wrong row", "coupled", tamper=_bonus_from_parent),
    Mutant("coupled: siblings ignored", "coupled", {"coupled.follow_choices": _walk_first_child}),
    Mutant("coupled: accept all", "coupled", {"coupled.follow_choices": _walk_any_child}),
)
