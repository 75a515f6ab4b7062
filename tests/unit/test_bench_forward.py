"""Which runs count, in what order they come, and what is made of them."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from itertools import chain, repeat
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from outrider.bench import plot
from outrider.bench.forward import (
    MAX_TRIES,
    BandwidthProbe,
    ForwardRuns,
    KernelRuns,
    Measurement,
    Workload,
    last_level_cache_bytes,
    measure,
    probe_bytes,
    probes_agree,
    summarise,
)
from outrider.bench.plot import check_can_plot, plot_slack
from outrider.bench.synthetic import Sizes, SyntheticWeights, parse_params, sizes_for, synthetic_config
from outrider.bench.target import (
    FORMATS,
    BenchTarget,
    check_memory,
    open_target,
)
from outrider.errors import ConfigError, ModelLoadError, UnsupportedModelError
from outrider.kernels import native
from outrider.kernels.packed import dequantize
from outrider.models.batch import ForwardBatch
from outrider.quantization.weights import WeightSource
from tests.tiny_models import make_tiny

TINY = Sizes(hidden=64, layers=2, heads=4, kv_heads=2, ffn=96, head_dim=16, vocab=160)
needs_kernels = pytest.mark.skipif(not native.is_available(), reason="no compiled kernels")


def workload(name: str, log: list[str], kernel_seconds: float | None = None, **of: Any) -> Workload:
    def run() -> float | None:
        log.append(name)
        return kernel_seconds

    values = {"kind": "kernels", "weights": "bf16", "num_rows": 1, "num_bytes": 10**9, "num_flops": 10**9, **of}
    return Workload(run=run, **values)


def ticking(*durations: float) -> Callable[[], float]:
    """A clock by which the timed runs take these seconds, the last one for ever."""
    ticks = (time for seconds in chain(durations, repeat(durations[-1])) for time in (0.0, seconds))
    return lambda: next(ticks)


def reading(*values: float) -> Callable[[], float]:
    """A probe with these results, the last one for ever."""
    results = chain(values, repeat(values[-1]))
    return lambda: next(results)


def tiny_target(weights: tuple[Any, ...] = FORMATS) -> BenchTarget:
    source = cast(WeightSource, SyntheticWeights(TINY))
    return BenchTarget("tiny", synthetic_config(TINY), source, weights, 32)


# --- measuring


def test_probes_agree_within_a_part_of_the_larger() -> None:
    assert probes_agree(100, 86)
    assert probes_agree(86, 100)
    assert not probes_agree(100, 84)


def test_a_run_counts_only_between_equal_probes() -> None:
    one, measurement = workload("a", []), Measurement()
    measure([one], 2, measurement, probe=reading(80e9, 45e9, 46e9, 80e9, 78e9), clock=ticking(1.0, 2.0, 3.0, 4.0))
    assert [sample.seconds for sample in measurement.samples[one]] == [2.0, 4.0]
    assert [sample.bandwidth for sample in measurement.samples[one]] == [45.5e9, 79e9]
    assert measurement.num_tried[one] == 4
    assert measurement.probes == [80e9, 45e9, 46e9, 80e9, 78e9]


def test_workloads_warm_up_and_take_turns_beginning_with_the_next_one() -> None:
    log: list[str] = []
    measure([workload(name, log) for name in "abc"], 3, Measurement(), probe=reading(1.0), clock=ticking(1.0))
    assert "".join(log) == "aabbcc" + "bbccaa" + "ccaabb"


def test_a_workload_with_enough_samples_drops_out() -> None:
    log: list[str] = []
    both = [workload(name, log) for name in "ab"]
    measurement = Measurement()
    measure(both, 1, measurement, probe=reading(1.0, 2.0, 2.0), clock=ticking(1.0))  # a's first run does not count
    assert "".join(log) == "aabb" + "aa"
    assert [len(measurement.samples[of]) for of in both] == [1, 1]


def test_an_unsteady_machine_ends_the_measurement_too() -> None:
    log: list[str] = []
    one, measurement = workload("a", log), Measurement()
    flipping = (value for _ in range(100) for value in (1.0, 2.0))
    measure([one], 2, measurement, probe=lambda: next(flipping), clock=ticking(1.0))
    assert measurement.samples[one] == []
    assert measurement.num_tried[one] == 2 * MAX_TRIES == len(log) / 2
    (row,) = summarise(measurement)["rows"]
    assert (row["ms"], row["gbps"], row["share"], row["num_samples"], row["num_tried"]) == (None, None, None, 0, 10)


def test_an_interruption_leaves_the_finished_samples() -> None:
    done, never = workload("a", []), workload("b", [])
    measurement = Measurement()
    probes = iter([1.0, 1.0])

    def probe() -> float:
        try:
            return next(probes)
        except StopIteration:
            raise KeyboardInterrupt from None

    with pytest.raises(KeyboardInterrupt):
        measure([done, never], 2, measurement, probe=probe, clock=ticking(1.0))
    assert len(summarise(measurement)["rows"]) == 1
    assert measurement.num_kept == 1


def test_summary_has_medians_rates_and_shares() -> None:
    measurement = Measurement()
    both = [
        workload("a", [], 0.01, kind="forward", num_rows=4, num_bytes=10**9, num_flops=4 * 10**9),
        workload("b", [], 0.3, kind="prefill", num_rows=100),
    ]
    measure(both, 3, measurement, probe=reading(100e9), clock=ticking(0.02, 0.4, 0.4, 0.04, 0.025, 0.4))
    summary = summarise(measurement)
    (row,), (prefill,) = summary["rows"], summary["prefill"]
    assert row == {
        "weights": "bf16",
        "m": 4,
        "ms": pytest.approx(25),
        "ms_min": pytest.approx(20),
        "ms_max": pytest.approx(40),
        "kernel_ms": pytest.approx(10),
        "gbps": pytest.approx(40),
        "share": pytest.approx(0.4),
        "gflops": pytest.approx(160),
        "num_samples": 3,
        "num_tried": 3,
    }
    assert prefill["tokens_per_s"] == pytest.approx(250)
    assert summary["probe"] == {"gbps_median": 100.0, "gbps_min": 100.0, "gbps_max": 100.0, "num_probes": 7}
    json.dumps(summary)


def test_probe_is_larger_than_the_caches(tmp_path: Path) -> None:
    for index, size in enumerate(("48K", "1024K", "512M", "rubbish")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert last_level_cache_bytes(tmp_path) == 512 << 20
    assert probe_bytes(tmp_path) == 4 << 30
    assert last_level_cache_bytes(tmp_path / "nothing") is None
    assert probe_bytes(tmp_path / "nothing") == 1 << 30


# --- synthetic models and what is read of them


def test_half_a_billion_has_the_documented_shape() -> None:
    sizes = sizes_for(parse_params("0.5B"))
    assert sizes == Sizes(hidden=1280, layers=24, heads=20, kv_heads=4, ffn=4096, head_dim=64, vocab=32000)
    assert sizes.params == 512_819_200


@pytest.mark.parametrize("text", ["12M", "0.1B", "350M", "1b", "3B", "7B", "70B", "1000B", "500000000"])
def test_sizes_reach_the_parameters_asked_for(text: str) -> None:
    wanted = parse_params(text)
    sizes = sizes_for(wanted)
    assert wanted <= sizes.params < wanted + 12 * sizes.hidden**2
    assert sizes.heads % sizes.kv_heads == 0
    assert sizes.heads * sizes.head_dim == sizes.hidden


@pytest.mark.parametrize("text", ["", "B", "big", "-1B", "nan", "infB", "0", "1e30", "1TB", "5M"])
def test_nonsense_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--params"):
        sizes_for(parse_params(text))


def test_synthetic_weights_are_the_same_every_time_and_in_every_format() -> None:
    first, second = SyntheticWeights(TINY), SyntheticWeights(TINY)
    name = "model.layers.1.mlp.down_proj"
    weights = {format: dequantize(first.linear(name, format, 32)) for format in FORMATS}
    assert torch.equal(weights["int4"], dequantize(second.linear(name, "int4", 32)))
    assert torch.allclose(weights["int8"], weights["fp32"], rtol=1e-5)
    assert torch.allclose(weights["bf16"], weights["fp32"], rtol=1e-2)
    assert weights["int4"].std() == pytest.approx(float(weights["fp32"].std()), rel=0.1)
    assert not torch.equal(weights["fp32"], dequantize(SyntheticWeights(TINY, seed=1).linear(name, "fp32")))
    assert first.tensor("model.embed_tokens.weight") is first.tensor("model.embed_tokens.weight")
    assert (first.held, first.linear_names, "lm_head.weight" in first) == (None, frozenset(), False)
    assert first.names == sorted(first.names)
    with pytest.raises(ModelLoadError, match="no tensor"):
        first.tensor("lm_head.weight")


@needs_kernels
@pytest.mark.parametrize("format", FORMATS)
def test_forwards_read_the_bytes_of_the_layers_alone_and_keep_nothing(format: Any) -> None:
    target = tiny_target()
    assert target.num_params == TINY.params
    linears = KernelRuns(format, target.linears(format))
    runs = ForwardRuns(format, target.model(format), context=5, num_positions=37)
    of_kernels, of_forward = linears.workload(3), runs.workload(3, target.num_params)
    prefill = runs.prefill(37, target.num_params)
    assert of_kernels.num_bytes == of_forward.num_bytes == prefill.num_bytes
    assert of_kernels.num_flops == of_forward.num_flops == 6 * TINY.params
    assert prefill.num_flops == 2 * (37 * (TINY.params - 64 * 160) + 64 * 160)
    assert of_kernels.run() is None
    for _ in range(2):  # the second time over the slots of the first
        for each in (of_forward, prefill, runs.workload(32, target.num_params)):
            seconds = each.run()
            assert seconds is not None
            assert seconds > 0


@needs_kernels
def test_sequences_of_a_forward_have_their_own_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target()
    model = target.model("fp32")
    batches: list[ForwardBatch] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda batch, cache: (batches.append(batch), forward(batch, cache))[1])
    runs = ForwardRuns("fp32", model, context=5, num_positions=7, num_sequences=3)
    workload = runs.workload(2, target.num_params)
    workload.run()
    assert (workload.num_rows, workload.num_flops) == (6, 12 * TINY.params)
    flat = batches[-1].attention.flat
    assert flat.cu_rows.tolist() == [0, 2, 4, 6]
    assert flat.num_context.tolist() == [5, 5, 5]
    assert len(set(flat.slots.tolist())) == 3 * 7


@needs_kernels
def test_a_workload_keeps_the_weights_that_it_reads() -> None:
    linears = tiny_target().linears("int8")
    alive = weakref.ref(linears[0].weight.data)
    one = KernelRuns("int8", linears).workload(2)
    del linears
    gc.collect()
    assert alive() is not None
    one.run()


@needs_kernels
def test_bandwidth_probe_reads_its_buffer() -> None:
    assert 1e6 < BandwidthProbe(1 << 20)() < 1e13


@pytest.mark.parametrize("fastest", native.FETCHES)
def test_bandwidth_probe_reads_in_the_fastest_way(fastest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that becomes slower with every reading does not make what comes first the fastest."""
    speed = 100e9

    def read(buffer: Tensor, fetch: str) -> float:
        nonlocal speed
        speed *= 0.99
        return speed * (1.0 if fetch == fastest else 0.8)

    monkeypatch.setattr(native, "read_bandwidth", read)
    probe = BandwidthProbe(1 << 10)
    assert probe.fetch == fastest
    assert probe() == speed


