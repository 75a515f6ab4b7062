"""Tree shapes against brute force over all trees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.drafting.drafter import DraftOutcome
from outrider.drafting.dynamic_tree import DynamicTreePlanner, PromptedTree, mean_tokens
from outrider.drafting.positional_acceptance import AcceptanceCounter
from outrider.drafting.sequoia import LatencyTable, OptimalTrees, best_lengths, hardware_aware_shape, sequoia_shape
from outrider.drafting.tree_shape import TreeShape, best_first_shape, expected_length, node_confidences, node_probs
from outrider.errors import ConfigError
from outrider.token_tree import TokenTree, VerifiedPath

Paths = frozenset[tuple[int, ...]]


def all_trees(num_ranks: int, max_depth: int, max_nodes: int) -> Iterator[Paths]:
    """Every set of nodes that holds its parents, each once."""
    found: set[Paths] = {frozenset()}
    layer = found
    for _ in range(max_nodes):
        grown: set[Paths] = set()
        for tree in layer:
            for parent in [(), *tree]:
                if len(parent) < max_depth:
                    grown |= {tree | {(*parent, rank)} for rank in range(num_ranks)}
        layer = grown - found
        found |= layer
    yield from found


def value(tree: Paths, acceptance: Sequence[Sequence[float]]) -> float:
    return sum(float(np.prod([acceptance[d][rank] for d, rank in enumerate(path)])) for path in tree)


def matrix(num_depths: int, num_ranks: int) -> st.SearchStrategy[list[list[float]]]:
    probs = st.floats(0, 1).map(lambda p: round(p, 3))
    row = st.lists(probs, min_size=num_ranks, max_size=num_ranks).map(lambda row: [p / max(1, sum(row)) for p in row])
    return st.lists(row, min_size=num_depths, max_size=num_depths)


TREES = {depth: list(all_trees(3, depth, 5)) for depth in (1, 2, 3)}


@settings(max_examples=60)
@given(matrix(3, 3), st.integers(1, 3), st.integers(0, 5))
def test_the_dynamic_programme_finds_the_best_of_all_trees(
    acceptance: list[list[float]], max_depth: int, max_nodes: int
) -> None:
    best = max(value(tree, acceptance) for tree in TREES[max_depth] if len(tree) <= max_nodes)
    trees = OptimalTrees(5, max_depth, acceptance)
    shape = trees.shape(max_nodes)
    assert trees.expected_length(max_nodes) == pytest.approx(best, abs=1e-12)
    assert expected_length(shape, acceptance) == pytest.approx(best, abs=1e-12)
    assert len(shape.parents) <= max_nodes
    assert max(shape.depths, default=0) <= max_depth
    assert sequoia_shape(max_nodes, max_depth, acceptance).paths == shape.paths or max_nodes < 5


@given(matrix(3, 4), st.booleans(), st.integers(1, 6), st.integers(1, 30))
def test_best_first_and_the_dynamic_programme_agree(
    rows: list[list[float]], by_depth: bool, max_depth: int, max_nodes: int
) -> None:
    """Both are optimal; they may differ only between equals."""
    acceptance = rows if by_depth else rows[0]
    greedy = best_first_shape(max_nodes, max_depth, acceptance)
    optimal = sequoia_shape(max_nodes, max_depth, acceptance)
    length = expected_length(optimal, acceptance)
    assert length == pytest.approx(expected_length(greedy, acceptance))
    depth = min(max_depth, 3) if by_depth else max_depth
    assert best_lengths(max_nodes, max_depth, acceptance)[depth, max_nodes] == pytest.approx(length)


def test_acceptance_by_depth_moves_the_tree() -> None:
    """Where deep candidates are poor the tree is wide, where they are good it is deep."""
    flat = sequoia_shape(4, 4, [[0.4, 0.3, 0.2, 0.1], [0.1] * 4, [0.1] * 4, [0.1] * 4])
    deep = sequoia_shape(4, 4, [[0.6, 0.2, 0.1, 0.1], [0.9, 0.0], [0.9], [0.9]])
    assert flat.paths == [(0,), (1,), (2,), (3,)]
    assert deep.paths == [(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)]


def test_sequoia_beats_chains_and_full_trees_of_the_same_size() -> None:
    acceptance = (0.6, 0.2, 0.1, 0.05)
    chain = TreeShape.from_paths([(0,) * depth for depth in range(1, 15)])
    binary = TreeShape.from_paths([path for depth in (1, 2, 3) for path in product(range(2), repeat=depth)])
    assert len(chain.parents) == len(binary.parents) == 14
    optimal = expected_length(sequoia_shape(14, 14, acceptance), acceptance)
    assert optimal > 1.05 * max(expected_length(chain, acceptance), expected_length(binary, acceptance))


def test_expected_length_is_what_a_walk_gives() -> None:
    shape = TreeShape.from_paths([[0], [1], [0, 0], [1, 2]])
    acceptance = [[0.5, 0.25], [0.5, 0.1, 0.2]]
    assert node_probs(shape, acceptance) == [1.0, 0.5, 0.25, 0.25, 0.05]
    assert expected_length(shape, acceptance) == pytest.approx(1.05)
    assert expected_length(shape, [[0.5]]) == 0.5, "nothing is known of the other ranks and depths"
    rng = np.random.default_rng(0)
    total = 0
    for _ in range(20_000):
        path: tuple[int, ...] = ()
        while len(path) < 2:
            probs = acceptance[len(path)]
            drawn = rng.choice(len(probs) + 1, p=[*probs, 1 - sum(probs)])
            if (*path, drawn) not in shape.paths:
                break
            path = (*path, drawn)
        total += len(path)
    assert total / 20_000 == pytest.approx(1.05, abs=0.03)


# Tables of published trees


def test_a_published_table_becomes_a_shape() -> None:
    """Given in any order, parents behind their children too."""
    shape = TreeShape.from_paths([[0, 0], [0], [1], [0, 1], [0, 0, 0]])
    assert shape.paths == [(0,), (1,), (0, 0), (0, 1), (0, 0, 0)]
    assert shape.parents == (0, 0, 1, 1, 3)
    assert shape.ranks == (0, 1, 0, 1, 0)
    assert shape.depths == (1, 1, 2, 2, 3)
    assert TreeShape.from_paths(best_first_shape(9, 3, (0.5, 0.3)).paths) == best_first_shape(9, 3, (0.5, 0.3))


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([[0], [1, 0]], "its parent"),
        ([[0], [0]], "twice"),
        ([[]], "at least one"),
        ([[-1]], "ranks from 0"),
        ([[0.5]], "ranks from 0"),
        ([[True]], "ranks from 0"),
        (["0"], "ranks from 0"),
        ([0], "ranks from 0"),
    ],
)
def test_a_table_that_is_no_tree_is_refused(paths: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TreeShape.from_paths(paths)


@pytest.mark.parametrize("acceptance", [[], [0.5, 1.5], [[0.5], 0.5], [[0.5], [-0.1]], [float("nan")], ["a"]])
def test_acceptance_that_is_none_is_refused(acceptance: list) -> None:
    with pytest.raises(ConfigError, match="acceptance"):
        sequoia_shape(4, 2, acceptance)


def test_filling_a_shape() -> None:
    shape = TreeShape.from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0], [2, 0]])
    asked: list[tuple[int, int]] = []

    def candidates(token: int, depth: int) -> list[int]:
        asked.append((token, depth))
        return {7: [5, 6, -1], 5: [1, 2], 6: []}[token]

    tree = shape.fill(7, candidates, max_nodes=10, max_depth=10)
    assert tree.tokens == (7, 5, 6, 1, 2)
    assert tree.parents == (-1, 0, 0, 1, 1)
    assert asked == [(7, 0), (5, 1), (6, 1)], "each node's candidates once"
    assert shape.fill(7, candidates, max_nodes=3, max_depth=10).tokens == (7, 5, 6, 1)
    assert shape.fill(7, candidates, max_nodes=10, max_depth=1).tokens == (7, 5, 6)
    assert shape.fill(7, candidates, max_nodes=0, max_depth=1).tokens == (7,)
    assert tree.confidences is None


def test_filling_a_shape_with_confidences() -> None:
    shape = TreeShape.from_paths([[0], [1], [0, 0], [0, 1], [1, 0]])
    confidences = node_confidences(shape, [[0.5, 0.25], [0.5, 0.1]])
    assert confidences == [1.0, 0.5, 0.25, 0.5, 0.1, 0.5]

    def fill(min_path_prob: float) -> TokenTree:
        return shape.fill(
            0,
            lambda token, depth: [] if token == 1 and depth == 1 else [2 * token + 1, 2 * token + 2],
            max_nodes=9,
            max_depth=9,
            confidences=confidences,
            min_path_prob=min_path_prob,
        )

    assert fill(0.0).tokens == (0, 1, 2, 5)
    assert fill(0.0).confidences == (1.0, 0.5, 0.25, 0.5), "they go with the nodes, not with their places"
    assert fill(0.2).tokens == (0, 1, 2)
    assert fill(0.3).tokens == (0, 1)


# Measured acceptance


def test_acceptance_is_counted_along_the_path() -> None:
    counter = AcceptanceCounter(max_depth=2, num_ranks=2)
    tree = TokenTree((9, 1, 2, 3, 4, 5), (-1, 0, 0, 0, 1, 2))  # 9 -> 1 2 3, 1 -> 4, 2 -> 5
    logits = torch.zeros(6, 10)
    counter.count([DraftOutcome("a", tree, VerifiedPath((2, 5), 0), logits)])  # 9 2 5: rank 1, then rank 0
    assert counter.by_depth_and_rank() == [[0.0, 1.0], [1.0, 0.0]]
    counter.count([DraftOutcome("a", tree, VerifiedPath((1,), 0), logits)])  # 9 1: rank 0, then none
    counter.count([DraftOutcome("a", tree, VerifiedPath((3,), 0), logits)])  # rank 2 is not counted
    counter.count([DraftOutcome("a", TokenTree.root_only(9), VerifiedPath((), 0), logits)])
    assert counter.by_depth_and_rank() == [[pytest.approx(1 / 3), pytest.approx(1 / 3)], [0.5, 0.0]]
    assert counter.by_rank() == [pytest.approx(2 / 5), pytest.approx(1 / 3)]


def test_counted_acceptance_converges_to_the_true_one() -> None:
    acceptance = [[0.5, 0.2], [0.4, 0.3]]
    shape = TreeShape.from_paths([[0], [1], [0, 0], [0, 1], [1, 0], [1, 1]])
    tree = shape.fill(0, lambda token, depth: [2 * token + 1, 2 * token + 2], max_nodes=9, max_depth=9)
    counter, rng = AcceptanceCounter(2, 2), np.random.default_rng(1)
    children = tree.children()
    for _ in range(6000):
        node, path = 0, []
        for probs in acceptance:
            drawn = rng.choice(3, p=[*probs, 1 - sum(probs)])
            if drawn == 2:
                break
            node = children[node][drawn]
            path.append(node)
        counter.count([DraftOutcome("a", tree, VerifiedPath(tuple(path), 0), None)])
    np.testing.assert_allclose(counter.by_depth_and_rank(), acceptance, atol=0.03)


# Size and depth for a machine

FREE = LatencyTable((1, 64), (10.0, 10.0))  # rows cost nothing
DEAR = LatencyTable((1, 2, 64), (10.0, 19.0, 600.0))  # rows cost as much as steps
STEP = LatencyTable((1, 8, 9, 64), (10.0, 10.0, 30.0, 30.0))  # a second tile of rows


def test_latency_tables_choose_different_trees() -> None:
    acceptance = (0.7, 0.15, 0.05)

    def choose(target: LatencyTable, draft_ms: float):
        return hardware_aware_shape(acceptance, target, draft_ms, max_nodes=40, max_depth=8)

    assert len(choose(FREE, 0.0).shape.parents) == 40
    assert choose(DEAR, 0.0).shape.parents == ()
    assert len(choose(STEP, 0.0).shape.parents) == 7, "as many as fit below the step, with the root"
    shallow, deep = choose(FREE, 5.0), choose(FREE, 0.1)
    assert max(shallow.shape.depths) < max(deep.shape.depths), "a slow drafter wants shallow trees"
    assert choose(FREE, 1000.0).shape.parents == (), "and a very slow one none"


@settings(max_examples=15)
@given(matrix(3, 3), st.lists(st.floats(1, 20), min_size=6, max_size=6), st.floats(0, 10))
def test_the_choice_is_the_best_of_all_trees(acceptance: list[list[float]], ms: list[float], draft_ms: float) -> None:
    table = LatencyTable((1, 2, 3, 4, 5, 6), tuple(ms))
    ms = np.maximum.accumulate(ms).tolist()

    def rate(tree: Paths) -> float:
        depth = max(map(len, tree), default=0)
        return (1 + value(tree, acceptance)) / (ms[len(tree)] + depth * draft_ms)

    choice = hardware_aware_shape(acceptance, table, draft_ms, max_nodes=5, max_depth=3)
    best = max(rate(tree) for tree in TREES[3])
    assert choice.tokens_per_ms == pytest.approx(best)
    assert rate(frozenset(choice.shape.paths)) == pytest.approx(best)


@pytest.mark.parametrize(
    ("rows", "ms"), [((), ()), ((2, 1), (1.0, 1.0)), ((0, 1), (1.0, 1.0)), ((1,), (1.0, 2.0)), ((1,), (0.0,))]
)
def test_a_latency_table_that_is_none_is_refused(rows: tuple, ms: tuple) -> None:
    with pytest.raises(ConfigError, match="latency table"):
        LatencyTable(rows, ms)


def test_latency_is_interpolated() -> None:
    assert LatencyTable((1, 5), (2.0, 4.0)).ms_of(2) == 2.5
    assert LatencyTable((1, 5, 9), (2.0, 4.0, 3.0)).ms_of(9) == 4.0, "a dip is noise"


# Dynamic trees

PROMPTED = [[0.6, 0.2], [0.4, 0.15]]


def all_prompted(state: int, num_states: int, max_rows: int) -> Iterator[PromptedTree]:
    for paths in all_trees(2, state, max_rows - 1) if state else [frozenset()]:
        shape = TreeShape.from_paths(paths)
        for prompts in product(range(num_states), repeat=1 + len(paths)):
            if 1 + len(paths) + sum(prompts) <= max_rows:
                yield PromptedTree(shape, prompts)


@pytest.mark.parametrize("max_rows", [1, 2, 3, 4])
def test_dynamic_trees_are_the_best_of_all_policies(max_rows: int) -> None:
    choices = [list(all_prompted(state, 3, max_rows)) for state in range(3)]
    best = max(mean_tokens(trees, PROMPTED) for trees in product(*choices))
    plan = DynamicTreePlanner(PROMPTED, 8).plan(max_rows)
    assert plan.tokens_per_step == pytest.approx(best)
    assert all(tree.num_rows <= max_rows for tree in plan.trees)
    assert all(max(tree.shape.depths, default=0) <= state for state, tree in enumerate(plan.trees))


def test_the_steady_state_is_what_a_long_run_gives() -> None:
    plan = DynamicTreePlanner(PROMPTED, 12).plan(9)
    rng, state, tokens, num_steps = np.random.default_rng(2), 0, 0, 30_000
    for _ in range(num_steps):
        tree, path = plan.trees[state], ()
        node_of = {path: node for node, path in enumerate([(), *tree.shape.paths])}
        while len(path) < len(PROMPTED):
            probs = PROMPTED[len(path)]
            drawn = int(rng.choice(len(probs) + 1, p=[*probs, 1 - sum(probs)]))
            if (*path, drawn) not in node_of:
                break
            path = (*path, drawn)
        tokens += 1 + len(path)
        state = tree.prompt_tokens[node_of[path]]
    assert tokens / num_steps == pytest.approx(plan.tokens_per_step, rel=0.01)
    assert plan.tokens_per_step > 1.5


def test_machines_get_different_dynamic_trees() -> None:
    planner = DynamicTreePlanner(PROMPTED, 24)
    free = planner.plan_for(FREE, max_rows=24)
    step = planner.plan_for(STEP, max_rows=24)
    dear = planner.plan_for(DEAR, max_rows=24)
    assert free.trees != step.trees != dear.trees
    assert max(tree.num_rows for tree in step.trees) == 8
    assert dear.tokens_per_step == pytest.approx(1.0), "plain decoding"
    assert free.tokens_per_step > step.tokens_per_step > dear.tokens_per_step
