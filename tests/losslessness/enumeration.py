"""Proofs by exhaustion: all drafts and all decisions of a verification rule, with their exact probabilities.

A rule is run as a probabilistic program: `enumerate_runs` runs it again and again, each time down another
branch of its random choices, in float64. The distribution of what it emits must be the target's within 1e-12.
Target and drafter are tables with another distribution after every prefix, so that a row out of place shows.

A new rule joins by one line in `test_rules.py`; `check_rule` is all that is asked of it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outrider.sampling.noise import Purpose
from outrider.token_tree import DraftDistribution, SiblingDraws, TokenTree, TokenTreeBatch, VerifiedPath
from outrider.verification.rule import VerificationRule

T = TypeVar("T")
TOLERANCE = 1e-12
# How p and q relate: everywhere positive; with zeros at random; no token in common; equal; nearly certain.
Kind = Literal["dense", "zeros", "disjoint", "equal", "peaked"]
KINDS: tuple[Kind, ...] = ("dense", "zeros", "disjoint", "equal", "peaked")
# How the tokens of a tree come about: drawn from q; drawn, and once q has no token left, the lowest ids that
# are not among the siblings yet; given, with no distribution.
Proposal = Literal["drawn", "drawn_and_filled", "given"]


class EnumeratedDecisions:
    """Decisions that take the options in `prefix`, then always the first; options of probability 0 are none.

    Attributes:
        weight: probability of the choices so far.
        taken, num_options: of each choice so far.
    """

    def __init__(self, prefix: Sequence[int], *, greedy: bool = False) -> None:
        self._prefix = prefix
        self._greedy = greedy
        self.weight = 1.0
        self.taken: list[int] = []
        self.num_options: list[int] = []

    def choose(self, weights: NDArray[np.float64]) -> int:
        """One index of `weights`, which sum to 1."""
        possible = np.flatnonzero(weights > 0)
        option = self._prefix[len(self.taken)] if len(self.taken) < len(self._prefix) else 0
        self.taken.append(option)
        self.num_options.append(len(possible))
        self.weight *= float(weights[possible[option]])
        return int(possible[option])

    def greedy(self, node: int) -> bool:
        return self._greedy

    def sample(self, log_weights: Tensor, nodes: Sequence[int], purpose: Purpose) -> list[int]:
        assert log_weights.dtype == torch.float64
        assert log_weights.shape[0] == len(nodes)
        assert purpose in (Purpose.TARGET, Purpose.RESIDUAL)
        if self._greedy:
            return log_weights.argmax(-1).tolist()
        return [self.choose(row) for row in log_weights.softmax(-1).numpy()]

    def accept(self, probability: float, node: int, trial: int) -> bool:
        assert 0.0 <= probability <= 1.0
        assert node >= 0
        assert trial >= 0
        return self.choose(np.array([1.0 - probability, probability])) == 1


def enumerate_runs(run: Callable[[EnumeratedDecisions], T]) -> Iterator[tuple[T, float]]:
    """Every result of `run` with the probability of the choices that led to it."""
    prefix: list[int] = []
    while True:
        decisions = EnumeratedDecisions(prefix)
        yield run(decisions), decisions.weight
        prefix, num_options = decisions.taken, decisions.num_options
        while prefix and prefix[-1] + 1 == num_options[-1]:
            prefix.pop()
            num_options.pop()
        if not prefix:
            return
        prefix[-1] += 1


@dataclass(frozen=True)
class Tables:
    """A target p and a drafter q with another distribution after every path of tokens from the root."""

    vocab: int
    kind: Kind
    seed: int

    def p(self, path: Sequence[int]) -> NDArray[np.float64]:
        return _table_row(self, tuple(path), 0)

    def q(self, path: Sequence[int]) -> NDArray[np.float64]:
        return _table_row(self, tuple(path), 0 if self.kind == "equal" else 1)

    def log_rows(self, tree: TokenTree, which: Literal["p", "q"]) -> Tensor:
        """``[num_nodes, vocab]`` log-distributions after each node, each row off by a constant of its own."""
        paths: list[tuple[int, ...]] = [()]
        for token, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True):
            paths.append((*paths[parent], token))
        rows = np.stack([self.p(path) if which == "p" else self.q(path) for path in paths])
        with np.errstate(divide="ignore"):
            return torch.from_numpy(np.log(rows) + 3.0 * np.arange(tree.num_nodes)[:, None] - 1.0)


@lru_cache(maxsize=100_000)
def _table_row(tables: Tables, path: tuple[int, ...], which: int) -> NDArray[np.float64]:
    rng = np.random.default_rng([tables.seed, which, len(path), *path])
    row = rng.dirichlet(np.ones(tables.vocab) * (0.1 if tables.kind == "peaked" else 1.0)) + 1e-6
    if tables.kind == "zeros":
        row[rng.permutation(tables.vocab)[: rng.integers(0, tables.vocab)]] = 0.0
    elif tables.kind == "disjoint":
        split = np.random.default_rng([tables.seed, 2, *path]).permutation(tables.vocab)
        row[split[tables.vocab // 2 :] if which else split[: tables.vocab // 2]] = 0.0
    row /= row.sum()
    row.setflags(write=False)
    return row


@dataclass(frozen=True)
class Case:
    """One step to enumerate.

    Attributes:
        shapes: parents of each tree of the batch; a node beyond what q has left to draw is left out, with all
            below it.
    """

    shapes: tuple[tuple[int, ...], ...]
    vocab: int
    kind: Kind
    draws: SiblingDraws
    proposal: Proposal
    seed: int

    @property
    def tables(self) -> list[Tables]:
        return [Tables(self.vocab, self.kind, 100 * self.seed + index) for index in range(len(self.shapes))]


ROOT: tuple[int, ...] = (-1,)
CHAINS: tuple[tuple[int, ...], ...] = ((-1, 0), (-1, 0, 1), (-1, 0, 1, 2))
TREES: tuple[tuple[int, ...], ...] = (
    (-1, 0, 0),
    (-1, 0, 0, 0),
    (-1, 0, 0, 1, 2),
    (-1, 0, 1, 0, 3),  # siblings that are no neighbours
    (-1, 0, 0, 1, 1, 2),
    (-1, 0, 0, 1, 3, 3),  # depth 3, ragged
)


def cases_for(rule: VerificationRule) -> Iterator[Case]:
    """The steps that `rule` must be exact on, small ones first.

    Drafts that share the target's noise are not independent of its choices: a rule for those has to be exact
    for any given tree, and `test_rules_invariance.py` checks the rest of it.
    """
    batch = ((-1, 0, 1), ROOT, (-1, 0)) if rule.chains_only else ((-1, 0, 0), ROOT, (-1, 0, 1))
    shapes: list[tuple[tuple[int, ...], ...]] = [(ROOT,), *((chain,) for chain in CHAINS), batch]
    if not rule.chains_only:
        shapes += [(tree,) for tree in TREES]
    proposals: tuple[Proposal, ...] = ("given",)
    if rule.draft_noise == "independent":
        proposals = ("given", "drawn", "drawn_and_filled")
    all_draws: tuple[SiblingDraws, ...] = ("without_replacement", "with_replacement")
    for shape, kind, proposal, draws in itertools.product(shapes, KINDS, proposals, all_draws):
        if draws == "with_replacement" and proposal != "drawn":
            continue  # given tokens are drawn neither way, and a q drawn from with replacement never runs out
        if len(shape) > 1:
            yield Case(shape, 2, kind, draws, proposal, seed=1)
        elif max(map(len, shape)) > 4:
            yield Case(shape, 3, kind, draws, proposal, seed=1)
        else:
            for seed in range(1, 5):
                yield Case(shape, 3 + seed % 2, kind, draws, proposal, seed)


def check_rule(rule: VerificationRule) -> None:
    """Prove `rule` lossless on all `cases_for` it.

    Raises:
        AssertionError: the emitted tokens' distribution is not the target's, or drafts are not used.
    """
    check_certain_paths(rule)
    for case in cases_for(rule):
        check_greedy(rule, case)
        check_distribution(rule, case)


def check_distribution(rule: VerificationRule, case: Case) -> None:
    """The emitted tokens, continued with p to a fixed length, have the target's distribution."""
    lengths = [max(_depths(shape)) + 1 for shape in case.shapes]
    emitted: dict[tuple[tuple[int, ...], ...], float] = defaultdict(float)
    for tokens, weight in enumerate_runs(lambda decisions: _run_step(rule, case, decisions)):
        emitted[tokens] += weight
    actual: dict[tuple[tuple[int, ...], ...], float] = defaultdict(float)
    for paths, weight in emitted.items():
        continued = [
            _continuations(tables, path, length)
            for tables, path, length in zip(case.tables, paths, lengths, strict=True)
        ]
        for combination in itertools.product(*continued):
            sequences = tuple(sequence for sequence, _ in combination)
            actual[sequences] += weight * float(np.prod([probability for _, probability in combination]))
    expected = {
        tuple(sequence for sequence, _ in combination): float(np.prod([prob for _, prob in combination]))
        for combination in itertools.product(
            *(_continuations(tables, (), length) for tables, length in zip(case.tables, lengths, strict=True))
        )
    }
    for sequences in expected.keys() | actual.keys():
        error = abs(actual.get(sequences, 0.0) - expected.get(sequences, 0.0))
        assert error < TOLERANCE, f"{rule.name}, {case}: P{sequences} is off by {error:.3g}"


