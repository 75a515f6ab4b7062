"""The planner: the best nodes by brute force, prices that follow the machine, never slower on a simulated clock."""

from __future__ import annotations

import gc
import json
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.cache.kv_cache import KVCache
from outrider.config import AutoConfig, drafter_config
from outrider.drafting.acceptance import CENTRES, AcceptanceEstimator
from outrider.drafting.auto import AutoDrafter
from outrider.drafting.drafter import DraftContext, DraftOutcome, FinishedText
from outrider.drafting.forward_cost import ForwardCost
from outrider.drafting.planner import choose_nodes
from outrider.engine.cache_files import MAX_FILES, keep, recall
from outrider.engine.calibration import forward_cost_of, measure
from outrider.engine.planner_memory import remember
from outrider.errors import ConfigError
from outrider.models.batch import ForwardBatch
from outrider.sampling.params import SamplingParams
from outrider.token_tree import DraftDistribution, TokenTree
from outrider.verification.coupled import follow_choices
from tests.toy_model import ToyModel

# Which nodes


@st.composite
def weighed_trees(draw: st.DrawFn) -> list[tuple[tuple[int, ...], list[float]]]:
    """A batch of small trees: parents, and probabilities that fall along paths."""
    batch = []
    for _ in range(draw(st.integers(1, 3))):
        parents, probs = [-1], [1.0]
        for node in range(1, draw(st.integers(1, 4))):
            parents.append(draw(st.integers(0, node - 1)))
            probs.append(probs[parents[-1]] * draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0])))
        batch.append((tuple(parents), probs))
    return batch


@given(
    weighed_trees(), st.lists(st.sampled_from([0.0, 0.1, 0.5, 3.0]), min_size=12, max_size=12), st.floats(0.1, 3.0)
)
def test_the_chosen_nodes_are_the_best_of_all_subtrees(batch, steps: list[float], tokens_per_s: float) -> None:
    """Whatever the cost of rows looks like: flat stretches and cliffs included."""
    num_rows = len(batch)

    def seconds(rows: int) -> float:
        return 1.0 + sum(steps[: rows - num_rows])

    def worth(chosen: Sequence[Sequence[int]]) -> float:
        gain = sum(probs[node] for (_, probs), nodes in zip(batch, chosen, strict=True) for node in nodes if node)
        rows = num_rows + sum(len(nodes) - 1 for nodes in chosen)
        return gain - tokens_per_s * (seconds(rows) - seconds(num_rows))

    kept = choose_nodes(
        [probs for _, probs in batch],
        lambda most: np.array([seconds(num_rows + size) for size in range(most + 1)]),
        tokens_per_s,
    )
    for (parents, _), nodes in zip(batch, kept, strict=True):
        assert nodes[0] == 0
        assert all(parents[node] in nodes for node in nodes[1:]), "a node without its parent"
    per_tree = []
    for parents, _ in batch:
        subsets = (
            [0, *(n for n, bit in enumerate(bits, 1) if bit)] for bits in product([0, 1], repeat=len(parents) - 1)
        )
        per_tree.append([nodes for nodes in subsets if all(parents[node] in nodes for node in nodes[1:])])
    assert worth(kept) == pytest.approx(max(worth(chosen) for chosen in product(*per_tree)))


# What a forward costs


def test_costs_are_interpolated_and_never_fall_with_more_rows() -> None:
    cost = ForwardCost([1, 8, 16], [0, 100], [[1.0, 0.9, 3.0], [2.0, 3.0, 4.0]])
    assert cost.seconds(1, 0) == cost.seconds(8, 0) == 1.0, "less for more rows is noise"
    assert cost.seconds(12, 0) == pytest.approx(2.0)
    assert cost.seconds(24, 0) == pytest.approx(5.0), "beyond the table it goes on as it ended"
    assert cost.seconds(1, 50) == pytest.approx(1.5)
    assert cost.seconds(1, 200) == pytest.approx(3.0)
    batch = cost.seconds(8, 50, 8)
    assert batch == pytest.approx(1.0 + 8 * 0.5), "eight contexts are read, the weights once"
    cost.observe(12, 50, 1, 5.0)
    for context, num_sequences in ((0, 1), (70, 1), (300, 3)):
        one_by_one = [cost.seconds(rows, context, num_sequences) for rows in range(3, 40)]
        assert cost.with_more_rows(3, 36, context, num_sequences) == pytest.approx(one_by_one)
    cost = ForwardCost([1, 8, 16], [0, 100], [[1.0, 0.9, 3.0], [2.0, 3.0, 4.0]])
    again = ForwardCost.from_mapping(cost.as_mapping())
    assert again.seconds(12, 30) == cost.seconds(12, 30)


