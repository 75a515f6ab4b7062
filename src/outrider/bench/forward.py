"""What a forward of M rows costs, beside the memory bandwidth that the machine had while it ran.

Bandwidth of one machine changes by a factor of two within seconds, so every timed run stands between two probes of
it and counts only if they agree:

    probe  run a  probe  run b  probe  run c  probe ...      a probe is after one run and before the next
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from outrider.cache.kv_cache import KVCache, SequenceCommit
from outrider.kernels import huge_pages, native
from outrider.kernels.packed import WeightFormat
from outrider.kernels.rows import SequenceRows
from outrider.models.batch import ForwardBatch
from outrider.models.llama import LlamaModel

AGREEMENT = 0.15
"""How far two probes may be apart, as a part of the larger."""
MAX_TRIES = 5
"""Runs of a workload for each sample that is wanted, until it is given up."""
PROBE_BYTES = 1 << 30
PROBE_CACHES = 8
"""A probe reads PROBE_BYTES, or so many times the last-level cache if that is more."""

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_BLOCK_SIZE = 16
_PROBE_ROUNDS = 3  # of the ways of reading, before the fastest is known
_DECODE, _PREFILL = "decode", "prefill"  # names of sequences in the cache, numbered if decoding


@dataclass(frozen=True, eq=False)
class Workload:
    """Something to time.

    Attributes:
        kind: linear layers alone, a forward of M new tokens, or a prompt whose last token's logits are wanted.
        weights: the format of its linear layers.
        num_rows: tokens that go through them.
        num_bytes: of weights that a run reads, each once.
        num_flops: two for every weight and row.
        run: does it; returns the seconds that it spent in kernels, or None for `kernels`.
    """

    kind: Literal["kernels", "forward", "prefill"]
    weights: WeightFormat
    num_rows: int
    num_bytes: int
    num_flops: int
    run: Callable[[], float | None]


@dataclass(frozen=True)
class Sample:
    """One run whose probes agreed.

    Attributes:
        kernel_seconds: what `Workload.run` returned.
        bandwidth: bytes per second, the mean of the probes before and after.
    """

    seconds: float
    kernel_seconds: float | None
    bandwidth: float


@dataclass
class Measurement:
    """What was measured; grows while `measure` runs.

    Attributes:
        samples: of each workload, those that were kept.
        num_tried: timed runs of each workload.
        probes: bytes per second of every probe, in order.
    """

    samples: dict[Workload, list[Sample]] = field(default_factory=dict)
    num_tried: dict[Workload, int] = field(default_factory=dict)
    probes: list[float] = field(default_factory=list)

    @property
    def num_kept(self) -> int:
        return sum(map(len, self.samples.values()))


def probes_agree(before: float, after: float) -> bool:
    """Whether the machine can be taken to have had one bandwidth between two probes."""
    return abs(before - after) <= AGREEMENT * max(before, after)


def measure(
    workloads: Sequence[Workload],
    repeats: int,
    measurement: Measurement,
    *,
    probe: Callable[[], float],
    clock: Callable[[], float] = time.perf_counter,
    on_start: Callable[[Workload], None] = lambda workload: None,
) -> None:
    """Run workloads in turns until each has `repeats` samples or was tried too often.

    Right before it is timed a workload runs once untimed: a probe has emptied the caches, and a step of decoding
    comes after another. Each round begins with the next workload, so that slow changes of the machine touch all of
    them alike.

    Args:
        measurement: filled as the runs end, so that an interruption leaves the finished ones.
        probe: the read bandwidth now, in bytes per second.
        clock: seconds.
        on_start: called before a workload runs, untimed and timed.
    """
    for workload in workloads:
        measurement.samples.setdefault(workload, [])
        measurement.num_tried.setdefault(workload, 0)
    measurement.probes.append(probe())
    for turn in range(MAX_TRIES * repeats):
        waiting = [workload for workload in workloads if len(measurement.samples[workload]) < repeats]
        if not waiting:
            return
        first = turn % len(waiting)
        for workload in [*waiting[first:], *waiting[:first]]:
            on_start(workload)
            workload.run()
            start = clock()
            kernel_seconds = workload.run()
            seconds = clock() - start
            before, after = measurement.probes[-1], probe()
            measurement.probes.append(after)
            measurement.num_tried[workload] += 1
            if probes_agree(before, after):
                measurement.samples[workload].append(Sample(seconds, kernel_seconds, (before + after) / 2))


class BandwidthProbe:
    """Reads a buffer that no cache holds, in pages like those of weights, with all threads of the kernels.

    Weights are read in whichever of the ways of `native.FETCHES` is the fastest, and so is the buffer: on some
    processors one way reaches less than three quarters of what another does.

    Args:
        num_bytes: of the buffer.
    """

    def __init__(self, num_bytes: int) -> None:
        self._buffer = huge_pages.allocate(num_bytes).fill_(1)  # written, so that every page is its own
        speeds: dict[str, list[float]] = {fetch: [] for fetch in native.FETCHES}
        for _ in range(_PROBE_ROUNDS):  # in turns, for the memory may change its speed meanwhile
            for fetch, seen in speeds.items():
                seen.append(native.read_bandwidth(self._buffer, fetch))
        self.fetch = max(speeds, key=lambda fetch: median(speeds[fetch]))

    def __call__(self) -> float:
        """Bytes per second."""
        return native.read_bandwidth(self._buffer, self.fetch)


def probe_bytes(caches: Path = _CACHES) -> int:
    """How much a probe has to read on this machine.

    Args:
        caches: the kernel's folder about the caches of a core.
    """
    return max(PROBE_BYTES, PROBE_CACHES * (last_level_cache_bytes(caches) or 0))


def last_level_cache_bytes(caches: Path = _CACHES) -> int | None:
    """Size of the largest cache; None where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = []
    for path in caches.glob("index*/size"):
        try:
            text = path.read_text().strip()
            sizes.append(int(text[:-1]) * units[text[-1]])
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return max(sizes, default=None)


