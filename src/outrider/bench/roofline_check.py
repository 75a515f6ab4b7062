"""How far the roofline of one row is from the truth here: reads of memory and forwards, in turns."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from outrider.bench.forward import last_level_cache_bytes, probes_agree

NUM_PAIRS, MAX_PAIRS = 7, 35


def roofline_check(
    num_bytes: float, forward: Callable[[], float], probe: Callable[[], float]
) -> dict[str, Any] | None:
    """Predicted over measured seconds of a forward of one row that does nothing but read `num_bytes`.

    A machine's bandwidth changes from second to second, so each forward stands between two probes and counts only if
    they agree.

    Args:
        forward: seconds of one.
        probe: bytes per second now.

    Returns:
        Medians; None if the machine was never steady.
    """
    forward()
    pairs: list[tuple[float, float]] = []  # (bandwidth, seconds)
    before = probe()
    for _ in range(MAX_PAIRS):
        seconds = forward()
        after = probe()
        if probes_agree(before, after):
            pairs.append(((before + after) / 2, seconds))
        before = after
        if len(pairs) == NUM_PAIRS:
            break
    if not pairs:
        return None
    ratios = [num_bytes / bandwidth / seconds for bandwidth, seconds in pairs]
    return {
        "weight_bytes_read": num_bytes,
        "last_level_cache_bytes": last_level_cache_bytes(),
        "bandwidth": median(bandwidth for bandwidth, _ in pairs),
        "measured_s": median(seconds for _, seconds in pairs),
        "predicted_over_measured": median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "samples": len(pairs),
    }