@pytest.mark.parametrize(
    "values",
    [
        {"rows": [1, 2], "contexts": [0], "seconds": [[1.0]]},
        {"rows": [2, 4], "contexts": [0], "seconds": [[1.0, 2.0]]},
        {"rows": [1, 1], "contexts": [0], "seconds": [[1.0, 2.0]]},
        {"rows": [1, 2], "contexts": [0], "seconds": [[1.0, float("nan")]]},
        {"rows": [1, 2], "contexts": [0], "seconds": [[0.0, 1.0]]},
        {"rows": [1, 2]},
        {"rows": 3, "contexts": [0], "seconds": [[1.0]]},
    ],
)
def test_a_table_that_cannot_be_is_refused(values: dict) -> None:
    with pytest.raises(ConfigError):
        ForwardCost.from_mapping(values)


def test_costs_follow_a_machine_that_changes_its_speed() -> None:
    cost = ForwardCost([1, 8], [0], [[1.0, 1.2]])
    for _ in range(40):
        cost.observe(1, 0, 1, 2.0)
    assert cost.seconds(1, 0) == pytest.approx(2.0, rel=0.05)
    assert cost.seconds(8, 0) / cost.seconds(1, 0) < 1.25, "plain steps alone do not tell what rows cost"
    for _ in range(300):
        cost.observe(1, 0, 1, 2.0)
        cost.observe(8, 0, 1, 6.0)
    assert cost.seconds(8, 0) / cost.seconds(1, 0) == pytest.approx(3.0, rel=0.1)
    before = cost.seconds(1, 0)
    cost.observe(1, 0, 1, 1000.0)
    assert cost.seconds(1, 0) < 1.3 * before, "one disturbed step"


def test_unknown_costs_take_their_scale_from_the_first_step() -> None:
    cost = ForwardCost.unknown()
    cost.observe(1, 0, 1, 0.02)
    assert cost.seconds(1, 0) == pytest.approx(0.02)


# What confidences are worth


def test_confidences_are_corrected_by_what_happens() -> None:
    estimator = AcceptanceEstimator()
    tree = TokenTree((0, 1, 2), (-1, 0, 0), confidences=(1.0, 0.8, 0.8))
    assert estimator.path_probs("d", "a", tree)[1:] == pytest.approx([0.81] * 2)
    for _ in range(100):
        estimator.observe("d", "a", tree, [3])
    assert estimator.path_probs("d", "a", tree)[1] < 0.03, "never right, whatever it says"
    assert estimator.path_probs("d", "b", tree)[1] < 0.1, "and other requests hear of it"
    assert estimator.path_probs("other", "a", tree)[1] == pytest.approx(0.81), "but not other drafters"
    for _ in range(60):
        estimator.observe("d", "b", tree, [1])
    assert estimator.path_probs("d", "b", tree)[1] > 0.4, "a request's own record counts more"
    estimator.release("b")


def test_only_nodes_below_the_path_are_counted() -> None:
    """What hangs off a wrong node was never tried."""
    estimator = AcceptanceEstimator()
    tree = TokenTree((0, 1, 2), (-1, 0, 1), confidences=(1.0, 0.5, 0.95))
    for _ in range(50):
        estimator.observe("d", "a", tree, [9])
    probs = estimator.path_probs("d", "a", tree)
    assert probs[1] < 0.1
    assert probs[2] / probs[1] == pytest.approx(0.95)


def test_depths_are_told_apart() -> None:
    """Of equal confidence the first token is mostly wrong, and what stands behind a right one mostly right."""
    estimator = AcceptanceEstimator()
    tree = TokenTree((0, 1, 2, 3), (-1, 0, 1, 2), confidences=(1.0, 0.7, 0.7, 0.7))
    for i in range(100):
        estimator.observe("d", f"r{i}", tree, [1, 2, 3, 9] if i % 5 == 0 else [9])
    first, second, third = (estimator.path_probs("d", "new", tree)[node] for node in (1, 2, 3))
    assert 0.1 < first < 0.4
    assert second / first > 0.7
    assert third / second > 0.7


