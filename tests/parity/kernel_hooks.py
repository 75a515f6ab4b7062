"""What the compiled kernels measure and decide by themselves, forced or driven by a test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from outrider.kernels import native


@contextmanager
def forced_fetch(fetch: str) -> Iterator[None]:
    """One of `native.FETCHES` for all layers, instead of whichever was measured to be the fastest."""
    native.compiled().force_fetch(native.FETCHES.index(fetch))
    try:
        yield
    finally:
        native.compiled().force_fetch(-1)


@contextmanager
def forced_parts(bounds: Sequence[float]) -> Iterator[None]:
    """All layers divided among threads at these parts of 1, from 0 to 1, whatever was measured."""
    assert len(bounds) == native.num_threads() + 1
    native.compiled().force_parts(list(bounds))
    try:
        yield
    finally:
        native.compiled().force_parts([])


def new_tuner() -> Any:
    """What finds the fastest of `native.FETCHES`: ``next()`` is what to use, ``record(seconds)`` its time."""
    return native.compiled().Tuner()


def new_balance(number: int) -> Any:
    """What divides layers among so many threads.

    ``record(thread, num_bytes, seconds)`` is what one has read, ``update()`` comes after each layer, and
    ``share_of(count, thread)`` is a thread's part ``(begin, end)`` of so many panels.
    """
    return native.compiled().Balance(number)


def noise_ceiling(half: int) -> float:
    """What the Gumbel noise of a random number of 32 bits is taken to be at most before logarithms are taken."""
    return native.compiled().noise_ceiling(half)
