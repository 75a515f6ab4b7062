"""The draft model's trees are right: each growth against a naive reading of its method, and the cache behind them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest

from outrider.config import DraftModelConfig, SchedulerConfig
from outrider.drafting.draft_model import DraftModelDrafter
from outrider.drafting.drafter import DraftContext, DraftOutcome, DraftStyle
from outrider.drafting.growth import tree as growing_tree
from outrider.drafting.growth.best_first import MostProbable
from outrider.drafting.growth.build import build_growth
from outrider.drafting.growth.expected import best_nodes, expected_length
from outrider.drafting.growth.levels import CAPE_CANDIDATES
from outrider.drafting.growth.stochastic_beam import truncated
from outrider.drafting.growth.tree import GrowingTree, Row
from outrider.drafting.sequoia import sequoia_shape
from outrider.drafting.tree_shape import TreeShape, best_first_shape
from outrider.engine.engine import Engine
from outrider.errors import ConfigError
from outrider.sampling.noise import Purpose, gumbel_noise
from outrider.sampling.params import SamplingParams
from outrider.token_tree import TokenTree, VerifiedPath, ancestor_mask
from tests.losslessness.engine_harness import CATALOGUE, make_engine, make_request, run
from tests.toy_model import ToyModel

SHARED = DraftStyle()
INDEPENDENT = DraftStyle("independent", "without_replacement")
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=1.0)
VOCAB = 5
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
GROWTHS: dict[str, DraftModelConfig] = {
    "mcsd": DraftModelConfig(growth="mcsd", branching=(2, 2, 1), min_path_prob=0.0),
    "mcsd_improved": DraftModelConfig(growth="mcsd_improved", width=3),
    "rsd_c": DraftModelConfig(growth="rsd_c", branching=[2, 2], min_path_prob=0.0),
    "dyspec_threshold": DraftModelConfig(growth="dyspec_threshold", min_path_prob=0.05),
    "opt_tree": DraftModelConfig(growth="opt_tree", min_path_prob=0.0),
    "static": DraftModelConfig(growth="static", min_path_prob=0.0),
    "static-measured": DraftModelConfig(growth="static", rank_probs="measured", min_path_prob=0.0),
    "ppd": DraftModelConfig(growth="ppd", min_path_prob=0.01),
    "static-table": DraftModelConfig(
        growth="static", rank_paths=[[0], [1], [0, 0], [0, 1], [1, 0]], min_path_prob=0.0
    ),
}


def log_q(path: tuple[int, ...]) -> Row:
    logits = 2.0 * np.random.default_rng([7, len(path), *path]).standard_normal(VOCAB).astype(np.float32)
    return logits - np.log(np.exp(logits).sum())


def grown(
    config: DraftModelConfig, params: SamplingParams = GREEDY, style: DraftStyle = SHARED, seed: int = 0
) -> GrowingTree:
    growth = build_growth(config, style)
    context = DraftContext("r", [0, 0], 1, 1024, 64, params, seed, frozenset())
    tree = GrowingTree(context, growth.draws, growth.limits)
    tree.set_log_weights(0, log_q(()))
    num_read = 0
    for nodes in growth.grow(tree):
        num_read += len(nodes)
        for node in nodes:
            tree.set_log_weights(node, log_q(tuple(tree.path_tokens(node))))
    assert num_read <= growth.num_rows
    return tree


def paths_of(tree: GrowingTree) -> list[tuple[int, ...]]:
    """Token path to each draft node of the finished tree, in node order."""
    made = tree.finished()
    return [tuple(made.tokens[above] for above in made.path(node)) for node in range(1, made.num_nodes)]


@pytest.mark.parametrize("max_expanded", [1, 3, 8])
def test_rows_held_for_the_most_probable_nodes_are_few_and_enough(
    max_expanded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto`'s tree held 280 rows in the draft's cache for each request: what it reads is below 100."""
    config = DraftModelConfig(growth="specexec", depth=16, max_nodes=24, max_expanded=max_expanded, min_path_prob=0.0)
    assert build_growth(config, SHARED).num_rows == 24 + 16 * max_expanded
    sampled = SamplingParams(temperature=1.0)
    made = [paths_of(grown(config, sampled, seed=seed)) for seed in range(20)]
    monkeypatch.setattr(MostProbable, "num_rows", 10_000)
    assert made == [paths_of(grown(config, sampled, seed=seed)) for seed in range(20)]


