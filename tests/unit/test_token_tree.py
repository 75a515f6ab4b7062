from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.errors import TokenTreeError
from outrider.token_tree import TokenTree, TokenTreeBatch, ancestor_mask


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
