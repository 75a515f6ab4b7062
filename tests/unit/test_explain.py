"""The divergence explainer on models whose rounding is known: ties are called ties, and bugs bugs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from outrider.losslessness.explain import Divergence, explain_divergence
from outrider.sampling.noise import Purpose, gumbel_noise
from outrider.sampling.params import SamplingParams
from tests.toy_model import ToyModel

ROUNDING = 1e-3
PROMPT = [7, 8, 9]
GREEDY = SamplingParams(temperature=0.0)


class RoundingModel(ToyModel):
    """The same logits everywhere, but for rounding that depends on the number of rows in a forward."""

    def __init__(self, logits: list[float], rounding: float = ROUNDING) -> None:
        super().__init__(vocab_size=len(logits))
        self._logits_everywhere = np.array(logits, dtype=np.float32)
        self._rounding = rounding

    def forward(self, batch, cache):
        logits = super().forward(batch, cache)
        noise = np.random.default_rng(len(batch.token_ids)).uniform(-1, 1, self.vocab_size)
        return logits + self._rounding * torch.from_numpy(noise.astype(np.float32))

    def _logits(self, seen):
        return self._logits_everywhere


def logits_with(gap: float, vocab_size: int = 12) -> list[float]:
    """Token 0 leads token 1 by `gap`; the others are far below."""
    return [5.0, 5.0 - gap] + [-5.0] * (vocab_size - 2)


def test_tokens_within_the_rounding_are_a_tie() -> None:
    model = RoundingModel(logits_with(gap=0.5 * ROUNDING))
    explanation = explain_divergence(model, Divergence(PROMPT, [3, 0, 2], [3, 1, 4], GREEDY, seed=0))
    assert explanation.verdict == "tie"
    assert explanation.position == 1
    assert (explanation.plain_token, explanation.other_token) == (0, 1)
    assert 0 < explanation.delta < 2.1 * ROUNDING
    assert explanation.distance <= explanation.tolerance
    assert {token for token, _ in explanation.top_two} == {0, 1}
    assert explanation.top_two_gap < 3 * ROUNDING


def test_a_clear_choice_is_a_bug_and_its_distance_is_half_the_gap() -> None:
    model = RoundingModel(logits_with(gap=1.0))
    explanation = explain_divergence(model, Divergence(PROMPT, [3, 0], [3, 1], GREEDY, seed=0))
    assert explanation.verdict == "bug"
    assert explanation.replayed_token == 0
    assert explanation.distance == pytest.approx(0.5, rel=0.1)
    assert "beyond" in explanation.reason


def test_plain_decoding_is_not_believed_more_than_the_other_run() -> None:
    model = RoundingModel(logits_with(gap=1.0))
    explanation = explain_divergence(model, Divergence(PROMPT, [1], [0], GREEDY, seed=0))
    assert explanation.verdict == "bug"
    assert explanation.replayed_token == 0


def test_the_bitwise_mode_has_no_ties() -> None:
    model = RoundingModel(logits_with(gap=0.5 * ROUNDING))
    divergence = Divergence(PROMPT, [0], [1], GREEDY, seed=0, row_invariant=True)
    explanation = explain_divergence(model, divergence)
    assert explanation.verdict == "bug"
    assert explanation.tolerance == 0.0


def test_an_output_that_ends_early_is_a_bug() -> None:
    model = RoundingModel(logits_with(gap=0.0))
    explanation = explain_divergence(model, Divergence(PROMPT, [0, 1], [0], GREEDY, seed=0))
    assert (explanation.verdict, explanation.position) == ("bug", 1)
    assert (explanation.plain_token, explanation.other_token) == (1, None)


def test_replays_one_row_a_prefill_a_tree_and_a_batch() -> None:
    model = RoundingModel(logits_with(gap=0.0))
    explanation = explain_divergence(model, Divergence(PROMPT, [0, 0, 1], [0, 0, 0], GREEDY, seed=0))
    assert list(explanation.differences or {}) == ["one row", "prefill", "8 rows", "4 sequences"]
    # prompt but one, three single rows; the prefix of five at once; four then eight; four sequences of four
    assert model.num_rows == [2, 1, 1, 1, 5, 4, 8, 4, 4, 4, 4, 4]


def test_a_one_token_prompt_near_the_end_of_the_context() -> None:
    model = RoundingModel(logits_with(gap=0.0))
    model.context_length = 2
    explanation = explain_divergence(model, Divergence([3], [0], [1], GREEDY, seed=0))
    assert explanation.verdict == "tie"
    assert model.num_rows == [1, 1, 2, 4]


@pytest.mark.parametrize(("raw_gap", "verdict"), [(1.0, "tie"), (1.5, "bug")])
def test_penalties_are_part_of_the_replay(raw_gap: float, verdict: str) -> None:
    """The token seen before leads by one raw logit, which is just what its penalty takes: 6 / 1.2 = 5."""
    model = RoundingModel([6.0, 5.0 + 1.0 - raw_gap, -5.0, -5.0])
    params = SamplingParams(temperature=0.0, repetition_penalty=1.2)
    explanation = explain_divergence(model, Divergence([3, 0], [0], [1], params, seed=0))
    assert explanation.verdict == verdict
    assert explanation.top_two_gap == pytest.approx(raw_gap, abs=4 * ROUNDING)


@pytest.mark.parametrize(("margin", "verdict"), [(1e-5, "tie"), (0.05, "bug")])
def test_the_border_of_top_p_is_part_of_the_replay(margin: float, verdict: str) -> None:
    """A token just inside the nucleus is chosen; a run in which it is just outside chooses another one."""
    logits = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    before = float(logits.softmax(-1)[:3].sum())  # of the tokens before token 3
    seed = next(seed for seed in range(1000) if keyed_choice(logits[:4], seed) == 3)
    other = keyed_choice(logits[:3], seed)
    params = SamplingParams(temperature=1.0, top_p=before + margin)
    model = RoundingModel(logits.tolist())
    explanation = explain_divergence(model, Divergence(PROMPT, [3], [other], params, seed))
    assert explanation.replayed_token == 3
    assert explanation.verdict == verdict


def keyed_choice(logits: torch.Tensor, seed: int) -> int:
    noise = gumbel_noise(seed, len(PROMPT), Purpose.TARGET, len(logits))
    return int((logits.numpy() + noise).argmax())


def test_a_token_that_the_parameters_exclude_is_a_bug() -> None:
    model = RoundingModel(logits_with(gap=0.0))
    params = SamplingParams(temperature=0.0, min_tokens=4)
    divergence = Divergence(PROMPT, [0], [1], params, seed=0, stop_ids={1})
    explanation = explain_divergence(model, divergence)
    assert explanation.verdict == "bug"
    assert explanation.distance == math.inf
    assert explanation.record()["distance"] is None


def test_logits_that_are_no_numbers_in_one_shape_are_a_bug() -> None:
    model = RoundingModel(logits_with(gap=1.0))
    right = model.forward

    def broken_for_eight_rows(batch, cache):
        return right(batch, cache) * (math.nan if len(batch.token_ids) == 8 else 1.0)

    model.forward = broken_for_eight_rows  # pyright: ignore[reportAttributeAccessIssue]
    explanation = explain_divergence(model, Divergence(PROMPT, [0], [1], GREEDY, seed=0))
    assert explanation.verdict == "bug"
    assert explanation.delta == math.inf