def confidence_of(params: SamplingParams, seed: int = 0) -> Callable[[tuple[int, ...]], Row]:
    """``[vocab]`` how likely each token is the target's choice after a path, from the definition."""

    def confidences(path: tuple[int, ...]) -> Row:
        keys = log_q(path)
        if not params.greedy:
            keys = keys + gumbel_noise(seed, 2 + len(path), Purpose.TARGET, VOCAB)
        weights = np.exp((growing_tree.GREEDY_SHARPNESS if params.greedy else growing_tree.SAMPLED_SHARPNESS) * keys)
        return weights / weights.sum()

    return confidences


# What is optimal


def test_best_nodes_against_every_closed_set() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        parents = [-1, *(int(rng.integers(0, i)) for i in range(1, 8))]
        scores = [-float(rng.random())]
        for parent in parents[1:]:
            scores.append(scores[parent] - float(rng.random()))
        for size in range(1, 9):
            closed = (
                chosen
                for chosen in combinations(range(8), size)
                if all(parents[node] in (-1, *chosen) for node in chosen)
            )
            best = max(expected_length([scores[node] for node in chosen]) for chosen in closed)
            chosen = best_nodes(scores, size)
            assert expected_length([scores[node] for node in chosen]) == pytest.approx(best)
            assert all(parents[node] in (-1, *chosen) for node in chosen)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "config",
    [
        DraftModelConfig(growth="specexec", depth=4, max_nodes=14, max_expanded=1, min_path_prob=0.0),
        DraftModelConfig(growth="specexec", depth=4, max_nodes=14, max_expanded=5, min_path_prob=0.0),
        DraftModelConfig(growth="opt_tree", depth=4, max_nodes=14, min_gain=0.0, min_path_prob=0.0),
        DraftModelConfig(growth="dyspec", depth=4, max_nodes=14, max_expanded=3, min_path_prob=0.0),
    ],
    ids=["specexec-1", "specexec-5", "opt_tree", "dyspec"],
)
def test_best_first_trees_hold_the_most_probable_paths(config: DraftModelConfig, params: SamplingParams) -> None:
    """Against all 780 paths of up to four tokens."""
    confidences = confidence_of(params)
    probability: dict[tuple[int, ...], float] = {(): 1.0}
    for depth in range(1, 5):
        for path in product(range(VOCAB), repeat=depth):
            probability[path] = probability[path[:-1]] * float(confidences(path[:-1])[path[-1]])
    best = sorted(probability, key=lambda path: -probability[path])[1 : 1 + 14]
    tree = grown(config, params)
    assert set(paths_of(tree)) == set(best)
    guesses = tree.finished().path_confidences
    assert guesses is not None
    assert guesses[1:] == pytest.approx([probability[path] for path in paths_of(tree)], rel=1e-4)


def test_opt_tree_stops_when_a_layer_gains_too_little() -> None:
    lengths = []
    for min_gain in (0.0, 0.3, 3.0):
        tree = grown(DraftModelConfig(growth="opt_tree", depth=8, max_nodes=14, min_gain=min_gain, min_path_prob=0))
        lengths.append(max(tree.finished().depths))
    assert lengths[0] > lengths[1] >= lengths[2] >= 1
    assert lengths[2] == 1


