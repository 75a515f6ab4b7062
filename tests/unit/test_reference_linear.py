"""The linear layers' arithmetic against straight loops in numpy that round where the contract says so."""

from __future__ import annotations

import gc
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outrider.kernels import reference_linear
from outrider.kernels.packed import (
    PackedWeight,
    dequantize,
    pack_bf16,
    pack_fp32,
    pack_int4,
    pack_int8,
)
from outrider.kernels.reference_linear import linear
from tests.unit.test_packed import generator, random_int4, random_int8

f32 = np.float32


def round_row(row: np.ndarray) -> tuple[list[int], np.float32]:
    """Integers and scale of one row of float32, one value after the other."""
    largest = max(abs(value) for value in row)
    inverse = f32(127) / largest if largest > 0 else f32(0)
    integers = []
    for value in row:
        scaled = float(f32(value * inverse))
        integers.append(round(scaled))  # Python rounds halves to even, too
    return integers, f32(largest / f32(127))


def slow_int8(x: np.ndarray, q: Tensor, scales: Tensor, bias: Tensor | None) -> np.ndarray:
    out = np.empty((len(x), len(q)), f32)
    for r, row in enumerate(x):
        integers, scale = round_row(row)
        for n in range(len(q)):
            total = sum(a * int(b) for a, b in zip(integers, q[n], strict=True))
            value = f32(f32(total) * f32(scales[n])) * scale
            out[r, n] = value if bias is None else value + f32(bias[n])
    return out


def fma(a: float, b: float, c: float) -> np.float32:
    """Rounded once: the product is exact in float64, and so is the sum for the magnitudes of these tests."""
    assert math.fsum([a * b, c, -(a * b + c)]) == 0
    return f32(a * b + c)


def slow_int4(
    x: np.ndarray, weights: tuple[Tensor, Tensor, Tensor | None], group_size: int, bias: Tensor | None
) -> np.ndarray:
    q, scales, zeros = weights
    out = np.empty((len(x), len(q)), f32)
    for r, row in enumerate(x):
        integers, scale = round_row(row)
        for n in range(len(q)):
            acc = f32(0)
            for group in range(scales.shape[1]):
                zero = 8.0 if zeros is None else float(zeros[n, group])
                inputs = range(group * group_size, min(len(row), (group + 1) * group_size))
                total = sum(integers[k] * (int(q[n, k]) - zero) for k in inputs)
                acc = fma(float(f32(total)), float(scales[n, group]), float(acc))
            value = acc * scale
            out[r, n] = value if bias is None else value + f32(bias[n])
    return out


def random_x(num_rows: int, num_inputs: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, num_inputs, generator=generator(seed + 1)) * 3


sizes = st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 150))


@settings(max_examples=25)
@given(size=sizes, with_bias=st.booleans(), seed=st.integers(0, 2**20))
def test_int8_bit_for_bit(size: tuple[int, int, int], with_bias: bool, seed: int) -> None:
    num_rows, num_outputs, num_inputs = size
    q, scales = random_int8(num_outputs, num_inputs, seed)
    x, bias = random_x(num_rows, num_inputs, seed), torch.randn(num_outputs) if with_bias else None
    expected = slow_int8(x.numpy(), q, scales, bias)
    assert np.array_equal(linear(x, pack_int8(q, scales), bias).numpy(), expected)


