"""What a linear layer on packed weights has to do, as checks of any function from rows to outputs.

Legend: M rows, N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from outrider.kernels import packed, reference_linear
from outrider.kernels.packed import PackedWeight, WeightFormat
from tests.parity.kernel_levels import ROUNDING, assert_same_bits, assert_within, use_threads

Apply = Callable[[Tensor], Tensor]
"""Rows ``[M, K]`` to ``[M, N]`` float32, weight and bias within."""

SMALLEST_NORMAL = 2.0**-126
"""Of float32 and bfloat16: dot products of bfloat16 in hardware take what is below, and leave it, as zero."""

SMALLEST_QUANTIZED = 3.7322e-37
"""Of a row's largest magnitudes: 127 divided by a smaller one is not finite."""

INTEGERS = ("int8", "int4")


@dataclass(frozen=True)
class Layer:
    """A layer and the function to test: `apply` is made from the other two."""

    weight: PackedWeight
    bias: Tensor | None
    apply: Apply


@dataclass(frozen=True)
class Kind:
    """What layers there are, apart from their sizes."""

    format: WeightFormat
    group_size: int = 0
    has_zeros: bool = False
    has_order: bool = False
    has_bias: bool = False

    def weight(self, num_outputs: int, num_inputs: int, seed: int = 0) -> tuple[PackedWeight, Tensor | None]:
        """A random weight and its bias."""
        generator = torch.Generator().manual_seed(seed)
        shape = (num_outputs, num_inputs)

        def integers(low: int, high: int, *size: int) -> Tensor:
            return torch.randint(low, high + 1, size, generator=generator)

        scales = torch.rand(num_outputs, -(-num_inputs // (self.group_size or num_inputs)), generator=generator)
        match self.format:
            case "fp32":
                weight = packed.pack_fp32(torch.randn(shape, generator=generator))
            case "bf16":
                weight = packed.pack_bf16(torch.randn(shape, generator=generator))
            case "int8":
                weight = packed.pack_int8(integers(-127, 127, *shape).to(torch.int8), scales[:, 0] / 50 - 0.002)
            case "int4":
                zeros = integers(0, 15, *scales.shape).to(torch.uint8) if self.has_zeros else None
                q = integers(0, 15, *shape).to(torch.uint8)
                weight = packed.pack_int4(q, (scales / 4 - 0.02).half(), zeros, self.group_size)
        if self.has_order:
            weight = replace(weight, input_order=torch.randperm(num_inputs, generator=generator).to(torch.int32))
        return weight, torch.randn(num_outputs, generator=generator) if self.has_bias else None


KINDS = {
    "fp32": Kind("fp32"),
    "fp32 order bias": Kind("fp32", has_order=True, has_bias=True),
    "bf16": Kind("bf16"),
    "bf16 order bias": Kind("bf16", has_order=True, has_bias=True),
    "int8": Kind("int8"),
    "int8 order bias": Kind("int8", has_order=True, has_bias=True),
    "int4 g32": Kind("int4", 32),
    "int4 g64 zeros bias": Kind("int4", 64, has_zeros=True, has_bias=True),
    "int4 g128 bias": Kind("int4", 128, has_bias=True),
    "int4 g32 zeros order": Kind("int4", 32, has_zeros=True, has_order=True),
    "int4 g128 zeros order bias": Kind("int4", 128, has_zeros=True, has_order=True, has_bias=True),
}


def rows_of(num_rows: int, num_inputs: int, seed: int = 0) -> Tensor:
    """Random rows whose magnitudes differ by orders."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** (4 * torch.rand(num_rows, 1, generator=generator) - 2)
    return torch.randn(num_rows, num_inputs, generator=generator) * scale


def check_near_truth(layer: Layer, x: Tensor) -> None:
    """Against float64 sums over the dequantised weight, each output within the error that its roundings allow.

    A float32 sum of K products, in whatever order and fused or not, is off by at most K + 1 roundings of the sum of
    magnitudes; bias, scales of groups and of the row add one each. The integer formats first round each input by at
    most half a step, the row's largest magnitude / 127, and take the smallest rows as zeros. bfloat16 rounds the rows
    before; whatever of them, of the weight or of the sums is subnormal may count as zero.

    Raises:
        AssertionError: one output is farther off.
    """
    weight, bias = layer.weight, layer.bias
    dense = packed.dequantize(weight).double()
    inputs = (x.bfloat16() if weight.format == "bf16" else x).double()
    terms = weight.num_inputs + -(-weight.num_inputs // (weight.group_size or weight.num_inputs)) + 6
    largest = x.abs().amax(dim=1, keepdim=True).double() * (weight.format in INTEGERS)
    off_by = torch.where(largest < SMALLEST_QUANTIZED, largest, 0.5001 / 127 * largest)
    per_input = dense.abs().sum(dim=1)
    magnitude = inputs.abs() @ dense.T.abs() + largest / 127 * per_input
    bound = terms * (ROUNDING * magnitude + 2.0**-149) + off_by * per_input
    if weight.format == "bf16":
        bound = bound + terms * SMALLEST_NORMAL
        bound = bound + _only_subnormal(inputs).abs() @ dense.T.abs() + inputs.abs() @ _only_subnormal(dense).T.abs()
    truth = inputs @ dense.T
    if bias is not None:
        truth = truth + bias.double()
        bound = bound + ROUNDING * (bias.abs() + truth.abs() + bound)
    assert_within(layer.apply(x), truth, bound)


def _only_subnormal(values: Tensor) -> Tensor:
    return torch.where(values.abs() < SMALLEST_NORMAL, values, 0)


def check_equals_reference(layer: Layer, x: Tensor, fuses: bool) -> None:
    """The integer formats bit for bit: all that is rounded is said in the reference, in which order too.

    Without a fused multiply-add, int4 rounds once more for each group, which is said in `twice_rounded_int4`.

    Raises:
        AssertionError: one bit differs.
    """
    reference = reference_linear.linear
    if layer.weight.format == "int4" and not fuses:
        reference = twice_rounded_int4
    assert_same_bits(layer.apply(x), reference(x, layer.weight, layer.bias))


def twice_rounded_int4(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """As the reference, with the product of a group's sum and its scale rounded before it is added."""
    if weight.input_order is not None:
        x = x[:, weight.input_order.long()]
    q, row_scales = reference_linear.quantize_rows(x)
    values, scales, zeros = packed.unpack(weight)
    assert scales is not None
    acc = torch.zeros(len(x), weight.num_outputs)
    for group, columns in enumerate(torch.arange(weight.num_inputs).split(weight.group_size)):
        some, integers = q[:, columns], values[:, columns].float()
        sums = some @ (integers if zeros is not None else integers - packed.NO_ZERO_POINT).T
        if zeros is not None:
            sums = sums + -some.sum(dim=1, keepdim=True) * zeros[:, group].float()
        acc = acc + sums * scales[:, group].float()
    y = acc * row_scales
    return y if bias is None else y + bias


def check_row_invariance(apply: Apply, x: Tensor, batch_sizes: Sequence[int], seed: int = 0) -> None:
    """A row's bits in any number of rows, at any place among them, beside whatever neighbours.

    Raises:
        AssertionError: one bit differs.
    """
    alone = torch.cat([apply(row[None]) for row in x])
    for num_rows in batch_sizes:
        assert_same_bits(apply(x[:num_rows]), alone[:num_rows])
        assert_same_bits(apply(x[len(x) - num_rows :]), alone[len(x) - num_rows :])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    assert_same_bits(apply(x[order]), alone[order])
    for stranger in (0.0, 3e38, float("nan"), float("-inf")):
        mixed = x.clone()
        mixed[1::2] = stranger
        assert_same_bits(apply(mixed)[::2], alone[::2])


def check_threads(apply: Apply, x: Tensor, numbers: Sequence[int] = (2, 3, 5, 1)) -> None:
    """Raises AssertionError where the number of threads changes one bit."""
    with use_threads(1):
        alone = apply(x)
    for number in numbers:
        with use_threads(number):
            assert_same_bits(apply(x), alone)


def check_bad_rows(layer: Layer, x: Tensor) -> None:
    """A NaN or infinity anywhere in a row makes all of the row's outputs not finite and changes no other row.

    Raises:
        AssertionError: it was lost, or it spread.
    """
    clean = layer.apply(x)
    for bad in (float("nan"), float("inf"), float("-inf")):
        for place in {0, x.shape[1] // 2, x.shape[1] - 1}:
            broken = x.clone()
            broken[2, place] = bad
            broken[5] = bad
            out = layer.apply(broken)
            assert not out[[2, 5]].isfinite().any(), f"{bad} at input {place} was lost"
            others = [row for row in range(len(x)) if row not in (2, 5)]
            assert_same_bits(out[others], clean[others])