def check_greedy(rule: VerificationRule, case: Case) -> None:
    """A greedy request's tokens are the argmaxes, whatever was drafted."""
    tokens = _run_step(rule, case, EnumeratedDecisions((), greedy=True))
    for tables, path in zip(case.tables, tokens, strict=True):
        for length, token in enumerate(path):
            assert token == int(tables.p(path[:length]).argmax()), f"{rule.name}, {case}: {path} is not greedy"


def check_certain_paths(rule: VerificationRule) -> None:
    """Where the target is certain of a path of the tree, the whole path is accepted: no sibling is missed."""
    for shape in CHAINS if rule.chains_only else CHAINS + TREES:
        tree = TokenTree((0, *range(1, len(shape))), shape)
        for leaf in set(range(len(shape))) - set(shape):
            rows = torch.full((len(shape), len(shape) + 1), -torch.inf, dtype=torch.float64)
            rows[:, len(shape)] = 0.0
            for node in tree.path(leaf):
                rows[tree.parents[node], len(shape)] = -torch.inf
                rows[tree.parents[node], tree.tokens[node]] = 0.0
            result = rule.verify(TokenTreeBatch.from_trees([tree]), rows, EnumeratedDecisions(()))
            expected = VerifiedPath(tree.path(leaf), len(shape))
            assert result.paths == (expected,), f"{rule.name}, {shape}: got {result.paths}, expected {expected}"


