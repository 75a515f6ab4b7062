"""Shapes planned while decoding: by what was accepted, by what forwards cost, and never by anything else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from outrider import LLM
from outrider.config import DraftModelConfig, drafter_config
from outrider.drafting.draft_model import DraftModelDrafter
from outrider.drafting.drafter import DraftOutcome
from outrider.drafting.dynamic_tree import candidate_tree
from outrider.drafting.forward_cost import ForwardCost
from outrider.drafting.growth.shape_planner import PRIOR, ShapePlanner
from outrider.drafting.growth.tree import GrowthLimits
from outrider.drafting.positional_acceptance import AcceptanceCounter
from outrider.drafting.sequoia import LatencyTable, sequoia_shape
from outrider.drafting.tree_shape import TreeShape, expected_length
from outrider.engine import build, draft_models
from outrider.errors import ConfigError
from outrider.sampling.params import SamplingParams
from outrider.token_tree import TokenTree, VerifiedPath
from tests.losslessness.engine_harness import CATALOGUE, make_engine, make_request, run
from tests.tiny_models import make_tiny
from tests.toy_model import ToyModel

LIMITS = GrowthLimits(num_nodes=8, depth=4, min_path_prob=0.0)
FREE = ForwardCost((1, 512), (0,), [(1.0, 1.0001)])
STEEP = ForwardCost((1, 4, 5, 512), (0,), [(1.0, 1.0, 2.0, 400.0)])  # four rows for the price of one, then one each
TREE = TokenTree((9, 1, 2, 3, 4), (-1, 0, 0, 1, 2))  # 9 -> 1 2, 1 -> 3, 2 -> 4


def outcome(path: Sequence[int], tree: TokenTree = TREE, next_token: int = 0) -> DraftOutcome:
    return DraftOutcome("r", tree, VerifiedPath(tuple(path), next_token), None)


# Counting


def test_estimates_begin_with_the_prior_and_end_with_what_was_counted() -> None:
    counter = AcceptanceCounter(2, 2)
    assert counter.estimates((0.6, 0.2), 8) == [[0.6, 0.2]] * 2
    for _ in range(6):
        counter.count([outcome((2, 4))])
    by_rank = [(6 + 8 * 0.6) / (12 + 8), (6 + 8 * 0.2) / (6 + 8)]
    first = [8 * by_rank[0] / 14, (6 + 8 * by_rank[1]) / 14]
    second = [(6 + 8 * by_rank[0]) / 14, by_rank[1]]
    assert counter.by_depth_and_rank() == [[0.0, 1.0], [1.0, 0.0]]
    expected = [[first[0], min(first)], [second[0], min(second)]]
    np.testing.assert_allclose(counter.estimates((0.6, 0.2), 8), expected)
    for _ in range(10_000):
        counter.count([outcome((1, 3)), outcome((1,))])
    np.testing.assert_allclose(counter.estimates((0.6, 0.2), 8), [[1.0, 0.0], [0.5, 0.0]], atol=0.005)


def test_what_comes_after_an_open_path_is_not_counted() -> None:
    counter = AcceptanceCounter(2, 2)
    counter.count_path(TREE, (1,), is_open=True)
    assert counter.by_depth_and_rank() == [[1.0, 0.0], [0.0, 0.0]]
    counter.count_path(TREE, (1, 3))
    counter.count_path(TREE, (1,))
    assert counter.by_depth_and_rank() == [[1.0, 0.0], [0.5, 0.0]]


def counted(outcomes: Sequence[DraftOutcome]) -> list[list[float]]:
    planner = ShapePlanner(LIMITS, None, 0.0)
    for one in outcomes:
        planner.count(TREE, one)
    assert planner._counter is not None
    return planner._counter.by_depth_and_rank()


def test_a_pruned_tree_counts_for_all_that_was_proposed() -> None:
    """What was cut is judged too, as far as the target's tokens go."""
    pruned = TREE.restricted_to([0, 1])
    assert counted([outcome((), pruned, 2)])[0][:2] == [0.0, 1.0]
    assert counted([outcome((), pruned, 2)])[1][:2] == [0.0, 0.0], "nothing is known behind the token after"
    assert counted([outcome((1,), pruned, 7)])[:2] == counted([outcome((1,))])[:2]
    foreign = TokenTree.chain(9, [2, 4, 4])
    assert counted([outcome((1, 2, 3), foreign, 1)])[:2] == counted([outcome((2, 4))])[:2]
    assert counted([outcome((), TokenTree.root_only(9), 5)])[:2] == counted([outcome(())])[:2]


