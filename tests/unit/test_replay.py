"""Replaying a recorded output counts what an engine that generates it would have got accepted."""

from __future__ import annotations

import pytest

from outrider.bench.replay import Recording, ReplayResult, SyntheticTarget, replay
from outrider.config import HierarchyConfig, MergeConfig, RecyclingConfig, SourceConfig
from outrider.drafting.context_recycling import ContextRecyclingDrafter
from outrider.drafting.drafter import DraftContext, DraftStyle
from outrider.errors import ConfigError
from outrider.sampling.noise import Purpose, gumbel_noise
from outrider.sampling.params import SamplingParams
from outrider.token_tree import TokenTree
from tests.losslessness.engine_harness import CATALOGUE, make_engine, make_request, run
from tests.toy_model import ToyModel

# Those whose proposals follow from tokens alone, and cost no model.
LOOKUP = [
    name for name, config in CATALOGUE.items() if isinstance(config, (SourceConfig, MergeConfig, HierarchyConfig))
]


@pytest.mark.parametrize("drafter", LOOKUP)
def test_counts_are_the_engines(drafter: str) -> None:
    """But for drafters that learn from choices at rejected nodes, which no recording has."""
    model = ToyModel(memory=0.2, eos_token_ids=())
    engine = make_engine(drafter, model=model)
    prompt = [1, 2, 3, 1, 2, 3, 4]
    request = make_request("r", prompt, SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True), model)
    run(engine, [request])
    result = replay(make_engine(drafter, model=model).drafter, [Recording(prompt, request.output_token_ids)])
    assert result.num_tokens == 80
    assert result.num_accepted + result.num_steps == 80
    if drafter not in ("aded", "hierarchy", "merge"):
        assert result.num_steps == request.metrics.num_steps
        assert result.num_accepted == request.metrics.num_accepted_tokens
    assert sum(result.num_right) == result.num_accepted
    assert 0 <= result.calibration_error <= 1


def test_a_drafter_that_reads_logits_needs_a_target() -> None:
    def drafter() -> ContextRecyclingDrafter:
        return ContextRecyclingDrafter(RecyclingConfig(), DraftStyle(), 10)

    with pytest.raises(ConfigError, match="reads logits"):
        replay(drafter(), [Recording([1], [2, 3])])
    for temperature in (0.0, 1.0):
        recorded = [Recording([1, 2, 3] * 4, [1, 2, 3] * 10)] * 2
        result = replay(drafter(), recorded, target=SyntheticTarget(10), temperature=temperature)
        assert result.num_tokens == 60
        assert result.acceptance_length > 2


@pytest.mark.parametrize("method", ["jacobi", "lookahead"])
def test_a_target_makes_the_choices_too(method: str) -> None:
    drafter = make_engine(method).drafter
    recorded = [Recording([1, 2, 3, 4], [5, 6, 7] * 10)]
    result = replay(drafter, recorded, target=SyntheticTarget(20))
    assert result.num_tokens == 30
    assert result.num_accepted > 0


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_stand_in_chooses_what_was_recorded(temperature: float) -> None:
    params = SamplingParams(temperature=temperature)
    asked = DraftContext("r", [3, 1, 4], 3, 8, 8, params, 5, frozenset())
    tree = TokenTree((4, 1, 2, 5, 7), (-1, 0, 0, 1, 2))
    logits, choices = SyntheticTarget(50).outcome(asked, tree, [1, 5, 9, 2])
    assert [choices[node] for node in (0, 1, 3)] == [1, 5, 9]
    for node, depth in ((0, 0), (1, 1), (3, 2)):
        keys = logits[node].numpy().copy()
        if temperature:
            keys = keys / temperature + gumbel_noise(5, 3 + depth, Purpose.TARGET, 50)
        assert keys.argmax() == choices[node]
    assert [int(logits[node].argmax()) for node in (2, 4)] == [choices[2], choices[4]]


def test_times_leave_out_the_steps_that_read_prompts() -> None:
    result = ReplayResult(num_steps=4, first_steps=[0, 2], propose_s=[9.0, 0.001, 7.0, 0.003], observe_s=[0.0] * 4)
    assert result.step_ms.tolist() == pytest.approx([1.0, 3.0])
    assert (result.median_draft_ms, result.prompt_ms) == pytest.approx((2.0, 8000.0))
    empty = ReplayResult()
    assert (empty.median_draft_ms, empty.prompt_ms) == (0.0, 0.0)


def test_the_node_budget_is_kept() -> None:
    engine = make_engine("ngram")
    result = replay(engine.drafter, [Recording([1, 2, 3] * 5, [1, 2, 3] * 10)], max_nodes=3)
    assert result.num_drafted <= 3 * result.num_steps
    assert result.acceptance_length == pytest.approx(30 / result.num_steps)
