"""Layers divided among threads by how fast each one's core reads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from outrider.kernels import native
from tests.parity.kernel_hooks import new_balance

pytestmark = pytest.mark.skipif(not native.is_available(), reason="outrider was built without compiled kernels")

NUM_PANELS, PANEL_BYTES = 1000, 1 << 20


def parts_after(speeds: Sequence[float], num_layers: int, *, noise: float = 0.0, seed: int = 0) -> list[float]:
    """Each thread's part of the panels, whose cores read so many bytes per second."""
    rng = random.Random(seed)
    balance = new_balance(len(speeds))
    for _ in range(num_layers):
        for thread, speed in enumerate(speeds):
            begin, end = balance.share_of(NUM_PANELS, thread)
            num_bytes = (end - begin) * PANEL_BYTES
            balance.record(thread, num_bytes, num_bytes / speed * rng.lognormvariate(0, noise))
        balance.update()
    return parts_of(balance, len(speeds))


def parts_of(balance: Any, number: int) -> list[float]:
    shares = [balance.share_of(NUM_PANELS, thread) for thread in range(number)]
    assert shares[0][0] == 0
    assert shares[-1][1] == NUM_PANELS
    assert all(before[1] == after[0] for before, after in pairwise(shares))
    return [(end - begin) / NUM_PANELS for begin, end in shares]


@pytest.mark.parametrize("speeds", [(3e9, 1e9), (20e9, 25e9), (1e9, 2e9, 3e9, 4e9)])
def test_threads_get_parts_of_their_speed(speeds: tuple[float, ...]) -> None:
    assert parts_after(speeds, 200) == pytest.approx([speed / sum(speeds) for speed in speeds], abs=0.01)
    assert parts_after(speeds, 2000, noise=0.1) == pytest.approx([speed / sum(speeds) for speed in speeds], abs=0.03)


def test_cores_that_are_alike_are_treated_alike() -> None:
    """To follow noise would cost a panel now and then."""
    for seed in range(20):
        assert parts_after((22e9, 22.5e9), 500, noise=0.05, seed=seed) == [0.5, 0.5]


def test_a_slow_core_keeps_a_part_so_that_it_is_measured() -> None:
    assert parts_after((1e6, 1e9), 500) == pytest.approx([0.2, 0.8], abs=0.001)
    assert parts_after((1.0, 0.0001), 500) == pytest.approx([0.8, 0.2], abs=0.001)


def test_a_core_that_recovers_gets_its_part_back() -> None:
    balance = new_balance(2)
    for layer in range(1000):
        for thread in (0, 1):
            speed = 0.5 if thread == 1 and layer < 500 else 1.0
            balance.record(thread, 1 << 20, 1e-3 / speed)
        balance.update()
        if layer == 499:
            assert parts_of(balance, 2) == pytest.approx([2 / 3, 1 / 3], abs=0.01)
    assert parts_of(balance, 2) == [0.5, 0.5]


def test_too_little_to_be_measured_changes_nothing() -> None:
    balance = new_balance(2)
    for _ in range(100):
        balance.record(0, 1000, 1e-6)
        balance.record(1, 1000, 1e-3)
        balance.update()
    assert parts_of(balance, 2) == [0.5, 0.5]
    balance.record(0, 1 << 20, 1e-6)  # only one thread has been measured
    balance.update()
    assert parts_of(balance, 2) == [0.5, 0.5]
