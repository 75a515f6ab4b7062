"""Jacobi decoding against the equations: every block proposed is the iterate that the papers define."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from outrider.config import JacobiConfig
from outrider.drafting.drafter import DraftContext, DraftOutcome, DraftStyle
from outrider.drafting.initial_guess import InitialGuess
from outrider.drafting.jacobi import MAX_TRACES, JacobiDrafter
from outrider.errors import ConfigError
from outrider.sampling.noise import Purpose, gumbel_noise
from outrider.sampling.params import SamplingParams
from outrider.token_tree import TokenTree, VerifiedPath
from tests.losslessness import engine_harness
from tests.losslessness.engine_harness import make_engine, make_request, run
from tests.toy_model import ToyModel

VOCAB, LENGTH = 24, 40
GREEDY = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.5, max_tokens=LENGTH, ignore_eos=True, seed=7)
PROMPT = [3, 1, 4, 1, 5]
Choose = Callable[[Sequence[int]], int]


def target(params: SamplingParams) -> Choose:
    """The equation of one position: what the target chooses after some tokens."""
    model = ToyModel(VOCAB, memory=0.0)

    def choose(tokens: Sequence[int]) -> int:
        logits = model._logits(tuple(tokens))
        if params.greedy:
            return int(logits.argmax())
        noise = gumbel_noise(params.seed or 0, len(tokens), Purpose.TARGET, VOCAB)
        return int((logits / np.float32(params.temperature) + noise).argmax())

    return choose


def decode(config: JacobiConfig, params: SamplingParams, monkeypatch: pytest.MonkeyPatch):
    """Runs the engine; returns the request, its drafter and the guesses of every step."""
    monkeypatch.setitem(engine_harness.CATALOGUE, "under test", config)
    engine = make_engine("under test", model=ToyModel(VOCAB, memory=0.0))
    assert isinstance(engine.drafter, JacobiDrafter)
    right, proposals = engine.drafter.propose, []

    def propose(contexts: Sequence[DraftContext]) -> list[TokenTree]:
        trees = right(contexts)
        proposals.extend(list(tree.tokens[1:]) for tree in trees)
        return trees

    monkeypatch.setattr(engine.drafter, "propose", propose)
    request = make_request("r", PROMPT, params, ToyModel(VOCAB))
    run(engine, [request])
    return request, engine.drafter, proposals


def solution(choose: Choose) -> list[int]:
    tokens = list(PROMPT)
    for _ in range(LENGTH):
        tokens.append(choose(tokens))
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_one_block_is_the_jacobi_iteration_of_the_whole_system(
    params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All equations at once from a start of zeros, as in Song et al."""
    choose = target(params)
    iterates = [[0] * LENGTH]
    expected = solution(choose)
    while iterates[-1] != expected:
        iterates.append([choose([*PROMPT, *iterates[-1][:i]]) for i in range(LENGTH)])
        assert len(iterates) <= LENGTH + 1, "more iterations than unknowns"
    config = JacobiConfig(mode="gs_jacobi", block_size=LENGTH, initial="zero")
    request, drafter, proposals = decode(config, params, monkeypatch)
    assert request.output_token_ids == expected
    num_known = 0
    for iterate, proposal in zip(iterates, proposals, strict=False):
        assert proposal == iterate[num_known : LENGTH - 1]
        right = next((i for i in range(LENGTH) if iterate[i] != expected[i]), LENGTH)
        num_known = min(right + 1, LENGTH)
    assert request.metrics.num_steps == len(proposals) <= LENGTH
    fixed_at = [
        next(k for k in range(len(iterates)) if all(later[i] == expected[i] for later in iterates[k:]))
        for i in range(LENGTH)
    ]
    assert drafter.fixed_at("r") == tuple(fixed_at)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("mode", ["jacobi", "gs_jacobi", "hybrid"])
