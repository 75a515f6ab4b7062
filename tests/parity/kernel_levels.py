"""Runs a piece of a test at one level of the compiled kernels, or with a number of threads, and puts both back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from outrider.kernels import native

LEVELS = [level for level in native.levels() if level != native.REFERENCE]

FUSES = {"amx": True, "avx512": True, "avx2": True, "portable": False}
"""Whether a level has a fused multiply-add: without one the product is rounded before it is added."""

ROUNDING = 2.0**-24
"""The largest relative error of one rounding to float32."""


@contextmanager
def use_level(level: str) -> Iterator[None]:
    """Kernels of this level within the block, whatever the environment asks for."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(native.ISA_VARIABLE, level)
            assert native.isa() == level
            yield
    finally:
        native.isa()


@contextmanager
def use_threads(number: int) -> Iterator[None]:
    native.set_num_threads(number)
    try:
        yield
    finally:
        native.set_num_threads(None)


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    """Every bit, signs of zeros included; any NaN equals any other.

    Raises:
        AssertionError: it names the rows that differ.
    """
    assert got.shape == expected.shape, f"{list(got.shape)} != {list(expected.shape)}"
    assert got.dtype == expected.dtype == torch.float32
    same = got.contiguous().view(torch.int32) == expected.contiguous().view(torch.int32)
    same |= got.isnan() & expected.isnan()
    rows = (~same).flatten(1).any(dim=1).nonzero()[:, 0].tolist()
    assert not rows, f"rows {rows[:8]} of {len(got)} have other bits"


def assert_within(got: Tensor, truth: Tensor, bound: Tensor) -> None:
    """Every element finite and within its own bound of the float64 truth.

    Raises:
        AssertionError: it names the worst element.
    """
    assert got.shape == truth.shape, f"{list(got.shape)} != {list(truth.shape)}"
    assert got.isfinite().all(), "not finite"
    excess = (got.double() - truth).abs() - bound
    if excess.numel() and float(excess.max()) > 0:
        at = torch.unravel_index(excess.argmax(), excess.shape)
        raise AssertionError(
            f"at {[int(i) for i in at]}: {float(got[at])} for {float(truth[at])}, allowed error {float(bound[at])}"
        )