# Simulated decoding: a clock that only moves by what things cost


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SimulatedDrafter:
    """A chain that is right with a probability that may change over time.

    Attributes:
        rates: of acceptance, by the request's step.
        seconds: of a proposal.
    """

    returns_probs = False
    reads_logits = False
    num_without_room = 0
    max_nodes = 8

    def __init__(self, name: str, clock: Clock, seconds: float, rates, confidence: float | None) -> None:
        self.name, self.clock, self.cost, self.rates, self.confidence = name, clock, seconds, rates, confidence
        self.rng = random.Random(3)

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        trees = []
        for context in contexts:
            self.clock.now += self.cost
            position = len(context.token_ids)
            depth = min(8, context.max_nodes)
            tokens = [
                true_token(position + d) + (0 if self.rng.random() < self.rates(position) else 1000)
                for d in range(depth)
            ]
            confidences = None if self.confidence is None else (1.0, *[self.confidence] * depth)
            trees.append(
                TokenTree((context.token_ids[-1], *tokens), tuple(range(-1, depth)), confidences=confidences)
            )
        return trees

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        pass

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        pass


def true_token(position: int) -> int:
    return position % 997


def decode(
    drafters,
    clock: Clock,
    num_tokens: int,
    *,
    plain_s: float = 1.0,
    row_s: float = 0.02,
    batch: int = 1,
):
    """Seconds of decoding `num_tokens` for each of `batch` requests, and the planner."""
    true_cost = ForwardCost([1, 64], [0], [[plain_s, plain_s + 63 * row_s]])
    auto = AutoDrafter(AutoConfig(drafters=["none"]), drafters, true_cost, clock=clock)
    texts = {f"r{i}": [true_token(p) for p in range(10)] for i in range(batch)}
    while min(map(len, texts.values())) < num_tokens:
        step(auto, clock, texts, plain_s=plain_s, row_s=row_s)
    produced = sum(len(text) - 10 for text in texts.values())
    return clock.now / produced * batch, auto


def step(auto: AutoDrafter, clock: Clock, texts: dict[str, list[int]], *, plain_s: float, row_s: float) -> None:
    """One step of all requests."""
    contexts = [
        DraftContext(i, text, 10, 48, 48, SamplingParams(), 0, frozenset(), num_step_rows=len(texts))
        for i, text in texts.items()
    ]
    trees = auto.propose(contexts)
    clock.now += plain_s + row_s * (sum(tree.num_nodes for tree in trees) - 1)
    outcomes = []
    for (request_id, text), tree in zip(texts.items(), trees, strict=True):
        choices = [true_token(len(text) + depth) for depth in tree.depths]
        outcomes.append(DraftOutcome(request_id, tree, follow_choices(tree, choices), None, choices))
    auto.observe(outcomes)
    for outcome in outcomes:
        texts[outcome.request_id].extend(outcome.new_tokens)


def always(rate: float):
    return lambda position: rate


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("confidence", [None, 0.3, 0.99])
@pytest.mark.parametrize("seconds", [0.001, 0.05, 0.5, 3.0])
def test_a_worthless_drafter_costs_less_than_two_percent(
    seconds: float, confidence: float | None, batch: int
) -> None:
    """Whatever it claims, whatever it costs."""
    clock = Clock()
    row_s = 0.02
    drafters = [
        SimulatedDrafter("bad", clock, seconds, always(0.02), confidence),
        SimulatedDrafter("worse", clock, 2 * seconds, always(0.0), confidence),
    ]
    per_token, _ = decode(drafters, clock, 2000, row_s=row_s, batch=batch)
    plain = 1.0 + row_s * (batch - 1)
    assert per_token < 1.02 * plain


class LaboriousDrafter(SimulatedDrafter):
    """Is right, and not worth it: a short text is over before its reading has been won back.

    Attributes:
        reading_s, observing_s, forgetting_s: of a request's first proposal, of what became of one, of a release.
    """

    def __init__(self, clock: Clock, *, reading_s: float = 0.0, observing_s: float = 0.0, forgetting_s: float = 0.0):
        super().__init__("laborious", clock, 0.01, always(0.5), 0.5)
        self.reading_s, self.observing_s, self.forgetting_s = reading_s, observing_s, forgetting_s
        self.known: set[str] = set()

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        new = {context.request_id for context in contexts} - self.known
        self.clock.now += self.reading_s * len(new)
        self.known |= new
        return super().propose(contexts)

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        self.clock.now += self.observing_s

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        if request_id in self.known:
            self.clock.now += self.forgetting_s
        self.known.discard(request_id)


