"""The compiled attention and cache writes: the truth, row invariance, trees, and what a row must not see."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outrider.kernels import native
from outrider.kernels.attention import AttentionParams, FlatSequences
from tests.parity.attention_checks import (
    NAN,
    Step,
    check_bad_rows,
    check_batches,
    check_layouts,
    check_near_truth,
    check_rows_alone,
    check_threads,
    decode,
    encode,
    make_step,
)
from tests.parity.kernel_levels import LEVELS, assert_same_bits, use_level, use_threads

TREE = (-1, 0, 0, 1, 1, 2, 5, 3)
FOREST = (-1, -1, 0, 1, 2)  # several rows hang off the context
CHUNK_AND_TREE = (-1, 0, 1, *(parent + 3 for parent in TREE))
STAR = (-1, *(0,) * 90)
COMB = tuple(
    max(row - 1 - row % 2, -1) for row in range(141)
)  # every other row of a long way down has a second child
DTYPES = [torch.float32, torch.bfloat16, torch.int8]

# A split is 64 keys: contexts around multiples of it, and trees that reach over the end of one and of several.
CONTEXTS = [0, 1, 7, 8, 15, 16, 17, 31, 33, 59, 62, 63, 64, 65, 100, 126, 127, 128, 129, 191, 192, 193, 255, 256, 300]
OPTIONS = {
    "plain": {},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "window of a split": {"window": 64},
    "window of two": {"window": 130},
    "softcap": {"softcap": 0.7},
    "softcap of fifty": {"softcap": 50.0},
    "sinks": {"sinks": True},
    "all": {"window": 70, "softcap": 2.0, "sinks": True},
}
MIX = [(TREE, 9), ((-1,), 70), (CHUNK_AND_TREE, 61), (FOREST, 12), (tuple(range(-1, 19)), 0), ((-1,), 0), (COMB, 130)]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_level(request.param):
        yield request.param


def check_bits(step: Step) -> None:
    check_rows_alone(native.attention, step)
    check_batches(native.attention, step)
    check_layouts(native.attention, step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contexts(level: str, dtype: torch.dtype) -> None:
    for context in CONTEXTS:
        for parents in (TREE, tuple(range(-1, 6)), (-1,)):
            step = make_step([(parents, context)], dtype=dtype, seed=context)
            check_near_truth(native.attention, step)
            check_rows_alone(native.attention, step)


@pytest.mark.parametrize("parents", [TREE, FOREST, CHUNK_AND_TREE, STAR, COMB, tuple(range(-1, 149))])
def test_trees(level: str, parents: tuple[int, ...]) -> None:
    for context in (0, 5, 60, 64, 127, 200):
        step = make_step([(parents, context)], seed=context)
        check_near_truth(native.attention, step)
        check_rows_alone(native.attention, step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_options(level: str, options: str, dtype: torch.dtype) -> None:
    for scattered in (False, True):
        step = make_step(MIX, dtype=dtype, scattered=scattered, **OPTIONS[options])
        check_near_truth(native.attention, step)
        check_bits(step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 2, 3, 5, 6, 7, 8, 71])
def test_groups(level: str, group: int, dtype: torch.dtype) -> None:
    """Up to six queries share the loads of keys and values."""
    for kv_heads in (1, 3):
        step = make_step([(TREE, 66), ((-1, 0, 1), 3)], heads=(kv_heads * group, kv_heads, 8, 12), dtype=dtype)
        check_near_truth(native.attention, step)
        check_bits(step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_vectors(level: str, dtype: torch.dtype) -> None:
    """Widths of whole vectors go short ways, and values for few queries are read where they are."""
    chain = tuple(range(-1, 19))
    for heads in ((8, 4, 32, 32), (12, 2, 64, 96), (5, 1, 128, 64)):
        step = make_step(
            [(chain, 70), ((-1,), 200), ((-1, 0, 1), 130), (TREE, 130)], heads=heads, dtype=dtype, window=140
        )
        check_near_truth(native.attention, step)
        check_bits(step)
        check_threads(native.attention, step)


WIDTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 20, 31, 33, 64, 80, 100, 127, 128, 129, 255, 256, 257, 300, 600]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths(level: str, dtype: torch.dtype) -> None:
    for i, width in enumerate(WIDTHS):
        for value_width in (width, WIDTHS[-1 - i]):
            step = make_step([(TREE, 60), ((-1, 0), 65)], heads=(2, 1, width, value_width), dtype=dtype, seed=i)
            check_near_truth(native.attention, step)
            check_rows_alone(native.attention, step)


def test_keys_and_values_of_different_types(level: str) -> None:
    keys, values = make_step(MIX, dtype=torch.int8), make_step(MIX, dtype=torch.bfloat16)
    step = replace(keys, value_cache=values.value_cache)
    check_near_truth(native.attention, step)
    check_rows_alone(native.attention, step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_threads(level: str, dtype: torch.dtype) -> None:
    for layouts in (MIX, [((-1,), 3)], [(tuple(range(-1, 149)), 40)]):
        check_threads(native.attention, make_step(layouts, heads=(6, 3, 16, 16), dtype=dtype))


def test_a_chain_is_a_tree(level: str) -> None:
    """Rows of a chain go another way than rows of a tree; both give the same bits."""

    def as_trees(
        query: Tensor, keys: Tensor, values: Tensor, sequences: FlatSequences, params: AttentionParams
    ) -> Tensor:
        every = np.zeros_like(sequences.is_chain)
        return native.attention(query, keys, values, replace(sequences, is_chain=every), params)

    for options in OPTIONS.values():
        for context in (0, 3, 63, 64, 200):
            step = make_step([(tuple(range(-1, 139)), context), ((-1, 0, 1), context), ((-1,), context)], **options)
            assert_same_bits(step.run(as_trees), step.run(native.attention))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_rows(level: str, dtype: torch.dtype) -> None:
    for context in (0, 9, 62):
        step = make_step([(TREE, context), (CHUNK_AND_TREE, 3), ((-1, 0, 1, 2), context), (FOREST, 5)], dtype=dtype)
        check_bad_rows(native.attention, step)


def test_large_scores(level: str) -> None:
    """Of any size that float32 holds, and the last key's far above or far below all others."""
    for factor in (1e-30, 30.0, 1e4, 1e16):
        step = make_step(MIX)
        step = replace(step, query=step.query * factor)
        out = step.run(native.attention)
        assert out.isfinite().all()
        check_bits(step)
        if factor < 100:
            check_near_truth(native.attention, step)


