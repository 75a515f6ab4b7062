"""int4 checkpoints of the hub, GPTQ and AWQ, turned into packed weights without changing a value.

Both hold, for a linear layer, the integers (`qweight`) and zero points (`qzeros`) eight to an int32 and float16
`scales` [G, N]. GPTQ packs qweight along the inputs, [K/8, N], and its first version stores zero points less one;
`g_idx` [K] says which group an input belongs to. AWQ ("gemm") packs along the outputs, [K, N/8], in the order
0, 2, 4, 6, 1, 3, 5, 7. In both, w = scale * (q - zero).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from outrider.errors import ModelLoadError, UnsupportedModelError
from outrider.kernels.packed import GROUP_SIZES, NO_ZERO_POINT, PackedWeight, WeightFormat, pack_int4
from outrider.quantization.tensor_files import TensorFiles

_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i holds output 8 * column + _AWQ_ORDER[i]
_WHAT_WORKS = (
    "use a GPTQ (checkpoint_format gptq or gptq_v2) or AWQ (version gemm) checkpoint of 4 bits, or quantise the "
    "original model with `outrider quantize`"
)


class HubInt4:
    """The quantised linear layers of a GPTQ or AWQ checkpoint.

    Attributes:
        weights: what the layers are, "int4".
        names: of the layers, without ".weight".
        tensor_names: of the tensors that they are made of.
    """

    weights: WeightFormat = "int4"

    def __init__(self, files: TensorFiles, config: Mapping[str, Any]) -> None:
        """Take up the layers that have a `qweight`.

        Args:
            config: `quantization_config` of config.json.

        Raises:
            UnsupportedModelError: bits, groups or a variant of the format that outrider does not read.
            ModelLoadError: no quantised layer.
        """
        self._files = files
        self._method = _method(config)
        self._group_size = _group_size(config)
        self._symmetric = bool(config.get("sym", False))
        self._stored_zero_less = 1 if self._method == "gptq" and config.get("checkpoint_format") != "gptq_v2" else 0
        self.names = frozenset(name.removesuffix(".qweight") for name in files.names if name.endswith(".qweight"))
        if not self.names:
            raise ModelLoadError(
                f"weights of {files.folder}",
                got="no qweight tensors",
                expected=f"the quantised layers that config.json announces ({self._method})",
                remedy="download all files of the model",
            )
        parts = {f"{name}.{part}" for name in self.names for part in _PARTS}
        self.tensor_names = frozenset(name for name in parts if name in files)

    def shape(self, name: str) -> tuple[int, int]:
        """(N, K) of a layer."""
        qweight, scales = (self._files.shape(f"{name}.{part}") for part in ("qweight", "scales"))
        return scales[-1], qweight[0] * (8 if self._method == "gptq" else 1)

    def read(self, name: str) -> PackedWeight:
        """A layer as it is, repacked.

        Raises:
            ModelLoadError: tensors that do not fit together.
            UnsupportedModelError: groups of other sizes than config.json says.
        """
        num_outputs, num_inputs = self.shape(name)
        group_size = num_inputs if self._group_size == -1 else self._group_size
        num_groups = -(-num_inputs // group_size)
        qweight, qzeros, scales = (self._files.tensor(f"{name}.{part}") for part in ("qweight", "qzeros", "scales"))
        if self._method == "gptq":
            expected = ((num_inputs // 8, num_outputs), (num_groups, -(-num_outputs // 8)), (num_groups, num_outputs))
        else:
            packed_outputs = -(-num_outputs // 8)
            expected = ((num_inputs, packed_outputs), (num_groups, packed_outputs), (num_groups, num_outputs))
        got = tuple(tuple(tensor.shape) for tensor in (qweight, qzeros, scales))
        if got != expected or qweight.dtype != torch.int32 or qzeros.dtype != torch.int32:
            raise ModelLoadError(
                f"qweight, qzeros and scales of {name}",
                got=f"{qweight.dtype} {got}",
                expected=f"int32 {expected} for groups of {self._group_size}",
                remedy="config.json and weights must be of the same model",
            )
        q, zeros = self._integers(qweight, qzeros, num_outputs)
        order = self._input_order(name, num_inputs, group_size)
        if order is not None:
            q = q[:, order.long()]
        return _pack(q, _half(scales, name).T, zeros, group_size, order)

    def _integers(self, qweight: Tensor, qzeros: Tensor, num_outputs: int) -> tuple[Tensor, Tensor]:
        """uint8 q [N, K] in the order of the inputs, and zero points [N, G]."""
        q, zeros = _nibbles(qweight), _nibbles(qzeros)
        if self._method == "awq":
            back = torch.tensor(_AWQ_ORDER).argsort()
            q, zeros = q[..., back].flatten(1).T, zeros[..., back].flatten(1).T
        else:
            q, zeros = q.transpose(0, 1).flatten(1), zeros.flatten(1).T
        q, zeros = q[:num_outputs], zeros[:num_outputs]
        # Symmetric means a zero point of 8, and some writers call checkpoints with 8 stored "gptq" too.
        if self._symmetric and bool((zeros == zeros[0, 0]).all()) and int(zeros[0, 0]) in (7, 8):
            return q, torch.full_like(zeros, NO_ZERO_POINT)
        return q, (zeros + self._stored_zero_less) & 15

    def _input_order(self, name: str, num_inputs: int, group_size: int) -> Tensor | None:
        """Inputs sorted by their group where `g_idx` does not have them so already: int32 [K]."""
        if f"{name}.g_idx" not in self._files or self._method != "gptq":
            return None
        group_of = self._files.tensor(f"{name}.g_idx").long()
        in_order = torch.arange(num_inputs) // group_size
        if torch.equal(group_of, in_order):
            return None
        order = group_of.argsort(stable=True)
        if len(group_of) != num_inputs or not torch.equal(group_of[order], in_order):
            raise UnsupportedModelError(
                f"{name}.g_idx",
                got="groups of several sizes",
                expected=f"groups of {group_size} inputs",
                remedy=_WHAT_WORKS,
            )
        return order.int()


def _method(config: Mapping[str, Any]) -> Literal["gptq", "awq"]:
    """Which of the two formats, after a look at everything that we do not read."""
    method, bits = config.get("quant_method"), config.get("bits")
    if method == "gptq":
        variant, known = config.get("checkpoint_format", "gptq"), ("gptq", "gptq_v2")
    else:
        variant, known = config.get("version", "gemm"), ("gemm",)
    problem = None
    if method not in ("gptq", "awq"):
        problem = f"quant_method {method!r}"
    elif bits != 4:
        problem = f"{method} of {bits} bits"
    elif str(variant).lower() not in known:
        problem = f"{method} variant {variant!r}"
    elif any(not str(rule).startswith("-") for rule in config.get("dynamic") or {}):
        problem = "gptq with other settings for some layers (dynamic)"
    if problem is not None:
        raise UnsupportedModelError(
            "quantization_config", got=problem, expected="gptq or awq of 4 bits", remedy=_WHAT_WORKS
        )
    return "gptq" if method == "gptq" else "awq"


def _group_size(config: Mapping[str, Any]) -> int:
    size = config.get("group_size", -1)
    if size == -1 or size in GROUP_SIZES or (isinstance(size, int) and size > 0 and size % GROUP_SIZES[-1] == 0):
        return size
    raise UnsupportedModelError(
        "quantization_config",
        got=f"group_size {size!r}",
        expected="32, 64, a multiple of 128, or -1 (one group)",
        remedy=_WHAT_WORKS,
    )


def _nibbles(words: Tensor) -> Tensor:
    """uint8 [..., 8] from int32 [...], the lowest first."""
    pairs = words.contiguous().view(torch.uint8).view(*words.shape, 4)
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2)


def _half(scales: Tensor, name: str) -> Tensor:
    half = scales.half()
    if not torch.equal(half.float(), scales.float()):
        raise UnsupportedModelError(
            f"{name}.scales",
            got=f"{scales.dtype} values that float16 does not hold",
            expected="float16",
            remedy=_WHAT_WORKS,
        )
    return half


def _pack(q: Tensor, scales: Tensor, zeros: Tensor, group_size: int, order: Tensor | None) -> PackedWeight:
    """Groups larger than the kernels' are cut into several with the same scale."""
    if group_size not in GROUP_SIZES:
        num_groups = -(-q.shape[1] // GROUP_SIZES[-1])
        owner = torch.arange(num_groups) * GROUP_SIZES[-1] // group_size
        scales, zeros, group_size = scales[:, owner], zeros[:, owner], GROUP_SIZES[-1]
    symmetric = bool((zeros == NO_ZERO_POINT).all())
    return pack_int4(q.contiguous(), scales.contiguous(), None if symmetric else zeros, group_size, order)
