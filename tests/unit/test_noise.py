from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.sampling import noise
from outrider.sampling.noise import Purpose, child_seed, fresh_seed, gumbel_noise, uniform

MASK = 2**64 - 1
KNOWN_ROW = [
    -0.25240859389305115,
    0.16109290719032288,
    0.8293913006782532,
    2.1068074703216553,
    1.1809979677200317,
]
KNOWN_UNIFORM = 0.21157074131452058
KNOWN_CHILD = 4215632694831091248


def philox_block(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x64-10 as Salmon et al. (SC 2011) give it."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        product0, product1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (
            (product1 >> 64) ^ c1 ^ k0,
            product1 & MASK,
            (product0 >> 64) ^ c3 ^ k1,
            product0 & MASK,
        )
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return [c0, c1, c2, c3]


@given(
    seed=st.integers(0, MASK),
    position=st.integers(0, 2**40),
    purpose=st.sampled_from(Purpose),
    trial=st.integers(0, 99),
)
def test_stream_is_the_published_algorithm(seed: int, position: int, purpose: Purpose, trial: int) -> None:
    words = [word for block in (1, 2) for word in philox_block((seed, purpose), (block, 0, position, trial))]
    halves = [half for word in words for half in (word & 0xFFFFFFFF, word >> 32)]
    expected = -np.log(-np.log((np.array(halves) + 0.5) / 2.0**32))
    assert gumbel_noise(seed, position, purpose, 13, trial) == pytest.approx(expected[:13], rel=1e-6, abs=1e-6)
    assert uniform(seed, position, purpose, trial) == ((words[0] >> 12) + 0.5) / 2.0**52


def test_known_values() -> None:
    """Frozen: with another stream, old seeds would give other text."""
    row = gumbel_noise(1234, 56, Purpose.TARGET, 5)
    assert row.dtype == np.float32
    assert row.tolist() == pytest.approx(KNOWN_ROW, rel=1e-6)
    assert uniform(1234, 56, Purpose.ACCEPT, 1) == KNOWN_UNIFORM
    assert child_seed(1234, 1) == KNOWN_CHILD
    assert [purpose.value for purpose in Purpose] == [0, 1, 2, 3, 4]


def test_noise_depends_on_its_key_alone() -> None:
    keys = [
        (seed, position, purpose, trial)
        for seed in (0, 1, MASK)
        for position in range(4)
        for purpose in Purpose
        for trial in range(2)
    ]

    def row_of(key: tuple[int, int, Purpose, int]) -> np.ndarray:
        seed, position, purpose, trial = key
        return gumbel_noise(seed, position, purpose, 101, trial).copy()

    first = {key: row_of(key) for key in keys}
    assert len({row.tobytes() for row in first.values()}) == len(keys)
    random.Random(0).shuffle(keys)
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(row_of, keys))
    assert all(np.array_equal(row, first[key]) for key, row in zip(keys, again, strict=True))


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 63, 4095])
def test_shorter_vocabulary_sees_the_same_noise(vocab_size: int) -> None:
    long = gumbel_noise(3, 5, Purpose.TARGET, 4096)
    assert np.array_equal(gumbel_noise(3, 5, Purpose.TARGET, vocab_size), long[:vocab_size])


def test_rows_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        gumbel_noise(3, 5, Purpose.TARGET, 8)[0] = 1.0


def test_memo_is_bounded_and_keeps_what_was_used_last() -> None:
    memo = noise._RowMemo(max_bytes=3 * 40)
    rows = [np.full(10, index, dtype=np.float32) for index in range(4)]
    for index in range(3):
        memo.put((index,), rows[index])
    assert memo.get((0,)) is rows[0]
    memo.put((3,), rows[3])
    assert memo.get((1,)) is None
    assert memo.get((0,)) is rows[0]
    memo.put((9,), np.zeros(1000, dtype=np.float32))
    assert memo.get((9,)) is None


def test_gumbel_max_draws_the_distribution_at_every_position() -> None:
    """Chi-square over positions of one seed, and of adjacent pairs: the counters do not correlate."""
    p = np.array([0.5, 0.25, 0.15, 0.1])
    num_positions = 20_000
    drawn = np.array([np.argmax(np.log(p) + gumbel_noise(7, pos, Purpose.TARGET, 4)) for pos in range(num_positions)])
    expected = num_positions * p
    assert ((np.bincount(drawn, minlength=4) - expected) ** 2 / expected).sum() < 16.3  # 3 df, 0.1%
    pairs = np.bincount(4 * drawn[:-1] + drawn[1:], minlength=16)
    expected_pairs = (num_positions - 1) * np.outer(p, p).ravel()
    assert ((pairs - expected_pairs) ** 2 / expected_pairs).sum() < 37.7  # 15 df, 0.1%


def test_uniforms_are_uniform_and_never_0_or_1() -> None:
    values = np.array([uniform(7, pos, Purpose.ACCEPT, trial) for pos in range(5000) for trial in range(2)])
    assert 0.0 < values.min() < values.max() < 1.0
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 43.8  # 19 df, 0.1%
    assert (2**52 - 1 + 0.5) * 2.0**-52 < 1.0


def test_seeds() -> None:
    assert child_seed(5, 0) == 5
    children = {child_seed(seed, index) for seed in (5, 6) for index in range(100)}
    assert len(children) == 200
    assert all(0 <= seed <= MASK for seed in children)
    assert len({fresh_seed() for _ in range(100)}) == 100
    assert all(0 <= fresh_seed() < 2**63 for _ in range(100))
