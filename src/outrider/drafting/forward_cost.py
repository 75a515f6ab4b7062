"""What a forward of the target costs, by the number of its rows and its context: measured, and kept up to date."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outrider.errors import ConfigError

SCALE_ADAPTATION = 0.15  # weight of a new measurement in the speed of the whole machine, which may change at any time
SHAPE_ADAPTATION = 0.03  # likewise in what a number of rows costs beside others, which does not
FAR = 1000
OUTLIER = 3.0  # a step that takes more times its usual time was disturbed: it counts as if it had taken so many


Floats = NDArray[np.float64]


class ForwardCost:
    """Seconds of a forward, interpolated between measured numbers of rows and lengths of context.

    A machine's speed changes with its load and its neighbours', so steps correct the table as they run: its scale at
    once, its shape slowly, each around its number of rows.

    Args:
        rows: ``[R]`` numbers of rows, ascending from 1.
        contexts: ``[C]`` positions before them, ascending.
        seconds: ``[C][R]``, above 0.

    Raises:
        ConfigError: other shapes, or figures that cannot be times.
    """

    def __init__(self, rows: Sequence[int], contexts: Sequence[int], seconds: Sequence[Sequence[float]]) -> None:
        ascending = all(
            len(points) and points[0] >= 0 and all(a < b for a, b in pairwise(points)) for points in (rows, contexts)
        )
        fits = len(seconds) == len(contexts) and all(len(of) == len(rows) for of in seconds)
        if (
            not ascending
            or not fits
            or rows[0] != 1
            or len(rows) < 2
            or not all(0 < s < math.inf for of in seconds for s in of)
        ):
            raise ConfigError(
                "table of forward costs",
                got=f"{len(rows)} rows, {len(contexts)} contexts, {[len(of) for of in seconds]} times",
                expected="two or more ascending rows from 1, ascending contexts, a positive time for each pair",
                remedy="measure it again",
            )
        self.rows, self.contexts = tuple(rows), tuple(contexts)
        # More rows never cost less: what says otherwise is noise, and a planner would chase it.
        self.table = tuple(tuple(max(of[: i + 1]) for i in range(len(of))) for of in seconds)
        # Beyond the last point a line goes on as it ended.
        self._points = np.array([*rows, FAR * rows[-1]], dtype=np.float64)
        self._curves = [np.array([*of, _line(of, *_between(rows, FAR * rows[-1]))]) for of in self.table]
        self._scale = 1.0
        self._factors = [1.0] * len(rows)
        self._is_guess = False

    @staticmethod
    def unknown() -> ForwardCost:
        """Nothing measured: the first forward tells the scale, and rows are taken to cost something."""
        cost = ForwardCost((1, 8, 16, 64), (0,), [(1.0, 1.3, 1.7, 4.0)])
        cost._is_guess = True
        return cost

    @staticmethod
    def from_mapping(values: Mapping[str, Any]) -> ForwardCost:
        """The inverse of `as_mapping`.

        Raises:
            ConfigError: not such a mapping.
        """
        try:
            return ForwardCost(values["rows"], values["contexts"], values["seconds"])
        except (KeyError, TypeError) as error:
            raise ConfigError(
                "table of forward costs", got=repr(values)[:60], expected="rows, contexts, seconds"
            ) from error

    def as_mapping(self) -> dict[str, Any]:
        return {"rows": list(self.rows), "contexts": list(self.contexts), "seconds": [list(of) for of in self.table]}

    def seconds(self, num_rows: float, context: float, num_sequences: int = 1) -> float:
        """Expected seconds of a forward; linear between and beyond the measured points.

        Rows share the weights, but only those of one sequence share its context: what the table says of a longer
        context is taken once for each sequence, with its share of the rows.

        Args:
            context: positions before the rows of each sequence, in the mean.
        """
        r, at_row = _between(self.rows, num_rows)
        of_rows = self._factors[-1] if at_row > 1 else _line(self._factors, r, at_row)
        together = _line(self.table[0], r, at_row)
        contexts = num_sequences * self._longer_context(max(1.0, num_rows / num_sequences), context)
        return self._scale * of_rows * max(together + contexts, 1e-9)

    def with_more_rows(self, num_rows: int, most: int, context: float, num_sequences: int = 1) -> Floats:
        """``[1 + most]`` what `seconds` says of `num_rows` and of up to `most` rows more."""
        rows = np.arange(num_rows, num_rows + most + 1)
        factors = np.interp(rows, self.rows, self._factors)
        contexts = 0.0
        if len(self.contexts) > 1:
            c, at_context = _between(self.contexts, context)
            low, high = self._curves[c], self._curves[c + 1]
            each = np.maximum(1.0, rows / num_sequences)
            curve = low + at_context * (high - low) - self._curves[0]
            contexts = num_sequences * np.interp(each, self._points, curve)
        return self._scale * factors * np.maximum(np.interp(rows, self._points, self._curves[0]) + contexts, 1e-9)

    def _longer_context(self, num_rows: float, context: float) -> float:
        """What a context takes beyond the shortest that was measured, by the table."""
        if len(self.contexts) == 1:
            return 0.0
        r, at_row = _between(self.rows, num_rows)
        c, at_context = _between(self.contexts, context)
        low, high = _line(self.table[c], r, at_row), _line(self.table[c + 1], r, at_row)
        return low + at_context * (high - low) - _line(self.table[0], r, at_row)

    def observe(self, num_rows: int, context: float, num_sequences: int, seconds: float) -> None:
        """Learn from a forward that took `seconds`."""
        change = seconds / self.seconds(num_rows, context, num_sequences)
        if self._is_guess:
            self._is_guess = False
            self._scale = change
            return
        change = min(OUTLIER, max(1 / OUTLIER, change))
        self._scale *= change**SCALE_ADAPTATION
        r, at_row = _between(self.rows, num_rows)
        for point, weight in ((r, 1 - min(at_row, 1.0)), (r + 1, min(at_row, 1.0))):
            self._factors[point] *= change ** (SHAPE_ADAPTATION * weight)


def _between(points: Sequence[int], at: float) -> tuple[int, float]:
    """The interval of `points` to interpolate in, and where in it; beyond the last point above 1."""
    i = min(max(bisect_right(points, at) - 1, 0), len(points) - 2)
    return i, max(0.0, (at - points[i]) / (points[i + 1] - points[i]))


def _line(values: Sequence[float], i: int, at: float) -> float:
    return values[i] + at * (values[i + 1] - values[i])