def test_dyspec_threshold_holds_the_places_that_are_likely_enough() -> None:
    threshold = 0.05
    tree = grown(DraftModelConfig(growth="dyspec_threshold", depth=6, max_nodes=64, min_path_prob=threshold))
    confidences, expected, level = confidence_of(GREEDY), set(), [((), 1.0)]
    while level and len(level[0][0]) < 6:
        below = [((*path, x), p * float(confidences(path)[x])) for path, p in level for x in range(VOCAB)]
        level = [(path, p) for path, p in below if p >= threshold]
        expected |= {path for path, _ in level}
    assert set(paths_of(tree)) == expected


def test_sampled_dyspec_takes_the_likeliest_place_each_time() -> None:
    """Values of places from the paper: path probability times what the siblings before have left of q."""
    tree = grown(DraftModelConfig(growth="dyspec", depth=5, max_nodes=10, min_path_prob=0.0), SAMPLED, INDEPENDENT)
    for node in range(1, 11):
        value = {}
        for place in range(node):
            if tree.depths[place] < 5:
                q = np.exp(log_q(tuple(tree.path_tokens(place))))
                drawn = [tree.tokens[n] for n in range(1, node) if tree.parents[n] == place]
                path = [tree.tokens[n] for n in (*ancestors(tree, place), place) if n]
                reach = math.prod(float(np.exp(log_q(tuple(path[:i]))[path[i]])) for i in range(len(path)))
                value[place] = reach * (1.0 - float(q[drawn].sum()))
        assert value[tree.parents[node]] == pytest.approx(max(value.values()), rel=1e-4)


def ancestors(tree: GrowingTree, node: int) -> list[int]:
    found = []
    while tree.parents[node] > 0:
        node = tree.parents[node]
        found.append(node)
    return found[::-1]


