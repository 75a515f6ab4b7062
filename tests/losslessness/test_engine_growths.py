"""The suites of the engine for the growths that `DRAFTERS` leaves out: a part of them, or all with the slow tests."""

from __future__ import annotations

import pytest

from tests.losslessness import test_engine, test_engine_distribution
from tests.losslessness.engine_harness import GROWTHS
from tests.losslessness.test_engine import SETTINGS

EVERYTHING_AT_ONCE = (36, 3, 11, False)
MIXES = ((400, 16, 256, True), (400, 16, 256, False), (400, 4, 9, True), (40, 16, 256, True))
RULES = ("rejection", "tree_rejection", "multi_candidate")


@pytest.mark.parametrize("growth", GROWTHS)
def test_equal_to_plain_decoding(growth: str) -> None:
    for setting in ("greedy", "sampled-eos", "penalties", "two"):
        test_engine.test_equal_to_plain_decoding_alone(growth, setting)
    test_engine.test_equal_to_plain_decoding_in_every_batch_mix(growth, *EVERYTHING_AT_ONCE)
    test_engine.test_drafts_are_accepted(growth)


@pytest.mark.parametrize("growth", GROWTHS)
def test_what_goes_wrong_changes_nothing(growth: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test_engine.test_preemption_does_not_change_the_output(growth)
    test_engine.test_unsound_logits_end_the_requests_that_reach_them_and_no_other(growth)
    test_engine.test_an_engine_goes_on_after_a_failed_forward(growth, monkeypatch)


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("rule", RULES)
def test_rejection_rules(rule: str, growth: str) -> None:
    test_engine.test_greedy_is_the_same_under_rejection_rules(rule, growth)
    test_engine.test_sampling_under_rejection_rules_is_repeatable(rule, growth)


@pytest.mark.parametrize(
    ("rule", "growth"), [("tree_rejection", "draft_model-static-measured"), ("multi_candidate", "draft_model-ppd")]
)
def test_shapes_by_outcomes_leave_the_distribution_alone(rule: str, growth: str) -> None:
    """A step's trees depend on what became of earlier ones, of this request and of others."""
    assert test_engine_distribution.chi_square(growth, rule) < 4.5


@pytest.mark.slow
@pytest.mark.parametrize("growth", GROWTHS)
def test_every_setting_and_mix(growth: str) -> None:
    for setting in SETTINGS:
        test_engine.test_equal_to_plain_decoding_alone(growth, setting)
    for mix in MIXES:
        test_engine.test_equal_to_plain_decoding_in_every_batch_mix(growth, *mix)
    test_engine.test_requests_that_come_and_go_do_not_disturb_each_other(growth)


@pytest.mark.slow
@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("rule", ["coupled", *RULES])
def test_outputs_have_the_targets_distribution(rule: str, growth: str) -> None:
    assert test_engine_distribution.chi_square(growth, rule) < 4.5
