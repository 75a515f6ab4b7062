"""Drafts are right, not only harmless: each drafter against a naive reading of its method."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import pytest
import torch

from outrider.config import DraftModelConfig, RecyclingConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, DraftStyle
from outrider.drafting.growth.tree import GREEDY_SHARPNESS
from outrider.drafting.recycling import RecyclingDrafter
from outrider.drafting.tree_shape import best_first_shape
from outrider.sampling.params import SamplingParams
from outrider.token_tree import TokenTree, VerifiedPath
from tests.losslessness.engine_harness import CATALOGUE, make_engine, make_request, run
from tests.toy_model import ToyModel

GREEDY = SamplingParams(temperature=0.0)


def context(tokens: list[int], *, max_nodes: int = 64, max_depth: int = 64, request_id: str = "r") -> DraftContext:
    return DraftContext(request_id, tokens, len(tokens), max_nodes, max_depth, GREEDY, 0, frozenset())


def paths(tree: TokenTree) -> set[tuple[int, ...]]:
    """Token paths from below the root to each leaf."""
    leaves = set(range(tree.num_nodes)) - set(tree.parents)
    return {tuple(tree.tokens[node] for node in tree.path(leaf)) for leaf in leaves if leaf}


# Tree shapes and Token Recycling as in the paper; over longer contexts: test_recycling.py


def test_best_first_shape_is_optimal() -> None:
    """Against every subtree of the full tree of three ranks and depth three."""
    rank_probs = (0.6, 0.25, 0.1)

    def value(chosen) -> float:
        total = 0.0
        for path in chosen:
            probability = 1.0
            for rank in path:
                probability *= rank_probs[rank]
            total += probability
        return total

    nodes = [path for depth in (1, 2, 3) for path in product(range(3), repeat=depth)]
    top = sorted(nodes, key=lambda path: -value([path]))[:14]  # a better node never stands below a worse one
    for size in range(1, 7):
        best = max(
            value(chosen)
            for chosen in combinations(top, size)
            if all(path[:-1] in chosen or len(path) == 1 for path in chosen)
        )
        shape = best_first_shape(size, 3, rank_probs)
        made: list[tuple[int, ...]] = [()]
        for parent, rank in zip(shape.parents, shape.ranks, strict=True):
            made.append((*made[parent], rank))
        assert value(made[1:]) == pytest.approx(best)
        assert list(shape.depths) == [len(path) for path in made[1:]]
        assert sorted(shape.depths) == list(shape.depths)


def test_recycling_proposes_the_candidates_seen_last() -> None:
    config = RecyclingConfig(num_candidates=2, depth=2, max_nodes=6, shape="best_first")
    drafter = RecyclingDrafter(config, DraftStyle(), vocab_size=6)
    assert drafter.propose([context([3])])[0].num_nodes == 1, "nothing was seen yet"
    logits = torch.zeros(2, 6)
    logits[0, 4], logits[0, 1] = 5.0, 4.0  # after token 3: first 4, then 1
    logits[1, 2], logits[1, 5] = 5.0, 4.0  # after token 4: first 2, then 5
    seen = DraftOutcome("a", TokenTree.chain(3, [4]), VerifiedPath((1,), 2), logits)
    drafter.observe([seen])
    assert paths(drafter.propose([context([0, 3], request_id="b")])[0]) == {(4, 2), (4, 5), (1,)}
    drafter.release("a")
    assert drafter.propose([context([4])])[0].num_nodes > 1, "the matrix outlives the request"
    assert drafter.propose([context([3], max_depth=1)])[0].num_nodes == 3
    assert drafter.propose([context([3], max_nodes=1)])[0].num_nodes == 2


def test_recycling_trees_are_the_optimal_ones_and_say_how_likely_their_nodes_are() -> None:
    for shape, depth in (("best_first", 3), ("sequoia", 5)):
        config = RecyclingConfig(num_candidates=3, depth=6, max_nodes=6, shape=shape)  # type: ignore[arg-type]
        drafter = RecyclingDrafter(config, DraftStyle(), vocab_size=4)
        logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]] * 4)  # after every token: 1, then 2, then 3
        for token in range(4):
            drafter.observe([DraftOutcome("a", TokenTree.root_only(token), VerifiedPath((), 1), logits[:1])])
        (tree,) = drafter.propose([context([3])])
        assert tree.num_nodes == 7
        assert max(tree.depths) == depth, "what is accepted more often the deeper it stands makes trees deep"
        assert tree.confidences is not None
        for node, children in enumerate(tree.children()):
            of_children = [tree.confidences[child] for child in children]
            assert of_children == sorted(of_children, reverse=True)
            assert all(0 < confidence < 1 for confidence in of_children), node
    likely = context([3])
    (cut,) = drafter.propose([replace(likely, min_path_prob=0.2)])
    assert all(p >= 0.2 for p in cut.path_confidences or ())
    assert 1 < cut.num_nodes < 7


# Draft model


def greedy_continuation(model: ToyModel, tokens: list[int], length: int) -> tuple[int, ...]:
    made: list[int] = []
    for _ in range(length):
        made.append(int(model._logits((*tokens, *made)).argmax()))
    return tuple(made)


def test_a_greedy_chain_is_the_drafts_own_continuation() -> None:
    engine = make_engine("draft_model-chain")
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    (tree,) = engine.drafter.propose([context(tokens)])
    assert paths(tree) == {greedy_continuation(ToyModel(memory=0.3), tokens, 4)}


def test_unlikely_paths_are_not_drafted_further() -> None:
    """A path goes on as long as the draft finds it at least as probable as asked; its first token is free."""
    tokens, model = [3, 1, 4, 1, 5, 9, 2, 6], ToyModel(memory=0.3)
    (tree,) = make_engine("draft_model").drafter.propose([context(tokens)])
    config = DraftModelConfig()
    expected, probability = [], 1.0
    while len(expected) < config.depth and (not expected or probability >= config.min_path_prob):
        p = torch.from_numpy(GREEDY_SHARPNESS * model._logits((*tokens, *expected))).softmax(-1)
        expected.append(int(p.argmax()))
        probability *= float(p.max())
    assert paths(tree) == {tuple(expected)}


def test_a_greedy_tree_holds_the_most_probable_children() -> None:
    engine = make_engine("draft_model-tree")
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    (tree,) = engine.drafter.propose([context(tokens)])
    model = ToyModel(memory=0.3)
    config = CATALOGUE["draft_model-tree"]
    assert isinstance(config, DraftModelConfig)
    for node, children in enumerate(tree.children()):
        if children and len(children) == config.width:
            path = [tree.tokens[above] for above in tree.path(node)]
            best = torch.from_numpy(model._logits((*tokens, *path))).topk(config.width).indices.tolist()
            assert [tree.tokens[child] for child in children] == best
    assert max(tree.depths) == config.depth
    assert tree.num_nodes <= config.max_nodes + 1


def test_a_draft_equal_to_the_target_is_always_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """With shared noise a perfect draft is accepted to the last token, greedy and sampled."""
    for params in (GREEDY, SamplingParams(temperature=1.0, seed=4, top_k=6, frequency_penalty=0.4)):
        engine = make_engine("draft_model-chain", model=ToyModel(memory=0.3, eos_token_ids=()))
        request = make_request("r", [1, 2, 3], params, ToyModel(eos_token_ids=()))
        run(engine, [request])
        metrics = request.metrics
        assert metrics.num_draft_tokens > 50
        assert metrics.num_accepted_tokens == metrics.num_draft_tokens


def test_requests_that_do_not_fit_into_the_drafts_cache_decode_without_drafts() -> None:
    engine = make_engine("draft_model-tree", draft_blocks=9)
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    requests = [make_request(f"r{i}", [1 + i, 2, 3], params) for i in range(4)]
    run(engine, requests)
    alone = [make_request(f"r{i}", [1 + i, 2, 3], params) for i in range(4)]
    for request in alone:
        run(make_engine("none"), [request])
    assert [r.output_token_ids for r in requests] == [r.output_token_ids for r in alone]
    assert engine.stats.num_drafts > 0
