"""Weights of linear layers, packed once into panels of 32 outputs that every kernel and the file format share.

A linear layer is y = x W^T + b with W [N outputs, K inputs]. Panels are contiguous; N is padded with zero weights
to a multiple of 32 and K to a multiple of `_K_MULTIPLE` (int4: of the group). The bytes of a panel, in order:

    fp32  [K][32] float32
    bf16  [K_pad/2][32][2] bfloat16, the two consecutive inputs of a pair next to each other
    int8  32 float32 scales, then [K_pad/4][32][4] uint8 = q + 128 with q in -127..127; w = scale * q
    int4  per group: 32 float16 scales, 32 float16 zero points if there are any, then [group/8][32][4] bytes of two
          nibbles: in step i the low nibble of byte b is input 8i + b and the high one is input 8i + 4 + b;
          w = scale * (q - zero) with q in 0..15, and zero = 8 without zero points

So every format is a matrix of 32-bit words, transposed within its panel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from outrider.kernels import huge_pages

WeightFormat = Literal["fp32", "bf16", "int8", "int4"]

PANEL = 32
ALIGNMENT = 64
GROUP_SIZES = (32, 64, 128)
NO_ZERO_POINT = 8  # of int4 weights without zero points: q - 8

_K_MULTIPLE = {"fp32": 1, "bf16": 2, "int8": 4}
_SCALES_INT8 = PANEL * 4  # bytes
_SCALES_INT4 = PANEL * 2
_INT8_OFFSET = 128


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """One packed weight [N, K]; the bytes are laid out as the module says.

    Attributes:
        group_size: of int4; 0 otherwise.
        has_zeros: int4 with zero points.
        data: uint8 [num_panels, panel_bytes] on the CPU, contiguous, 64-byte aligned.
        input_order: int32 [K], packed input k is x[..., input_order[k]]; None is the identity.
    """

    format: WeightFormat
    num_outputs: int
    num_inputs: int
    group_size: int
    has_zeros: bool
    data: Tensor
    input_order: Tensor | None = None

    def __post_init__(self) -> None:
        num_bytes = panel_bytes(self.format, self.num_inputs, self.group_size, self.has_zeros)
        _check("packed data", self.data, torch.uint8, (num_panels(self.num_outputs), num_bytes))
        if self.input_order is not None:
            _check("input_order", self.input_order, torch.int32, (self.num_inputs,))
        if self.data.device.type != "cpu" or not self.data.is_contiguous() or self.data.data_ptr() % ALIGNMENT:
            raise ValueError(f"packed data: expected contiguous CPU memory aligned to {ALIGNMENT} bytes")


class Unpacked(NamedTuple):
    """What `pack_*` was given: inputs in the packed order.

    values: float32, bfloat16, int8 or uint8 (int4) [N, K].
    scales: float32 [N] (int8) or float16 [N, num_groups] (int4).
    zeros: float16 [N, num_groups] (int4 with zero points).
    """

    values: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None


def num_panels(num_outputs: int) -> int:
    return -(-num_outputs // PANEL)


def padded_inputs(format: WeightFormat, num_inputs: int, group_size: int = 0) -> int:
    """K rounded up to what the format packs together."""
    multiple = group_size if format == "int4" else _K_MULTIPLE[format]
    return -(-num_inputs // multiple) * multiple


def panel_bytes(format: WeightFormat, num_inputs: int, group_size: int = 0, has_zeros: bool = False) -> int:
    """Bytes of one panel, a multiple of 64.

    Raises:
        ValueError: an unknown format, no inputs, or a group size that does not belong to the format.
    """
    if format != "int4" and format not in _K_MULTIPLE:
        raise ValueError(f"weight format: got {format!r}, expected fp32, bf16, int8 or int4")
    if num_inputs < 1:
        raise ValueError(f"num_inputs: got {num_inputs}, expected 1 or more")
    if format == "int4":
        if group_size not in GROUP_SIZES:
            raise ValueError(f"group_size: got {group_size}, expected one of {GROUP_SIZES}")
    elif group_size or has_zeros:
        raise ValueError(f"group_size and has_zeros belong to int4: got {group_size}, {has_zeros} with {format}")
    columns = padded_inputs(format, num_inputs, group_size)
    match format:
        case "fp32":
            return columns * PANEL * 4
        case "bf16":
            return columns * PANEL * 2
        case "int8":
            return _SCALES_INT8 + columns * PANEL
        case "int4":
            return columns // group_size * _group_bytes(group_size, has_zeros)


def pack_fp32(weight: Tensor) -> PackedWeight:
    """Pack as float32.

    Args:
        weight: float [N, K].
    """
    return _pack_float(weight, "fp32", torch.float32)


def pack_bf16(weight: Tensor) -> PackedWeight:
    """Pack as bfloat16, rounded to nearest even.

    Args:
        weight: float [N, K].
    """
    return _pack_float(weight, "bf16", torch.bfloat16)


def pack_int8(q: Tensor, scales: Tensor) -> PackedWeight:
    """Pack w = scales * q.

    Args:
        q: int8 [N, K] in -127..127.
        scales: float32 [N].

    Raises:
        ValueError: other dtypes or shapes, or a q of -128.
    """
    _check("q", q, torch.int8, (None, None))
    num_outputs, num_inputs = q.shape
    _check("scales", scales, torch.float32, (num_outputs,))
    if q.numel() and int(q.min()) < -127:
        raise ValueError("q: got -128, expected -127..127")
    data = _allocate("int8", num_outputs, num_inputs)
    padded = _pad(q, padded_inputs("int8", num_inputs), 0)
    words = (padded.view(torch.uint8) ^ _INT8_OFFSET).view(torch.int32)  # flipping the sign bit adds 128
    data[:, :_SCALES_INT8].view(torch.float32).copy_(_pad(scales[:, None], 1, 0).view(-1, PANEL))
    _store_words(data[:, _SCALES_INT8:].view(torch.int32), words)
    return PackedWeight("int8", num_outputs, num_inputs, 0, False, data)


def pack_int4(
    q: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, input_order: Tensor | None = None
) -> PackedWeight:
    """Pack w = scales * (q - zeros) by groups of consecutive inputs.

    Args:
        q: uint8 [N, K] in 0..15, its inputs already in the order `input_order`.
        scales: float16 [N, num_groups], num_groups = ceil(K / group_size).
        zeros: uint8 or float16 [N, num_groups]; None is 8 everywhere.
        group_size: 32, 64 or 128.
        input_order: int32 [K]; packed input k is x[..., input_order[k]].

    Raises:
        ValueError: other dtypes, shapes, values or groups.
    """
    _check("q", q, torch.uint8, (None, None))
    num_outputs, num_inputs = q.shape
    data = _allocate("int4", num_outputs, num_inputs, group_size, zeros is not None)
    columns = padded_inputs("int4", num_inputs, group_size)
    num_groups = columns // group_size
    _check("scales", scales, torch.float16, (num_outputs, num_groups))
    if q.numel() and int(q.max()) > 15:
        raise ValueError(f"q: got {int(q.max())}, expected 0..15")
    groups = data.view(data.shape[0], num_groups, -1)  # [P, G, bytes]
    _store_per_group(groups[..., :_SCALES_INT4], scales, 0)
    if zeros is not None:
        zeros = zeros.half() if zeros.dtype == torch.uint8 else zeros
        _check("zeros", zeros, torch.float16, (num_outputs, num_groups))
        _store_per_group(groups[..., _SCALES_INT4 : 2 * _SCALES_INT4], zeros, NO_ZERO_POINT)
    halves = _pad(q, columns, NO_ZERO_POINT).view(-1, num_groups, group_size // 8, 2, 4)
    words = (halves[..., 0, :] | halves[..., 1, :] << 4).view(torch.int32)  # [N_pad, G, group/8, 1]
    start = _group_bytes(group_size, zeros is not None) - group_size * PANEL // 2
    target = groups[..., start:].view(torch.int32).unflatten(-1, (-1, PANEL))  # [P, G, group/8, 32]
    target.copy_(words.view(-1, PANEL, num_groups, group_size // 8).permute(0, 2, 3, 1))
    return PackedWeight("int4", num_outputs, num_inputs, group_size, zeros is not None, data, input_order)


def unpack(packed: PackedWeight) -> Unpacked:
    """What the weight was packed from, without the padding."""
    data, num_inputs = packed.data, packed.num_inputs
    rows = slice(packed.num_outputs)
    match packed.format:
        case "fp32":
            return Unpacked(_load_words(data.view(torch.int32)).view(torch.float32)[rows])
        case "bf16":
            values = _load_words(data.view(torch.int32)).view(torch.bfloat16)
            return Unpacked(values[rows, :num_inputs].contiguous())
        case "int8":
            words = _load_words(data[:, _SCALES_INT8:].view(torch.int32))
            q = (words.view(torch.uint8) ^ _INT8_OFFSET).view(torch.int8)
            scales = data[:, :_SCALES_INT8].view(torch.float32).flatten()
            return Unpacked(q[rows, :num_inputs].contiguous(), scales[rows].clone())
        case "int4":
            return _unpack_int4(packed)


def dequantize(packed: PackedWeight) -> Tensor:
    """The weight that the packed one stands for: float32 [N, K], inputs in the model's own order."""
    values, scales, zeros = unpack(packed)
    weight = values.float()
    if packed.format == "int8":
        assert scales is not None
        weight *= scales[:, None]
    elif packed.format == "int4":
        assert scales is not None
        shift = NO_ZERO_POINT if zeros is None else per_input(zeros.float(), packed)
        weight = (weight - shift) * per_input(scales.float(), packed)
    if packed.input_order is None:
        return weight
    original = torch.empty_like(weight)
    original[:, packed.input_order.long()] = weight
    return original


