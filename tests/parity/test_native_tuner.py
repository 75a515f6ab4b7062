"""Who fetches weights: measured while a model runs, without being misled by memory that changes its speed."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from outrider.kernels import native
from tests.parity.kernel_hooks import new_tuner

pytestmark = pytest.mark.skipif(not native.is_available(), reason="outrider was built without compiled kernels")

TIMES = {"processor": 1.3, "far": 1.05, "near": 1.0}  # of a use, beside the best


def choices(seed: int, *, num_uses: int, modes: tuple[float, float], period: int, noise: float = 0.05) -> list[str]:
    """What is chosen for each use while memory changes between two speeds, every `period` uses on average."""
    rng = random.Random(seed)
    tuner = new_tuner()
    mode, chosen = 0, []
    for _ in range(num_uses):
        fetch = native.FETCHES[tuner.next()]
        if rng.random() < 1 / period:
            mode = 1 - mode
        delay = 5.0 if rng.random() < 0.02 else 1.0  # another process had the core
        tuner.record(5e-5 * TIMES[fetch] * modes[mode] * delay * rng.lognormvariate(0, noise))
        chosen.append(fetch)
    return chosen


@pytest.mark.parametrize("period", [10, 100, 1000])
def test_the_fastest_is_found_while_memory_changes_its_speed(period: int) -> None:
    counts = Counter(
        fetch for seed in range(20) for fetch in choices(seed, num_uses=3000, modes=(1, 1.8), period=period)[200:]
    )
    assert counts["near"] / counts.total() > 0.9
    assert 0 < counts["processor"] / counts.total() < 0.02


def test_all_are_tried_at_first_and_now_and_then() -> None:
    chosen = choices(0, num_uses=1000, modes=(1, 1), period=1)
    assert Counter(chosen[:45]) == dict.fromkeys(native.FETCHES, 15)
    assert 5 <= chosen[45:].count("processor") <= 15


def test_what_was_best_once_is_given_up() -> None:
    tuner = new_tuner()
    last = []
    for use in range(6000):
        fetch = native.FETCHES[tuner.next()]
        tuner.record(1e-4 * (2.0 if (fetch == "near") == (use > 1000) else 1.0 if fetch == "near" else 1.5))
        last.append(fetch)
    assert last[500:1000].count("near") > 480
    assert last[-500:].count("near") < 20


def test_long_uses_are_not_tried_often() -> None:
    """What takes milliseconds, such as an output layer, is tried for some of them only."""
    tuner = new_tuner()
    chosen = []
    for _ in range(2000):
        chosen.append(native.FETCHES[tuner.next()])
        tuner.record(5e-3 * TIMES[chosen[-1]])
    assert chosen[3:14] == ["near"] * 11
    assert chosen[:150].count("near") > 120
    assert chosen[500:].count("near") > 1450
