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


def largest(
    rows: NDArray[np.float32], count: int, maxima: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
    """The `count` largest of each row of ``[R, V]``, falling, of equals the lowest first; NaN counts as -inf.

    Args:
        maxima: ``[R, num_maxima(V)]`` the greatest of each `MAXIMA_BLOCK`, if known; only blocks that can hold one of
            the largest are read then.

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
    known = 0
    if maxima is not None:
        if maxima.shape != (num_rows, native.num_maxima(size)) or not maxima.flags.c_contiguous:
            raise ValueError(f"maxima: got {list(maxima.shape)}, expected {[num_rows, native.num_maxima(size)]}")
        known = address(maxima)
    native.compiled().largest(address(rows), known, num_rows, size, count, address(places), address(values))
    return places, values


def address(array: NDArray[Any]) -> int:
    """Where a contiguous array's numbers stand."""
    return array.__array_interface__["data"][0]