# Planning


def test_shapes_follow_what_was_accepted() -> None:
    wide, deep = ShapePlanner(LIMITS, None, 0.0), ShapePlanner(LIMITS, None, 0.0)
    assert wide.shape(1) == sequoia_shape(8, 4, PRIOR)
    full = sequoia_shape(8, 4, (0.5, 0.3, 0.2)).fill(
        0, lambda t, d: [3 * t + i for i in (1, 2, 3)], max_nodes=8, max_depth=4
    )
    children = full.children()
    for _ in range(16):
        for planner, rank, length in ((wide, len(children[0]) - 1, 1), (deep, 0, 4)):
            path, node = [], 0
            while len(path) < length and len(children[node]) > rank:
                node = children[node][rank]
                path.append(node)
            for _ in range(4):
                planner.count(full, outcome(path, full))
            planner.end_step()
    assert max(deep.shape(1).depths) == 4
    assert wide.shape(1).depths.count(1) > deep.shape(1).depths.count(1)


def test_plans_are_made_ever_more_seldom() -> None:
    planner, made = ShapePlanner(LIMITS, None, 0.0, first_rebuild=2), []
    before = planner.shape(1)
    for step in range(1, 3000):
        planner.end_step()
        after = planner.shape(1)
        if after is not before:
            made.append(step)
            before = after
    assert made == [2, 6, 14, 30, 62, 126, 254, 510, 1022, 1534, 2046, 2558]


def test_machines_and_batches_get_shapes_of_their_own() -> None:
    def size(cost: ForwardCost | None, num_step_rows: int, draft_cost: float = 0.0) -> TreeShape:
        planner = ShapePlanner(LIMITS, None, draft_cost)
        planner.cost = cost
        return planner.shape(num_step_rows)

    assert len(size(None, 1).parents) == len(size(FREE, 1).parents) == 8
    assert len(size(STEEP, 1).parents) == 3, "as many as fit beside the root"
    assert len(size(STEEP, 2).parents) == 1, "four rows of two requests"
    assert len(size(STEEP, 64).parents) == 1, "never none: what is not drafted is not learnt about"
    assert max(size(FREE, 1, draft_cost=0.5).depths) < max(size(FREE, 1, draft_cost=0.01).depths)
    assert size(FREE, 3) == size(FREE, 4), "rounded to powers of two"


def test_a_level_costs_what_a_forward_of_the_draft_was_measured_to_take() -> None:
    """Over a row of each request; the same as a number of the target's forwards that comes to it."""
    for num_step_rows in (1, 8):
        for one, eight in ((0.001, 0.001), (0.3, 0.3), (0.001, 0.6)):
            measured, given = (
                ShapePlanner(LIMITS, None, None),
                ShapePlanner(LIMITS, None, {1: one, 8: eight}[num_step_rows]),
            )
            measured.cost = given.cost = FREE  # a second a forward
            measured.own_cost = ForwardCost((1, 8), (0,), [(one, eight)])
            assert measured.shape(num_step_rows) == given.shape(num_step_rows)


def test_each_state_has_the_best_tree_of_its_depth() -> None:
    acceptance = [[0.6, 0.2], [0.5, 0.2], [0.4, 0.1]]
    for table in (None, LatencyTable((1, 4, 5, 9), (1.0, 1.0, 3.0, 3.5))):
        trees = [candidate_tree(state, acceptance, table, max_nodes=8) for state in range(4)]
        assert [max(tree.shape.depths, default=0) for tree in trees] == (
            [0, 1, 2, 3] if table is None else [0, 1, 2, 2]
        )
        for state, tree in enumerate(trees):
            assert not any(tree.prompt_tokens)
            assert tree.num_rows == 1 + len(tree.shape.parents)
            assert tree.num_rows <= (9 if table is None else 4)
            length = expected_length(tree.shape, acceptance)
            assert length == pytest.approx(
                expected_length(sequoia_shape(tree.num_rows - 1, state or 1, acceptance), acceptance)
            )
    planner = ShapePlanner(LIMITS, acceptance, 0.0)
    for depth in range(1, 4):
        assert planner.shape_of_depth(depth, 1) == candidate_tree(depth, acceptance, None, max_nodes=8).shape
    crowded = ShapePlanner(LIMITS, acceptance, 0.0)
    crowded.cost = STEEP
    assert [crowded.shape_of_depth(depth, 64).paths for depth in range(1, 4)] == [[(0,)]] * 3, "never none"


