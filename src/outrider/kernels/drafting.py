"""What drafting computes in compiled code: the few largest logits, ranks with noise, statistics and trees.

Whoever calls these has the same in Python, for machines without compiled kernels; tests compare the two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from outrider.kernels import native


def compiled() -> Any | None:
    """The compiled module (`kernels/cpu/drafting/bindings.cpp`); None where outrider runs on its reference code."""
    return native._native if native.is_available() else None


def largest(rows: NDArray[np.float32], count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
    """The `count` largest of each row of ``[R, V]``, falling, of equals the lowest first; NaN counts as -inf.

    Returns:
        ``[R, count]`` places and values; None without compiled code.

    Raises:
        ValueError: rows of another shape, with gaps, or shorter than `count`.
    """
    if not native.is_available():
        return None
    fits = rows.ndim == 2 and rows.dtype == np.float32 and rows.flags.c_contiguous and 1 <= count <= rows.shape[1]
    if not fits:
        raise ValueError(f"rows: got {rows.dtype} {list(rows.shape)}, expected contiguous float32 [R, >= {count}]")
    num_rows, size = rows.shape
    places = np.empty((num_rows, count), dtype=np.int64)
    values = np.empty((num_rows, count), dtype=np.float32)
    native._module().largest(address(rows), num_rows, size, count, address(places), address(values))
    return places, values


def address(array: NDArray[Any]) -> int:
    """Where a contiguous array's numbers stand."""
    return array.__array_interface__["data"][0]
