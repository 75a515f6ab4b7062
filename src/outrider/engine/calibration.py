"""Measuring what a model's forwards cost, once per model, format, device and number of threads."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from outrider.cache.kv_cache import KVCache, SequenceCommit
from outrider.drafting.forward_cost import ForwardCost
from outrider.engine.cache_files import cache_file, keep, recall
from outrider.kernels import native
from outrider.kernels.rows import SequenceRows
from outrider.models.batch import ForwardBatch
from outrider.models.model import Model

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CONTEXTS = (32, 1024)
FORMAT_VERSION = 3
BUDGET_S = 4.0  # of measuring; a slow model gets MIN_ROUNDS all the same
MIN_ROUNDS, MAX_ROUNDS = 3, 15
BLOCK_SIZE = 16
SEQUENCE = "calibration"

Progress = Callable[[int, int], None]  # (measurements made, measurements in all)


def identity_of(path: str, form: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """What tells a model and its format from others, as JSON.

    Args:
        path: folder or hub id.
        form: how it was loaded.
    """
    folder = Path(path)
    is_folder, config = folder.is_dir(), folder / "config.json"
    return {
        "model": str(folder.resolve()) if is_folder else path,
        "changed": config.stat().st_mtime_ns if config.is_file() else None,
        "form": {**form, "dtype": str(model.dtype), "cache_dtype": str(model.cache_dtype)},
        "num_layers": len(model.layer_shapes),
    }


def forward_cost_of(
    model: Model,
    identity: dict[str, Any],
    *,
    row_invariant: bool,
    recalibrate: bool = False,
    on_progress: Progress | None = None,
) -> ForwardCost:
    """The measured costs: from an earlier start if nothing that they depend on has changed, else measured now.

    Args:
        identity: see `identity_of`.
        row_invariant: measure the bitwise mode's attention.
        recalibrate: measure now in any case; later starts take that.
        on_progress: called after every measurement.
    """
    path = cache_file("calibration", {**identity, **machine(), "row_invariant": row_invariant})
    cost = None if recalibrate else recall(path, ForwardCost.from_mapping)
    if cost is None:
        cost = measure(model, row_invariant=row_invariant, on_progress=on_progress)
        keep(path, cost.as_mapping())
    return cost


@torch.inference_mode()
def measure(model: Model, *, row_invariant: bool, on_progress: Progress | None = None) -> ForwardCost:
    """Time forwards of a model over numbers of rows and lengths of context, in interleaved rounds.

    A machine's memory may change its speed between two forwards, so each is taken as a multiple of a forward of one
    row just before it. The context's keys and values are zeros: what they are costs nothing.
    """
    longest = max(1, model.context_length - max(ROWS))
    contexts = sorted({min(context, longest) for context in CONTEXTS})
    rows = tuple(m for m in ROWS if m <= model.context_length - contexts[0])
    points = [(c, m) for c in contexts for m in rows]
    ratios: dict[tuple[int, int], list[float]] = {point: [] for point in points}
    plain: list[float] = []
    with native.cores_for_kernels(model.runs_on_kernels):
        caches = {context: _cache_with(model, context) for context in contexts}
        _forward(model, caches[contexts[0]], contexts[0], rows[-1], row_invariant)  # warm-up
        start, num_rounds = time.perf_counter(), MAX_ROUNDS
        done = 0
        while done < num_rounds:
            for context, num_rows in points:
                plain.append(_forward(model, caches[contexts[0]], contexts[0], 1, row_invariant))
                seconds = _forward(model, caches[context], context, num_rows, row_invariant)
                ratios[context, num_rows].append(seconds / plain[-1])
                if on_progress is not None:
                    on_progress(len(plain), num_rounds * len(points))
            done += 1
            a_round = (time.perf_counter() - start) / done
            num_rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(BUDGET_S / a_round)))
    one = statistics.median(plain)
    return ForwardCost(rows, contexts, [[one * statistics.median(ratios[c, m]) for m in rows] for c in contexts])


def one_row_timer(model: Model, *, row_invariant: bool) -> Callable[[], float]:
    """Seconds of one more forward of one row after a short context, whenever it is called."""
    context = min(CONTEXTS[0], max(1, model.context_length - max(ROWS)))
    cache = _cache_with(model, context)

    def timed() -> float:
        with torch.inference_mode(), native.cores_for_kernels(model.runs_on_kernels):
            return _forward(model, cache, context, 1, row_invariant)

    return timed


def _cache_with(model: Model, context: int) -> KVCache:
    cache = KVCache(
        model.layer_shapes,
        num_blocks=-(-(context + max(ROWS)) // BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        dtype=model.cache_dtype,
        device=model.device,
        prefix_caching=False,
    )
    cache.admit(SEQUENCE, [0])
    cache.reserve(SEQUENCE, context)
    cache.commit({SEQUENCE: SequenceCommit(range(context), [0] * context)})
    return cache


def _forward(model: Model, cache: KVCache, context: int, num_rows: int, row_invariant: bool) -> float:
    start = time.perf_counter()
    rows = SequenceRows(
        [0] * num_rows, range(-1, num_rows - 1), context, cache.reserve(SEQUENCE, num_rows), range(num_rows)
    )
    batch = ForwardBatch([rows], model.device, row_invariant=row_invariant)
    if model.choose(batch, cache) is None:
        model.forward(batch, cache)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def machine() -> dict[str, Any]:
    """What a forward's time depends on beside the model."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "version": FORMAT_VERSION,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "device": device,
        "cores": os.cpu_count(),
        "isa": native.isa(),
        "threads": native.num_threads() if native.is_available() else 0,
    }