@pytest.mark.parametrize("work", ["reading_s", "observing_s", "forgetting_s"])
def test_whatever_a_drafter_spends_is_in_its_account(work: str) -> None:
    """Short texts, one after the other: reading, observing and forgetting each cost more than drafts win."""
    clock = Clock()
    drafter = LaboriousDrafter(clock, **{work: {"observing_s": 3.0}.get(work, 30.0)})
    auto = AutoDrafter(AutoConfig(drafters=["none"]), [drafter], ForwardCost([1, 64], [0], [[1.0, 2.0]]), clock=clock)
    num_tokens = 0
    for index in range(500):
        text = [true_token(p) for p in range(10)]
        while len(text) < 30:
            (tree,) = auto.propose(
                [DraftContext(f"r{index}", text, 10, 48, 48, SamplingParams(), 0, frozenset(), num_step_rows=1)]
            )
            clock.now += 1.0 + (tree.num_nodes - 1) / 63
            choices = [true_token(len(text) + depth) for depth in tree.depths]
            outcome = DraftOutcome(f"r{index}", tree, follow_choices(tree, choices), None, choices)
            auto.observe([outcome])
            text += outcome.new_tokens
        auto.release(f"r{index}")
        num_tokens += len(text) - 10
    assert clock.now < 1.02 * num_tokens


def decode_batches(
    drafters: Sequence[SimulatedDrafter], clock: Clock, num_batches: int, *, credit: float
) -> tuple[float, AutoDrafter]:
    """Seconds a step of full batches of 16 short requests, one batch after the other, and the planner.

    Args:
        credit: of every account at the beginning: what an earlier run has left.
    """
    num, num_steps = 16, 48
    auto = AutoDrafter(AutoConfig(drafters=["none"]), drafters, ForwardCost([1, 64], [0], [[1.0, 2.26]]), clock=clock)
    for arm in auto._arms:
        for _ in range(16):
            arm.shared.add(0, 0)
        arm.measured(arm.drafter.cost, 8, steady=True)
        arm.credit = credit
    start = clock.now
    for batch in range(num_batches):
        texts = {f"{batch}-{i}": [true_token(p) for p in range(10)] for i in range(num)}
        for _ in range(num_steps):
            step(auto, clock, texts, plain_s=1.0, row_s=0.02)
        for name in texts:
            auto.release(name)
    return (clock.now - start) / (num_batches * num_steps), auto


def test_new_requests_do_not_use_an_account_up_at_once() -> None:
    """Each is unknown, and its prompt yet to be read: what was saved must not be lost within a batch or two."""
    clock = Clock()
    drafters = [LaboriousDrafter(clock, reading_s=0.3), SimulatedDrafter("bad", clock, 0.05, always(0.0), 0.3)]
    drafters[0].rates = always(0.0)
    per_step, auto = decode_batches(drafters, clock, 4, credit=4.0)
    plain = 1.0 + 0.02 * 15
    assert per_step < 1.02 * plain
    assert auto._arms[0].shared.num_trials > 16, "they are tried all the same"


class ListeningDrafter(SimulatedDrafter):
    """Attributes:
    heard: texts that it was given when their requests had finished."""

    heard: list[FinishedText | None]

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        self.heard.append(finished)


def test_whole_texts_are_given_to_drafters_that_slept_unless_they_cannot_pay() -> None:
    clock = Clock()
    drafter = ListeningDrafter("listening", clock, 0.5, always(0.0), 0.3)
    drafter.heard = []
    _, auto = decode([drafter], clock, 500, batch=2)
    assert auto.num_chosen["listening"] < 100, "it slept in most steps"
    (arm,) = auto._arms
    text = FinishedText([1, 2, 3], 1)
    arm.credit = -1.0
    auto.release("r0", text)
    auto.release("never asked", text)
    arm.credit = 1.0
    auto.release("never asked either", text)
    auto.release("r1")
    assert drafter.heard == [text, None, text, None], "reading a text is work"


class SlowClock(Clock):
    """Time passes between any two looks at it: what a planner does itself is not free."""

    def __call__(self) -> float:
        self.now += 0.006
        return self.now


def test_planning_has_its_price_and_sleep_has_none() -> None:
    clock = SlowClock()
    per_token, _ = decode([SimulatedDrafter("bad", clock, 0.0, always(0.0), 0.3)], clock, 4000)
    assert per_token < 1.02


def test_a_new_request_sleeps_too_while_no_drafter_can_pay() -> None:
    clock = SlowClock()
    _, auto = decode([SimulatedDrafter("bad", clock, 9.0, always(0.0), 0.3)], clock, 100)
    before = clock.now
    auto.propose([DraftContext("new", [1, 2], 2, 48, 48, SamplingParams(), 0, frozenset())])
    assert clock.now == before, "not even a look at the clock"


