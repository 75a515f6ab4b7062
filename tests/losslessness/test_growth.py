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
from outrider.drafting.drafter import DraftContext, DraftOutcome, DraftStyle
from outrider.drafting.growth.build import build_growth
from outrider.drafting.growth.policy import Growth, PlannedGrowth
from outrider.drafting.growth.tree import Draws, GrowingTree, GrowthLimits, Row
from outrider.sampling.noise import Purpose
from outrider.sampling.params import SamplingParams
from outrider.token_tree import TokenTree, TokenTreeBatch
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
    "static-measured": DraftModelConfig(
        growth="static", rank_probs="measured", depth=3, max_nodes=NUM_NODES, min_path_prob=0.1
    ),
    "ppd": DraftModelConfig(growth="ppd", rank_probs=(0.5, 0.4), depth=3, max_nodes=NUM_NODES, min_path_prob=0.3),
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
        left = np.exp(self._below[node].log_probs)  # not of the node's own path where one guess serves several
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


def grow(growth: Growth, tables: Tables, decisions: EnumeratedDecisions) -> TokenTree:
    tree = EnumeratedTree(tables, decisions, growth)
    for nodes in growth.grow(tree):
        for node in nodes:
            tree.read(node)
    return tree.finished()


def run(growth: Growth, rule_name: str, tables: Tables, decisions: EnumeratedDecisions) -> tuple[int, ...]:
    grown = grow(growth, tables, decisions)
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
class TablesAfter(Tables):
    """What tables give after some tokens."""

    prefix: tuple[int, ...] = ()

    def p(self, path: Sequence[int]) -> np.ndarray:
        return super().p((*self.prefix, *path))

    def q(self, path: Sequence[int]) -> np.ndarray:
        return super().q((*self.prefix, *path))


@pytest.mark.parametrize("name", ["static", "ppd"])
@pytest.mark.parametrize("rule_name", ["tree_rejection", "multi_candidate"])
def test_shapes_by_earlier_outcomes_are_exact(name: str, rule_name: str) -> None:
    """Two steps, the second with a tree that what became of the first has shaped."""
    config = DraftModelConfig(growth=name, rank_probs="measured", depth=2, max_nodes=2, min_path_prob=0.3)  # type: ignore[arg-type]
    second_shapes = set()

    def two_steps(decisions: EnumeratedDecisions, kind: Kind) -> tuple[int, ...]:
        growth = build_growth(config, style_of(rule_name))
        assert isinstance(growth, PlannedGrowth)
        emitted: tuple[int, ...] = ()
        for step in range(2):
            tables = TablesAfter(2, kind, 1, emitted)
            grown = grow(growth, tables, decisions)
            batch = TokenTreeBatch.from_trees([grown])
            path = build_rule(rule_name).verify(batch, tables.log_rows(grown, "p"), decisions).paths[0]
            emitted += emitted_tokens(grown, path)
            for _ in range(200 if step == 0 else 0):  # as if it had been so for long
                growth.planner.count(grown, DraftOutcome("r", grown, path, None))
                growth.planner.end_step()
            if step == 1:
                second_shapes.add(grown.parents)
        return emitted

    for kind in PROVED:
        tables, length = Tables(2, kind, 1), 6
        actual: dict[tuple[int, ...], float] = defaultdict(float)
        for tokens, weight in enumerate_runs(lambda decisions, kind=kind: two_steps(decisions, kind)):
            for rest in itertools.product(range(2), repeat=length - len(tokens)):
                actual[tokens + rest] += weight * probability(tables, tokens + rest, len(tokens))
        sequences = itertools.product(range(2), repeat=length)
        assert max(abs(actual[s] - probability(tables, s, 0)) for s in sequences) < TOLERANCE
    assert len(second_shapes) > 1, "a case in which nothing varies"


def test_candidates_of_the_target_are_lossless_only_one_at_a_time() -> None:
    """Why `mcsd_improved` has the root for the target's candidates.

    The paper takes several tokens that the target would say next, drafts below each, and keeps the one with the
    longest accepted draft: which of them is kept depends on what follows it, and so the output is not the target's.
    """

    def one_step(decisions: EnumeratedDecisions, num_candidates: int) -> int:
        left, lengths = tables.p(()).copy(), {}
        for _ in range(num_candidates):
            first = decisions.choose(left / left.sum())
            left[first] = 0.0
            p, q = tables.p((first,)), tables.q((first,))
            second = decisions.choose(q)
            lengths[first] = decisions.accept(min(1.0, p[second] / q[second]), 0, 0)
        return max(lengths, key=lambda token: lengths[token])  # of equals the one that was drawn first

    tables = Tables(VOCAB, "dense", 1)
    for num_candidates, is_exact in ((1, True), (2, False)):
        actual = np.zeros(VOCAB)
        for token, weight in enumerate_runs(lambda decisions, count=num_candidates: one_step(decisions, count)):
            actual[token] += weight
        error = np.abs(actual - tables.p(())).max()
        assert error < TOLERANCE if is_exact else error > 0.01


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
                grown = grow(growth, tables, decisions)
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
