"""Draft models keep their place: what they draft is a function of a request's own tokens, parameters and seed.

Whatever was accepted or rejected before, whoever else is drafted for, and whoever lost its place meanwhile. Under the
coupled rule nothing else would notice: a drafter that reads the wrong tokens changes no output, it is only slower.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from outrider.config import DraftModelConfig
from outrider.drafting.drafter import DraftContext, Drafter, DraftOutcome
from outrider.sampling.params import SamplingParams
from outrider.token_tree import TokenTree
from outrider.verification.coupled import follow_choices
from tests.losslessness.engine_harness import CATALOGUE, make_engine, make_request, run
from tests.toy_model import ToyModel
from tests.toy_vocabulary import num_shared

# Shapes that are planned by the outcomes of all requests depend on them.
DRAFT_MODELS = [
    name for name, config in CATALOGUE.items() if isinstance(config, DraftModelConfig) and not config.plans_shapes
]
RULES = ["coupled", "rejection", "tree_rejection", "multi_candidate"]
PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.9),
    SamplingParams(temperature=1.0, top_k=6, repetition_penalty=1.2),
    SamplingParams(temperature=0.7, frequency_penalty=0.4),
]
NUM_STEPS = 8


def context(request_id: str, tokens: Sequence[int], params: SamplingParams, seed: int) -> DraftContext:
    return DraftContext(request_id, list(tokens), 3, 64, 20, params, seed, frozenset())


def same(ours: TokenTree, theirs: TokenTree) -> bool:
    """Tokens, shape and distributions, to the last bit."""
    if ours.tokens != theirs.tokens or ours.parents != theirs.parents:
        return False
    if ours.draft is None or theirs.draft is None:
        return ours.draft is theirs.draft
    return torch.equal(ours.draft.log_probs, theirs.draft.log_probs)


def new_drafter(name: str, rule: str) -> Drafter:
    return make_engine(name, rule=rule).drafter


def check_drafts(name: str, rule: str) -> None:
    """Requests drafted for together, step by step, against a new drafter that is shown one request's tokens.

    Raises:
        AssertionError: a tree differs.
    """
    rng, target = random.Random(3), ToyModel(memory=0.4)
    drafter = new_drafter(name, rule)
    texts = {f"r{i}": [rng.randrange(24) for _ in range(3 + 5 * i)] for i in range(len(PARAMS))}
    for step in range(NUM_STEPS):
        contexts = [
            context(request_id, texts[request_id], params, seed)
            for seed, (request_id, params) in enumerate(zip(texts, PARAMS, strict=True))
        ]
        rng.shuffle(contexts)
        outcomes = []
        for asked, tree in zip(contexts, drafter.propose(contexts), strict=True):
            (expected,) = new_drafter(name, rule).propose([asked])
            assert same(tree, expected), f"{asked.request_id} in step {step}"
            paths = [[tree.tokens[above] for above in tree.path(node)] for node in range(tree.num_nodes)]
            choices = [int(target._logits((*asked.token_ids, *path)).argmax()) for path in paths]
            outcomes.append(DraftOutcome(asked.request_id, tree, follow_choices(tree, choices), None, choices))
        drafter.observe(outcomes)
        for outcome in outcomes:
            texts[outcome.request_id] += outcome.new_tokens
        if step == NUM_STEPS // 2:
            drafter.release("r1")


@pytest.mark.parametrize("name", DRAFT_MODELS)
@pytest.mark.parametrize("rule", RULES)
def test_drafts_depend_on_the_request_alone(rule: str, name: str) -> None:
    check_drafts(name, rule)


NOISY = ["draft_model", "draft_model-tree", "staged", "staged-models", "universal_draft", "auto", "auto-sparing"]


def check_acceptance(name: str) -> None:
    """Requests sampled with a draft model that is the target itself: by the same noise it makes the same choices.

    Raises:
        AssertionError: much of it is rejected.
    """
    model = ToyModel(memory=0.3)
    engine = make_engine(name, model=model)
    bias = dict.fromkeys(
        range(num_shared(model.vocab_size), model.vocab_size), -100.0
    )  # what not every draft can say
    params = SamplingParams(temperature=1.0, max_tokens=60, seed=4, ignore_eos=True, logit_bias=bias)
    run(engine, [make_request(f"r{i}", [1 + i, 2, 3], params, model) for i in range(4)])
    assert engine.stats.num_accepted_tokens >= 0.7 * engine.stats.num_output_tokens


@pytest.mark.parametrize("name", NOISY)
def test_a_draft_equal_to_the_target_is_accepted(name: str) -> None:
    check_acceptance(name)