# In the engine


def measured(**changes: object) -> DraftModelConfig:
    settings = {"growth": "static", "rank_probs": "measured", "min_path_prob": 0.0, **changes}
    return DraftModelConfig(**settings)  # type: ignore[arg-type]


def steps_and_shapes(config: DraftModelConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[TreeShape]]:
    """Steps for some text by a draft that is often right, and the shapes on the way."""
    monkeypatch.setitem(CATALOGUE, "asked", config)
    engine = make_engine("asked", model=ToyModel(memory=0.45))
    drafter = engine.drafter
    assert isinstance(drafter, DraftModelDrafter)
    shapes: list[TreeShape] = []
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    requests = [make_request(f"r{i}", [3 + i, 1, 4], params) for i in range(3)]
    planner = drafter._planner
    run(engine, requests, each_step=lambda: shapes.append(planner.shape(1)) if planner else None)
    return engine.stats.num_steps, shapes


def test_a_measured_shape_beats_one_for_another_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft's first choice is usual, its second and third are not; a shape for the contrary is corrected."""
    wrong = DraftModelConfig(growth="static", rank_probs=(0.2, 0.19, 0.18, 0.17), max_nodes=10, min_path_prob=0.0)
    steps, shapes = steps_and_shapes(measured(max_nodes=10), monkeypatch)
    assert steps < 0.9 * steps_and_shapes(wrong, monkeypatch)[0]
    assert len(set(map(id, shapes))) > 1
    assert steps_and_shapes(measured(max_nodes=10), monkeypatch) == (steps, shapes), "outcomes alone decide"


@pytest.mark.parametrize("config", [measured(), DraftModelConfig(growth="ppd")])
def test_the_targets_cost_reaches_the_planner(config: DraftModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOGUE, "asked", config)
    drafter = make_engine("asked").drafter
    assert isinstance(drafter, DraftModelDrafter)
    assert drafter._planner is not None
    assert drafter._planner.cost is not None
    chain = make_engine("asked", rule="rejection").drafter
    assert isinstance(chain, DraftModelDrafter)
    assert chain._planner is None, "a rule for chains gets a chain"


@pytest.mark.parametrize(
    ("settings", "num_measured"),
    [({"draft_cost": "measured"}, 1), ({"draft_cost": 0.2}, 0), ({"growth": "ppd"}, 0), ({"growth": "beam"}, 0)],
    ids=str,
)
def test_the_draft_is_timed_where_shapes_are_planned_by_it(
    settings: dict[str, object], num_measured: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is told from the target, whose checkpoint it is in another format."""
    target = LLM(make_tiny("llama", tmp_path / "target"), decoding="none")
    identities: list[dict[str, object]] = []
    monkeypatch.setattr(build, "forward_cost_of", lambda model, identity, **_: identities.append(identity) or FREE)
    timed: list[dict[str, object]] = []
    monkeypatch.setattr(draft_models, "forward_cost_of", lambda model, identity, **_: timed.append(identity) or FREE)
    spec = {"method": "self_draft", "growth": "static", "rank_probs": "measured", "weights": "int8", **settings}
    if spec["growth"] != "static":
        del spec["rank_probs"]
    drafter = target.with_decoding(spec).engine.drafter
    assert isinstance(drafter, DraftModelDrafter)
    assert len(timed) == num_measured
    assert not any(identity in identities for identity in timed)
    if num_measured:
        assert drafter._planner is not None
        assert drafter._planner.own_cost is FREE


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank_probs": "guessed"}, "or 'measured'"),
        (
            {"growth": "static", "rank_probs": "measured", "max_nodes": 129},
            "max_nodes: got 129, expected at most 128",
        ),
        ({"growth": "static", "rank_probs": "measured", "depth": 33}, "depth: got 33, expected at most 32"),
        ({"draft_cost": -1}, "draft_cost"),
        ({"draft_cost": "0.1"}, "or 'measured'"),
        ({"growth": "static", "rank_probs": "measured", "rank_paths": [[0]]}, "leave one of them out"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        drafter_config({"method": "draft_model", **values})
