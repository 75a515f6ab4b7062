"""Replaying a recorded output counts what an engine that generates it would have got accepted."""

from __future__ import annotations

import pytest

from outrider.bench.replay import Recording, replay
from outrider.config import HierarchyConfig, MergeConfig, RecyclingConfig, SourceConfig
from outrider.drafting.context_recycling import ContextRecyclingDrafter
from outrider.drafting.drafter import DraftStyle
from outrider.errors import ConfigError
from outrider.sampling.params import SamplingParams
from tests.losslessness.engine_harness import DRAFTERS, make_engine, make_request, run
from tests.toy_model import ToyModel

# Those whose proposals follow from tokens alone, and cost no model.
LOOKUP = [
    name for name, config in DRAFTERS.items() if isinstance(config, (SourceConfig, MergeConfig, HierarchyConfig))
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


def test_a_drafter_that_reads_logits_is_refused() -> None:
    with pytest.raises(ConfigError, match="reads logits"):
        replay(ContextRecyclingDrafter(RecyclingConfig(), DraftStyle(), 10), [Recording([1], [2, 3])])


def test_the_node_budget_is_kept() -> None:
    engine = make_engine("ngram")
    result = replay(engine.drafter, [Recording([1, 2, 3] * 5, [1, 2, 3] * 10)], max_nodes=3)
    assert result.num_drafted <= 3 * result.num_steps
    assert result.acceptance_length == pytest.approx(30 / result.num_steps)
