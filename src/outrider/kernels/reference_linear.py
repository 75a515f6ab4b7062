"""Linear layers on packed weights in PyTorch: the readable truth of the arithmetic, and the path without a compiler.

Shapes: M rows, K inputs, N outputs, G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from outrider.kernels.packed import NO_ZERO_POINT, PackedWeight, padded_inputs, unpack

# So many products of two int8 sum to less than 2^24: float32 holds every partial sum, in whatever order, exactly.
_EXACT_INPUTS = 1024


@dataclass(frozen=True)
class _Dense:
    """A weight in the form that `linear` multiplies by.

    values: float32 [K, N], the weight or its integers; int4: [G, group, N], q - zero (float64 if that is no integer).
    scales: float32 [N] (int8), float64 [G, N] (int4), None otherwise.
    """

    values: Tensor
    scales: Tensor | None = None


_dense_forms: WeakKeyDictionary[PackedWeight, _Dense] = WeakKeyDictionary()


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias in the arithmetic of the weight's format.

    fp32 multiplies as it is; bf16 rounds x to bfloat16 and accumulates in float32; int8 and int4 round each row of x
    to int8 (scale = largest magnitude / 127) and sum products of integers exactly, so that a row's bits depend on no
    other row. A NaN or infinity in a row makes the whole row non-finite. The unpacked weight, four bytes an element,
    is kept as long as `weight` lives.

    Args:
        x: float [M, K].
        bias: float [N].

    Returns:
        float32 [M, N].

    Raises:
        ValueError: x or bias of another shape.
    """
    if x.ndim != 2 or x.shape[1] != weight.num_inputs:
        raise ValueError(f"x: got {list(x.shape)}, expected [M, {weight.num_inputs}]")
    if bias is not None and tuple(bias.shape) != (weight.num_outputs,):
        raise ValueError(f"bias: got {list(bias.shape)}, expected [{weight.num_outputs}]")
    x = x.float()
    if weight.input_order is not None:
        x = x[:, weight.input_order.long()]
    dense = _dense_form(weight)
    match weight.format:
        case "fp32":
            y = x @ dense.values
        case "bf16":
            y = x.bfloat16().float() @ dense.values
        case "int8":
            q, row_scales = quantize_rows(x)
            y = _sum_int8(q, dense) * row_scales
        case "int4":
            q, row_scales = quantize_rows(x)
            y = _sum_int4(q, dense) * row_scales
    return y if bias is None else y + bias.float()


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row to integers in -127..127 and its scale.

    A row whose largest magnitude has no finite 127 / magnitude (zeros, or below 4e-37) becomes zeros. One with a NaN
    or infinity becomes zeros with a scale that is not finite, so that 0 * scale is NaN.

    Args:
        x: float32 [M, K].

    Returns:
        q, float32 [M, K] of integers, and the scales, float32 [M, 1].
    """
    largest = x.abs().amax(dim=1, keepdim=True)
    inverse = torch.full_like(largest, 127.0).div(largest)  # `127 / largest` multiplies by the reciprocal
    inverse = torch.where(inverse.isfinite(), inverse, 0)
    q = (x * inverse).round()  # to nearest even
    return torch.where(q.isfinite(), q, 0), largest / 127


def _sum_int8(q: Tensor, dense: _Dense) -> Tensor:
    """Float32 [M, N]: the exact sums, rounded once, by the scales of the outputs."""
    assert dense.scales is not None
    total = q.new_zeros(len(q), dense.values.shape[1], dtype=torch.float64)
    for start in range(0, len(dense.values), _EXACT_INPUTS):
        some = slice(start, start + _EXACT_INPUTS)
        total += q[:, some] @ dense.values[some]
    return total.float() * dense.scales


def _sum_int4(q: Tensor, dense: _Dense) -> Tensor:
    """Float32 [M, N]: over the groups in order, acc = fma(sum of the group, its scale, acc).

    Products of a sum and a scale are exact in float64, and so is adding them to acc while all stay below 2^29 (the
    smallest scale is 2^-24): rounding that to float32 is the fused operation.
    """
    assert dense.scales is not None
    num_groups, group_size, num_outputs = dense.values.shape
    q = torch.nn.functional.pad(q, (0, num_groups * group_size - q.shape[1]))
    acc = q.new_zeros(len(q), num_outputs)
    for group, values in enumerate(dense.values):
        sums = q[:, group * group_size : (group + 1) * group_size].to(values.dtype) @ values
        acc = torch.addcmul(acc.double(), sums.float().double(), dense.scales[group]).float()
    return acc


def _dense_form(weight: PackedWeight) -> _Dense:
    dense = _dense_forms.get(weight)
    if dense is None:
        dense = _dense_forms[weight] = _to_dense(weight)
    return dense


def _to_dense(weight: PackedWeight) -> _Dense:
    values, scales, zeros = unpack(weight)
    if weight.format != "int4":
        return _Dense(values.float().T.contiguous(), scales)
    assert scales is not None
    columns = padded_inputs("int4", weight.num_inputs, weight.group_size)
    padded = torch.nn.functional.pad(values, (0, columns - weight.num_inputs))  # met by zeros of x
    groups = padded.float().unflatten(1, (-1, weight.group_size))  # [N, G, group]
    if zeros is None:
        groups = groups - NO_ZERO_POINT
    else:
        whole = torch.equal(zeros, zeros.round())
        groups = groups.to(torch.float32 if whole else torch.float64) - zeros[..., None]
    return _Dense(groups.permute(1, 2, 0).contiguous(), scales.T.double().contiguous())
