"""The compiled linear layers: arithmetic, row invariance, edges of their formats, threads and processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outrider.kernels import native, packed, reference_linear
from outrider.kernels.packed import PackedWeight
from tests.parity.kernel_hooks import forced_fetch
from tests.parity.kernel_levels import FUSES, LEVELS, assert_same_bits, use_level, use_threads
from tests.parity.linear_checks import (
    INTEGERS,
    KINDS,
    Kind,
    Layer,
    check_bad_rows,
    check_equals_reference,
    check_near_truth,
    check_row_invariance,
    check_threads,
    rows_of,
)

# 32 outputs are a panel; bfloat16 packs 2 inputs together, int8 4, int4 a group; rows are packed by 1024 inputs.
SIZES = [(1, 1), (31, 2), (32, 3), (33, 31), (2, 33), (65, 64), (130, 65), (33, 130), (5, 1030), (64, 2051)]
# Tiles hold 2, 3, 4, 6 or 12 rows, and rows beyond are spread over tiles of nearly equal size.
BATCHES = [0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 23, 24, 25, 37, 64, 130]
LARGEST = torch.finfo(torch.float32).max


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_level(request.param):
        yield request.param


def layer_of(kind: Kind, num_outputs: int, num_inputs: int, seed: int = 0) -> Layer:
    weight, bias = kind.weight(num_outputs, num_inputs, seed)
    return Layer(weight, bias, native.Linear(weight, bias))


def check(layer: Layer, x: Tensor, level: str) -> None:
    check_near_truth(layer, x)
    if layer.weight.format in INTEGERS:
        check_equals_reference(layer, x, FUSES[level])


@pytest.mark.parametrize("kind", KINDS)
def test_sizes(level: str, kind: str) -> None:
    for seed, (num_outputs, num_inputs) in enumerate(SIZES):
        layer = layer_of(KINDS[kind], num_outputs, num_inputs, seed)
        for num_rows in (1, 7, 26):
            check(layer, rows_of(num_rows, num_inputs, seed), level)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_rows(level: str, kind: str) -> None:
    layer = layer_of(KINDS[kind], 65, 70)
    for num_rows in BATCHES:
        check(layer, rows_of(num_rows, 70, num_rows), level)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_size(level: str, kind: str) -> None:
    for num_outputs in (1, 31, 32, 33, 65, 96, 130):
        for num_inputs in (1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025, 1030, 4099):
            layer = layer_of(KINDS[kind], num_outputs, num_inputs)
            check(layer, rows_of(9, num_inputs), level)
    layer = layer_of(KINDS[kind], 33, 70)
    check_row_invariance(layer.apply, rows_of(130, 70), range(131))


@pytest.mark.parametrize("kind", KINDS)
def test_row_invariance(level: str, kind: str) -> None:
    for num_outputs, num_inputs in ((33, 70), (40, 1030)):
        layer = layer_of(KINDS[kind], num_outputs, num_inputs)
        for num_threads in (1, 2):
            with use_threads(num_threads):
                check_row_invariance(layer.apply, rows_of(64, num_inputs), [0, *range(1, 31, num_threads), 63])


@pytest.mark.parametrize("kind", KINDS)
def test_ways_of_reading_weights_give_the_same_bits(level: str, kind: str) -> None:
    for num_outputs, num_inputs in ((33, 70), (70, 1030)):
        layer = layer_of(KINDS[kind], num_outputs, num_inputs)
        x = rows_of(40, num_inputs)
        alone = torch.cat([layer.apply(row[None]) for row in x])
        for fetch in native.FETCHES:
            for num_threads in (1, 3):
                with use_threads(num_threads), forced_fetch(fetch):
                    for num_rows in range(1, 41):
                        assert_same_bits(layer.apply(x[:num_rows]), alone[:num_rows])


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4 g32"])
def test_layers_that_are_measured_keep_their_bits(level: str, kind: str) -> None:
    """Large enough that ways are tried in turns."""
    layer = layer_of(KINDS[kind], 2048, 1030)
    x = rows_of(14, 1030)
    with use_threads(2):
        first = layer.apply(x)
        for _ in range(40):
            assert_same_bits(layer.apply(x), first)
    assert_same_bits(torch.cat([layer.apply(row[None]) for row in x]), first)


@pytest.mark.parametrize("kind", ["bf16", "int8 order bias", "int4 g64 zeros bias", "int4 g128 bias"])
def test_more_rows_than_a_core_holds(level: str, kind: str) -> None:
    """Matrix registers take 128 rows of 8,200 inputs through all weights before the next ones."""
    layer = layer_of(KINDS[kind], 70, 8200)
    x = rows_of(150, 8200)
    for num_threads in (1, 2):
        with use_threads(num_threads):
            whole = layer.apply(x)
            for rows in (slice(1), slice(5, 12), slice(100, 150), slice(127, 130)):
                assert_same_bits(layer.apply(x[rows]), whole[rows])
    check_near_truth(layer, x[120:140])


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_threads(level: str, kind: str) -> None:
    """Threads share the packing of rows and the panels; with more threads than either some have nothing to do."""
    for num_outputs, num_rows in ((1, 1), (130, 2), (130, 40)):
        check_threads(layer_of(KINDS[kind], num_outputs, 70).apply, rows_of(num_rows, 70))


@pytest.mark.skipif(not LEVELS, reason="built without kernels")
@pytest.mark.parametrize("kind", [name for name in KINDS if KINDS[name].format in INTEGERS])
def test_levels_agree(kind: str) -> None:
    """int8 rounds alike everywhere, int4 wherever there is a fused multiply-add."""
    outputs = []
    for level in LEVELS:
        if KINDS[kind].format == "int8" or FUSES[level]:
            with use_level(level):
                outputs.append(layer_of(KINDS[kind], 65, 1030).apply(rows_of(14, 1030)))
    for output in outputs[1:]:
        assert_same_bits(output, outputs[0])


@pytest.mark.parametrize("kind", KINDS)
def test_bad_rows(level: str, kind: str) -> None:
    for num_inputs in (1, 33, 1030):
        check_bad_rows(layer_of(KINDS[kind], 40, num_inputs), rows_of(14, num_inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_give_the_bias(level: str, kind: str) -> None:
    layer = layer_of(KINDS[kind], 40, 70)
    bias = torch.zeros(40) if layer.bias is None else layer.bias
    for zero in (0.0, -0.0):
        x = rows_of(9, 70)
        x[4] = zero
        assert torch.equal(layer.apply(x)[4], bias)


@pytest.mark.parametrize("kind", KINDS)
def test_small_rows(level: str, kind: str) -> None:
    """Down to subnormal rows, and where 127 / magnitude just ceases to be finite (3.732e-37)."""
    layer = layer_of(KINDS[kind], 40, 70)
    magnitudes = [1e-36, 3.8e-37, 3.7345e-37, 3.733e-37, 3.7322e-37, 3.73e-37, 1e-38, 1e-40, 1e-44]
    signs = rows_of(len(magnitudes), 70).sign()
    x = signs * torch.tensor(magnitudes)[:, None]
    x[:, 1::3] *= 0.4
    check(layer, x, level)
    beside_ones = rows_of(9, 70).clamp(-1, 1)
    beside_ones[:, ::2] = x[:, ::2]
    check(layer, beside_ones, level)


@pytest.mark.parametrize("kind", KINDS)
def test_large_rows(level: str, kind: str) -> None:
    layer = layer_of(KINDS[kind], 40, 70)
    signs = rows_of(6, 70).sign()
    check(replace(layer, bias=None, apply=native.Linear(layer.weight)), signs * 1e33, level)
    if layer.weight.format in INTEGERS:
        x = signs * LARGEST  # the row's scale and the sums are finite, their product overflows
        check_equals_reference(layer, x, FUSES[level])
        x[:, 3:] = 0
        check_equals_reference(layer, x, FUSES[level])
    elif layer.weight.format == "fp32":
        x = torch.zeros(6, 70)
        x[:, 5] = LARGEST
        weight = packed.pack_fp32(torch.full((40, 70), 0.5))
        assert torch.equal(native.Linear(weight)(x), torch.full((6, 40), LARGEST / 2))


@pytest.mark.parametrize("num_inputs", [1030, native.MAX_INPUTS - 1, native.MAX_INPUTS])
def test_largest_sums_int8(level: str, num_inputs: int) -> None:
    """All products of one sign are the most that 32 bits have to hold; half of each sign is the most on the way."""
    signs = torch.ones(4, num_inputs)
    signs[1] = -1
    signs[2, num_inputs // 2 :] = -1
    signs[3, ::2] = -1
    q = (127 * signs).to(torch.int8)
    layer = layer_with(packed.pack_int8(q, torch.tensor([1.0, 0.5, 1e-3, -3.0])))
    x = torch.cat((signs, signs * 3e38, torch.zeros(1, num_inputs)))
    check_equals_reference(layer, x, FUSES[level])
    sums = 127 * signs.double() @ q.double().T  # x = 1 has the integer 127
    truth = sums * torch.tensor([1.0, 0.5, 1e-3, -3.0]).double() / 127
    torch.testing.assert_close(layer.apply(signs).double(), truth, rtol=3e-7, atol=0)


@pytest.mark.parametrize("group_size", packed.GROUP_SIZES)
@pytest.mark.parametrize("zero", [None, 0, 8, 15])
def test_largest_sums_int4(level: str, group_size: int, zero: int | None) -> None:
    for num_inputs in (1030, native.MAX_INPUTS):
        num_groups = -(-num_inputs // group_size)
        q = torch.zeros(3, num_inputs, dtype=torch.uint8)
        q[1] = 15
        q[2, ::2] = 15
        scales = torch.tensor([0.01, 2.0**-24, 300.0]).half()[:, None].repeat(1, num_groups)
        zeros = None if zero is None else torch.full((3, num_groups), zero, dtype=torch.uint8)
        layer = layer_with(packed.pack_int4(q, scales, zeros, group_size))
        signs = torch.ones(3, num_inputs)
        signs[1] = -1
        signs[2, ::2] = -1
        check_equals_reference(layer, signs, FUSES[level])


def layer_with(weight: PackedWeight) -> Layer:
    return Layer(weight, None, native.Linear(weight))


def test_fractional_zero_points(level: str) -> None:
    """Sums of a group are then no integers: the products with the zero points are exact only where they are fused."""
    generator = torch.Generator().manual_seed(0)
    zeros = (torch.rand(40, 3, generator=generator) * 15).half()
    q = torch.randint(0, 16, (40, 96), generator=generator).to(torch.uint8)
    layer = layer_with(packed.pack_int4(q, torch.rand(40, 3, generator=generator).half(), zeros, 32))
    check(layer, rows_of(9, 96), level)


@pytest.mark.parametrize("scale", [2.0**-24, 2.0**-15, 65504.0])
def test_extreme_scales_int4(level: str, scale: float) -> None:
    q = torch.arange(40 * 70).view(40, 70).remainder(16).to(torch.uint8)
    scales = torch.full((40, 3), scale, dtype=torch.float16)
    layer = layer_with(packed.pack_int4(q, scales, None, 32))
    check(layer, rows_of(9, 70), level)


def test_too_many_inputs() -> None:
    weight = packed.pack_int8(torch.zeros(1, native.MAX_INPUTS + 1, dtype=torch.int8), torch.ones(1))
    with pytest.raises(ValueError, match="got 65537, expected at most 65536"):
        native.Linear(weight)


@pytest.mark.parametrize("kind", KINDS)
def test_forms_of_input(level: str, kind: str) -> None:
    """Strides, offsets that no vector is aligned to, and other float types are brought to one form."""
    layer = layer_of(KINDS[kind], 33, 31)
    x = rows_of(9, 31).bfloat16().float()
    expected = layer.apply(x)
    assert_same_bits(layer.apply(x.bfloat16()), expected)
    assert_same_bits(layer.apply(x.double()), expected)
    assert_same_bits(layer.apply(x.T.contiguous().T), expected)
    assert_same_bits(layer.apply(torch.cat((torch.zeros(9, 1), x), dim=1)[:, 1:]), expected)
    assert_same_bits(layer.apply(x[1:]), expected[1:])
    assert layer.apply(x[:0]).shape == (0, 33)


@pytest.mark.parametrize("number", [0, -1, 1025])
def test_number_of_threads_out_of_range(number: int) -> None:
    with pytest.raises(ValueError, match=f"got {number}, expected 1 to 1024"):
        native.set_num_threads(number)


kinds = st.builds(
    Kind, st.sampled_from(["fp32", "bf16", "int8"]), has_order=st.booleans(), has_bias=st.booleans()
) | st.builds(Kind, st.just("int4"), st.sampled_from(packed.GROUP_SIZES), st.booleans(), st.booleans(), st.booleans())


@pytest.mark.skipif(not LEVELS, reason="built without kernels")
@settings(max_examples=150)
@given(
    level=st.sampled_from(LEVELS or [native.REFERENCE]),
    kind=kinds,
    num_outputs=st.integers(1, 140),
    num_inputs=st.integers(1, 300) | st.integers(1000, 1100),
    num_rows=st.integers(0, 40),
    num_threads=st.sampled_from([1, 1, 2, 3]),
    seed=st.integers(0, 2**20),
)
def test_random_layers(
    *, level: str, kind: Kind, num_outputs: int, num_inputs: int, num_rows: int, num_threads: int, seed: int
) -> None:
    x = rows_of(num_rows, num_inputs, seed)
    with use_level(level), use_threads(num_threads):
        layer = layer_of(kind, num_outputs, num_inputs, seed)
        check(layer, x, level)
        some = seed % (num_rows + 1)
        assert_same_bits(layer.apply(x[some:]), layer.apply(x)[some:])


def test_calls_from_several_threads(level: str) -> None:
    """Callers share one pool and its buffers, and take turns; the number of threads may change meanwhile."""
    layers = [layer_of(kind, 40 + 8 * i, 100 + i) for i, kind in enumerate(KINDS.values())]
    rows = [rows_of(5 + i, 100 + i) for i in range(len(layers))]
    expected = [layer.apply(x) for layer, x in zip(layers, rows, strict=True)]

    def call_all(start: int) -> None:
        for i in range(4 * len(layers)):
            which = (start + i) % len(layers)
            if i % 7 == 0:
                native.set_num_threads(1 + i % 3)
            assert_same_bits(layers[which].apply(rows[which]), expected[which])

    with use_threads(3), ThreadPoolExecutor(4) as executor:
        for done in [executor.submit(call_all, start) for start in range(4)]:
            done.result()


def test_flushing_subnormals_is_all_threads_or_none(level: str) -> None:
    """It is a mode of each thread of the processor: workers take over the caller's."""
    layer = layer_of(KINDS["fp32"], 130, 70)
    x = rows_of(9, 70) * 1e-40
    with use_threads(3):
        layer.apply(x)  # workers that started before
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor does not flush")
        try:
            check_threads(layer.apply, x)
        finally:
            torch.set_flush_denormal(False)