def draw_tree(
    tables: Tables, shape: Sequence[int], case: Case, choose: Callable[[NDArray[np.float64]], int]
) -> TokenTree:
    """A tree of `shape` whose tokens are drawn from the drafter's table, or given."""
    tokens, parents = [0], [-1]
    paths: list[tuple[int, ...]] = [()]
    left = {0: tables.q(())}  # what is left of q below each node
    index_of = {0: 0}
    given = np.random.default_rng([case.seed, len(shape)])
    for position, shape_parent in enumerate(shape[1:], 1):
        if shape_parent not in index_of:
            continue
        parent = index_of[shape_parent]
        if case.proposal == "given":
            token = int(given.integers(tables.vocab))
        elif left[parent].sum() > 0.0:
            token = choose(left[parent])
        elif case.proposal == "drawn_and_filled":
            siblings = {tokens[node] for node in range(1, len(tokens)) if parents[node] == parent}
            token = min(set(range(tables.vocab)) - siblings, default=0)
        else:
            continue
        if case.draws == "without_replacement":
            rest = left[parent].copy()
            rest[token] = 0.0
            left[parent] = rest / rest.sum() if rest.sum() > 0.0 else rest
        index_of[position] = len(tokens)
        tokens.append(token)
        parents.append(parent)
        paths.append((*paths[parent], token))
        left[index_of[position]] = tables.q(paths[-1])
    tree = TokenTree(tuple(tokens), tuple(parents))
    if case.proposal == "given":
        return tree
    return TokenTree(tree.tokens, tree.parents, DraftDistribution(tables.log_rows(tree, "q"), case.draws))


def emitted_tokens(tree: TokenTree, path: VerifiedPath) -> tuple[int, ...]:
    """The tokens of a verified path; asserts that it is a path of the tree."""
    parents = (0, *path.accepted_nodes)
    for parent, node in zip(parents, path.accepted_nodes, strict=False):
        assert tree.parents[node] == parent, f"{path} is no path of {tree}"
    return (*(tree.tokens[node] for node in path.accepted_nodes), path.next_token)


def _run_step(rule: VerificationRule, case: Case, decisions: EnumeratedDecisions) -> tuple[tuple[int, ...], ...]:
    """Draft, verify, and give each tree's emitted tokens."""
    trees = [
        draw_tree(tables, shape, case, decisions.choose)
        for tables, shape in zip(case.tables, case.shapes, strict=True)
    ]
    rows = [tables.log_rows(tree, "p") for tables, tree in zip(case.tables, trees, strict=True)]
    result = rule.verify(TokenTreeBatch.from_trees(trees), torch.cat(rows), decisions)
    return tuple(emitted_tokens(tree, path) for tree, path in zip(trees, result.paths, strict=True))


def _continuations(tables: Tables, path: tuple[int, ...], length: int) -> list[tuple[tuple[int, ...], float]]:
    """All sequences of `length` that begin with `path`, with their probability given it."""
    sequences = [(path, 1.0)]
    for _ in range(length - len(path)):
        sequences = [
            ((*sequence, token), probability * p)
            for sequence, probability in sequences
            for token, p in enumerate(tables.p(sequence).tolist())
        ]
    return sequences


def _depths(parents: Sequence[int]) -> list[int]:
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return depths