@pytest.mark.parametrize("confidence", [None, 0.5])
@pytest.mark.parametrize("seconds", [0.001, 0.1, 0.5])
def test_a_good_drafter_is_used(seconds: float, confidence: float | None) -> None:
    clock = Clock()
    per_token, auto = decode([SimulatedDrafter("good", clock, seconds, always(0.9), confidence)], clock, 2000)
    accepted = sum(0.9**d for d in range(1, 9))
    ideal = (1.0 + seconds + 8 * 0.02) / (1 + accepted)
    assert per_token < 1.1 * ideal
    assert auto.num_chosen["good"] > 200


def test_the_better_of_two_is_used_and_the_change_noticed() -> None:
    clock = Clock()
    first = SimulatedDrafter("first", clock, 0.2, lambda p: 0.9 if p < 2000 else 0.0, 0.7)
    second = SimulatedDrafter("second", clock, 0.2, lambda p: 0.0 if p < 2000 else 0.9, 0.7)
    per_token, auto = decode([first, second], clock, 4000)
    ideal = (1.0 + 0.2 + 8 * 0.02) / (1 + sum(0.9**d for d in range(1, 9)))
    assert per_token < 1.35 * ideal
    assert min(auto.num_chosen.values()) > 200


def test_an_expensive_drafter_is_left_alone_where_a_free_one_does_as_well() -> None:
    clock = Clock()
    free = SimulatedDrafter("free", clock, 0.0001, always(0.8), 0.8)
    costly = SimulatedDrafter("costly", clock, 0.8, always(0.8), 0.8)
    _, auto = decode([free, costly], clock, 4000)
    assert auto.num_chosen["free"] > 20 * auto.num_chosen["costly"]


def test_several_drafters_in_one_batch() -> None:
    """Each request gets what works for it."""

    class OnlyFor(SimulatedDrafter):
        def __init__(self, request_id: str, clock: Clock) -> None:
            super().__init__(f"for {request_id}", clock, 0.05, always(0.9), 0.7)
            self.request_id = request_id

        def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
            trees = []
            for context in contexts:
                self.rates = always(0.9 if context.request_id == self.request_id else 0.0)
                trees += super().propose([context])
            return trees

    clock = Clock()
    per_token, auto = decode([OnlyFor("r0", clock), OnlyFor("r1", clock)], clock, 1500, batch=2)
    assert per_token < 0.3, "far faster than plain decoding's 1.02"
    assert min(auto.num_chosen.values()) > 100


def test_prices_decide_the_size_of_a_tree() -> None:
    sizes = {}
    for row_s in (0.001, 0.6):
        clock = Clock()
        drafter = SimulatedDrafter("d", clock, 0.0, always(0.6), 0.6)
        decode([drafter], clock, 500, row_s=row_s)
        rows = []
        auto = AutoDrafter(
            AutoConfig(drafters=["none"]), [drafter], ForwardCost([1, 64], [0], [[1.0, 1 + 63 * row_s]]), clock=clock
        )
        context = DraftContext("x", [1, 2], 2, 48, 48, SamplingParams(), 0, frozenset())
        for _ in range(3):
            (tree,) = auto.propose([context])
            rows.append(tree.num_nodes)
            clock.now += 1.0
            path = follow_choices(tree, [0] * tree.num_nodes)
            auto.observe([DraftOutcome("x", tree, path, None, [0] * tree.num_nodes)])
        sizes[row_s] = rows[0]
    assert sizes[0.001] > 6
    assert sizes[0.6] < 4


class ScriptedDrafter:
    """Proposes the tree that it holds."""

    returns_probs = True
    num_without_room = 0
    reads_logits = False
    max_nodes = 8

    def __init__(self, name: str, tree: TokenTree) -> None:
        self.name, self.tree = name, tree

    def propose(self, contexts: Sequence[DraftContext]) -> list[TokenTree]:
        return [self.tree for _ in contexts]

    def observe(self, outcomes: Sequence[DraftOutcome]) -> None:
        pass

    def release(self, request_id: str, finished: FinishedText | None = None) -> None:
        pass


def one_step(auto: AutoDrafter, clock: Clock, request_ids: Sequence[str] = ("x",)) -> list[TokenTree]:
    """A step that takes a second of the clock, each request's text being [1, 2]; the trees that were verified."""
    contexts = [
        DraftContext(id_, [1, 2], 2, 48, 48, SamplingParams(), 0, frozenset(), num_step_rows=len(request_ids))
        for id_ in request_ids
    ]
    trees = auto.propose(contexts)
    clock.now += 1.0
    outcomes = []
    for request_id, tree in zip(request_ids, trees, strict=True):
        choices = [true_token(2 + depth) for depth in tree.depths]
        outcomes.append(DraftOutcome(request_id, tree, follow_choices(tree, choices), None, choices))
    auto.observe(outcomes)
    return trees