CHILD_SECONDS = 20


def succeeds_in_a_child(layer: Layer, x: Tensor, expected: Tensor) -> bool:
    """Whether a forked process computes the same; it is ended if it hangs."""
    child = os.fork()
    if child == 0:  # nothing of pytest may run here
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(CHILD_SECONDS)
        os._exit(0 if torch.equal(layer.apply(x), expected) else 1)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_has_its_own_threads(level: str) -> None:
    layer, x = layer_of(KINDS["int8"], 130, 70), rows_of(9, 70)
    with use_threads(3):
        expected = layer.apply(x)
        assert succeeds_in_a_child(layer, x, expected)
        assert torch.equal(layer.apply(x), expected)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forks_amid_calls(level: str) -> None:
    """What another thread held at the time of the fork is nobody's in the child."""
    layer, x = layer_of(KINDS["int8"], 130, 1030), rows_of(40, 1030)
    done = Event()

    def keep_calling() -> None:
        while not done.is_set():
            layer.apply(x)

    with use_threads(2), ThreadPoolExecutor(1) as executor:
        expected = layer.apply(x[:2])
        caller = executor.submit(keep_calling)
        try:
            for _ in range(10):
                assert succeeds_in_a_child(layer, x[:2], expected)
        finally:
            done.set()
        caller.result()


def test_reference_is_what_is_compared_with() -> None:
    """The reference itself is near the truth, so that equal bits mean something."""
    for kind in KINDS.values():
        weight, bias = kind.weight(40, 1030)
        reference = Layer(weight, bias, lambda x, w=weight, b=bias: reference_linear.linear(x, w, b))
        check_near_truth(reference, rows_of(9, 1030))
