"""Processors against a slow reference, row by row in plain Python, after vLLM's definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outrider.sampling.params import SamplingParams
from outrider.sampling.processors import RowContext, process_logits
from outrider.sampling.sampler import check_finite
from outrider.token_tree import TokenTree, TokenTreeBatch

TREE = TokenTree((3, 5, 2, 5, 5), (-1, 0, 0, 1, 3))
FULL = SamplingParams(
    temperature=0.7,
    top_k=5,
    top_p=0.9,
    min_p=0.02,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.3,
    logit_bias={1: 2.5, 6: -1.0},
    min_tokens=3,
)


def context_of(params: SamplingParams, tree: TokenTree = TREE, first_row: int = 0) -> RowContext:
    rows = slice(first_row, first_row + tree.num_nodes)
    return RowContext(rows, params, [4, 0, 4, 6, tree.tokens[0]], 3, tree, frozenset({0, 2}))


def reference_row(
    logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> list[float]:
    """One row, one token at a time; ranks by (probability, lower id)."""
    row = [value + params.logit_bias.get(token, 0.0) for token, value in enumerate(logits)]
    if len(output) < params.min_tokens:
        row[0] = row[2] = -math.inf
    for token in range(len(row)):
        if token in prompt or token in output:
            penalty = params.repetition_penalty
            row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
        row[token] -= params.frequency_penalty * output.count(token)
        row[token] -= params.presence_penalty * (token in output)
    if params.temperature == 0:
        return row
    row = [value / params.temperature for value in row]
    if params.min_p > 0:
        largest = max(row)
        row = [v if math.exp(v - largest) >= params.min_p else -math.inf for v in row]
    ranked = sorted(range(len(row)), key=lambda token: (-row[token], token))
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    if params.top_p < 1:
        weights = [math.exp(row[token] - max(row)) for token in ranked]
        kept, reached = 0, 0.0
        while kept < len(ranked) and reached < params.top_p:
            reached += weights[kept] / math.fsum(weights)
            kept += 1
        ranked = ranked[:kept]
    return [value if token in ranked else -math.inf for token, value in enumerate(row)]


def reference(logits: Tensor, context: RowContext) -> Tensor:
    rows = []
    for node, row in enumerate(logits.tolist()):
        tokens = [*context.token_ids, *(context.tree.tokens[n] for n in context.tree.path(node))]
        split = context.num_prompt_tokens
        rows.append(reference_row(row, context.params, tokens[:split], tokens[split:]))
    return torch.tensor(rows)


def logits_of(num_rows: int, vocab: int, seed: int = 0) -> Tensor:
    return 3 * torch.from_numpy(np.random.default_rng(seed).standard_normal((num_rows, vocab))).float()


@given(
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        top_k=st.sampled_from([-1, 0, 1, 3, 7, 8, 100]),
        top_p=st.sampled_from([0.05, 0.6, 0.95, 1.0]),
        min_p=st.sampled_from([0.0, 0.03, 0.4]),
        repetition_penalty=st.sampled_from([1.0, 0.7, 1.5]),
        presence_penalty=st.sampled_from([0.0, 0.6, -1.5]),
        frequency_penalty=st.sampled_from([0.0, 0.9, -0.2]),
        logit_bias=st.sampled_from([{}, {1: 3.0, 7: -50.0}]),
        min_tokens=st.sampled_from([0, 2, 3, 9]),
    ),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=300)
def test_rows_are_what_the_reference_says(params: SamplingParams, seed: int) -> None:
    logits = logits_of(TREE.num_nodes, 8, seed)
    before = logits.clone()
    context = context_of(params)
    torch.testing.assert_close(process_logits(logits, [context]), reference(logits, context))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("vocab", [7, 4096, 50_000])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_alone_equals_the_row_in_any_batch(vocab: int, threads: int) -> None:
    """Bit for bit: what else is in the batch, and how many threads there are, changes nothing."""
    all_params = [
        FULL,
        SamplingParams(),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.8, top_p=0.9),
        SamplingParams(temperature=0.8, top_k=50),
        SamplingParams(temperature=0.8, top_p=0.9),
        replace(FULL, seed=1),
        SamplingParams(temperature=0.8, min_p=0.1),
        SamplingParams(temperature=1e-8, top_p=0.5),
    ]
    trees = TokenTreeBatch.from_trees([TREE] * len(all_params))
    logits = logits_of(trees.num_nodes, vocab)
    contexts = [context_of(params, first_row=5 * index) for index, params in enumerate(all_params)]
    previous = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = process_logits(logits, contexts)
        for index, params in enumerate(all_params):
            for node in range(TREE.num_nodes):
                path = [TREE.tokens[n] for n in TREE.path(node)]
                root = TokenTree.root_only((3, *path)[-1])
                alone = RowContext(slice(0, 1), params, [4, 0, 4, 6, 3, *path], 3, root, frozenset({0, 2}))
                row = 5 * index + node
                assert torch.equal(process_logits(logits[row : row + 1], [alone])[0], together[row])
    finally:
        torch.set_num_threads(previous)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    logits = logits_of(TREE.num_nodes, 8).to(dtype)
    processed = process_logits(logits, [context_of(FULL)])
    assert processed.dtype == torch.float32
    torch.testing.assert_close(processed, reference(logits.float(), context_of(FULL)))


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0, top_k=3, top_p=0.1)])
def test_nothing_to_do_costs_no_copy(params: SamplingParams) -> None:
    logits = logits_of(TREE.num_nodes, 8)
    assert process_logits(logits, [context_of(params)]) is logits


def test_ties_at_the_border_keep_the_lowest_ids() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0, 2.0, 0.0], [0.0] * 6])
    contexts = [
        RowContext(slice(row, row + 1), SamplingParams(top_k=3), [], 0, TokenTree.root_only(0), ())
        for row in range(2)
    ]
    kept = process_logits(logits, contexts).isfinite()
    assert kept.tolist() == [[True, True, False, False, True, False], [True, True, True, False, False, False]]
    contexts = [replace(context, params=SamplingParams(top_p=0.5)) for context in contexts]
    assert process_logits(logits, contexts).isfinite()[1].tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize("temperature", [1e-2, 1e-4, 1e-8, 1e-45, 5e-324])
def test_cold_temperatures_stay_finite(temperature: float) -> None:
    logits = torch.tensor([[80.0, 79.9, -200.0, 80.0]])
    params = SamplingParams(temperature=temperature)
    row = process_logits(logits, [RowContext(slice(0, 1), params, [], 0, TokenTree.root_only(0), ())])[0]
    assert row.softmax(-1).tolist() == pytest.approx([0.5, 0.0, 0.0, 0.5], abs=1e-4)


@pytest.mark.parametrize("params", [FULL, SamplingParams(top_k=2), SamplingParams(top_p=0.5, temperature=0.5)])
@pytest.mark.parametrize("bad", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]])
def test_unsound_rows_stay_unsound_and_alone(params: SamplingParams, bad: list[float]) -> None:
    logits = logits_of(2 * TREE.num_nodes, 8)
    logits[1] = torch.tensor(bad * 4)
    contexts = [context_of(params), context_of(params, first_row=5)]
    assert check_finite(logits).tolist() == [True, False, *[True] * 8]
    processed = process_logits(logits, contexts)
    assert check_finite(processed).tolist() == [True, False, *[True] * 8]
    torch.testing.assert_close(processed[5:], reference(logits[5:], contexts[1]))


def test_excluding_every_token_gives_an_unsound_row() -> None:
    params = SamplingParams(min_tokens=5)
    context = RowContext(slice(0, 1), params, [], 0, TokenTree.root_only(0), range(8))
    assert check_finite(process_logits(logits_of(1, 8), [context])).tolist() == [False]
