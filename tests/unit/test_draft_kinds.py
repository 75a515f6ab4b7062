"""Draft models of several kinds: what they draft is what a naive reading says, with as few forwards as promised."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

from outrider.cache.kv_cache import KVCache
from outrider.config import DraftModelConfig, SortedDraftConfig, StagedConfig, drafter_config
from outrider.drafting.build import TargetParts, build_drafter
from outrider.drafting.draft_kinds import DraftParts, plain_draft, sorted_draft, staged_draft, translated_draft
from outrider.drafting.drafter import DraftContext, Drafter, DraftOutcome, DraftStyle, FinishedText
from outrider.drafting.forward_cost import ForwardCost
from outrider.errors import ConfigError
from outrider.sampling.params import SamplingParams
from outrider.token_tree import TokenTree, VerifiedPath
from outrider.verification.coupled import follow_choices
from tests.toy_model import ToyModel
from tests.toy_vocabulary import RenamedToyModel, num_shared, toy_translation

GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.9, top_k=12, frequency_penalty=0.3, seed=5)
COUPLED = DraftStyle()
REJECTION = DraftStyle("independent", "without_replacement")
TEXT = [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]


def parts(model: ToyModel, vocab_size: int = 24, num_blocks: int = 400) -> DraftParts:
    cache = KVCache(model.layer_shapes, num_blocks=num_blocks, block_size=4, dtype=model.cache_dtype)
    return DraftParts(model, cache, vocab_size, 64, ForwardCost.unknown)


def context(
    tokens: Sequence[int], params: SamplingParams = GREEDY, *, max_depth: int = 64, request_id: str = "r"
) -> DraftContext:
    return DraftContext(request_id, tokens, 3, 64, max_depth, params, 7, frozenset())


def generate(drafter: Drafter, target: ToyModel, params: SamplingParams, num_steps: int) -> list[TokenTree]:
    """Trees of a request that goes along the target's most probable tokens."""
    tokens, trees = list(TEXT), []
    for _ in range(num_steps):
        (tree,) = drafter.propose([context(list(tokens), params)])
        choices = []
        for node in range(tree.num_nodes):
            path = [tree.tokens[above] for above in tree.path(node)]
            choices.append(int(target._logits((*tokens, *path)).argmax()))
        path = follow_choices(tree, choices)
        outcome = DraftOutcome("r", tree, path, None, choices)
        drafter.observe([outcome])
        tokens += outcome.new_tokens
        trees.append(tree)
    return trees


# Staged


def staged(config: StagedConfig, style: DraftStyle, middle: DraftParts, innermost: ToyModel | None = None) -> Drafter:
    inner_config = drafter_config(config.drafter)

    def build(inner: DraftModelConfig, inner_style: DraftStyle) -> Drafter:
        assert innermost is not None
        return plain_draft(inner, inner_style, parts(innermost))

    inner = build_drafter(inner_config, style, TargetParts(24, lambda: bytes(32), build, ForwardCost.unknown))
    return staged_draft(config, style, middle, inner, inner_config)


SHAPES = {
    "chain": {"depth": 6, "min_path_prob": 0.0},
    "likely": {"depth": 8, "min_path_prob": 0.05},
    "tree": {"depth": 4, "width": 3, "max_expanded": 2, "max_nodes": 14, "min_path_prob": 0.0},
}


@pytest.mark.parametrize("inner", ["ngram", "recycling", "none", {"method": "draft_model", "depth": 3}], ids=str)
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("style", [COUPLED, REJECTION], ids=["coupled", "rejection"])
@pytest.mark.parametrize("shape", SHAPES)
def test_staged_trees_are_those_of_the_draft_alone(shape: str, style: DraftStyle, params, inner) -> None:
    """Tokens, confidences and distributions, to the last bit."""
    target, settings = ToyModel(memory=0.3), SHAPES[shape]
    alone = plain_draft(DraftModelConfig(**settings), style, parts(ToyModel(memory=0.2)))
    config = StagedConfig(**settings, drafter=inner)
    drafter = staged(config, style, parts(ToyModel(memory=0.2)), ToyModel(memory=0.1))
    expected = generate(alone, target, params, 12)
    got = generate(drafter, target, params, 12)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.parents == theirs.parents
        assert ours.confidences == theirs.confidences
        assert (ours.draft is None) == (theirs.draft is None)
        if ours.draft is not None and theirs.draft is not None:
            assert torch.equal(ours.draft.log_probs, theirs.draft.log_probs)