def per_input(of_groups: Tensor, packed: PackedWeight) -> Tensor:
    """Values of groups [N, num_groups] spread over their inputs [N, K] (packed order)."""
    return of_groups.repeat_interleave(packed.group_size, dim=1)[:, : packed.num_inputs]


def _unpack_int4(packed: PackedWeight) -> Unpacked:
    group_size = packed.group_size
    groups = packed.data.view(len(packed.data), -1, _group_bytes(group_size, packed.has_zeros))  # [P, G, bytes]
    rows = slice(packed.num_outputs)
    start = groups.shape[-1] - group_size * PANEL // 2
    words = groups[..., start:].view(torch.int32).unflatten(-1, (-1, PANEL))  # [P, G, group/8, 32]
    pairs = _dense(words.permute(0, 3, 1, 2)).view(torch.uint8)
    pairs = pairs.view(len(groups) * PANEL, -1, 1, 4)[rows]  # [N, K/8, 1, 4]
    q = torch.cat([pairs & 15, pairs >> 4], dim=2).view(packed.num_outputs, -1)
    scales = _load_per_group(groups[..., :_SCALES_INT4])[rows]
    zeros = _load_per_group(groups[..., _SCALES_INT4 : 2 * _SCALES_INT4])[rows] if packed.has_zeros else None
    return Unpacked(q[:, : packed.num_inputs].contiguous(), scales, zeros)


