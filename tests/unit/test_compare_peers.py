"""`benchmarks/peers/compare.py`: what is compared with what, without the peers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "peers"))

import compare

from outrider.bench.forward import Measurement, Sample, Workload


def test_a_memory_that_flips_has_two_modes_and_disturbed_samples_none() -> None:
    slow, fast = [47e9, 50e9, 46e9, 45e9], [76e9, 78e9, 80e9, 75e9, 77e9, 79e9, 76e9]
    modes = compare.bandwidth_modes([*slow, *fast, 20e9])
    assert len(modes) == 2
    assert modes[0] in fast
    assert modes[1] in slow
    assert compare.bandwidth_modes([]) == []


def test_engines_are_compared_in_the_same_mode_alone(capsys: pytest.CaptureFixture[str]) -> None:
    workload = Workload("forward", "bf16", 8, 10**9, 0, lambda: None)
    prompt = Workload("prefill", "bf16", 512, 10**9, 0, lambda: None)
    samples = {
        # seconds, of which in kernels (a peer's own clock), bandwidth
        "outrider bf16": [Sample(0.025, 0.024, 50e9), Sample(0.029, 0.024, 50e9), Sample(0.015, 0.014, 76e9)],
        "outrider bf16, lm_head int8": [Sample(0.020, 0.019, 51e9)],
        "llama.cpp bf16": [Sample(1.0, 0.054, 51e9), Sample(1.0, 0.054, 49e9)],
        "openvino bf16": [Sample(1.0, 0.021, 75e9), Sample(1.0, 0.060, 48e9)],
    }
    found = {}
    for bandwidth in (50e9, 76e9):
        summaries = []
        for name, kept in samples.items():
            measurement = Measurement()
            measurement.samples = {workload: kept, prompt: []}
            summaries.append(compare.summary(name, [workload, prompt], measurement, bandwidth))
        compare.print_tables(summaries, [8])
        found[bandwidth] = summaries, capsys.readouterr().out
    own = found[50e9][0][0]["rows"][0]
    assert own["ms"] == pytest.approx(27.0), "with Python"
    assert own["kernel_ms"] == pytest.approx(24.0)
    assert own["share"] == pytest.approx((1 / 0.025 + 1 / 0.029) / 2 * 1e9 / 50e9)
    assert "| llama.cpp bf16 | 54.0 (54.0-54.0) | - |" in found[50e9][1]
    assert "| bf16 | 2.00 (llama.cpp) | - |" in found[50e9][1]
    assert "| bf16, lm_head int8 | 2.70 (llama.cpp) | - |" in found[50e9][1]
    assert "| bf16 | 1.40 (openvino, 1 of 2) | - |" in found[76e9][1], "llama.cpp was not seen at this bandwidth"