class KernelRuns:
    """The linear layers of a model one after another, each on the same M rows: nothing but GEMMs.

    Args:
        linears: of all layers, and the output layer.
    """

    def __init__(self, weights: WeightFormat, linears: Sequence[native.Linear]) -> None:
        self._weights: WeightFormat = weights
        self._linears = list(linears)
        self.num_bytes = sum(linear.weight.data.numel() for linear in linears)
        self._num_params = sum(linear.weight.num_outputs * linear.weight.num_inputs for linear in linears)

    def workload(self, num_rows: int) -> Workload:
        widths = {linear.weight.num_inputs for linear in self._linears}
        widest = max(linear.weight.num_outputs for linear in self._linears)
        inputs = {width: torch.randn(num_rows, width) for width in widths}
        output = torch.zeros(num_rows, widest)
        # Past `Linear.__call__`: its few microseconds a layer would be a tenth of the time of small layers.
        calls = [(linear, inputs[linear.weight.num_inputs]) for linear in self._linears]  # keeps what is pointed to

        def run() -> None:
            run_linear = native.compiled().linear
            for linear, x in calls:
                run_linear(linear.handle, x.data_ptr(), num_rows, output.data_ptr())

        return Workload("kernels", self._weights, num_rows, self.num_bytes, 2 * self._num_params * num_rows, run)