def drawn_chain(tokens: Sequence[int]) -> TokenTree:
    """A chain that a draft model drew: under rejection rules it may be left out for no reason that lies in it."""
    chain = TokenTree.chain(2, tokens)
    log_probs = torch.zeros(chain.num_nodes, 10).log_softmax(-1)
    confidences = tuple([1.0] + [0.5] * len(tokens))
    return replace(chain, draft=DraftDistribution(log_probs, "without_replacement"), confidences=confidences)


@pytest.mark.parametrize("past", [[2, 3], [2, 5], [5, 5, 5, 5, 5, 5, 5, 5]])
def test_a_drawn_tree_is_kept_or_left_out_whatever_was_drawn(past: list[int]) -> None:
    """Equal pasts, draws of any size: one decision. Otherwise outputs would not have the target's distribution."""
    kept = set()
    for draw in ([2], [7], [2, 3, 4, 5, 6, 7], [7] * 6, [7] * 8):
        clock = Clock()
        drafter = ScriptedDrafter("drawn", drawn_chain(past))
        cost = ForwardCost([1, 64], [0], [[1.0, 1 + 63 * 0.3]])
        config = AutoConfig(drafters=["none"], exploration=1.0)
        auto = AutoDrafter(config, [drafter], cost, clock=clock)
        for _ in range(6):
            one_step(auto, clock)
        drafter.tree = drawn_chain(draw)
        (tree,) = one_step(auto, clock)
        assert tree.num_nodes in (1, 1 + len(draw)), "a part of a drawn tree"
        kept.add(tree.num_nodes > 1)
    assert len(kept) == 1


def test_drafters_of_one_name_have_records_of_their_own() -> None:
    clock = Clock()
    good = SimulatedDrafter("draft_model", clock, 0.1, always(0.9), 0.7)
    bad = SimulatedDrafter("draft_model", clock, 0.1, always(0.0), 0.7)
    per_token, auto = decode([bad, good], clock, 2000)
    assert set(auto.num_chosen) == {"draft_model-1", "draft_model-2"}
    assert auto.num_chosen["draft_model-2"] > 20 * auto.num_chosen["draft_model-1"]
    assert per_token < 0.4


def test_a_failed_forward_teaches_nothing() -> None:
    """What was proposed for it is not judged by the tokens of a later step."""
    clock = Clock()
    chain = TokenTree((2, 0, 0), (-1, 0, 1), confidences=(1.0, 0.9, 0.9))
    auto = AutoDrafter(
        AutoConfig(drafters=["none"]),
        [ScriptedDrafter("d", chain)],
        ForwardCost([1, 64], [0], [[1.0, 2.0]]),
        clock=clock,
    )
    auto.propose([DraftContext("x", [1, 2], 2, 48, 48, SamplingParams(), 0, frozenset())])
    clock.now += 500.0  # it failed
    auto._wake["x"] = 10  # the request sleeps, as it may when others of its batch were drafted for
    one_step(auto, clock)
    assert auto._arms[0].shared.num_trials == 0
    assert auto._cost.seconds(1, 0) == 1.0


def test_short_texts_are_drafted_for() -> None:
    """A drafter that is asked once a request has no other price than that of its first time."""
    clock = Clock()
    auto = AutoDrafter(
        AutoConfig(drafters=["none"]),
        [SimulatedDrafter("d", clock, 0.05, always(1.0), 0.9)],
        ForwardCost([1, 64], [0], [[1.0, 1.1]]),
        clock=clock,
    )
    for index in range(20):
        names = [f"r{index}-{i}" for i in range(4)]
        trees = one_step(auto, clock, names)
        for name in names:
            auto.release(name)
    assert min(tree.num_nodes for tree in trees) > 1


def test_settings_are_checked() -> None:
    assert drafter_config("auto") == AutoConfig()
    for bad in (
        {"drafters": []},
        {"drafters": "ngram"},
        {"drafters": ["auto"]},
        {"exploration": 2},
        {"remember": 1},
        {"max_nodes": 0},
    ):
        with pytest.raises(ConfigError):
            drafter_config({"method": "auto", **bad})


# What is kept between runs