def num_forwards(inner: object, innermost: ToyModel | None, middle_memory: float, params: SamplingParams) -> int:
    middle = ToyModel(memory=middle_memory)
    config = StagedConfig(depth=6, min_path_prob=0.0, drafter=inner)
    generate(staged(config, COUPLED, parts(middle), innermost), ToyModel(memory=0.0), params, 20)
    return len(middle.num_rows)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_draft_model_runs_less_often(params: SamplingParams) -> None:
    alone = ToyModel(memory=0.2)
    generate(
        plain_draft(DraftModelConfig(depth=6, min_path_prob=0.0), COUPLED, parts(alone)),
        ToyModel(memory=0.0),
        params,
        20,
    )
    assert len(alone.num_rows) == 20 * 6, "a forward for each drafted token, the last one of a chain not read"
    assert num_forwards("none", None, 0.2, params) == 20 * 6
    perfect = {"method": "draft_model", "depth": 6, "max_nodes": 6, "min_path_prob": 0.0}
    assert num_forwards(perfect, ToyModel(memory=0.2), 0.2, params) == 20, "one forward where every guess is right"
    good = num_forwards(perfect, ToyModel(memory=0.1), 0.2, params)
    assert 20 < good < 80


def test_lookup_saves_forwards_on_a_text_that_repeats() -> None:
    assert num_forwards("ngram", None, 0.0, GREEDY) < 0.6 * 20 * 6


def test_a_tree_yields_more_tokens_a_target_call_than_a_chain() -> None:
    """The tree of the paper: siblings beside the chain, for the same number of the draft's forwards."""

    def yields(width: int) -> float:
        config = StagedConfig(depth=4, width=width, max_nodes=16, min_path_prob=0.0, drafter="ngram")
        drafter = staged(config, COUPLED, parts(ToyModel(memory=0.2)))
        target, tokens, steps = ToyModel(memory=0.9), list(TEXT), 0
        while len(tokens) < 200:
            (tree,) = drafter.propose([context(list(tokens))])
            paths = [[tree.tokens[above] for above in tree.path(node)] for node in range(tree.num_nodes)]
            choices = [int(target._logits((*tokens, *path)).argmax()) for path in paths]
            outcome = DraftOutcome("r", tree, follow_choices(tree, choices), None, choices)
            drafter.observe([outcome])
            tokens += outcome.new_tokens
            steps += 1
        return (len(tokens) - len(TEXT)) / steps

    assert yields(3) > yields(1) + 0.2


def test_inner_drafters_never_take_rejected_tokens_for_the_text() -> None:
    """What an inner drafter is told under the request's own id only ever grows along the committed text."""
    seen: list[tuple[str, list[int]]] = []

    class Recorder:
        name, max_nodes, returns_probs, reads_logits, num_without_room = "recorder", 3, False, False, 0

        def propose(self, contexts):
            seen.extend((c.request_id, list(c.token_ids)) for c in contexts)
            return [TokenTree.chain(c.token_ids[-1], [5, 6][: min(c.max_nodes, c.max_depth)]) for c in contexts]

        def observe(self, outcomes) -> None:
            pass

        def release(self, request_id: str, finished: FinishedText | None = None) -> None:
            pass

    config = StagedConfig(depth=4, min_path_prob=0.0)
    drafter = staged_draft(config, COUPLED, parts(ToyModel(memory=0.2)), Recorder(), drafter_config("ngram"))
    trees = generate(drafter, ToyModel(memory=0.9), GREEDY, 10)
    assert len(trees) == 10
    own = [tokens for request_id, tokens in seen if request_id == "r"]
    assert len(own) == 10
    for before, after in pairwise(own):
        assert after[: len(before)] == before
    assert any(request_id != "r" for request_id, _ in seen)


def test_staged_settings_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="unknown drafter"):
        drafter_config({"method": "staged", "drafter": "no such"})
    with pytest.raises(ConfigError, match=r"ngram\.depth"):
        drafter_config({"method": "staged", "drafter": {"method": "ngram", "depth": 0}})


# Sorted


def naive_exit(tokens: Sequence[int], levels: Sequence[ToyModel], min_confidence: float) -> tuple[int, int]:
    """The most probable next token by the first level that is confident, and that level."""
    for number, level in enumerate(levels):
        probs = torch.from_numpy(level._logits(tuple(tokens))).softmax(-1)
        if number == len(levels) - 1 or float(probs.max()) >= min_confidence:
            return int(probs.argmax()), number
    raise AssertionError