def test_a_child_is_never_likelier_than_its_parent() -> None:
    """Certain tokens, whose confidence may round to more than one."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        tree = grown(DraftModelConfig(depth=1, min_path_prob=0.0))
        weights = rng.standard_normal(VOCAB).astype(np.float32) * 3
        weights[1] += 30
        tree.set_log_weights(1, weights)
        assert max(tree.candidate_scores(1, VOCAB)) <= tree.scores[1]


# Shapes of levels


def test_branching_draws_as_many_as_asked_at_every_depth() -> None:
    for name, params, style in (("mcsd", GREEDY, SHARED), ("rsd_c", SAMPLED, INDEPENDENT)):
        config = DraftModelConfig(growth=name, branching=(3, 2, 1), max_nodes=64, min_path_prob=0.0)  # type: ignore[arg-type]
        tree = grown(config, params, style).finished()
        assert [tree.depths.count(depth) for depth in range(5)] == [1, 3, 6, 6, 0]
        for children in tree.children():
            assert len({tree.tokens[child] for child in children}) == len(children)


def test_mcsd_with_replacement_keeps_every_copy() -> None:
    config = DraftModelConfig(growth="mcsd", branching=(8,), max_nodes=64, min_path_prob=0.0)
    tree = grown(config, SAMPLED, DraftStyle("independent", "with_replacement")).finished()
    assert tree.num_nodes == 9
    assert len(set(tree.tokens[1:])) < 8
    assert tree.draft is not None
    assert tree.draft.draws == "with_replacement"


def test_improved_mcsd_ends_each_chain_where_confidence_does() -> None:
    config = DraftModelConfig(growth="mcsd_improved", width=3, depth=8, max_nodes=64, min_path_prob=0.02)
    confidences = confidence_of(GREEDY)
    expected = set()
    for first in np.argsort(-confidences(()))[:3].tolist():
        path, reach = (first,), float(confidences(())[first])
        expected.add(path)
        while reach >= 0.02 and len(path) < 8:
            row = confidences(path)
            path, reach = (*path, int(row.argmax())), reach * float(row.max())
            expected.add(path)
    assert set(paths_of(grown(config))) == expected


def test_a_mask_sliced_to_a_shorter_draft_is_the_one_built_for_it() -> None:
    parents = [-1, 0, 0, 1, 2, 3, 4]
    for length in range(1, 8):
        assert ancestor_mask(parents)[:length, :length].equal(ancestor_mask(parents[:length]))


def test_cape_widens_a_chain_where_it_is_not_sure() -> None:
    config = DraftModelConfig(growth="cape", depth=4, max_nodes=64, min_path_prob=0.0)
    tree, confidences = grown(config), confidence_of(GREEDY)
    path, counts = (), []
    for _ in range(4):
        row = confidences(path)
        count = next(number for border, number in CAPE_CANDIDATES if row.max() <= border or number == 1)
        counts.append(min(1 + count, VOCAB))
        path = (*path, int(row.argmax()))
    assert len(set(counts)) > 1, "a case in which nothing varies"
    made = tree.finished()
    assert paths_of(tree)[3] == path, "the chain comes first"
    assert [made.depths.count(depth) for depth in range(1, 5)] == counts


@pytest.mark.parametrize("ranks", [(0.6, 0.3, 0.05), [(0.5, 0.4, 0.3), (0.9, 0.01, 0.0), (0.8, 0.1, 0.0)]])
def test_static_trees_are_the_best_for_their_acceptance(ranks) -> None:
    tree = grown(
        DraftModelConfig(growth="static", depth=4, max_nodes=9, rank_probs=ranks, min_path_prob=0.0)
    ).finished()
    shape = sequoia_shape(9, 4, ranks)
    assert max(shape.depths) == (4 if isinstance(ranks[0], float) else 3)
    assert tree.parents[1:] == shape.parents
    for node, (parent, rank) in enumerate(zip(shape.parents, shape.ranks, strict=True), 1):
        row = log_q(tuple(tree.tokens[above] for above in tree.path(parent)))
        assert tree.tokens[node] == np.argsort(-row)[rank]


@pytest.mark.parametrize(("params", "style"), [(GREEDY, SHARED), (SAMPLED, SHARED), (SAMPLED, INDEPENDENT)])
def test_ppd_widens_a_chain_with_one_guess_for_each_depth(params: SamplingParams, style: DraftStyle) -> None:
    """As many levels as the draft is confident for, in the shape that is best for so many."""
    ranks, states = (0.5, 0.35, 0.2), set()
    for seed in range(12):
        config = DraftModelConfig(growth="ppd", depth=4, max_nodes=14, rank_probs=ranks, min_path_prob=0.4)
        tree = grown(config, params, style, seed)
        made, path = tree.finished(), []
        while children := made.children()[path[-1] if path else 0]:
            path.append(children[0])
        state = len(path)
        states.add(state)
        assert all(tree.scores[node] >= math.log(0.4) for node in path[:-1])
        assert state == max(best_first_shape(14, 4, ranks).depths) or tree.scores[path[-1]] < math.log(0.4)
        places = [
            tuple(siblings_before(made, above) for above in made.path(node)) for node in range(1, made.num_nodes)
        ]
        assert set(places) == set(best_first_shape(14, state, ranks).paths)
        if style is SHARED:  # what stands at a rank is the same below every candidate of a depth
            at = {(made.depths[node], place[-1], made.tokens[node]) for node, place in enumerate(places, 1)}
            assert len(at) == len({(depth, rank) for depth, rank, _ in at})
        else:  # drawn from the chain's guess, with noise of its own
            assert made.draft is not None
            for node in range(1, made.num_nodes):
                if made.children()[node]:
                    words = [made.tokens[above] for above in path[: made.depths[node]]]
                    expected = log_q(tuple(words))
                    np.testing.assert_allclose(made.draft.log_probs[node].numpy(), expected, atol=1e-5)
    assert params.greedy or len(states) > 1, "a case in which nothing varies"


def siblings_before(tree: TokenTree, node: int) -> int:
    return sum(tree.parents[other] == tree.parents[node] for other in range(node))


def test_ppd_reads_once_a_level(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = drafter_of(DraftModelConfig(growth="ppd", depth=4, max_nodes=12, min_path_prob=0.0), monkeypatch)
    model = drafter._runner._model  # type: ignore[attr-defined]
    (tree,) = drafter.propose([context(PROMPT)])
    assert tree.num_nodes > 6
    assert model.num_rows == [len(PROMPT), *[1] * (max(tree.depths) - 1)]


# In the form in which Medusa and EAGLE publish theirs.
TABLE = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize(("params", "style"), [(GREEDY, SHARED), (SAMPLED, SHARED), (SAMPLED, INDEPENDENT)])
def test_a_published_table_is_drafted_as_it_stands(params: SamplingParams, style: DraftStyle) -> None:
    config = DraftModelConfig(growth="static", rank_paths=TABLE[::-1], min_path_prob=0.0)
    tree = grown(config, params, style).finished()
    shape = TreeShape.from_paths(TABLE)
    ranks = [rank for children in tree.children() for rank, _ in enumerate(children)]
    assert tree.parents[1:] == shape.parents
    assert sorted(ranks) == sorted(shape.ranks)
    if params.greedy:
        for node, (parent, rank) in enumerate(zip(shape.parents, shape.ranks, strict=True), 1):
            row = log_q(tuple(tree.tokens[above] for above in tree.path(parent)))
            assert tree.tokens[node] == np.argsort(-row)[rank]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank_paths": [[0], [1, 0]]}, r"its parent \[1\] too"),
        ({"rank_paths": [[0], [2]]}, r"its sibling before it \[1\] too"),
        ({"rank_paths": [[0], [0, 0], [0, 2]]}, r"its sibling before it \[0, 1\] too"),
        ({"rank_paths": [[0], [0]]}, "every node once"),
        ({"rank_paths": []}, "a list of paths"),
        ({"rank_paths": "0"}, "a list of paths"),
        ({"rank_paths": [[]]}, "at least one"),
        ({"rank_paths": [0]}, "at least one"),
        ({"rank_paths": [[-1]]}, "integer"),
        ({"rank_paths": [[True]]}, "integer"),
        ({"rank_paths": [[0.0]]}, "integer"),
        ({"rank_paths": TABLE, "max_nodes": 8}, "max_nodes: got 8, expected at least the 9 .* set max_nodes to 9"),
        ({"rank_paths": TABLE, "depth": 3}, "depth: got 3, expected at least the 4"),
        ({"rank_paths": TABLE, "rank_probs": (0.5,)}, "leave one of them out"),
        ({"rank_paths": TABLE, "growth": "beam"}, "growth 'static'"),
    ],
    ids=str,
)
def test_tables_that_cannot_be_drafted_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DraftModelConfig(**{"growth": "static", **values})  # type: ignore[arg-type]


def test_stochastic_beam_search_draws_paths_without_replacement() -> None:
    """The first two paths of length two: P(a, b) = p(a) p(b) / (1 - p(a))."""
    config = DraftModelConfig(growth="rsd_s", depth=2, width=2, max_nodes=4, min_path_prob=0.0)
    pairs = list(product(range(VOCAB), repeat=2))
    p = {pair: math.exp(float(log_q(())[pair[0]] + log_q(pair[:1])[pair[1]])) for pair in pairs}
    counts: dict[tuple[tuple[int, ...], ...], int] = {}
    num_seeds = 3000
    for seed in range(num_seeds):
        drawn = tuple(path for path in paths_of(grown(config, SAMPLED, INDEPENDENT, seed)) if len(path) == 2)
        counts[drawn] = counts.get(drawn, 0) + 1
    expected = {(a, b): num_seeds * p[a] * p[b] / (1 - p[a]) for a in pairs for b in pairs if a != b}
    large = {pair: number for pair, number in expected.items() if number >= 8}
    square = sum((counts.get(pair, 0) - number) ** 2 / number for pair, number in large.items())
    assert sum(large.values()) > 0.6 * num_seeds
    assert square < len(large) + 4.5 * math.sqrt(2 * len(large))


def test_truncated_gumbels_keep_their_order_and_get_the_maximum() -> None:
    values = np.array([2.0, 1.5, -3.0, -40.0])
    moved = truncated(values, -7.0)
    naive = -np.log(np.exp(7.0) - np.exp(-values[0]) + np.exp(-values))
    assert moved == pytest.approx(naive, rel=1e-6)
    assert moved[0] == -7.0
    assert np.all(np.diff(moved) < 0)


def test_draws_are_fresh_in_every_step_node_and_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, ...]] = []
    right = growing_tree.gumbel_noise

    def recorded(*arguments):
        seen.append(arguments)
        return right(*arguments)

    monkeypatch.setattr(growing_tree, "gumbel_noise", recorded)
    engine = make_engine("draft_model-rsd_s", rule="tree_rejection")
    run(engine, [make_request("r", PROMPT, SamplingParams(temperature=1.0, seed=3, max_tokens=40, ignore_eos=True))])
    assert len(seen) > 50
    assert len(set(seen)) == len(seen)


# The engine and the draft's cache


@pytest.mark.parametrize("name", GROWTHS)
def test_growths_do_not_change_what_is_generated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOGUE, name, GROWTHS[name])
    settings = [GREEDY, SAMPLED, SamplingParams(temperature=0.8, seed=5, top_p=0.9, repetition_penalty=1.2)]
    for rule in ("coupled", "tree_rejection", "rejection"):
        engines = [make_engine(drafter, rule=rule) for drafter in (name, "none")]
        outputs = []
        for engine in engines:
            requests = [make_request(f"r{i}", PROMPT[i:], params) for i, params in enumerate(settings)]
            run(engine, requests)
            outputs.append([request.output_token_ids for request in requests])
        assert outputs[0][0] == outputs[1][0]
        assert rule != "coupled" or outputs[0] == outputs[1]
        assert engines[0].stats.num_accepted_tokens > 0


def drafter_of(config: DraftModelConfig, monkeypatch: pytest.MonkeyPatch) -> DraftModelDrafter:
    monkeypatch.setitem(CATALOGUE, "asked", config)
    drafter = make_engine("asked").drafter
    assert isinstance(drafter, DraftModelDrafter)
    return drafter


def context(tokens: list[int]) -> DraftContext:
    return DraftContext("r", tokens, len(PROMPT), 64, 64, GREEDY, 0, frozenset())


def test_every_draft_token_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = drafter_of(DraftModelConfig(depth=6, max_nodes=6, min_path_prob=0.0), monkeypatch)
    model = drafter._runner._model
    assert isinstance(model, ToyModel)
    drafter.propose([context(PROMPT)])
    assert model.num_rows == [len(PROMPT), 1, 1, 1, 1, 1]


def test_accepted_tokens_stay_in_the_cache_though_the_tree_was_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DraftModelConfig(growth="specexec", depth=4, max_nodes=16, max_expanded=3, min_path_prob=0.0)
    drafter = drafter_of(config, monkeypatch)
    (tree,) = drafter.propose([context(PROMPT)])
    deepest = max(range(tree.num_nodes), key=lambda node: tree.depths[node])
    path = tree.path(deepest)
    assert len(path) >= 3
    part = tree.restricted_to([0, *path])
    accepted = tuple(range(1, len(path)))  # all but the deepest
    drafter.observe([DraftOutcome("r", part, VerifiedPath(accepted, 7), None)])
    tokens = [*PROMPT, *(part.tokens[node] for node in accepted), 7]
    model = drafter._runner._model
    assert isinstance(model, ToyModel)
    model.num_rows.clear()
    (after,) = drafter.propose([context(tokens)])
    assert model.num_rows[0] == 1, "only the new root is left to read"
    (fresh,) = drafter_of(config, monkeypatch).propose([context(tokens)])
    assert (after.tokens, after.parents, after.confidences) == (fresh.tokens, fresh.parents, fresh.confidences)
    drafter.check_integrity()


def test_the_tree_of_another_drafter_is_followed_as_far_as_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = drafter_of(DraftModelConfig(depth=4, max_nodes=4, min_path_prob=0.0), monkeypatch)
    (tree,) = drafter.propose([context(PROMPT)])
    other = tree.restricted_to([0, 1]).tokens[1]
    foreign = type(tree).chain(PROMPT[-1], [other, (tree.tokens[2] + 1) % 24])
    drafter.observe([DraftOutcome("r", foreign, VerifiedPath((1, 2), 5), None)])
    tokens = [*PROMPT, *foreign.tokens[1:], 5]
    (after,) = drafter.propose([context(tokens)])
    (fresh,) = drafter_of(DraftModelConfig(depth=4, max_nodes=4, min_path_prob=0.0), monkeypatch).propose(
        [context(tokens)]
    )
    assert after.tokens == fresh.tokens


def spec_exec_engine(num_nodes: int, monkeypatch: pytest.MonkeyPatch, **changes: int) -> Engine:
    config = DraftModelConfig(growth="specexec", max_nodes=num_nodes, depth=12, max_expanded=64, min_path_prob=0.0)
    monkeypatch.setitem(CATALOGUE, "asked", config)
    settings = {"num_blocks": 800, "draft_blocks": 1200, "max_batch_tokens": 1200, **changes}
    scheduler = SchedulerConfig(max_num_seqs=4, max_batch_tokens=settings.pop("max_batch_tokens"))
    return make_engine("asked", scheduler=scheduler, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("params", [replace(GREEDY, ignore_eos=True), replace(SAMPLED, seed=3, ignore_eos=True)])
def test_spec_exec_takes_fewer_target_calls_the_larger_its_budget(
    params: SamplingParams, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Up to a thousand nodes in one step, and the output is plain decoding's."""
    params = replace(params, max_tokens=60)
    plain = make_request("plain", PROMPT, params)
    run(make_engine("none"), [plain])
    num_steps = []
    for num_nodes in (4, 64, 1024):
        engine = spec_exec_engine(num_nodes, monkeypatch)
        request = make_request("r", PROMPT, params)
        run(engine, [request])
        assert request.output_token_ids == plain.output_token_ids
        model = engine.model
        assert isinstance(model, ToyModel)
        assert max(model.num_rows[1:]) == 1 + num_nodes
        num_steps.append(engine.stats.num_steps)
    assert num_steps[0] > 1.5 * num_steps[1]
    assert num_steps[1] > 1.2 * num_steps[2]
    assert not caplog.records