def decode_again(
    planner: AutoDrafter, clock: Clock, num_tokens: int, true_rate: float, seconds: float = 0.3
) -> float:
    """Seconds a token of another run, in which a planner of the same drafter begins with what `planner` knew."""
    drafter = SimulatedDrafter("d", clock, seconds, always(true_rate), 0.6)
    auto = AutoDrafter(
        AutoConfig(drafters=["none"]), [drafter], ForwardCost([1, 64], [0], [[1.0, 2.26]]), clock=clock
    )
    auto.knowledge.recall(json.loads(json.dumps(planner.knowledge.as_mapping())))
    start, text = clock.now, [true_token(p) for p in range(10)]
    while len(text) < num_tokens + 10:
        context = DraftContext("x", text, 10, 48, 48, SamplingParams(), 0, frozenset())
        (tree,) = auto.propose([context])
        clock.now += 1.0 + 0.02 * (tree.num_nodes - 1)
        choices = [true_token(len(text) + depth) for depth in tree.depths]
        outcome = DraftOutcome("x", tree, follow_choices(tree, choices), None, choices)
        auto.observe([outcome])
        text += outcome.new_tokens
    return (clock.now - start) / (len(text) - 10)


def planner_that_knows(rate: float, seconds: float = 0.3) -> tuple[AutoDrafter, Clock]:
    clock = Clock()
    _, planner = decode([SimulatedDrafter("d", clock, seconds, always(rate), 0.6)], clock, 1000)
    return planner, clock


def test_what_paid_is_used_from_the_first_step_of_the_next_run() -> None:
    assert decode_again(*planner_that_knows(0.9), num_tokens=60, true_rate=0.9) < 0.4


def test_what_did_not_pay_is_not_tried_at_once() -> None:
    assert decode_again(*planner_that_knows(0.0, 8.0), num_tokens=60, true_rate=0.0, seconds=8.0) == pytest.approx(
        1.0
    )


def test_what_paid_once_is_soon_given_up() -> None:
    """An account keeps a few plain steps: that much another text may lose, and no more."""
    assert decode_again(*planner_that_knows(0.9), num_tokens=1000, true_rate=0.0) < 1.02


@pytest.mark.parametrize(("credit", "kept"), [(32.0, 1.0), (0.5, 0.5), (-2.0, -2.0), (-9.0, -4.0)])
def test_a_run_leaves_little_to_spend_and_more_to_owe(credit: float, kept: float) -> None:
    planner, _ = planner_that_knows(0.7)
    planner._arms[0].credit = credit
    assert planner.knowledge.as_mapping()["drafters"]["d"]["credit"] == kept


def test_what_is_kept_is_what_is_recalled() -> None:
    planner, _ = planner_that_knows(0.7)
    assert planner.knowledge.has_news
    kept = planner.knowledge.as_mapping()
    drafter = SimulatedDrafter("d", Clock(), 0.3, always(0.7), 0.6)
    other = AutoDrafter(AutoConfig(drafters=["none"]), [drafter], ForwardCost.unknown())
    other.knowledge.recall(kept)
    assert not other.knowledge.has_news
    assert other.knowledge.as_mapping() == kept


def spoilt_knowledge() -> list[object]:
    kept = planner_that_knows(0.7)[0].knowledge.as_mapping()

    def with_figure(name: str, value: object) -> dict:
        return {**kept, "drafters": {"d": {**kept["drafters"]["d"], name: value}}}

    bins = [0.0] * len(CENTRES)
    return [
        [],
        {},
        {**kept, "version": 1},
        {**kept, "drafters": [1]},
        {**kept, "drafters": {"d": {}}},
        with_figure("seconds", -1.0),
        with_figure("seconds", float("nan")),
        with_figure("seconds", "1"),
        with_figure("credit", 1e6),
        with_figure("num_trials", 10**6),
        with_figure("surplus", 1),
        with_figure("hits", 3),
        with_figure("hits", [bins, bins, bins[1:]]),
        with_figure("hits", [[1e3, *bins[1:]], bins, bins]),
        with_figure("trials", []),
    ]


@pytest.mark.parametrize("values", spoilt_knowledge())
def test_knowledge_that_cannot_be_is_refused_whole(values: object) -> None:
    drafter = SimulatedDrafter("d", Clock(), 0.3, always(0.7), 0.6)
    planner = AutoDrafter(AutoConfig(drafters=["none"]), [drafter], ForwardCost.unknown())
    with pytest.raises(ConfigError):
        planner.knowledge.recall(values)
    assert planner.knowledge.as_mapping()["drafters"] == {}


