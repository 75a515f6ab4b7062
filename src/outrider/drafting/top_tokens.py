"""The most probable tokens of rows of logits, in one pass over them: torch's `topk` takes as long as seven.

Maxima of strided groups bound what can be among the best: the `count`-th largest maximum is at most the `count`-th
largest logit. So the few groups whose maximum reaches it hold all that is wanted. Compiled code does the same faster.

Shapes: R rows, V vocabulary, G groups of `GROUP` logits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from outrider.kernels.drafting import largest

GROUP = 8  # logits in a group, `WIDE_GROUP` in large vocabularies; a group is every G-th logit
WIDE_GROUP = 16
WIDE_VOCAB = 1 << 16
NUM_BOUNDS = 512  # most maxima of a row that are sorted for the bound; fewer are too coarse, more take longer
ID_BITS, VALUE_BITS, ROW_BITS = 21, 32, 10  # of a sort key

Tokens = NDArray[np.int64]
Values = NDArray[np.float32]


def top_tokens(logits: Tensor, count: int, maxima: Tensor | None = None) -> tuple[Tokens, Values]:
    """The `count` largest of each row of ``[R, V]``, falling; on the CPU of equals the lowest first, NaN as -inf.

    Args:
        maxima: float32 on the CPU, as `Choices` has them; compiled code then reads a part of the rows.

    Returns:
        ``[R, count]`` tokens and their logits.
    """
    if logits.device.type != "cpu":
        top = logits.topk(count, dim=-1)
        return top.indices.cpu().numpy(), top.values.float().cpu().numpy()
    rows = np.ascontiguousarray(logits.float().numpy())
    return (
        largest(rows, count, None if maxima is None else maxima.numpy()) or _top(rows, count) or _sorted(rows, count)
    )


def _sorted(rows: Values, count: int) -> tuple[Tokens, Values]:
    """The same for all rows and shapes."""
    tokens = np.negative(np.where(np.isnan(rows), -np.inf, rows)).argsort(axis=1, kind="stable")[:, :count]
    return tokens, np.take_along_axis(rows, tokens, axis=1)


def _top(rows: Values, count: int) -> tuple[Tokens, Values] | None:
    """The same in NumPy; None for rows with NaN, and for shapes that it does not pay for, or is not made for."""
    num_rows, vocab_size = rows.shape
    if vocab_size < 4 * GROUP * count or vocab_size >> ID_BITS or num_rows >> ROW_BITS or not num_rows:
        return None
    size = WIDE_GROUP if vocab_size >= WIDE_VOCAB else GROUP
    maxima = bounds = _group_maxima(rows, size)
    # The maxima of fewer, greater groups are maxima still: at least `count` logits reach the bound.
    while bounds.shape[1] > NUM_BOUNDS and bounds.shape[1] >= 4 * GROUP * count:
        bounds = _group_maxima(bounds, GROUP)
    least = np.sort(bounds, axis=1)[:, -count]
    num_groups = maxima.shape[1]
    (groups,) = (maxima >= least[:, None]).ravel().nonzero()
    of_row = groups // num_groups
    # The first groups have a member more where groups of `size` leave some logits over.
    num_members = size + (size * num_groups < vocab_size)
    members = (groups - of_row * num_groups)[:, None] + np.arange(0, num_members * num_groups, num_groups)
    places = members + (of_row * vocab_size)[:, None]
    return _largest(rows, places[members < vocab_size], least, count)


def _group_maxima(rows: Values, size: int) -> Values:
    """``[R, G]`` maxima of the groups g, g + G, g + 2 G, ...; what is left over goes to the first groups."""
    num_rows, width = rows.shape
    num_groups = width // size
    whole = num_groups * size
    maxima = rows[:, :whole].reshape(num_rows, size, num_groups).max(axis=1)
    if whole < width:  # fewer than `size`, and than there are groups
        first = maxima[:, : width - whole]
        np.maximum(first, rows[:, whole:], out=first)
    return maxima


def _largest(rows: Values, places: Tokens, least: Values, count: int) -> tuple[Tokens, Values] | None:
    """The largest of each row among flat places into the rows; None if of a row too few are at least `least`."""
    num_rows, vocab_size = rows.shape
    flat = rows.reshape(-1)
    values = flat.take(places)
    of_row = places // vocab_size
    is_large = values >= least.take(of_row)
    places, of_row, values = places[is_large], of_row[is_large], values[is_large]
    # Numbers that ascend with the row, and in a row with falling value, then with the token.
    bits = (values + 0.0).view(np.int32)  # of both zeros there is one
    falling = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64) + (1 << (VALUE_BITS - 1))
    keys = (((of_row << VALUE_BITS) + falling) << ID_BITS) + (places - of_row * vocab_size)
    keys.sort()
    starts = keys.searchsorted(np.arange(num_rows + 1) << (VALUE_BITS + ID_BITS))
    if (starts[1:] - starts[:-1]).min() < count:  # NaN compares with nothing
        return None
    tokens = keys.take(starts[:-1, None] + np.arange(count)) & ((1 << ID_BITS) - 1)
    return tokens, flat.take(tokens + np.arange(0, num_rows * vocab_size, vocab_size)[:, None])