def test_a_folder_with_an_output_layer_of_its_own(tmp_path: Path) -> None:
    target = open_target(str(make_tiny("qwen2", tmp_path)), None, None, 32)
    assert target.formats == ("bf16", "int8", "int4")
    assert target.linear_names[-1] == "lm_head"
    layer = 2 * 48 * (64 + 32) + 3 * 48 * 96  # attention of 4 and 2 heads of 16, and the MLP
    assert target.num_params == 3 * layer + 48 * target.config.vocab_size
    if native.is_available():
        assert all(linear.bias is not None for linear in target.linears("bf16")[:3])  # of the first q, k and v


def test_models_that_cannot_be_measured_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="model_type gpt2"):
        open_target(str(make_tiny("gpt2", tmp_path)), None, None, 32)
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        open_target(str(tmp_path / "nowhere"), None, None, 32)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="not valid"):
        open_target(str(broken), None, None, 32)


def test_memory_is_estimated_upwards_and_checked() -> None:
    target = tiny_target(("bf16", "int4"))
    packed = 2 * TINY.params + TINY.params // 2
    assert (
        packed
        < target.needed_bytes(max_rows=1, num_positions=16)
        < target.needed_bytes(max_rows=64, num_positions=512)
    )
    check_memory(10, None)
    check_memory(10, 10)
    with pytest.raises(ConfigError, match=r"3\.0 GiB needed, expected at most the 2\.0 GiB"):
        check_memory(3 << 30, 2 << 30)


# --- the picture


def test_plot_is_written(tmp_path: Path) -> None:
    rows = [
        {"weights": weights, "m": m, "ms": ms, "ms_min": ms, "ms_max": ms}
        for weights, m, ms in (("bf16", 1, 2.0), ("bf16", 8, 2.5), ("int4", 2, 1.0), ("int4", 4, None))
    ]
    for name in ("slack.png", "slack.svg"):
        plot_slack({"rows": rows}, str(tmp_path / name), "a title")
    assert (tmp_path / "slack.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "slack.svg").read_text()
    plot_slack({"rows": []}, str(tmp_path / "empty.png"), "nothing kept")


def test_plots_that_cannot_be_drawn_are_refused_before(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="ends in"):
        check_can_plot("slack.doc")
    check_can_plot("slack.png")

    def without_matplotlib(name: str) -> ModuleSpec | None:
        assert name == "matplotlib"

    monkeypatch.setattr(plot, "find_spec", without_matplotlib)
    with pytest.raises(ConfigError, match=r"pip install outrider\[bench\]"):
        check_can_plot("slack.png")
