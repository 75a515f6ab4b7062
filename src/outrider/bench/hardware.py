"""Machines by their published figures, or by what a probe of this one says: what a roofline needs to know."""

from __future__ import annotations

import difflib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from outrider.config import Weights, from_mapping
from outrider.errors import ConfigError

THIS, PROBED = "this", "probe"
PROBE_ROWS, PROBE_WIDTH, PROBE_REPEATS = 64, 2048, 15
LEAST_PROBE_BYTES, PROBE_CACHES = 1 << 28, 8  # a probe of memory reads so much, or so many times the last-level cache
GRAPH_LAUNCH_S = 0.3e-3  # our assumption for GPUs: a forward replayed as one graph
GPU_STEP_S = 0.5e-3  # likewise: scheduling, sampling and verification of a step
BANDWIDTH_EFFICIENCY, COMPUTE_EFFICIENCY = 0.8, 0.6  # our assumption of what good kernels reach


@dataclass(frozen=True)
class Hardware:
    """A machine's peaks, and what part of them a forward is taken to reach.

    Attributes:
        bandwidth: of memory, in bytes per second.
        flops: dense operations per second by the type of the multiplications: "fp32", "bf16", "int8".
        forward_s: every forward's time beside its work: launches, barriers.
        step_s: every step's time outside the models.
        bandwidth_efficiency, compute_efficiency: parts of the peaks that are reached, in (0, 1].
        source: of the peaks.

    Raises:
        ConfigError: figures that cannot be.
    """

    name: str
    bandwidth: float
    flops: dict[str, float]
    forward_s: float = GRAPH_LAUNCH_S
    step_s: float = GPU_STEP_S
    bandwidth_efficiency: float = BANDWIDTH_EFFICIENCY
    compute_efficiency: float = COMPUTE_EFFICIENCY
    source: str = "given by the user"

    def __post_init__(self) -> None:
        if not isinstance(self.flops, dict) or set(self.flops) != {"fp32", "bf16", "int8"}:
            raise ConfigError("hardware flops", got=repr(self.flops)[:80], expected="fp32, bf16 and int8")
        for key, value, low, high in (
            ("bandwidth", self.bandwidth, 1e6, 1e18),
            *((f"flops.{kind}", of, 1e6, 1e21) for kind, of in self.flops.items()),
            ("forward_s", self.forward_s, 0.0, 60.0),
            ("step_s", self.step_s, 0.0, 60.0),
            ("bandwidth_efficiency", self.bandwidth_efficiency, 1e-3, 1.0),
            ("compute_efficiency", self.compute_efficiency, 1e-3, 1.0),
        ):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                raise ConfigError(f"hardware {key}", got=repr(value), expected=f"a number in [{low:g}, {high:g}]")

    def flops_for(self, weights: Weights) -> float:
        """Peak for a weight format; int4 is multiplied as int8, as our CPU kernels do."""
        return self.flops["int8" if weights == "int4" else weights]


def _gpu(name: str, bandwidth: float, flops: tuple[float, float, float], source: str) -> Hardware:
    return Hardware(name, bandwidth, dict(zip(("fp32", "bf16", "int8"), flops, strict=True)), source=source)


# Peaks are the vendors', dense: where a data sheet prints figures "with sparsity", half of them.
KNOWN: dict[str, Hardware] = {
    of.name: of
    for of in (
        # 2,039 GB/s, 19.5 TFLOPS FP32, 312 TFLOPS BF16, 624 TOPS INT8.
        _gpu("a100", 2.039e12, (19.5e12, 312e12, 624e12), "NVIDIA A100 80GB SXM data sheet"),
        # 3.35 TB/s, 67 TFLOPS FP32; with sparsity 1,979 TFLOPS BF16, 3,958 TOPS INT8.
        _gpu("h100", 3.35e12, (67e12, 989.5e12, 1979e12), "NVIDIA H100 SXM data sheet"),
        # 4.8 TB/s, 67 TFLOPS FP32; with sparsity 1,979 TFLOPS BF16, 3,958 TOPS INT8.
        _gpu("h200", 4.8e12, (67e12, 989.5e12, 1979e12), "NVIDIA H200 SXM data sheet"),
        # 1,008 GB/s, 82.6 TFLOPS FP32, 165.2 TFLOPS BF16 with FP32 accumulation, 660.6 TOPS INT8.
        _gpu("rtx4090", 1.008e12, (82.6e12, 165.2e12, 660.6e12), "NVIDIA Ada GPU architecture white paper"),
        # 864 GB/s, 91.6 TFLOPS FP32, 362.05 TFLOPS BF16, 733 TOPS INT8.
        _gpu("l40s", 864e9, (91.6e12, 362.05e12, 733e12), "NVIDIA L40S data sheet"),
        # 400 GB/s; Apple gives 3.6 TFLOPS for the 10-core GPU of the M2, so 13.6 for the 38 cores of this one. No
        # matrix unit of the GPU multiplies integers or halves faster.
        _gpu("m2max", 400e9, (13.6e12, 13.6e12, 13.6e12), "Apple, M2 Max announcement; FLOP/s scaled from the M2's"),
        # No vendor says what two cores of a shared server get. benchmarks/results/forward_epyc_202611.md: 47 GB/s by
        # our own read probe; prompts of 512 tokens ran at 0.9 (bf16) and 1.6 TFLOP/s (int8), taken as reached, and
        # half of bf16 for fp32. So the efficiency of arithmetic is 1; of bandwidth, 0.94 (bf16).
        Hardware(
            "epyc-2c",
            47e9,
            {"fp32": 0.45e12, "bf16": 0.9e12, "int8": 1.6e12},
            forward_s=0.05e-3,
            step_s=0.4e-3,
            bandwidth_efficiency=0.94,
            compute_efficiency=1.0,
            source="measured: benchmarks/results/forward_epyc_202611.md",
        ),
    )
}


