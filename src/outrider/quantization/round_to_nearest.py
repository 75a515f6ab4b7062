"""Quantisation of a weight by itself: every value goes to the nearest step of its row's or group's scale."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.errors import ModelLoadError
from outrider.kernels.packed import NO_ZERO_POINT, PackedWeight, pack_int4, pack_int8

HALF_MAX = 65504.0  # of float16 scales
# Scales tried for a group, as parts of the one that takes its largest value to -8: a smaller scale clips that one
# value and is finer for the others. With the refits below they come within 0.3% of the error of the best scale.
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 1.05)
_REFITS = 2
_BLOCK_BYTES = 1 << 26  # of a weight, worked on at a time


def quantize_int8(weight: Tensor, name: str) -> PackedWeight:
    """Symmetric int8, one scale per output: its largest magnitude becomes 127.

    Args:
        weight: float [N, K].
        name: of the tensor, for errors.

    Raises:
        ModelLoadError: a NaN or infinity.
    """
    check_finite(weight, name)
    q = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight))
    for rows in _row_blocks(weight):
        block = weight[rows].float()
        scales[rows] = block.abs().amax(dim=1) / 127
        q[rows] = _steps(block, scales[rows, None]).clamp_(-127, 127).to(torch.int8)
    return pack_int8(q, scales)


def quantize_int4(weight: Tensor, group_size: int, name: str) -> PackedWeight:
    """Symmetric int4 in -8..7, one float16 scale per output and group, each the best of a small search.

    Args:
        weight: float [N, K].
        group_size: 32, 64 or 128 consecutive inputs.
        name: of the tensor, for errors.

    Raises:
        ModelLoadError: a NaN or infinity, or a value too large for a float16 scale.
    """
    check_finite(weight, name, limit=HALF_MAX)
    q = torch.empty(weight.shape, dtype=torch.uint8)
    scales = group_scales(weight, group_size)
    for rows in _row_blocks(weight):
        groups = _split_groups(weight[rows].float(), group_size)
        steps = round_to_steps(groups, scales[rows, :, None].float()) + NO_ZERO_POINT
        q[rows] = steps.flatten(1)[:, : weight.shape[1]].to(torch.uint8)
    return pack_int4(q, scales, None, group_size)


def group_scales(weight: Tensor, group_size: int, importance: Tensor | None = None) -> Tensor:
    """The scale that `search_scales` finds for every output and group.

    Args:
        weight: float [N, K].
        importance: float32 [K]: weights of the squared errors of the inputs; None is 1.

    Returns:
        float16 [N, ceil(K / group_size)].
    """
    of_groups = None if importance is None else _split_groups(importance[None], group_size)  # [1, G, group]
    blocks = (_split_groups(weight[rows].float(), group_size) for rows in _row_blocks(weight))
    return torch.cat([search_scales(groups, of_groups) for groups in blocks])


def check_finite(weight: Tensor, name: str, limit: float = float("inf")) -> None:
    """Refuse a weight that no scale can stand for.

    Raises:
        ModelLoadError: a NaN or infinity, or a magnitude above `limit`.
    """
    low, high = torch.aminmax(weight)
    largest = max(-float(low), float(high))
    if not (largest <= limit and largest < float("inf")):
        damaged = not largest < float("inf")
        raise ModelLoadError(
            f"tensor {name} cannot be quantised",
            got="NaN or infinity" if damaged else f"a value of {largest:.3g}",
            expected="finite weights" if damaged else f"magnitudes up to {limit:.0f}",
            remedy="the checkpoint is damaged: download it again" if damaged else "use int8 or bf16",
        )


def search_scales(groups: Tensor, importance: Tensor | None = None) -> Tensor:
    """The scale of each group with the least squared error after rounding to -8..7, among a few and their refits.

    A scale may be negative: the value of largest magnitude, whatever its sign, can then be -8. Refitting a scale is
    least squares for the integers that it gave.

    Args:
        groups: float32 [..., group_size], finite.
        importance: float32, broadcastable to groups: weights of the squared errors; None is 1.

    Returns:
        float16 [...].
    """
    where = groups.abs().argmax(dim=-1, keepdim=True)
    widest = groups.gather(-1, where) / -NO_ZERO_POINT  # [..., 1]
    best = groups.new_full((*groups.shape[:-1], 1), float("inf"))
    best_scales, best_q = torch.zeros_like(best), torch.zeros_like(groups)
    for attempt in range(len(_SHRINK) + _REFITS):
        if attempt < len(_SHRINK):
            candidate = widest * _SHRINK[attempt]
        else:
            candidate = _least_squares(groups, best_q, importance)
        candidate = candidate.clamp(-HALF_MAX, HALF_MAX).half().float()
        q = round_to_steps(groups, candidate)
        error = (groups - q * candidate).square_()
        error = (error if importance is None else error.mul_(importance)).sum(dim=-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_scales = torch.where(better, candidate, best_scales)
        best_q = torch.where(better, q, best_q)
    return best_scales.squeeze(-1).half()


def round_to_steps(values: Tensor, scales: Tensor) -> Tensor:
    """Integers in -8..7, as float32, nearest to values / scales (float32); 0 where the scale is 0."""
    return _steps(values, scales).clamp_(-NO_ZERO_POINT, NO_ZERO_POINT - 1)


def _split_groups(weight: Tensor, group_size: int) -> Tensor:
    """Float [N, G, group_size] from [N, K], the last group filled up by zeros."""
    columns = -(-weight.shape[1] // group_size) * group_size
    return torch.nn.functional.pad(weight, (0, columns - weight.shape[1])).unflatten(1, (-1, group_size))


def _steps(values: Tensor, scales: Tensor) -> Tensor:
    return (values / torch.where(scales == 0, 1, scales)).mul_(scales != 0).round_()


def _least_squares(groups: Tensor, q: Tensor, importance: Tensor | None) -> Tensor:
    weighted = q if importance is None else q * importance
    above, below = (weighted * groups).sum(-1, keepdim=True), (weighted * q).sum(-1, keepdim=True)
    return torch.where(below > 0, above / below.clamp(min=torch.finfo(below.dtype).tiny), 0)


def _row_blocks(weight: Tensor) -> list[slice]:
    step = max(1, _BLOCK_BYTES // (4 * max(1, weight.shape[1])))
    return [slice(start, start + step) for start in range(0, len(weight), step)]
