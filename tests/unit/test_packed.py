"""Packed weights: the layout, byte by byte, against loops that know nothing of words and transposes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outrider.kernels.packed import (
    ALIGNMENT,
    PANEL,
    PackedWeight,
    dequantize,
    pack_bf16,
    pack_fp32,
    pack_int4,
    pack_int8,
    panel_bytes,
    unpack,
)

SHAPES = [(1, 1), (3, 2), (31, 5), (32, 64), (33, 63), (64, 1), (70, 130)]
shapes = st.tuples(st.integers(1, 80), st.integers(1, 200))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_int8(num_outputs: int, num_inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    q = torch.randint(-127, 128, (num_outputs, num_inputs), generator=g, dtype=torch.int8)
    return q, torch.rand(num_outputs, generator=g) - 0.5


def random_int4(
    num_outputs: int, num_inputs: int, group_size: int, with_zeros: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    g = generator(seed)
    num_groups = -(-num_inputs // group_size)
    q = torch.randint(0, 16, (num_outputs, num_inputs), generator=g, dtype=torch.uint8)
    scales = (torch.rand(num_outputs, num_groups, generator=g) - 0.5).half()
    zeros = torch.randint(0, 16, (num_outputs, num_groups), generator=g, dtype=torch.uint8) if with_zeros else None
    return q, scales, zeros


def check_invariants(packed: PackedWeight) -> None:
    num_bytes = panel_bytes(packed.format, packed.num_inputs, packed.group_size, packed.has_zeros)
    assert num_bytes % 64 == 0
    assert packed.data.shape == (-(-packed.num_outputs // PANEL), num_bytes)
    assert packed.data.data_ptr() % ALIGNMENT == 0


def as_numpy(packed: PackedWeight, dtype: type) -> np.ndarray:
    return packed.data.numpy().view(dtype)


# --- the layout


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_layout(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=generator())
    packed = pack_fp32(weight)
    check_invariants(packed)
    words = as_numpy(packed, np.float32)
    for n in range(-(-shape[0] // PANEL) * PANEL):
        for k in range(shape[1]):
            expected = weight[n, k] if n < shape[0] else 0
            assert words[n // PANEL, k * PANEL + n % PANEL] == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_layout(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=generator())
    packed = pack_bf16(weight)
    check_invariants(packed)
    words = as_numpy(packed, np.uint16)
    bits = weight.bfloat16().view(torch.int16).numpy().view(np.uint16)
    for n in range(-(-shape[0] // PANEL) * PANEL):
        for k in range(-(-shape[1] // 2) * 2):
            expected = bits[n, k] if n < shape[0] and k < shape[1] else 0
            assert words[n // PANEL, k // 2 * 2 * PANEL + n % PANEL * 2 + k % 2] == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_layout(shape: tuple[int, int]) -> None:
    q, scales = random_int8(*shape)
    packed = pack_int8(q, scales)
    check_invariants(packed)
    data = packed.data.numpy()
    for n in range(-(-shape[0] // PANEL) * PANEL):
        panel, column = divmod(n, PANEL)
        inside = n < shape[0]
        assert data[panel, 4 * column : 4 * column + 4].view(np.float32)[0] == (scales[n] if inside else 0)
        for k in range(-(-shape[1] // 4) * 4):
            expected = int(q[n, k]) + 128 if inside and k < shape[1] else 128
            assert data[panel, 128 + k // 4 * 128 + column * 4 + k % 4] == expected


@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shape", [(1, 1), (33, 63), (40, 130)])
def test_int4_layout(shape: tuple[int, int], group_size: int, with_zeros: bool) -> None:
    q, scales, zeros = random_int4(*shape, group_size, with_zeros)
    packed = pack_int4(q, scales, zeros, group_size)
    check_invariants(packed)
    data = packed.data.numpy()
    group_bytes = (128 if with_zeros else 64) + group_size * 16
    for n in range(-(-shape[0] // PANEL) * PANEL):
        panel, column = divmod(n, PANEL)
        inside = n < shape[0]
        for k in range(-(-shape[1] // group_size) * group_size):
            group, within = divmod(k, group_size)
            start = group * group_bytes
            halves = data[panel, start : start + 128].view(np.float16)
            assert halves[column] == (scales[n, group] if inside else 0)
            if zeros is not None:
                assert halves[PANEL + column] == (zeros[n, group] if inside else 8)
            step, place = divmod(within, 8)
            byte = data[panel, start + group_bytes - 16 * group_size + step * 128 + column * 4 + place % 4]
            nibble = byte & 15 if place < 4 else byte >> 4
            assert nibble == (q[n, k] if inside and k < shape[1] else 8)


# --- and back


@settings(max_examples=40)
@given(shape=shapes, seed=st.integers(0, 2**20))
def test_floats_come_back(shape: tuple[int, int], seed: int) -> None:
    weight = torch.randn(shape, generator=generator(seed))
    assert torch.equal(unpack(pack_fp32(weight)).values, weight)
    assert torch.equal(dequantize(pack_fp32(weight)), weight)
    assert torch.equal(unpack(pack_bf16(weight)).values, weight.bfloat16())
    assert torch.equal(dequantize(pack_bf16(weight)), weight.bfloat16().float())


@settings(max_examples=40)
@given(shape=shapes, seed=st.integers(0, 2**20))
def test_int8_comes_back(shape: tuple[int, int], seed: int) -> None:
    q, scales = random_int8(*shape, seed)
    packed = pack_int8(q, scales)
    found = unpack(packed)
    assert found.scales is not None
    assert torch.equal(found.values, q)
    assert torch.equal(found.scales, scales)
    assert torch.equal(dequantize(packed), q.float() * scales[:, None])


@settings(max_examples=60)
@given(
    shape=shapes,
    group_size=st.sampled_from([32, 64, 128]),
    with_zeros=st.booleans(),
    ordered=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_int4_comes_back(shape: tuple[int, int], group_size: int, with_zeros: bool, ordered: bool, seed: int) -> None:
    q, scales, zeros = random_int4(*shape, group_size, with_zeros, seed)
    order = torch.randperm(shape[1], generator=generator(seed)).int() if ordered else None
    packed = pack_int4(q, scales, zeros, group_size, order)
    found = unpack(packed)
    assert found.scales is not None
    assert torch.equal(found.values, q)
    assert torch.equal(found.scales, scales)
    assert (found.zeros is None) == (zeros is None)
    if found.zeros is not None and zeros is not None:
        assert torch.equal(found.zeros, zeros.half())
    expected = torch.empty(shape)
    for k in range(shape[1]):
        group = k // group_size
        zero = 8 if zeros is None else zeros[:, group].float()
        column = scales[:, group].float() * (q[:, k].float() - zero)
        expected[:, k if order is None else int(order[k])] = column
    assert torch.equal(dequantize(packed), expected)


def test_fractional_zero_points_come_back() -> None:
    q, scales, _ = random_int4(5, 64, 32, False)
    zeros = torch.tensor([7.5, 0.25]).half().expand(5, 2).contiguous()
    found = unpack(pack_int4(q, scales, zeros, 32))
    assert found.zeros is not None
    assert torch.equal(found.zeros, zeros)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_float_dtype_and_any_strides(dtype: torch.dtype) -> None:
    weight = torch.randn(66, 40, generator=generator()).to(dtype)
    for view in (weight, weight.T, weight[1:, 1:], weight[:, ::2], weight[:32, :40]):
        assert torch.equal(dequantize(pack_fp32(view)), view.float())
        assert torch.equal(dequantize(pack_bf16(view)), view.bfloat16().float())


def test_bf16_behind_an_odd_number_of_elements() -> None:
    """As in a file, where a tensor may start in the middle of a 32-bit word."""
    memory = torch.randn(1 + 32 * 6, generator=generator()).bfloat16()
    weight = memory[1:].view(32, 6)
    assert torch.equal(dequantize(pack_bf16(weight)), weight.float())


# --- what is refused


def test_unknown_format_and_groups() -> None:
    with pytest.raises(ValueError, match="weight format"):
        panel_bytes("int3", 64)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="group_size"):
        panel_bytes("int4", 64, 48)
    with pytest.raises(ValueError, match="belong to int4"):
        panel_bytes("int8", 64, 64)
    with pytest.raises(ValueError, match="num_inputs"):
        panel_bytes("fp32", 0)


def test_wrong_tensors() -> None:
    q, scales = random_int8(3, 4)
    with pytest.raises(ValueError, match="scales"):
        pack_int8(q, scales[:2])
    with pytest.raises(ValueError, match="-128"):
        pack_int8(torch.full((3, 4), -128, dtype=torch.int8), scales)
    with pytest.raises(ValueError, match="weight"):
        pack_fp32(torch.zeros(3))
    with pytest.raises(ValueError, match="weight"):
        pack_bf16(q)
    q4, scales4, _ = random_int4(3, 64, 32, False)
    with pytest.raises(ValueError, match="scales"):
        pack_int4(q4, scales4.float(), None, 32)
    with pytest.raises(ValueError, match="scales"):
        pack_int4(q4, scales4, None, 64)
    with pytest.raises(ValueError, match=r"q: got 16"):
        pack_int4(q4 + 16 - q4, scales4, None, 32)
    with pytest.raises(ValueError, match="input_order"):
        pack_int4(q4, scales4, None, 32, torch.arange(63, dtype=torch.int32))


def test_wrong_data() -> None:
    data = pack_fp32(torch.zeros(40, 3)).data
    for wrong in (data[:1], data.to(torch.int8), data[:, :-64]):
        with pytest.raises(ValueError, match="packed data"):
            PackedWeight("fp32", 40, 3, 0, False, wrong)
    memory = torch.empty(data.numel() + 64, dtype=torch.uint8)
    askew = memory[1 + (-memory.data_ptr() % 64) :][: data.numel()].view(data.shape)
    with pytest.raises(ValueError, match="aligned"):
        PackedWeight("fp32", 40, 3, 0, False, askew)