@pytest.mark.parametrize("min_confidence", [0.0, 0.45, 0.6, 1.0])
def test_each_token_exits_at_the_first_confident_sub_model(min_confidence: float) -> None:
    models = [ToyModel(memory=memory) for memory in (0.0, 0.5, 1.0)]
    config = SortedDraftConfig(depth=5, min_path_prob=0.0, min_confidence=min_confidence, layers=[1, 2, 3])
    drafter = sorted_draft(config, COUPLED, [parts(model) for model in models])
    tokens, exits = list(TEXT), [0, 0, 0]
    target = ToyModel(memory=0.6)
    for _ in range(15):
        (tree,) = drafter.propose([context(list(tokens))])
        made: list[int] = []
        for _ in range(5):
            token, level = naive_exit([*tokens, *made], models, min_confidence)
            made.append(token)
            exits[level] += 1
        assert tree.tokens == (tokens[-1], *made)
        choices = [int(target._logits((*tokens, *made[:i])).argmax()) for i in range(6)]
        outcome = DraftOutcome("r", tree, follow_choices(tree, choices), None, choices)
        drafter.observe([outcome])
        drafter.check_integrity()
        tokens += outcome.new_tokens
    assert drafter._runner.num_exits == exits  # type: ignore[attr-defined]
    if 0.0 < min_confidence < 1.0:
        assert min(exits) > 0, "every depth was used"
    else:
        assert exits[0 if min_confidence == 0.0 else 2] == sum(exits)


def test_a_sub_model_that_is_never_asked_never_runs() -> None:
    models = [ToyModel(memory=0.0), ToyModel(memory=0.5)]
    config = SortedDraftConfig(depth=4, min_path_prob=0.0, min_confidence=0.0, layers=[1, 2])
    generate(sorted_draft(config, COUPLED, [parts(m) for m in models]), ToyModel(memory=0.2), GREEDY, 8)
    assert models[0].num_rows
    assert not models[1].num_rows


@pytest.mark.parametrize(
    "settings", [{"layers": []}, {"layers": [2, 1]}, {"layers": [0, 1]}, {"layers": "12"}, {"min_confidence": 2}]
)
def test_sorted_settings(settings: dict) -> None:
    with pytest.raises(ConfigError, match="sorted_draft"):
        drafter_config({"method": "sorted_draft", **settings})


# Another vocabulary, token by token


def shared_log_probs(tokens: Sequence[int], memory: float = 0.3) -> np.ndarray:
    """The draft's log q over the target's tokens, by hand."""
    translation = toy_translation(24)
    seen = tuple(draft for token in tokens for draft in translation.spell(token))
    own = RenamedToyModel(memory=memory)._logits(seen)
    logits = np.full(24, -np.inf)
    for target, draft in translation.pairs:
        logits[target] = own[draft]
    return logits - np.log(np.exp(logits).sum())


def test_translated_distributions() -> None:
    config = DraftModelConfig(depth=3, width=2, max_expanded=2, min_path_prob=0.0)
    drafter = translated_draft(config, REJECTION, parts(RenamedToyModel(memory=0.3)), toy_translation(24))
    tokens = [*TEXT, 23, 4]  # 23 is none of the draft's
    (tree,) = drafter.propose([context(tokens, SamplingParams(temperature=1.0))])
    assert tree.draft is not None
    for node, children in enumerate(tree.children()):
        if children:
            path = [tree.tokens[above] for above in tree.path(node)]
            expected = shared_log_probs([*tokens, *path])
            np.testing.assert_allclose(tree.draft.log_probs[node].numpy(), expected, atol=1e-5)
    assert all(token < num_shared(24) for token in tree.tokens[1:])


def test_translated_chain_is_the_drafts_own_continuation() -> None:
    """Also behind committed tokens that the draft cannot say, and with the target's own noise."""
    config = DraftModelConfig(depth=4, min_path_prob=0.0)
    drafter = translated_draft(config, COUPLED, parts(RenamedToyModel(memory=0.3)), toy_translation(24))
    rng = random.Random(1)
    tokens = list(TEXT)
    for _ in range(12):
        (tree,) = drafter.propose([context(list(tokens))])
        made: list[int] = []
        for _ in range(4):
            made.append(int(shared_log_probs([*tokens, *made]).argmax()))
        assert tree.tokens[1:] == tuple(made)
        num_accepted = rng.randrange(5)
        path = VerifiedPath(tuple(range(1, num_accepted + 1)), rng.choice([3, 22, 23]))
        drafter.observe([DraftOutcome("r", tree, path, None)])
        drafter.check_integrity()
        tokens += [*made[:num_accepted], path.next_token]
