"""What drafting computes in compiled code, against the same in Python: equal to the bit, orders included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.drafting.sources.calibration import Calibration, PythonBins
from outrider.drafting.sources.matches import MAX_LENGTH, weighted_paths
from outrider.drafting.sources.trigrams import PythonMatrix, SearchLimits, new_matrix, search
from outrider.drafting.top_tokens import top_tokens
from outrider.drafting.tree_merge import WeightedPath, merge_paths
from outrider.kernels.drafting import compiled, largest
from outrider.kernels.native import REFERENCE
from outrider.sampling.noise import Purpose, gumbel_noise, rank_with_noise
from tests.parity.kernel_levels import LEVELS, use_level

pytestmark = pytest.mark.skipif(not LEVELS, reason="outrider was built without a compiler")

MASK = 2**64 - 1
TOKENS = st.integers(0, 3)


def plain(paths: list[WeightedPath]) -> list[tuple[list[int], list[float]]]:
    return [(list(path.tokens), list(path.confidences)) for path in paths]


@given(
    st.lists(st.tuples(st.lists(TOKENS, max_size=6), st.integers(0, MAX_LENGTH)), max_size=12),
    st.integers(0, 6),
    st.sampled_from([list, tuple, lambda tokens: np.array(tokens, dtype=np.int64)]),
)
def test_weighted_paths(candidates: list[tuple[list[int], int]], max_paths: int, kind: type) -> None:
    candidates.sort(key=lambda candidate: -candidate[1])
    compiled = weighted_paths([(kind(tokens), length) for tokens, length in candidates], max_paths)
    with use_level(REFERENCE):
        assert plain(compiled) == plain(weighted_paths(candidates, max_paths))


@given(
    st.lists(st.lists(st.tuples(TOKENS, st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])), max_size=6), max_size=8),
    st.integers(0, 12),
    st.integers(0, 6),
    st.sampled_from([0.0, 0.1, 0.5]),
)
def test_merged_trees(found: list[list[tuple[int, float]]], max_nodes: int, max_depth: int, least: float) -> None:
    paths = [WeightedPath([token for token, _ in path], [prob for _, prob in path]) for path in found]
    compiled = merge_paths(7, paths, max_nodes, max_depth=max_depth, min_path_prob=least)
    with use_level(REFERENCE):
        python = merge_paths(7, paths, max_nodes, max_depth=max_depth, min_path_prob=least)
    assert compiled.tokens == python.tokens
    assert compiled.parents == python.parents
    assert compiled.confidences == python.confidences


@given(
    st.lists(TOKENS, min_size=2, max_size=60),
    st.lists(st.tuples(st.none() | TOKENS, TOKENS, TOKENS), max_size=20),
    st.tuples(st.sampled_from([2, 5, 100]), st.integers(1, 5), st.sampled_from([0.1, 0.5, 0.9])),
    st.builds(
        SearchLimits,
        num_candidates=st.integers(1, 5),
        exploration=st.sampled_from([0.0, 0.1, 3.0]),
        max_nodes=st.integers(0, 20),
        max_depth=st.integers(0, 6),
        min_path_prob=st.sampled_from([0.001, 0.01, 0.2]),
    ),
)
def test_trigrams(
    text: list[int],
    observed: list[tuple[int | None, int, int]],
    settings: tuple[int, int, float],
    limits: SearchLimits,
) -> None:
    """Learnt in pieces, in a matrix of its own and in a shared one."""
    compiled = [new_matrix(*settings), new_matrix(*settings)]
    python = [PythonMatrix(*settings), PythonMatrix(*settings)]
    for own, shared in (compiled, python):
        own.learn_text(text[: len(text) // 2], 1)
        own.learn_text(text, max(1, len(text) // 2))
        for before, last, token in observed:
            shared.learn(before, last, token)
    assert not any(isinstance(matrix, PythonMatrix) for matrix in compiled)
    assert list(map(len, compiled)) == list(map(len, python))
    for before, last in ((text[-2], text[-1]), (None, text[-1]), (0, 1)):
        assert plain(search(compiled, before, last, limits)) == plain(search(python, before, last, limits))


@given(
    seed=st.integers(0, MASK),
    position=st.integers(0, 2**40),
    purpose=st.sampled_from(Purpose),
    temperature=st.sampled_from([0.05, 1.0, 3.0]),
    vocab_size=st.sampled_from([40, 4097, 131072]),
    count=st.integers(1, 40),
    spread=st.sampled_from([0.0, 1e-5, 3.0]),
)
def test_ranks_with_noise(
    *,
    seed: int,
    position: int,
    purpose: Purpose,
    temperature: float,
    vocab_size: int,
    count: int,
    spread: float,
) -> None:
    generator = np.random.default_rng(seed)
    tokens = generator.choice(vocab_size, 32, replace=False)
    logits = (spread * generator.standard_normal(32)).astype(np.float32)

    def ranks() -> list[int]:
        return rank_with_noise(
            tokens,
            logits,
            count,
            temperature=temperature,
            seed=seed,
            position=position,
            purpose=purpose,
            vocab_size=vocab_size,
        )

    found = ranks()
    with use_level(REFERENCE):
        assert found == ranks()
    keys = logits + np.float32(temperature) * gumbel_noise(seed, position, purpose, vocab_size)[tokens]
    assert found == tokens[np.argsort(-keys, kind="stable")][:count].tolist()


@given(
    st.lists(
        st.tuples(
            st.lists(st.lists(st.tuples(TOKENS, st.floats(0.0, 1.0)), max_size=4), max_size=5),
            st.lists(TOKENS, max_size=5),
        ),
        max_size=40,
    )
)
def test_corrections(steps: list[tuple[list[list[tuple[int, float]]], list[int]]]) -> None:
    """Over so many steps that old observations are halved: the first step is taken again and again."""
    compiled_bins, python = Calibration(), PythonBins()
    for found, new_tokens in [*steps, *steps[:1] * 250]:
        paths = [WeightedPath([token for token, _ in path], [prob for _, prob in path]) for path in found]
        assert plain(compiled_bins.corrected("r", paths)) == plain(python.corrected("r", paths))
        for bins in (compiled_bins, python):
            bins.observe("r", new_tokens)
            bins.observe("other", new_tokens)


def test_near_ties_are_left_to_numpy() -> None:
    module = compiled()
    assert module is not None
    tokens, logits = np.array([5, 7, 5]), np.array([1.0, -9.0, 1.0], dtype=np.float32)
    assert module.rank_with_noise(1, 2, 0, tokens, logits, 1.0, 1) == []
    assert module.rank_with_noise(1, 2, 0, tokens[:2], logits[:2], 1.0, 1) == [5]
    with pytest.raises(ValueError, match="one for each token"):
        module.rank_with_noise(1, 2, 0, tokens, logits[:2], 1.0, 1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("vocab_size", [32, 100, 257, 4096, 5003, 66001])
@pytest.mark.parametrize("rounded", [False, True])
def test_largest_logits(level: str, vocab_size: int, rounded: bool) -> None:
    """Of equals the lowest come first, NaN last."""
    logits = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    if rounded:
        logits = logits.round()
    logits[1, ::3] = float("nan")
    logits[2] = float("nan")
    logits[3, 5:] = -float("inf")
    for count in (1, 8, 32):
        with use_level(level):
            found = largest(logits.numpy(), count)
            assert found is not None
        with use_level(REFERENCE):
            tokens, values = top_tokens(logits, count)
        assert found[0].tolist() == tokens.tolist()
        assert np.array_equal(found[1], values, equal_nan=True)


@pytest.mark.parametrize(
    "rows", [np.zeros((2, 3), dtype=np.float64), np.zeros((4, 6), dtype=np.float32)[:, ::2], np.zeros(3, np.float32)]
)
def test_rows_that_do_not_fit_are_refused(rows: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected contiguous float32"):
        largest(rows, 2)
    with pytest.raises(ValueError, match="expected contiguous float32"):
        largest(np.zeros((2, 3), dtype=np.float32), 4)
