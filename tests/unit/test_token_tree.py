from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.drafting.tree_merge import WeightedPath, merge_paths
from outrider.errors import TokenTreeError
from outrider.token_tree import DraftDistribution, TokenTree, TokenTreeBatch, ancestor_mask


@st.composite
def parents(draw: st.DrawFn) -> tuple[int, ...]:
    return (-1, *(draw(st.integers(0, node - 1)) for node in range(1, draw(st.integers(1, 12)))))


@st.composite
def token_trees(draw: st.DrawFn) -> TokenTree:
    shape = draw(parents())
    return TokenTree(tuple(draw(st.integers(0, 5)) for _ in shape), shape)


@given(token_trees())
def test_paths_depths_and_children_agree(tree: TokenTree) -> None:
    children = tree.children()
    assert sorted(child for siblings in children for child in siblings) == list(range(1, tree.num_nodes))
    for node in range(tree.num_nodes):
        path = tree.path(node)
        assert len(path) == tree.depths[node]
        assert all(tree.parents[below] == above for above, below in zip((0, *path), path, strict=False))
        assert path[-1:] == ((node,) if node else ())
        assert children[node] == sorted(children[node])
        assert all(tree.parents[child] == node for child in children[node])


@given(parents())
def test_ancestor_mask_follows_paths(shape: tuple[int, ...]) -> None:
    tree = TokenTree((0,) * len(shape), shape)
    mask = ancestor_mask(shape)
    assert mask.dtype == torch.bool
    for node in range(tree.num_nodes):
        assert set(mask[node].nonzero().ravel().tolist()) == {0, *tree.path(node)}


@given(st.lists(parents(), min_size=1, max_size=4))
def test_ancestor_mask_of_several_roots_keeps_them_apart(shapes: list[tuple[int, ...]]) -> None:
    flat: list[int] = []
    for shape in shapes:
        flat += [parent + len(flat) if parent >= 0 else -1 for parent in shape]
    blocks = torch.block_diag(*(ancestor_mask(shape).long() for shape in shapes)).bool()
    assert torch.equal(ancestor_mask(flat), blocks)


def test_ancestor_mask_of_nothing() -> None:
    assert ancestor_mask([]).shape == (0, 0)


@given(st.lists(st.lists(st.integers(0, 2), max_size=4), max_size=6), st.integers(1, 12))
def test_from_paths_merges_prefixes(paths: list[list[int]], max_nodes: int) -> None:
    tree = TokenTree.from_paths(9, paths, max_nodes)
    assert tree.tokens[0] == 9
    assert tree.num_nodes <= max_nodes
    held = [tuple(tree.tokens[n] for n in tree.path(node)) for node in range(tree.num_nodes)]
    assert len(set(held)) == len(held)
    prefixes = {tuple(path[:length]) for path in paths for length in range(len(path) + 1)} | {()}
    assert set(held) <= prefixes
    if len(prefixes) <= max_nodes:
        assert set(held) == prefixes


def test_chain_and_root() -> None:
    assert TokenTree.chain(4, [5, 6]).parents == (-1, 0, 1)
    assert TokenTree.chain(4, [5, 6]).tokens == (4, 5, 6)
    assert TokenTree.root_only(4).tokens == (4,)
    assert TokenTree.root_only(4).depths == (0,)


def test_siblings_may_be_equal() -> None:
    assert TokenTree((0, 1, 1), (-1, 0, 0)).children() == [[1, 2], [], []]


@pytest.mark.parametrize(
    ("tokens", "shape"),
    [
        ((), ()),
        ((1, 2), (-1,)),
        ((1,), (0,)),
        ((1, 2), (-1, -1)),
        ((1, 2), (-1, 1)),
        ((1, 2, 3), (-1, 2, 0)),
    ],
)
def test_what_is_no_tree_is_refused(tokens: tuple[int, ...], shape: tuple[int, ...]) -> None:
    with pytest.raises(TokenTreeError, match="token tree"):
        TokenTree(tokens, shape)


@given(st.lists(token_trees(), max_size=4))
def test_batch_rows_are_the_trees_in_order(trees: list[TokenTree]) -> None:
    batch = TokenTreeBatch.from_trees(trees)
    flat = [token for tree in trees for token in tree.tokens]
    assert batch.num_nodes == len(flat)
    for index, tree in enumerate(trees):
        assert tuple(flat[batch.rows(index)]) == tree.tokens


# Confidences, parts of trees, merging


def test_a_part_of_a_tree_keeps_tokens_distributions_and_confidences() -> None:
    rows = torch.arange(20.0).reshape(5, 4)
    tree = TokenTree(
        (9, 1, 2, 3, 1), (-1, 0, 0, 1, 2), DraftDistribution(rows, "without_replacement"), (1.0, 0.5, 0.3, 0.2, 0.1)
    )
    part = tree.restricted_to([0, 2, 4])
    assert (part.tokens, part.parents, part.confidences) == ((9, 2, 1), (-1, 0, 1), (1.0, 0.3, 0.1))
    assert part.draft is not None
    assert torch.equal(part.draft.log_probs, rows[[0, 2, 4]])
    assert tree.path_confidences == pytest.approx((1.0, 0.5, 0.3, 0.1, 0.03))
    with pytest.raises(TokenTreeError, match="parent"):
        tree.restricted_to([0, 3])


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 2), st.floats(0.05, 1.0)), min_size=1, max_size=4), min_size=1, max_size=5
    ),
    st.integers(0, 6),
)
def test_merging_keeps_the_best_tree_of_its_size(pairs: list[list[tuple[int, float]]], max_nodes: int) -> None:
    weighted = [WeightedPath([t for t, _ in path], [c for _, c in path]) for path in pairs]
    tree = merge_paths(7, weighted, max_nodes, max_depth=4)
    whole = merge_paths(7, weighted, 1000, max_depth=4)
    assert tree.num_nodes == min(max_nodes + 1, whole.num_nodes)
    products = whole.path_confidences
    assert products is not None
    assert tree.path_confidences is not None
    best = max(
        sum(products[node] for node in chosen)
        for chosen in combinations(range(1, whole.num_nodes), tree.num_nodes - 1)
        if all(whole.parents[node] in (0, *chosen) for node in chosen)
    )
    assert sum(tree.path_confidences[1:]) == pytest.approx(best)
    likely = merge_paths(7, weighted, 1000, max_depth=4, min_path_prob=0.3)
    assert all(p >= 0.3 for p in likely.path_confidences or ())
    assert max(merge_paths(7, weighted, 1000, max_depth=2).depths) <= 2