def hardware_of(spec: str) -> Hardware:
    """A machine of the table, this one as a probe finds it, or one of a JSON file with the fields of `Hardware`.

    Raises:
        ConfigError: none of these, a file that is none, or a probe without compiled kernels.
    """
    known = KNOWN.get(spec.lower())
    if known is not None:
        return known
    if spec.lower() == PROBED:
        return probed_hardware()
    path = Path(spec).expanduser()
    if path.is_file():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"hardware file {spec}", got=f"invalid JSON ({error})", expected="an object") from error
        if isinstance(values, dict):
            values = {"name": path.stem, **values}
        return from_mapping(Hardware, values, "hardware")
    near = difflib.get_close_matches(spec.lower(), (THIS, PROBED, *KNOWN), n=1)
    raise ConfigError(
        "--hardware",
        got=repr(spec),
        expected=f"{THIS}, {PROBED}, {', '.join(KNOWN)}, or a JSON file",
        remedy=f"did you mean {near[0]!r}?" if near else None,
    )


def probed_hardware() -> Hardware:
    """This machine, by what the kernels reach here and now: reads of memory, and products of PROBE_ROWS rows.

    Of the reads the median counts, because neighbours share the memory; of the products the fastest, because others
    that run on the same cores only disturb. What a forward and a step take beside the models is not measured: it is
    taken from `KNOWN["epyc-2c"]`.

    Raises:
        ConfigError: there are no compiled kernels to measure with.
    """
    import torch

    from outrider.bench.forward import BandwidthProbe, last_level_cache_bytes
    from outrider.kernels import native
    from outrider.kernels.packed import pack_bf16, pack_fp32, pack_int8

    if not native.is_available():
        raise ConfigError(
            f"--hardware {PROBED}",
            got="reference code",
            expected="compiled kernels",
            remedy="name a machine, or a file",
        )
    weight, x = torch.randn(PROBE_WIDTH, PROBE_WIDTH), torch.randn(PROBE_ROWS, PROBE_WIDTH)
    integers = torch.randint(-127, 128, weight.shape, dtype=torch.int8)
    linears = {
        "fp32": native.Linear(pack_fp32(weight)),
        "bf16": native.Linear(pack_bf16(weight)),
        "int8": native.Linear(pack_int8(integers, torch.ones(PROBE_WIDTH))),
    }
    read = BandwidthProbe(max(LEAST_PROBE_BYTES, PROBE_CACHES * (last_level_cache_bytes() or 0)))
    bandwidths: list[float] = []
    seconds: dict[str, list[float]] = {kind: [] for kind in linears}
    with native.cores_for_kernels():
        for _ in range(PROBE_REPEATS):  # in turns: the machine's speed changes
            bandwidths.append(read())
            for kind, linear in linears.items():
                linear(x)  # what reading has displaced comes back into the caches
                start = time.perf_counter()
                linear(x)
                seconds[kind].append(time.perf_counter() - start)
    operations = 2.0 * PROBE_ROWS * PROBE_WIDTH**2
    return replace(
        KNOWN["epyc-2c"],
        name="this machine",
        bandwidth=median(bandwidths),
        flops={kind: operations / min(of) for kind, of in seconds.items()},
        bandwidth_efficiency=1.0,
        compute_efficiency=1.0,
        source=f"measured just now, {PROBE_ROWS} rows at once",
    )
