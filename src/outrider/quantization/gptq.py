"""Calibrated int4: each rounding error is made good by the inputs that are still to be rounded.

GPTQ (Frantar et al., 2023, arXiv 2210.17323) minimises |(W - W_q) X^T|^2 over a layer's calibration inputs X, one
input (column of W) at a time. From its authors' code: inputs with the largest activations go first, and scales are
fixed beforehand, so that groups stay runs of consecutive inputs and kernels need no reordering. Ours: the search for
scales weighs each input's error by its mean square.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.errors import ModelLoadError
from outrider.kernels.packed import NO_ZERO_POINT, PackedWeight, pack_int4
from outrider.quantization.round_to_nearest import HALF_MAX, check_finite, group_scales, round_to_steps

_BLOCK = 128  # inputs rounded before the rest of the weight is brought up to date
_DAMPING = (0.01, 0.1, 1.0, 10.0)  # parts of the Hessian's mean diagonal, the next where one is not enough


class InputStatistics:
    """The Hessian of a layer's squared output error, X^T X, summed over calibration inputs.

    Attributes:
        hessian: float32 [K, K].
    """

    def __init__(self, num_inputs: int) -> None:
        self.hessian = torch.zeros(num_inputs, num_inputs)

    def add(self, x: Tensor) -> None:
        """Take up inputs, float [..., K]."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.hessian.addmm_(rows.T, rows)


def gptq_int4(weight: Tensor, hessian: Tensor, group_size: int, name: str) -> PackedWeight:
    """Symmetric int4 by groups, rounded for the inputs behind the Hessian; to nearest where they were all zero.

    Args:
        weight: float [N, K].
        hessian: float32 or float64 [K, K], as `InputStatistics` sums it.
        group_size: 32, 64 or 128 consecutive inputs.
        name: of the tensor, for errors.

    Raises:
        ModelLoadError: a NaN or infinity in the weight or the inputs, or a value too large for a float16 scale.
    """
    check_finite(weight, name, limit=HALF_MAX)
    if not hessian.isfinite().all():
        raise ModelLoadError(
            f"calibration of {name}",
            got="NaN or infinity in its inputs",
            expected="finite activations",
            remedy="the checkpoint is damaged, or needs float32 to run",
        )
    num_inputs = weight.shape[1]
    diagonal = hessian.diagonal()
    importance = diagonal + max(_DAMPING[0] * float(diagonal.mean()), torch.finfo(torch.float32).tiny)
    scales = group_scales(weight, group_size, importance.float())  # [N, G]
    order = diagonal.argsort(descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order], name)
    group_of = order // group_size
    q = _round_columns(weight.float()[:, order], scales, group_of, factor)
    original = torch.empty(len(weight), num_inputs, dtype=torch.uint8)
    original[:, order] = q
    return pack_int4(original, scales, None, group_size)


def _round_columns(weight: Tensor, scales: Tensor, group_of: Tensor, factor: Tensor) -> Tensor:
    """Round one column after the other, spreading each one's error over those to come.

    Args:
        weight: float32 [N, K], a copy of its own, spoilt on return.
        scales: float16 [N, G].
        group_of: int64 [K], the group of each column.
        factor: float32 [K, K], upper triangular, U^T U being the inverse of the Hessian.

    Returns:
        uint8 [N, K] in 0..15.
    """
    num_outputs, num_inputs = weight.shape
    q = torch.empty(num_outputs, num_inputs, dtype=torch.uint8)
    for start in range(0, num_inputs, _BLOCK):
        stop = min(num_inputs, start + _BLOCK)
        columns = weight[:, start:stop].T.contiguous()  # [block, N]: a column's values next to each other
        errors = torch.empty_like(columns)
        for k in range(start, stop):
            i = k - start
            scale = scales[:, group_of[k]].float()
            steps = round_to_steps(columns[i], scale)
            q[:, k] = (steps + NO_ZERO_POINT).to(torch.uint8)
            errors[i] = (columns[i] - steps * scale) / factor[k, k]
            columns[i:].addr_(factor[k, k:stop], errors[i], alpha=-1)
        weight[:, stop:].addmm_(errors.T, factor[start:stop, stop:], alpha=-1)
    return q


def _inverse_factor(hessian: Tensor, name: str) -> Tensor:
    """Upper triangular U [K, K] with U^T U = (H + damping)^-1.

    Raises:
        ModelLoadError: no damping makes the Hessian invertible.
    """
    mean = float(hessian.diagonal().mean()) or 1.0
    for damping in _DAMPING:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper.float()
    raise ModelLoadError(
        f"calibration of {name}",
        got="inputs whose Hessian cannot be inverted",
        expected="varied text",
        remedy="calibrate with more tokens, or with --method rtn",
    )