def _group_bytes(group_size: int, has_zeros: bool) -> int:
    return _SCALES_INT4 * (2 if has_zeros else 1) + group_size * PANEL // 2


def _allocate(
    format: WeightFormat, num_outputs: int, num_inputs: int, group_size: int = 0, has_zeros: bool = False
) -> Tensor:
    """Uninitialised panels, 64-byte aligned, which `PackedWeight` checks."""
    panels, num_bytes = num_panels(num_outputs), panel_bytes(format, num_inputs, group_size, has_zeros)
    return huge_pages.allocate(panels * num_bytes).view(panels, num_bytes)


def _pack_float(weight: Tensor, format: WeightFormat, dtype: torch.dtype) -> PackedWeight:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight: got {weight.dtype} {list(weight.shape)}, expected float [N, K]")
    num_outputs, num_inputs = weight.shape
    data = _allocate(format, num_outputs, num_inputs)
    padded = _pad(weight.to("cpu", dtype), padded_inputs(format, num_inputs), 0)
    if padded.storage_offset() * padded.element_size() % 4:  # in a file, behind an odd number of bfloat16
        padded = padded.clone()
    _store_words(data.view(torch.int32), padded.view(torch.int32))
    return PackedWeight(format, num_outputs, num_inputs, 0, False, data)


def _pad(matrix: Tensor, columns: int, fill: int) -> Tensor:
    """Contiguous, with rows to full panels and inputs to `columns`; the matrix itself where that is so already."""
    shape = (num_panels(len(matrix)) * PANEL, columns)
    if tuple(matrix.shape) == shape:
        return matrix.contiguous()
    padded = matrix.new_full(shape, fill)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded


def _store_words(target: Tensor, words: Tensor) -> None:
    """Panels [P, W * 32] from words [N_pad, W]: word w of output n goes to [n // 32][w][n % 32]."""
    target.unflatten(1, (-1, PANEL)).copy_(words.view(-1, PANEL, words.shape[1]).transpose(1, 2))


def _load_words(panels: Tensor) -> Tensor:
    """Words [N_pad, W] from panels [P, W * 32]."""
    return _dense(panels.unflatten(1, (-1, PANEL)).transpose(1, 2)).flatten(0, 1)


def _dense(tensor: Tensor) -> Tensor:
    """A copy with the strides of its shape; `contiguous` leaves any stride to a dimension of one."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def _store_per_group(target: Tensor, values: Tensor, fill: int) -> None:
    """Bytes [P, G, 64] from float16 [N, G]."""
    padded = _pad(values, values.shape[1], fill)
    target.view(torch.float16).copy_(padded.view(-1, PANEL, values.shape[1]).transpose(1, 2))


def _load_per_group(source: Tensor) -> Tensor:
    """Float16 [N_pad, G] from bytes [P, G, 64]."""
    return _dense(source.view(torch.float16).transpose(1, 2)).flatten(0, 1)


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    fits = tensor.ndim == len(shape) and all(
        want is None or got == want for got, want in zip(tensor.shape, shape, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        raise ValueError(f"{name}: got {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}")