def test_a_planner_leaves_a_file_and_a_spoilt_one_is_written_anew(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "planner" / "kept.json"
    for content in (None, "{", "[]", '{"version": 1}'):
        if content is not None:
            path.write_text(content)
        clock = Clock()
        drafter = SimulatedDrafter("d", clock, 0.3, always(0.7), 0.6)
        planner = AutoDrafter(
            AutoConfig(drafters=["none"]), [drafter], ForwardCost([1, 2], [0], [[1, 1]]), clock=clock
        )
        caplog.clear()
        remember(planner, path)
        assert ("ignored" in caplog.text) == (content is not None)
        one_step(planner, clock)
        del planner
        gc.collect()
        assert json.loads(path.read_text())["drafters"]["d"]["num_trials"] == 1


# Calibration


class BlankModel(ToyModel):
    """Does not mind that the context was never computed."""

    def choose(self, batch: ForwardBatch, cache: KVCache, *, with_logits: bool = False) -> None:
        return None

    def forward(self, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        self.num_rows.append(len(batch.token_ids))
        return torch.zeros(len(batch.token_ids), self.vocab_size)


def test_calibration_is_kept_and_a_spoilt_one_made_again(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, seen = BlankModel(), []
    cost = forward_cost_of(
        model, {"model": "toy"}, row_invariant=False, on_progress=lambda done, of: seen.append((done, of))
    )
    assert seen[-1][0] == seen[-1][1]
    num_forwards = len(model.num_rows)
    again = forward_cost_of(model, {"model": "toy"}, row_invariant=False)
    assert again.as_mapping() == cost.as_mapping()
    assert len(model.num_rows) == num_forwards
    (file,) = tmp_path.rglob("*.json")
    for spoilt in ("{", "[]", '{"rows": [1]}', file.read_text()[:-20]):
        file.write_text(spoilt)
        forward_cost_of(model, {"model": "toy"}, row_invariant=False)
        assert ForwardCost.from_mapping(json.loads(file.read_text()))
    assert len(model.num_rows) > num_forwards
    forward_cost_of(model, {"model": "another"}, row_invariant=False)
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_what_is_damaged_is_said_once_and_ignored(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "kept.json"
    for content in (b"{", b"\xff\xfe", b"[" * 100_000, b"", b"[]"):
        path.write_bytes(content)
        caplog.clear()
        for _ in range(2):
            assert recall(path, ForwardCost.from_mapping) is None
        (record,) = caplog.records
        assert str(path) in record.message
        assert "\n" not in record.message
    caplog.clear()
    assert recall(tmp_path / "nothing", ForwardCost.from_mapping) is None
    folder = tmp_path / "folder.json"
    folder.mkdir()
    assert recall(folder, ForwardCost.from_mapping) is None
    keep(folder / "kept.json", 1)
    keep(path / "below a file.json", 1)
    assert len(caplog.records) == 2
    assert "XDG_CACHE_HOME" in caplog.text


def test_the_files_that_were_used_last_are_kept(tmp_path) -> None:
    paths = [tmp_path / f"{index}.json" for index in range(MAX_FILES + 3)]
    for age, path in enumerate(reversed(paths[:-1])):
        keep(path, 1)
        os.utime(path, (1e9 - age, 1e9 - age))
    abandoned = tmp_path / "tmp0"  # by a process that was killed
    abandoned.touch()
    os.utime(abandoned, (1, 1))
    assert recall(paths[0], int) == 1
    keep(paths[-1], 2)
    kept = set(tmp_path.iterdir())
    assert len(kept) == MAX_FILES
    assert kept == {paths[0], *paths[4:]}, "the oldest three were not used, but for one"


def test_processes_do_not_disturb_each_other(tmp_path, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "gone.json").symlink_to(tmp_path / "what another process forgot")
    path = tmp_path / "kept.json"
    keep(path, 1)
    assert not caplog.records
    names = sorted(found.name for found in tmp_path.iterdir())

    def interrupted(*_: object) -> None:
        assert recall(path, int) == 1, "as long as the new one is not whole, the old one is there"
        raise OSError(28, "no space left")

    monkeypatch.setattr("outrider.engine.cache_files.os.replace", interrupted)
    keep(path, 2)
    assert "no space left" in caplog.text
    assert sorted(found.name for found in tmp_path.iterdir()) == names
    assert recall(path, int) == 1


def test_calibration_fits_into_a_short_context() -> None:
    cost = measure(BlankModel(context_length=40), row_invariant=False)
    assert cost.seconds(1, 0) > 0
    cost = measure(BlankModel(context_length=512), row_invariant=False)
    assert cost.contexts == (32, 448), "the longest that leaves room for the rows: else contexts would look free"
