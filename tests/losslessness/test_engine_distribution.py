"""The whole engine under rejection rules: outputs of thousands of seeds against the exact distribution.

The rules are proved by enumeration; this is about what stands around them: that drafts come with the q they were
drawn from, from noise of their own, and that no number is used twice.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from outrider.config import SchedulerConfig
from outrider.drafting.growth import tree as growing_tree
from outrider.sampling.params import SamplingParams
from outrider.verification.build import RULE_NAMES
from tests.losslessness.engine_harness import DRAFTERS, make_engine, make_request
from tests.toy_model import ToyModel

VOCAB, LENGTH, NUM_SEEDS = 4, 3, 3000
PROMPT = [1, 2, 1, 2, 1]


def exact(model: ToyModel) -> np.ndarray:
    """Probability of each output of LENGTH tokens, ``[VOCAB ** LENGTH]``."""
    probs = []
    for output in product(range(VOCAB), repeat=LENGTH):
        probability = 1.0
        for i, token in enumerate(output):
            logits = model._logits((*PROMPT, *output[:i])).astype(np.float64)
            p = np.exp(logits - logits.max())
            probability *= p[token] / p.sum()
        probs.append(probability)
    return np.array(probs)


def chi_square(drafter: str, rule: str) -> float:
    """Of the outputs of NUM_SEEDS seeds, in units of its standard deviation above its mean."""
    model = ToyModel(vocab_size=VOCAB, memory=0.7)
    engine = make_engine(
        drafter,
        rule=rule,
        model=model,
        num_blocks=2000,
        scheduler=SchedulerConfig(max_num_seqs=64, max_batch_tokens=900),
    )
    requests = [
        make_request(f"r{seed}", PROMPT, SamplingParams(max_tokens=LENGTH, seed=seed, ignore_eos=True), model)
        for seed in range(NUM_SEEDS)
    ]
    for request in requests:
        engine.add(request)
    while engine.has_unfinished:
        engine.step()
    assert drafter == "none" or engine.stats.num_accepted_tokens > NUM_SEEDS // 10
    counts = np.zeros(VOCAB**LENGTH)
    for request in requests:
        a, b, c = request.output_token_ids
        counts[(a * VOCAB + b) * VOCAB + c] += 1
    expected = exact(model) * NUM_SEEDS
    large = expected >= 5
    pooled = np.append(expected[large], expected[~large].sum())
    seen = np.append(counts[large], counts[~large].sum())
    freedom = len(pooled) - 1
    return float((((seen - pooled) ** 2 / pooled).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("drafter", [name for name in DRAFTERS if name != "recycling"])
@pytest.mark.parametrize("rule", RULE_NAMES)
def test_outputs_have_the_targets_distribution(rule: str, drafter: str) -> None:
    assert chi_square(drafter, rule) < 4.5


def draw_from_a_sharper_q(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: drafts are drawn with less noise than what their q says."""
    right = growing_tree.gumbel_noise
    monkeypatch.setattr(growing_tree, "gumbel_noise", lambda *arguments: right(*arguments) / 1.5)


@pytest.mark.parametrize(
    ("drafter", "rule"), [("draft_model-chain", "rejection"), ("draft_model-tree", "tree_rejection")]
)
def test_a_drafter_that_draws_from_another_q_is_found(
    drafter: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_from_a_sharper_q(monkeypatch)
    assert chi_square(drafter, rule) > 8


def test_coupled_drafts_do_not_care(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same mutant is harmless under the coupled rule: only the target's choice counts."""
    draw_from_a_sharper_q(monkeypatch)
    assert chi_square("draft_model-chain", "coupled") < 4.5