def test_sinks_far_from_the_scores(level: str) -> None:
    for sink in (-1e30, -100.0, 40.0):
        step = make_step(MIX, sinks=True)
        step = replace(step, params=replace(step.params, sinks=torch.full((4,), sink)))
        check_near_truth(native.attention, step)
        check_rows_alone(native.attention, step)


WRITTEN = {
    "random": torch.randn(6, 3, 1030, generator=torch.Generator().manual_seed(0)),
    "ties": (torch.arange(6 * 3 * 1030).view(6, 3, 1030) % 509 - 254)
    / 2,  # halves of integers, and of bfloat16 steps
    "zeros": torch.zeros(6, 3, 1030),
    "hardly quantised": torch.randn(6, 3, 1030, generator=torch.Generator().manual_seed(0)).sign() * 3.7345e-37,
    "small": torch.randn(6, 3, 1030, generator=torch.Generator().manual_seed(0)) * 1e-37,
    "subnormal": torch.randn(6, 3, 1030, generator=torch.Generator().manual_seed(0)) * 1e-40,
    "large": torch.randn(6, 3, 1030, generator=torch.Generator().manual_seed(0)).clamp(-3.4, 3.4) * 1e38,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("written", WRITTEN)
def test_writes(level: str, written: str, dtype: torch.dtype) -> None:
    """The rows' slots hold what the dtype makes of the rows, every other byte is as it was."""
    for width in (1, 2, 5, 8, 15, 16, 17, 64, 65, 100, 128, 257):
        rows = WRITTEN[written][..., :width] * torch.tensor([1.0, -0.25, 0.01])[:, None]
        slots = torch.tensor([3, 19, 0, 7, 8, 12])
        stored = encode(rows, dtype)
        cache = torch.full((20, *stored.shape[1:]), 77, dtype=dtype)
        expected = cache.clone()
        expected[slots] = stored
        native.write_kv(rows, cache, slots)
        assert torch.equal(cache.view(torch.int8), expected.view(torch.int8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [NAN, float("inf"), float("-inf")])
def test_writes_of_bad_rows(level: str, bad: float, dtype: torch.dtype) -> None:
    """Stay as bad as they are, in their own head; a head of int8 has one scale and is bad as a whole."""
    for width in (1, 15, 33):
        for place in {0, width // 2, width - 1}:
            rows = torch.randn(5, 3, width, generator=torch.Generator().manual_seed(0))
            clean = torch.zeros_like(encode(rows, dtype))
            native.write_kv(rows, clean, torch.arange(5))
            rows[2, 1, place] = bad
            cache = torch.zeros_like(clean)
            native.write_kv(rows, cache, torch.arange(5))
            head = decode(cache)[2, 1]
            assert not (head if dtype == torch.int8 else head[place]).isfinite().any()
            clean[2, 1] = cache[2, 1]
            assert torch.equal(cache.view(torch.int8), clean.view(torch.int8))


def test_writes_of_no_rows(level: str) -> None:
    cache = torch.zeros(4, 2, 8)
    native.write_kv(torch.empty(0, 2, 8), cache, torch.empty(0, dtype=torch.int64))
    assert not cache.any()


def test_forms_of_input(level: str) -> None:
    step = make_step(MIX)
    step = replace(step, query=step.query.bfloat16().float())
    expected = step.run(native.attention)
    for query in (
        step.query.bfloat16(),
        step.query.double(),
        step.query.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert_same_bits(replace(step, query=query).run(native.attention), expected)


def test_calls_from_several_threads(level: str) -> None:
    """Callers take turns; the number of threads may change meanwhile."""
    steps = [make_step(MIX[i:], heads=(4, 1 + i % 2, 16, 16), dtype=DTYPES[i % 3], seed=i) for i in range(len(MIX))]
    expected = [step.run(native.attention) for step in steps]

    def call_all(start: int) -> None:
        for i in range(3 * len(steps)):
            which = (start + i) % len(steps)
            if i % 5 == 0:
                native.set_num_threads(1 + i % 3)
            assert_same_bits(steps[which].run(native.attention), expected[which])

    with use_threads(3), ThreadPoolExecutor(4) as executor:
        for done in [executor.submit(call_all, start) for start in range(4)]:
            done.result()


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], int]:
    """Parents and context of one sequence: one row, a chain, or any forest."""
    num_rows = draw(st.integers(1, 24) | st.just(1) | st.just(80))
    context = draw(st.integers(0, 140))
    if num_rows == 80 or draw(st.booleans()):
        reach = draw(st.integers(1, num_rows))  # how far above a row its parent may stand
        seed = draw(st.integers(0, 2**20))
        steps = np.random.default_rng(seed).integers(1, reach + 1, num_rows)
        return tuple(max(int(row - step), -1) for row, step in enumerate(steps)), context
    return tuple(draw(st.integers(-1, row - 1)) for row in range(num_rows)), context


def check_random_steps(max_examples: int) -> None:
    @settings(max_examples=max_examples)
    @given(
        level=st.sampled_from(LEVELS),
        sequences=st.lists(layouts(), min_size=1, max_size=4),
        kv_heads=st.integers(1, 3),
        group=st.integers(1, 9),
        widths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
        dtype=st.sampled_from(DTYPES),
        window=st.none() | st.integers(1, 200),
        softcap=st.none() | st.floats(0.5, 60),
        sinks=st.booleans(),
        scattered=st.booleans(),
        num_threads=st.sampled_from([1, 1, 2, 3]),
        seed=st.integers(0, 2**20),
    )
    def check(
        *,
        level: str,
        sequences: list[tuple[tuple[int, ...], int]],
        kv_heads: int,
        group: int,
        widths: tuple[int, int],
        dtype: torch.dtype,
        window: int | None,
        softcap: float | None,
        sinks: bool,
        scattered: bool,
        num_threads: int,
        seed: int,
    ) -> None:
        with use_level(level), use_threads(num_threads):
            step = make_step(
                sequences,
                heads=(kv_heads * group, kv_heads, *widths),
                dtype=dtype,
                window=window,
                softcap=softcap,
                sinks=sinks,
                scattered=scattered,
                seed=seed,
            )
            check_near_truth(native.attention, step)
            check_bits(step)

    check()


@pytest.mark.skipif(not LEVELS, reason="built without kernels")
def test_random_steps() -> None:
    check_random_steps(60)


@pytest.mark.slow
@pytest.mark.skipif(not LEVELS, reason="built without kernels")
def test_many_random_steps() -> None:
    check_random_steps(1500)
