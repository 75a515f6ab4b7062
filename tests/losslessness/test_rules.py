"""Verification rules are lossless: exactly, by enumeration; and the enumeration finds wrong ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from outrider.errors import ConfigError, TokenTreeError
from outrider.token_tree import TokenTree, TokenTreeBatch
from outrider.verification.build import RULE_NAMES, build_rule
from outrider.verification.rejection import acceptance, residual
from tests.losslessness.enumeration import EnumeratedDecisions, check_rule
from tests.losslessness.mutants import MUTANTS, Mutant


@pytest.mark.parametrize("name", RULE_NAMES)
def test_rule_preserves_the_target_distribution(name: str) -> None:
    rule = build_rule(name)
    assert rule.lossless
    assert rule.name == name
    check_rule(rule)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_wrong_rule_is_found(mutant: Mutant) -> None:
    with pytest.raises(AssertionError):
        check_rule(mutant)


def test_chain_rule_refuses_trees() -> None:
    trees = TokenTreeBatch.from_trees([TokenTree((0, 1, 2), (-1, 0, 0))])
    with pytest.raises(TokenTreeError, match="tree_rejection"):
        build_rule("rejection").verify(trees, torch.zeros(3, 4), EnumeratedDecisions(()))


def test_unknown_rule_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=", ".join(RULE_NAMES)):
        build_rule("magic")


def test_residual_of_equal_distributions_is_p() -> None:
    p = np.array([0.0, 0.25, 0.75])
    assert residual(p, p.copy(), 2).tolist() == p.tolist()
    assert residual(p, np.array([0.5, 0.5, 0.0]), 0).tolist() == [0.0, 0.0, 1.0]
    certain = np.array([0.0, 1.0, 0.0])
    assert residual(certain, None, 1).tolist() == certain.tolist()


def test_token_that_q_rules_out_is_a_point_mass() -> None:
    p, q = np.array([0.25, 0.25, 0.5]), np.array([0.0, 0.5, 0.5])
    assert acceptance(p, q, 0) == acceptance(p, None, 0) == 0.25
    assert residual(p, q, 0).tolist() == pytest.approx([0.0, 1 / 3, 2 / 3])


@pytest.mark.parametrize("name", RULE_NAMES)
def test_verify_leaves_its_arguments_alone(name: str) -> None:
    trees = TokenTreeBatch.from_trees([TokenTree.chain(0, [1, 2])])
    rows = torch.randn(3, 4, dtype=torch.float64)
    before = rows.clone()
    build_rule(name).verify(trees, rows, EnumeratedDecisions(()))
    assert torch.equal(rows, before)
