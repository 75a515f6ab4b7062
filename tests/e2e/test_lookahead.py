"""Parallel decoding without a draft, on the bundled model: fewer steps for more rows, and the same tokens."""

from __future__ import annotations

import pytest

from outrider import LLM, SamplingParams
from outrider.bench.held_out import held_out_prompts
from outrider.drafting.jacobi import JacobiDrafter

PARAMS = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)


@pytest.fixture(scope="module")
def plain() -> LLM:
    return LLM(decoding="none")


def outputs(llm: LLM, params: SamplingParams = PARAMS) -> list[list[int]]:
    prompts, _ = held_out_prompts(4)
    return [output.outputs[0].token_ids for prompt in prompts for output in llm.generate(prompt, params)]


def test_steps_fall_as_the_window_and_the_ngrams_grow(plain: LLM) -> None:
    """With n-grams of trajectories alone, started from random tokens."""
    expected, num_steps = outputs(plain), []
    for window, ngram, guesses in ((1, 2, 1), (3, 3, 3), (7, 5, 7), (15, 5, 15)):
        sizes = {"window": window, "ngram": ngram, "guesses": guesses}
        llm = plain.with_decoding({"method": "lookahead", "text_ngrams": False, "initial": "random", **sizes})
        assert outputs(llm) == expected
        num_steps.append(llm.engine.stats.num_steps)
    assert num_steps == sorted(num_steps, reverse=True)
    assert num_steps[-1] < 0.75 * num_steps[0]


@pytest.mark.parametrize("mode", ["jacobi", "gs_jacobi", "hybrid"])
def test_jacobi_iterations_are_no_more_than_tokens(mode: str, plain: LLM) -> None:
    for params in (PARAMS, SamplingParams(temperature=0.8, max_tokens=64, ignore_eos=True, seed=3)):
        expected = outputs(plain, params)
        llm = plain.with_decoding({"method": "jacobi", "mode": mode, "parallel_length": 32})
        assert outputs(llm, params) == expected
        assert llm.engine.stats.num_steps < sum(map(len, expected))
        drafter = llm.engine.drafter
        assert isinstance(drafter, JacobiDrafter)
        graphs = [drafter.fixed_at(request_id) for request_id in drafter._traces]
        assert [len(graph) for graph in graphs] == [64] * 4
