"""Growths under rejection rules: exact by enumeration of every draw and every decision; and wrong growths are found.

A growth decides where to draw by what it has drawn. That is exact as long as no drawn node is dropped and no decision
looks at a token before it is drawn, so the draws of each run are enumerated as the growth asks for them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from outrider.config import DraftModelConfig
from outrider.drafting.drafter import DraftContext, DraftStyle
from outrider.drafting.growth.build import build_growth
from outrider.drafting.growth.policy import Growth
from outrider.drafting.growth.tree import Draws, GrowingTree, GrowthLimits, Row
from outrider.sampling.noise import Purpose
from outrider.sampling.params import SamplingParams
from outrider.token_tree import TokenTreeBatch
from outrider.verification.build import build_rule
from tests.losslessness.enumeration import (
    TOLERANCE,
    EnumeratedDecisions,
    Kind,
    Tables,
    emitted_tokens,
    enumerate_runs,
)

VOCAB, NUM_NODES = 3, 4
PROVED: tuple[Kind, ...] = ("dense", "zeros", "peaked")
GROWTHS: dict[str, DraftModelConfig] = {
    "beam": DraftModelConfig(width=2, max_expanded=1, depth=2, max_nodes=NUM_NODES, min_path_prob=0.3),
    "mcsd": DraftModelConfig(growth="mcsd", branching=(2, 1), depth=2, max_nodes=NUM_NODES, min_path_prob=0.2),
    "mcsd_improved": DraftModelConfig(
        growth="mcsd_improved", width=2, depth=3, max_nodes=NUM_NODES, min_path_prob=0.3
    ),
    "rsd_c": DraftModelConfig(growth="rsd_c", branching=(2, 1), depth=2, max_nodes=NUM_NODES, min_path_prob=0.0),
    "rsd_s": DraftModelConfig(growth="rsd_s", width=2, depth=2, max_nodes=NUM_NODES, min_path_prob=0.1),
    "cape": DraftModelConfig(growth="cape", depth=2, max_nodes=NUM_NODES, min_path_prob=0.1),
    "dyspec": DraftModelConfig(growth="dyspec", depth=3, max_nodes=NUM_NODES, max_expanded=2, min_path_prob=0.05),
    "dyspec_threshold": DraftModelConfig(growth="dyspec_threshold", depth=3, max_nodes=NUM_NODES, min_path_prob=0.25),
    "static": DraftModelConfig(
        growth="static", depth=2, max_nodes=NUM_NODES, rank_probs=(0.5, 0.3), min_path_prob=0.1
    ),
    "static-table": DraftModelConfig(
        growth="static", rank_paths=[[0], [1], [0, 0], [1, 0]], depth=2, max_nodes=NUM_NODES, min_path_prob=0.0
    ),
    "specexec": DraftModelConfig(growth="specexec", depth=2, max_nodes=NUM_NODES, max_expanded=2, min_path_prob=0.0),
    "opt_tree": DraftModelConfig(growth="opt_tree", depth=2, max_nodes=NUM_NODES, min_path_prob=0.0),
}


class EnumeratedTree(GrowingTree):
    """Draws from what its table has left of q, by enumerated decisions."""

    def __init__(self, tables: Tables, decisions: EnumeratedDecisions, growth: Growth) -> None:
        context = DraftContext("r", [0], 1, 64, 64, SamplingParams(temperature=1.0), 0, frozenset())
        super().__init__(context, growth.draws, growth.limits)
        self.tables, self.decisions = tables, decisions
        self.read(0)

    def read(self, node: int) -> None:
        with np.errstate(divide="ignore"):
            self.set_log_weights(node, np.log(self.tables.q(self.path_tokens(node))))

    def _next_token(self, node: int, number: int) -> int | None:
        if not self.is_sampled:
            return super()._next_token(node, number)
        left = self.tables.q(self.path_tokens(node)).copy()
        if self._siblings == "without_replacement":
            left[[self.tokens[n] for n in range(1, len(self.tokens)) if self.parents[n] == node]] = 0.0
        return self.decisions.choose(left / left.sum()) if left.sum() > 0.0 else None

    def _noise(self, node: int, purpose: Purpose, vocab_size: int, number: int = 0) -> Row:
        return np.zeros(vocab_size, dtype=np.float32)

    def candidate_keys(self, node: int, count: int) -> np.ndarray:
        """Any falling values, random or by the path: of Gumbels those below a node tell nothing of its tokens."""
        possible = int((self.tables.q(self.path_tokens(node)) > 0).sum())
        digest = hashlib.sha256(repr(self.path_tokens(node)).encode()).digest()
        offset = self.decisions.choose(np.array([0.5, 0.5])) * 1.5 + digest[0] / 100
        return np.array([offset - 0.7 * digest[rank + 1] / 64 - 2.0 * rank for rank in range(min(count, possible))])


def run(growth: Growth, rule_name: str, tables: Tables, decisions: EnumeratedDecisions) -> tuple[int, ...]:
    tree = EnumeratedTree(tables, decisions, growth)
    for nodes in growth.grow(tree):
        for node in nodes:
            tree.read(node)
    grown = tree.finished()
    batch = TokenTreeBatch.from_trees([grown])
    path = build_rule(rule_name).verify(batch, tables.log_rows(grown, "p"), decisions).paths[0]
    return emitted_tokens(grown, path)


def largest_error(growth: Growth, rule_name: str, tables: Tables) -> float:
    """Between the emitted tokens' distribution, continued with p, and the target's."""
    length = 1 + min(growth.limits.depth, NUM_NODES)
    actual: dict[tuple[int, ...], float] = defaultdict(float)
    for tokens, weight in enumerate_runs(lambda decisions: run(growth, rule_name, tables, decisions)):
        for rest in itertools.product(range(VOCAB), repeat=length - len(tokens)):
            actual[tokens + rest] += weight * probability(tables, tokens + rest, len(tokens))
    sequences = itertools.product(range(VOCAB), repeat=length)
    return max(abs(actual[sequence] - probability(tables, sequence, 0)) for sequence in sequences)


def probability(tables: Tables, sequence: Sequence[int], start: int) -> float:
    """p of the tokens from `start` on."""
    return float(np.prod([tables.p(sequence[:i])[sequence[i]] for i in range(start, len(sequence))]))


def style_of(rule_name: str) -> DraftStyle:
    rule = build_rule(rule_name)
    return DraftStyle(rule.draft_noise, rule.sibling_draws, rule.chains_only)


@pytest.mark.parametrize("rule_name", ["rejection", "tree_rejection", "multi_candidate"])
@pytest.mark.parametrize("name", GROWTHS)
def test_growths_are_exact_under_rejection_rules(name: str, rule_name: str) -> None:
    growth = build_growth(GROWTHS[name], style_of(rule_name))
    for kind in PROVED:
        error = largest_error(growth, rule_name, Tables(VOCAB, kind, seed=1))
        assert error < TOLERANCE, f"{kind}: off by {error:.3g}"


@dataclass(frozen=True)
class _DropsUnlikely:
    """Wrong: draws, looks at the token, and takes it back if it is unlikely."""

    limits = GrowthLimits(NUM_NODES, 1, 0.0)
    draws = Draws("independent", "without_replacement")
    num_rows = 4

    def grow(self, tree: GrowingTree) -> Iterator[Sequence[int]]:
        for _ in range(2):
            (child,) = tree.draw(0, 1) or (None,)
            if child is not None and tree.scores[child] < np.log(0.4):
                for column in (tree.tokens, tree.parents, tree.depths, tree.scores, tree.confidences):
                    column.pop()
                return
        yield from ()


@dataclass(frozen=True)
class _SortsSiblings:
    """Wrong: siblings in the order of their probability, not of their draw."""

    limits = GrowthLimits(NUM_NODES, 1, 0.0)
    draws = Draws("independent", "without_replacement")
    num_rows = 4

    def grow(self, tree: GrowingTree) -> Iterator[Sequence[int]]:
        drawn = tree.draw(0, 2)
        order = sorted(drawn, key=lambda node: tree.scores[node])
        tree.tokens[1:] = [tree.tokens[node] for node in order]
        yield from ()


@pytest.mark.parametrize("growth", [_DropsUnlikely(), _SortsSiblings()], ids=lambda growth: type(growth).__name__)
def test_wrong_growths_are_found(growth: Growth) -> None:
    kinds: tuple[Kind, ...] = ("dense", "peaked")
    errors = [largest_error(growth, "tree_rejection", Tables(VOCAB, kind, seed)) for kind in kinds for seed in (0, 1)]
    assert max(errors) > 1e-3


def test_drawn_nodes_cannot_be_dropped_nor_looked_at() -> None:
    growth = build_growth(GROWTHS["mcsd"], style_of("tree_rejection"))
    tree = EnumeratedTree(Tables(VOCAB, "dense", 0), EnumeratedDecisions(()), growth)
    tree.draw(0, 2)
    with pytest.raises(AssertionError):
        tree.keep([1])
    with pytest.raises(AssertionError):
        tree.candidate_scores(0, 2)


def test_pruning_by_confidence_is_exact() -> None:
    """What a planner does: the nodes of the greatest path confidence, earlier ones first of equals."""

    growth = build_growth(GROWTHS["rsd_c"], style_of("tree_rejection"))
    for kind in PROVED:
        for kept in (1, 2):
            tables = Tables(VOCAB, kind, 1)

            def pruned(decisions: EnumeratedDecisions, tables: Tables = tables, kept: int = kept) -> tuple[int, ...]:
                tree = EnumeratedTree(tables, decisions, growth)
                for nodes in growth.grow(tree):
                    for node in nodes:
                        tree.read(node)
                grown = tree.finished()
                confidences = grown.path_confidences
                assert confidences is not None
                order = sorted(range(1, grown.num_nodes), key=lambda node: (-confidences[node], node))
                part = grown.restricted_to([0, *sorted(order[:kept])])
                batch = TokenTreeBatch.from_trees([part])
                path = build_rule("tree_rejection").verify(batch, tables.log_rows(part, "p"), decisions).paths[0]
                return emitted_tokens(part, path)

            first = np.zeros(VOCAB)
            for tokens, weight in enumerate_runs(pruned):
                first[tokens[0]] += weight
            assert np.abs(first - tables.p(())).max() < TOLERANCE