def test_a_budget_that_cannot_be_had_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    for changes, message in (
        ({"max_batch_tokens": 200}, "got 1024, expected at most 199, the rows of a step"),
        ({"draft_blocks": 300}, "reads up to 1280, expected fewer than its cache's 1200 positions"),
    ):
        caplog.clear()
        engine = spec_exec_engine(1024, monkeypatch, **changes)
        for number in range(2):
            run(engine, [make_request(f"r{number}", PROMPT, params)])
        record, *later = caplog.records
        assert all("draft model's KV cache" in said.message for said in later), "what was foreseen has come"
        assert message in record.getMessage()
        model = engine.model
        assert isinstance(model, ToyModel)
        assert max(model.num_rows) == (200 if "max_batch_tokens" in changes else len(PROMPT))


@pytest.mark.parametrize(
    "values",
    [
        {"growth": "best"},
        {"branching": ()},
        {"branching": (0,)},
        {"branching": "3"},
        {"rank_probs": (0.1, 0.5)},
        {"rank_probs": (1.5,)},
        {"rank_probs": ((0.5, 0.1), 0.5)},
        {"rank_probs": ((0.5, 0.1), (0.1, 0.5))},
        {"rank_probs": ((0.5, 0.1), ())},
        {"min_gain": -1.0},
        {"growth": "dyspec_threshold", "min_path_prob": 0.0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        DraftModelConfig(**values)  # type: ignore[arg-type]
