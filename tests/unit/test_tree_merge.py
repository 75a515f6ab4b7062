"""Merging, correcting and attributing paths, each against a naive reading."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.drafting.drafter import DraftContext, DraftOutcome, DraftStyle, FinishedText
from outrider.drafting.sources.calibration import NUM_BELIEVED, NUM_BINS, Calibration
from outrider.drafting.sources.hierarchy import HierarchyDrafter
from outrider.drafting.tree_merge import WeightedPath, merge_paths
from outrider.sampling.params import SamplingParams
from outrider.token_tree import TokenTree, VerifiedPath

GUESSES = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0])), max_size=5)
PATHS = st.lists(GUESSES, max_size=6).map(
    lambda found: [WeightedPath([token for token, _ in path], [prob for _, prob in path]) for path in found]
)


def all_nodes(paths: Sequence[WeightedPath]) -> dict[tuple[int, ...], float]:
    """Every prefix of a path, in the order of the paths, with the greatest confidence that one gives it."""
    found: dict[tuple[int, ...], float] = {}
    for path in paths:
        for end in range(1, len(path.tokens) + 1):
            prefix = tuple(path.tokens[:end])
            found[prefix] = max(found.get(prefix, 0.0), path.confidences[end - 1])
    return found


def paths_to(tree: TokenTree) -> list[tuple[int, ...]]:
    """The tokens that lead to each node, the root excluded."""
    return [tuple(tree.tokens[node] for node in tree.path(end)) for end in range(1, tree.num_nodes)]


@given(PATHS, st.integers(0, 8), st.sampled_from([0.0, 0.1, 0.5]))
def test_the_likeliest_node_is_next(paths: list[WeightedPath], max_nodes: int, min_path_prob: float) -> None:
    nodes = all_nodes(paths)
    products: dict[tuple[int, ...], float] = {(): 1.0}
    for prefix, confidence in sorted(nodes.items(), key=lambda item: len(item[0])):
        products[prefix] = products[prefix[:-1]] * confidence
    tree = merge_paths(7, paths, max_nodes, max_depth=5, min_path_prob=min_path_prob)
    assert tree.confidences is not None
    made = paths_to(tree)
    assert len(set(made)) == len(made), "equal prefixes share nodes"
    taken: set[tuple[int, ...]] = {()}
    for prefix, confidence in zip(made, tree.confidences[1:], strict=True):
        open_nodes = [other for other in nodes if other[:-1] in taken and other not in taken]
        assert products[prefix] == max(products[other] for other in open_nodes)
        assert confidence == nodes[prefix]
        taken.add(prefix)
    left = [products[other] for other in nodes if other[:-1] in taken and other not in taken]
    assert len(made) == max_nodes or all(product < min_path_prob for product in left)


@given(st.lists(st.tuples(PATHS, st.lists(st.integers(0, 2), min_size=1, max_size=4)), max_size=8))
def test_corrections_count_what_came_true(steps: list[tuple[list[WeightedPath], list[int]]]) -> None:
    calibration = Calibration()
    promised = [min((index + 0.5) / NUM_BINS, 1.0) * NUM_BELIEVED for index in range(NUM_BINS + 1)]
    right = list(promised)
    for paths, new_tokens in steps:
        for path, corrected in zip(paths, calibration.corrected("r", paths), strict=True):
            bins = [int(confidence * NUM_BINS) for confidence in path.confidences]
            expected = [min(1.0, c * right[b] / promised[b]) for c, b in zip(path.confidences, bins, strict=True)]
            assert corrected.tokens == path.tokens
            assert corrected.confidences == pytest.approx(expected)
        calibration.observe("r", new_tokens)
        for prefix, confidence in all_nodes(paths).items():
            if len(prefix) <= len(new_tokens) and list(prefix[:-1]) == new_tokens[: len(prefix) - 1]:
                promised[int(confidence * NUM_BINS)] += confidence
                right[int(confidence * NUM_BINS)] += prefix[-1] == new_tokens[len(prefix) - 1]


class Level:
    """Says what it is told to, and remembers for how many nodes it was asked."""

    reads_logits = False

    def __init__(self, name: str, paths: Sequence[WeightedPath]) -> None:
        self.name = name
        self.paths = paths
        self.asked: list[int] = []

    def continuations(self, context: DraftContext) -> Sequence[WeightedPath]:
        self.asked.append(context.max_nodes)
        return self.paths if context.max_nodes else []

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        pass

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        pass


def hierarchy_step(levels: Sequence[Level], max_nodes: int) -> tuple[HierarchyDrafter, TokenTree]:
    drafter = HierarchyDrafter(levels, max_nodes=max_nodes, max_depth=8, style=DraftStyle())
    params = SamplingParams(temperature=0.0)
    (tree,) = drafter.propose([DraftContext("r", [7], 1, max_nodes, 8, params, 0, frozenset())])
    return drafter, tree


@given(st.lists(PATHS, min_size=1, max_size=3), st.integers(1, 8))
def test_hits_are_the_first_levels_that_proposed_them(found: list[list[WeightedPath]], max_nodes: int) -> None:
    levels = [Level(f"level {number}", paths) for number, paths in enumerate(found)]
    drafter, tree = hierarchy_step(levels, max_nodes)
    drafter.observe([DraftOutcome("r", tree, VerifiedPath((), 9), None)])
    first = {
        prefix: number
        for number in reversed(range(len(levels)))
        if levels[number].asked[-1]
        for prefix in all_nodes(levels[number].paths)
    }
    expected = [sum(first[prefix] == number for prefix in paths_to(tree)) for number in range(len(levels))]
    assert [statistics.num_drafted for statistics in drafter.statistics] == expected


def test_levels_that_are_not_asked_learn_in_every_step() -> None:
    """Else the first question would be answered from a backlog as long as the text."""
    full = Level("full", [WeightedPath([1, 2, 3], [0.9, 0.9, 0.9])])
    other = Level("other", [WeightedPath([4], [1.0])])
    drafter, tree = hierarchy_step([full, other], 3)
    assert tree.tokens == (7, 1, 2, 3)
    assert (full.asked, other.asked) == ([3], [0])
    assert drafter.statistics[1].num_asked == 0
    _, tree = hierarchy_step([full, other], 4)
    assert set(tree.tokens) == {7, 1, 2, 3, 4}
    assert other.asked == [0, 4]