class ForwardRuns:
    """Whole forwards on the lean path, built and run as a step of the engine does it.

    Args:
        context: cached tokens of each sequence before its new ones.
        num_positions: of the longest sequence.
        num_sequences: that decode together; prompts come alone.
    """

    def __init__(
        self, weights: WeightFormat, model: LlamaModel, *, context: int, num_positions: int, num_sequences: int = 1
    ) -> None:
        self._weights: WeightFormat = weights
        self._model = model
        self._cache = KVCache(
            model.layer_shapes,
            num_blocks=(num_sequences + 1) * -(-num_positions // _BLOCK_SIZE),
            block_size=_BLOCK_SIZE,
            dtype=model.cache_dtype,
            prefix_caching=False,
        )
        config = model.config
        self._head_params = config.vocab_size * config.hidden_size
        generator = torch.Generator().manual_seed(0)
        self._token_ids = torch.randint(model.vocab_size, (num_positions,), generator=generator).tolist()
        self._decoding = [f"{_DECODE} {i}" for i in range(num_sequences)]
        for sequence in (*self._decoding, _PREFILL):
            self._cache.admit(sequence, [])
        for sequence in self._decoding if context else ():
            self._step([sequence], context, all_logits=False)
            self._cache.commit({sequence: SequenceCommit(range(context), self._token_ids[:context])})

    def workload(self, num_rows: int, num_params: int) -> Workload:
        """M new tokens of each sequence, a chain, on top of its context, with the logits of all.

        Args:
            num_params: weights that a forward reads.
        """
        run = partial(self._step, self._decoding, num_rows, all_logits=True)
        num_tokens = num_rows * len(self._decoding)
        num_flops = 2 * num_params * num_tokens
        return Workload("forward", self._weights, num_tokens, self._model.weight_bytes, num_flops, run)

    def prefill(self, num_rows: int, num_params: int) -> Workload:
        """A prompt of M tokens from an empty cache, with the logits of its last one."""
        num_flops = 2 * ((num_params - self._head_params) * num_rows + self._head_params)
        run = partial(self._step, [_PREFILL], num_rows, all_logits=False)
        return Workload("prefill", self._weights, num_rows, self._model.weight_bytes, num_flops, run)

    def _step(self, sequences: Sequence[str], num_rows: int, *, all_logits: bool) -> float:
        """One forward that commits nothing; seconds in the kernels."""
        rows = [
            SequenceRows(
                self._token_ids[:num_rows],
                range(-1, num_rows - 1),
                self._cache.num_computed(sequence),
                self._cache.reserve(sequence, num_rows),
                range(num_rows) if all_logits else (num_rows - 1,),
            )
            for sequence in sequences
        ]
        self._model.forward(ForwardBatch(rows, row_invariant=True), self._cache)
        return self._model.kernel_seconds


def summarise(measurement: Measurement) -> dict[str, Any]:
    """Figures of every workload as JSON: lists "rows" and "prefill", and the "probe" beside them.

    Times are milliseconds: the median, and the range. GB/s and GFLOP/s are of the median time; "share" is the median
    of each run's part of the bandwidth around it; "kernel_ms" is there for whole forwards. Figures are None where no
    sample was kept; a workload that was never timed is left out.
    """
    rows, prefill = [], []
    for workload, samples in measurement.samples.items():
        if measurement.num_tried[workload] == 0:
            continue
        record = {**_record(workload, samples), "num_tried": measurement.num_tried[workload]}
        (prefill if workload.kind == "prefill" else rows).append(record)
    gbps = [bandwidth / 1e9 for bandwidth in measurement.probes]
    probe = {
        "gbps_median": median(gbps) if gbps else None,
        "gbps_min": min(gbps, default=None),
        "gbps_max": max(gbps, default=None),
        "num_probes": len(gbps),
    }
    return {"rows": rows, "prefill": prefill, "probe": probe}


def _record(workload: Workload, samples: Sequence[Sample]) -> dict[str, Any]:
    times = [sample.seconds for sample in samples]
    kernel = [sample.kernel_seconds for sample in samples if sample.kernel_seconds is not None]
    seconds = median(times) if times else None
    shares = [workload.num_bytes / sample.seconds / sample.bandwidth for sample in samples]
    record: dict[str, Any] = {
        "weights": workload.weights,
        "m": workload.num_rows,
        "ms": seconds and 1e3 * seconds,
        "ms_min": 1e3 * min(times) if times else None,
        "ms_max": 1e3 * max(times) if times else None,
        "gbps": seconds and workload.num_bytes / seconds / 1e9,
        "share": median(shares) if shares else None,
        "gflops": seconds and workload.num_flops / seconds / 1e9,
        "num_samples": len(samples),
    }
    if workload.kind != "kernels":
        record["kernel_ms"] = 1e3 * median(kernel) if kernel else None
    if workload.kind == "prefill":
        record["tokens_per_s"] = seconds and workload.num_rows / seconds
    return record