def test_blocks_follow_their_definitions(mode: str, params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:
    choose, size, parallel_length = target(params), 4, 22
    expected = solution(choose)
    guesses: dict[int, int] = {}  # output position -> guess
    num_known, block_end, steps = 0, 0, []
    while num_known < LENGTH:
        if mode == "jacobi":
            window = range(num_known, num_known + size)
        else:
            if num_known >= block_end:  # the block is solved: the next one
                block_end = num_known + size
                if mode == "hybrid":
                    block_end = max(min(block_end, parallel_length), num_known)
                guesses = {}
            window = range(num_known, block_end)
        block = [guesses.get(position, 0) for position in window][: LENGTH - num_known - 1]
        steps.append(block)
        known = [*PROMPT, *expected[:num_known]]
        for index in range(len(block) + 1):
            guesses[num_known + index] = choose([*known, *block[:index]])
        right = next((i for i, token in enumerate(block) if token != expected[num_known + i]), len(block))
        num_known += right + 1
    config = JacobiConfig(mode=mode, block_size=size, initial="zero", parallel_length=parallel_length)  # type: ignore[arg-type]
    request, _, proposals = decode(config, params, monkeypatch)
    assert proposals == steps
    assert request.output_token_ids == expected
    assert request.metrics.num_steps <= LENGTH
    if mode == "hybrid":
        assert proposals[-10:] == [[]] * 10, "plain decoding behind parallel_length"


def context(
    tokens: list[int], *, num_prompt: int | None = None, seed: int = 0, max_nodes: int = 64, request_id: str = "r"
) -> DraftContext:
    return DraftContext(request_id, tokens, num_prompt or len(tokens), max_nodes, 64, GREEDY, seed, frozenset())


def test_initial_guesses() -> None:
    tokens = [5, 6, 5, 7, 8, 5]

    def guesses(kind, *, seed: int = 0, first: int = 6) -> list[int]:
        return InitialGuess(kind, 100).tokens(context(tokens, num_prompt=4, seed=seed), first, 5, before=5)

    assert guesses("last") == [5] * 5
    assert guesses("zero") == [0] * 5
    assert guesses("prompt") == [5, 7, 5, 6, 5], "position 6 of a prompt of four"
    assert guesses("ngram") == [7, 8, 5, 7, 8], "7 was the last to follow 5"
    assert guesses("random") == guesses("random")
    assert guesses("random") != guesses("random", seed=1)
    assert guesses("random")[1:] == guesses("random", first=7)[:4], "keyed by position"
    assert all(0 <= token < 100 for token in guesses("random"))
    assert InitialGuess("ngram", 100).tokens(context([1, 2]), 2, 3, before=2) == [2, 2, 2], "nothing followed 2"


def test_ngram_guesses_learn_new_text() -> None:
    initial = InitialGuess("ngram", 100)
    assert initial.tokens(context([1, 2, 1]), 3, 2, before=1) == [2, 1]
    assert initial.tokens(context([1, 2, 1, 3, 1]), 5, 2, before=1) == [3, 1]


def test_rejection_rules_at_a_temperature_iterate_by_the_most_probable_tokens() -> None:
    config = JacobiConfig(mode="jacobi", block_size=2, initial="zero")
    assert not JacobiDrafter(config, DraftStyle(), 10).reads_logits
    drafter = JacobiDrafter(config, DraftStyle("independent", chains_only=True), 10)
    assert drafter.reads_logits
    (tree,) = drafter.propose([context([4])])
    logits = torch.eye(10)[[5, 6, 7]]
    drafter.observe([DraftOutcome("r", tree, VerifiedPath((), 9), logits)])
    (tree,) = drafter.propose([context([4, 9])])
    assert tree.tokens == (9, 6, 7)


def test_a_tree_of_another_drafter_refines_what_it_holds() -> None:
    drafter = JacobiDrafter(JacobiConfig(mode="jacobi", block_size=4, initial="zero"), DraftStyle(), 10)
    drafter.propose([context([4])])  # guesses 0 0 0 0
    tree = TokenTree.from_paths(4, [[8, 9], [0, 0, 1]], 10)  # nodes 4 | 8 9 | 0 0 1
    outcome = DraftOutcome("r", tree, VerifiedPath((1,), 3), None, (8, 3, 1, 5, 6, 7))
    drafter.observe([outcome])
    (tree,) = drafter.propose([context([4, 8, 3])])
    # Choices after 4, 4 0, 4 0 0 are 8, 5, 6: the second and third are new guesses, two of them behind 8, 3.
    assert tree.tokens == (3, 6, 0, 0, 0)
    (tree,) = drafter.propose([context([4, 8, 3, 6])])
    assert tree.tokens == (6, 0, 0, 0, 0), "a step that nobody told the drafter of"
    (tree,) = drafter.propose([context([4, 8])])
    assert tree.tokens == (8, 0, 0, 0, 0), "another text starts again"


def test_fewer_rows_than_guesses() -> None:
    drafter = JacobiDrafter(JacobiConfig(mode="jacobi", block_size=4, initial="zero"), DraftStyle(), 10)
    (tree,) = drafter.propose([context([4], max_nodes=2)])
    assert tree.tokens == (4, 0, 0)
    drafter.observe([DraftOutcome("r", tree, VerifiedPath((), 9), None, (9, 6, 7))])
    (tree,) = drafter.propose([context([4, 9])])
    assert tree.tokens == (9, 6, 7, 0, 0)
    assert drafter.propose([context([4, 9], max_nodes=0)])[0].num_nodes == 1


def test_traces_are_bounded_and_outlive_their_requests() -> None:
    drafter = JacobiDrafter(JacobiConfig(), DraftStyle(), 10)
    for index in range(MAX_TRACES + 5):
        request_id = f"r{index}"
        (tree,) = drafter.propose([context([4], request_id=request_id)])
        choices = tuple(range(tree.num_nodes))
        drafter.observe([DraftOutcome(request_id, tree, VerifiedPath((), 0), None, choices)])
        drafter.release(request_id)
    assert drafter.fixed_at("r0") == ()
    assert drafter.fixed_at(f"r{MAX_TRACES + 4}") == (1,)
    assert len(drafter._traces) == MAX_TRACES
    assert not drafter._blocks


@pytest.mark.parametrize(
    "values", [{"mode": "newton"}, {"block_size": 0}, {"initial": "best"}, {"parallel_length": -1}]
)
def test_wrong_settings_are_refused(values: dict) -> None:
    with pytest.raises(ConfigError, match=f"jacobi.{next(iter(values))}"):
        JacobiConfig(**values)