@settings(max_examples=25)
@given(
    size=sizes,
    group_size=st.sampled_from([32, 64, 128]),
    zero_points=st.sampled_from(["none", "whole", "fractional"]),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_int4_bit_for_bit(
    size: tuple[int, int, int], group_size: int, zero_points: str, with_bias: bool, seed: int
) -> None:
    num_rows, num_outputs, num_inputs = size
    q, scales, zeros = random_int4(num_outputs, num_inputs, group_size, zero_points != "none", seed)
    if zero_points == "fractional":
        assert zeros is not None
        zeros = zeros.half() + 0.375
    x, bias = random_x(num_rows, num_inputs, seed), torch.randn(num_outputs) if with_bias else None
    expected = slow_int4(x.numpy(), (q, scales, zeros), group_size, bias)
    assert np.array_equal(linear(x, pack_int4(q, scales, zeros, group_size), bias).numpy(), expected)


def test_int4_rounds_once_a_group() -> None:
    """Sums of all signs alike, so that their products with a scale need more bits than float32 has."""
    q, scales, zeros = random_int4(20, 256, 64, True)
    q, scales = q | 8, scales.abs()
    x = random_x(3, 256).abs()
    expected = slow_int4(x.numpy(), (q, scales, zeros), 64, None)
    assert np.array_equal(linear(x, pack_int4(q, scales, zeros, 64)).numpy(), expected)
    twice = np.zeros_like(expected)
    for group in range(4):
        one = slow_int4(x.numpy() * (np.arange(256) // 64 == group), (q, scales, zeros), 64, None)
        twice += one
    assert not np.array_equal(twice, expected)


def test_int8_sums_beyond_float32() -> None:
    """More products than float32 sums exactly: all of the same sign, and odd."""
    num_inputs = 5000
    q = torch.full((2, num_inputs), 127, dtype=torch.int8)
    q[1, 0] = 126
    out = linear(torch.ones(1, num_inputs), pack_int8(q, torch.ones(2)))
    exact = [127 * 127 * num_inputs, 127 * 127 * num_inputs - 127]
    expected = [f32(total) * (f32(1) / f32(127)) for total in exact]
    assert out[0].tolist() == expected


def all_formats(num_outputs: int = 40, num_inputs: int = 130) -> dict[str, PackedWeight]:
    weight = torch.randn(num_outputs, num_inputs, generator=generator())
    order = torch.randperm(num_inputs, generator=generator()).int()
    return {
        "fp32": pack_fp32(weight),
        "bf16": pack_bf16(weight),
        "int8": pack_int8(*random_int8(num_outputs, num_inputs)),
        "int4": pack_int4(*random_int4(num_outputs, num_inputs, 64, False), 64),
        "zeros": pack_int4(*random_int4(num_outputs, num_inputs, 32, True), 32),
        "order": pack_int4(*random_int4(num_outputs, num_inputs, 32, True), 32, order),
    }


FORMATS = list(all_formats())


@pytest.mark.parametrize("name", FORMATS)
def test_close_to_the_dequantised_weight(name: str) -> None:
    packed = all_formats()[name]
    x, bias = random_x(7, 130), torch.randn(40, generator=generator())
    exact = x.double() @ dequantize(packed).double().T + bias
    tolerance = {"fp32": 1e-6, "bf16": 0.01}.get(name, 0.02)  # of x rounded to 24, 8 and 7 bits
    error = (linear(x, packed, bias) - exact).abs().max() / exact.abs().max()
    assert error < tolerance


def test_bf16_rounds_the_input_only() -> None:
    weight, x = torch.randn(8, 64).bfloat16(), random_x(3, 64)
    exact = x.bfloat16().double() @ weight.double().T
    torch.testing.assert_close(linear(x, pack_bf16(weight)).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["int8", "int4", "zeros", "order"])
def test_row_invariant(name: str) -> None:
    packed, x = all_formats()[name], random_x(9, 130)
    together = linear(x, packed)
    for r in range(len(x)):
        assert torch.equal(linear(x[r : r + 1], packed)[0], together[r])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_row_stays_bad_and_alone(name: str, bad: float) -> None:
    packed, x = all_formats()[name], random_x(3, 130)
    sound = linear(x, packed)
    x[1, 17] = bad
    out = linear(x, packed)
    assert not out[1].isfinite().any()
    torch.testing.assert_close(out[[0, 2]], sound[[0, 2]])


@pytest.mark.parametrize("name", ["int8", "int4", "zeros"])
def test_rows_of_next_to_nothing(name: str) -> None:
    bias = torch.randn(40)
    x = torch.stack([torch.zeros(130), torch.full((130,), 1e-39), torch.full((130,), 1e-30)])
    out = linear(x, all_formats()[name], bias)
    assert torch.equal(out[0], bias)
    assert torch.equal(out[1], bias)
    assert out.isfinite().all()


def test_the_unpacked_form_lives_as_long_as_the_weight() -> None:
    packed, x = all_formats()["int4"], random_x(1, 130)
    before = len(reference_linear._dense_forms)
    linear(x, packed)
    form = reference_linear._dense_forms[packed]
    linear(x, packed)
    assert reference_linear._dense_forms[packed] is form
    del packed
    gc.collect()
    assert len(reference_linear._dense_forms) == before


def test_no_rows() -> None:
    for packed in all_formats().values():
        assert linear(torch.empty(0, 130), packed).shape == (0, 40)


def test_wrong_shapes() -> None:
    packed = all_formats()["fp32"]
    with pytest.raises(ValueError, match=r"x: got \[3, 129\], expected \[M, 130\]"):
        linear(torch.zeros(3, 129), packed)
    with pytest.raises(ValueError, match="bias"):
        linear(torch.zeros(3, 130), packed, torch.zeros(39))
