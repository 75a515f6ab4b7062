"""The compiled CPU kernels: whether they are there, and calls of them with checked arguments.

Legend: M rows, K inputs, N outputs, S cache slots.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from logging import getLogger
from typing import Any

import numpy as np
import torch
from torch import Tensor

from outrider.kernels.attention import AttentionParams, FlatSequences
from outrider.kernels.packed import PackedWeight
from outrider.kernels.rows import SequenceRows

try:
    from outrider.kernels import _native  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # built without a compiler
    _native: Any = None

ISA_VARIABLE = "OUTRIDER_ISA"
REFERENCE = "reference"
MAX_INPUTS = 65536
"""Inputs of a layer whose integer sums surely fit 32 bits."""

_FORMATS = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
_CACHE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_MAX_HEAD_WIDTH = 2048
SCALE_BYTES = 4
"""An int8 head in the cache is followed by its float32 scale."""


class IsaError(ValueError):
    """OUTRIDER_ISA asks for what this machine or this build does not have."""


@cache
def _select_isa(wanted: str | None) -> str:
    """Apply the wish once for each of its values; the level that runs, "reference" for none."""
    if wanted == REFERENCE:
        return REFERENCE
    if _native is None:
        if wanted is not None:
            raise IsaError(
                f"{ISA_VARIABLE}: got {wanted!r}, expected 'reference': outrider was built without kernels"
            )
        getLogger("outrider").warning(
            "outrider was installed without its compiled CPU kernels and runs on slow reference code; "
            "install a C++ compiler (g++ or clang++) and reinstall outrider"
        )
        return REFERENCE
    levels = _native.levels()
    if wanted is not None and wanted not in levels:
        raise IsaError(f"{ISA_VARIABLE}: got {wanted!r}, expected one of {', '.join([*levels, REFERENCE])}")
    _native.select_level(wanted or levels[0])
    return wanted or levels[0]


def isa() -> str:
    """The level of instructions that runs: "amx", "avx512", "avx2", "portable", or "reference" (nothing compiled).

    The environment's OUTRIDER_ISA forces one.

    Raises:
        IsaError: it names what this machine or build does not have.
    """
    level = _select_isa(os.environ.get(ISA_VARIABLE) or None)
    if _native is not None and level != REFERENCE and _native.active_level() != level:
        _native.select_level(level)
    return level


def is_available() -> bool:
    """Whether compiled kernels run."""
    return isa() != REFERENCE


def levels() -> list[str]:
    """Every level that this build and processor have, the fastest first, "reference" last."""
    return [*(_native.levels() if _native is not None else []), REFERENCE]


_threads_wanted: int | None = None
_threads_of_torch: int | None = None  # while torch itself is kept to one


def num_threads() -> int:
    """Threads that the kernels use: torch's number (`--threads`, OMP_NUM_THREADS) unless set otherwise."""
    return _threads_wanted or _threads_of_torch or torch.get_num_threads()


class cores_for_kernels:
    """Keep torch to one thread where the kernels do the work.

    What torch has left to do is small, and its other threads spin for milliseconds after every parallel operation,
    on the very cores that the kernels' threads need.
    """

    __slots__ = ("_wanted",)

    def __init__(self, wanted: bool = True) -> None:
        self._wanted = wanted and _threads_of_torch is None

    def __enter__(self) -> None:
        global _threads_of_torch  # noqa: PLW0603 - torch's number is one for the process, too
        if self._wanted:
            _threads_of_torch = torch.get_num_threads()
            torch.set_num_threads(1)

    def __exit__(self, *raised: object) -> None:
        global _threads_of_torch  # noqa: PLW0603
        if self._wanted:
            assert _threads_of_torch is not None
            torch.set_num_threads(_threads_of_torch)
            _threads_of_torch = None


def set_num_threads(number: int | None) -> None:
    """Use so many threads; None follows torch."""
    global _threads_wanted  # noqa: PLW0603 - one pool for the process
    if number is not None and not 1 <= number <= 1024:
        raise ValueError(f"number of threads: got {number}, expected 1 to 1024")
    _threads_wanted = number


def compiled() -> Any:
    """The compiled module, set to the level and the threads that are asked for."""
    level = isa()
    assert level != REFERENCE, "a compiled kernel was called on a machine without"
    _gather_threads()
    return _native


def _gather_threads() -> None:
    wanted = num_threads()
    if _native.num_threads() != wanted:
        _native.set_num_threads(wanted)


def _require(condition: bool, what: str, got: object, expected: object) -> None:
    """Kernels follow addresses: what does not fit must not reach them."""
    if not condition:
        raise ValueError(f"{what}: got {got}, expected {expected}")


def _require_indices(what: str, indices: Tensor, length: int) -> None:
    fits = indices.dtype == torch.int64 and indices.shape == (length,) and indices.is_contiguous()
    if not (fits and indices.device.type == "cpu"):  # no message where none is needed: every step comes here
        raise ValueError(f"{what}: got {indices.dtype} {list(indices.shape)}, expected int64 [{length}]")


class Linear:
    """A linear layer on the compiled kernels; row-invariant.

    Args:
        bias: ``[N]``, or None.

    Raises:
        ValueError: more than MAX_INPUTS inputs, or a bias or an order of inputs that does not fit.
    """

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None) -> None:
        _require(weight.num_inputs <= MAX_INPUTS, "inputs of a layer", weight.num_inputs, f"at most {MAX_INPUTS}")
        if bias is not None:
            _require(bias.shape == (weight.num_outputs,), "bias", list(bias.shape), [weight.num_outputs])
        if weight.input_order is not None:
            on_cpu = weight.input_order.device.type == "cpu" and weight.input_order.is_contiguous()
            _require(on_cpu, "order of inputs", weight.input_order.device, "contiguous memory of the CPU")
        self.weight = weight
        self.bias = None if bias is None else bias.detach().float().contiguous()
        order = weight.input_order
        self.handle = compiled().PackedLinear(
            _FORMATS[weight.format],
            weight.num_outputs,
            weight.num_inputs,
            weight.group_size,
            weight.has_zeros,
            weight.data.data_ptr(),
            0 if order is None else order.data_ptr(),
            0 if self.bias is None else self.bias.data_ptr(),
        )

    def __call__(self, x: Tensor) -> Tensor:
        """``[M, K]`` of any float type -> ``[M, N]`` float32."""
        rows = x.float().contiguous()
        out = torch.empty(len(rows), self.weight.num_outputs)
        _require(
            rows.ndim == 2 and rows.shape[1] == self.weight.num_inputs,
            "x",
            list(rows.shape),
            [
                "M",
                self.weight.num_inputs,
            ],
        )
        compiled().linear(self.handle, rows.data_ptr(), len(rows), out.data_ptr())
        return out


@dataclass(frozen=True, eq=False)
class CacheTensor:
    """Keys or values of one layer for the kernels: ``[S, heads, width]`` (int8: width + SCALE_BYTES)."""

    tensor: Tensor

    @property
    def width(self) -> int:
        return self.tensor.shape[2] - (SCALE_BYTES if self.tensor.dtype == torch.int8 else 0)

    @property
    def type(self) -> int:
        return _CACHE_TYPES[self.tensor.dtype]

    def handle(self) -> Any:
        _require(can_attend(self.tensor), "cache", f"{self.tensor.dtype} on {self.tensor.device}", "a dtype of ours")
        _require(self.tensor.is_contiguous() and self.tensor.ndim == 3, "cache", "gaps", "[slots, heads, width]")
        _require(0 < self.width <= _MAX_HEAD_WIDTH, "width of a head", self.width, f"1 to {_MAX_HEAD_WIDTH}")
        return compiled().KvCache(self.tensor.data_ptr(), self.type, self.tensor.shape[1], self.width)


def cache_width(head_width: int, dtype: torch.dtype) -> int:
    """Elements that a head takes in a cache of this dtype."""
    return head_width + (SCALE_BYTES if dtype == torch.int8 else 0)


def can_attend(cache: Tensor) -> bool:
    """Whether the kernels read and write such a cache."""
    return cache.dtype in _CACHE_TYPES and cache.device.type == "cpu"


def write_kv(rows: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Store keys or values ``[M, heads, width]`` at `slots` ``[M]`` int64 of a cache."""
    rows, target = rows.float().contiguous(), CacheTensor(cache)
    _require_indices("slots", slots, len(rows))
    _require(
        rows.shape[1:] == (cache.shape[1], target.width), "keys or values", list(rows.shape), "the cache's heads"
    )
    compiled().write_kv(rows.data_ptr(), target.handle(), slots.data_ptr(), len(rows))


def move_slots(storage: Tensor, sources: Sequence[int], targets: Sequence[int]) -> None:
    """Copy slots of every layer of ``[layers, slots, ...]`` to others; all are read before one is written.

    Raises:
        ValueError: no such slots, or a tensor with gaps.
    """
    _require(storage.is_contiguous() and storage.ndim > 2, "cache", "gaps", "[layers, slots, ...]")
    num_layers, num_slots = storage.shape[:2]
    slots = (*sources, *targets)
    _require(len(sources) == len(targets), "slots", len(sources), len(targets))
    _require(all(0 <= slot < num_slots for slot in slots), "slots", slots, f"0 to {num_slots - 1}")
    slot_bytes = storage.stride(1) * storage.itemsize
    compiled().move_slots(storage.data_ptr(), num_layers, num_slots, slot_bytes, sources, targets)


def attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, sequences: FlatSequences, params: AttentionParams
) -> Tensor:
    """Attention of all rows over the cache, which holds the step's keys and values already; row-invariant.

    Args:
        query: ``[M, heads, key width]``.

    Returns:
        ``[M, heads, value width]`` float32.
    """
    rows = query.float().contiguous()
    keys, values = CacheTensor(key_cache), CacheTensor(value_cache)
    num_rows, num_heads, width = rows.shape
    _require(num_rows == sequences.cu_rows[-1], "rows", num_rows, int(sequences.cu_rows[-1]))
    _require(
        width == keys.width and num_heads % key_cache.shape[1] == 0, "query", list(rows.shape), "the cache's heads"
    )
    _require(key_cache.shape[:2] == value_cache.shape[:2], "caches", list(value_cache.shape), list(key_cache.shape))
    out = torch.empty(*rows.shape[:2], values.width)
    sinks = None if params.sinks is None else params.sinks.detach().float().contiguous()
    if sinks is not None:
        _require(sinks.shape == (num_heads,), "sinks", list(sinks.shape), [num_heads])
    compiled().attention(
        rows.data_ptr(),
        out.data_ptr(),
        rows.shape[1],
        keys.handle(),
        values.handle(),
        params.scaling,
        params.softcap or 0.0,
        params.sliding_window or 0,
        0 if sinks is None else sinks.data_ptr(),
        *addresses_of(sequences),
    )
    return out


def addresses_of(sequences: FlatSequences) -> tuple[int, ...]:
    """What the kernels take as a batch's sequences."""
    return (
        len(sequences.num_context),
        _address(sequences.cu_rows),
        _address(sequences.num_context),
        _address(sequences.slots),
        _address(sequences.cu_slots),
        _address(sequences.parents),
        _address(sequences.is_chain),
    )


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


@dataclass(frozen=True, eq=False)
class LlamaLayerWeights:
    """One layer of `Llama`; norms float32, None where the family has none."""

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    gate: Linear
    up: Linear
    down: Linear
    input_norm: Tensor
    post_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    sliding_window: int | None

    def __post_init__(self) -> None:
        gate, up = self.gate.weight, self.up.weight
        same = (gate.format, gate.num_outputs) == (up.format, up.num_outputs)  # they are computed side by side
        _require(same, "gate and up", [gate.format, gate.num_outputs, up.format, up.num_outputs], "equal ones")

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.query, self.key, self.value, self.output, self.gate, self.up, self.down


MAXIMA_BLOCK = 64
"""Logits whose greatest a forward may leave beside them."""


def num_maxima(vocab_size: int) -> int:
    """Blocks of `MAXIMA_BLOCK` logits of a row; the last one may be shorter."""
    return -(-vocab_size // MAXIMA_BLOCK)


UNDECIDED = -1
"""A token that `Llama.forward` leaves to whoever takes logarithms as the noise is defined."""


def llama_caches(keys: Sequence[Tensor], values: Sequence[Tensor]) -> Any:
    """The keys and values of all layers, as a forward finds them; good for as long as the tensors live.

    Args:
        keys, values: ``[slots, heads, width]`` of each layer, all of one dtype and number of slots.
    """
    _require(len(keys) == len(values), "caches of values", len(values), len(keys))
    tensors = (*keys, *values)
    first = tensors[0]
    for tensor in tensors:
        same = tensor.dtype == first.dtype and len(tensor) == len(first)
        _require(same and can_attend(tensor), "cache", f"{tensor.dtype} {list(tensor.shape)}", "caches of one kind")
        _require(tensor.is_contiguous() and tensor.ndim == 3, "cache", "gaps", "[slots, heads, width]")
    addresses = ([tensor.data_ptr() for tensor in layer] for layer in (keys, values))
    return compiled().LlamaCaches(*addresses, _CACHE_TYPES[first.dtype], len(first))


class Llama:
    """A whole forward of the Llama family in one call; row-invariant.

    Args:
        embedding: ``[vocab, hidden]`` float32 or bfloat16.
        inverse_frequencies: ``[head_dim / 2]`` of the rotary embedding, `rope_scaling` a factor on cos and sin.
    """

    def __init__(
        self,
        layers: Sequence[LlamaLayerWeights],
        *,
        embedding: Tensor,
        final_norm: Tensor,
        lm_head: Linear,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        norm_eps: float,
        inverse_frequencies: Tensor,
        rope_scaling: float,
    ) -> None:
        native = compiled()
        self.lm_head, self.layers = lm_head, tuple(layers)
        self.embedding, self._final_norm = embedding.contiguous(), final_norm.float().contiguous()
        self._norms = [
            tuple(
                None if norm is None else norm.float().contiguous()
                for norm in (layer.input_norm, layer.post_norm, layer.query_norm, layer.key_norm)
            )
            for layer in layers
        ]
        self._handle = native.Llama(
            embedding.shape[1],
            layers[0].gate.weight.num_outputs,
            lm_head.weight.num_outputs,
            num_heads,
            num_kv_heads,
            head_dim,
            norm_eps,
            rope_scaling,
            inverse_frequencies.tolist(),
            len(embedding),
            self.embedding.data_ptr(),
            _CACHE_TYPES[embedding.dtype],
            self._final_norm.data_ptr(),
            lm_head.handle,
            [
                native.LlamaLayer(
                    *(linear.handle for linear in layer.linears),
                    *(0 if norm is None else norm.data_ptr() for norm in norms),
                    layer.sliding_window or 0,
                )
                for layer, norms in zip(layers, self._norms, strict=True)
            ],
        )

    @property
    def last_seconds(self) -> float:
        """How long the last forward ran, Python excluded."""
        return self._handle.last_seconds

    def forward(
        self,
        sequences: Sequence[SequenceRows],
        caches: Any,
        *,
        logits: Tensor | None = None,
        maxima: Tensor | None = None,
        chooses: bool = True,
    ) -> tuple[list[int], list[float]]:
        """Run the rows of a step; R of them are wanted.

        Args:
            caches: what `llama_caches` gives, for as many layers.
            logits: ``[R, vocab]`` contiguous float32 to be filled, or None.
            maxima: ``[R, num_maxima(vocab)]`` likewise, if logits are wanted and choices: see `Choices`.
            chooses: whether each wanted row's successor is chosen.

        Returns:
            Of each wanted row the token, `UNDECIDED` where rounding could decide, and the greatest log-weight;
            neither means anything if nothing is chosen.

        Raises:
            ValueError: rows that hang together wrongly, tokens or slots that are none, caches of another model.
        """
        _gather_threads()  # the level was selected when the weights were packed; every step comes here
        addresses = (0 if tensor is None else tensor.data_ptr() for tensor in (logits, maxima))
        return self._handle.forward(sequences, caches, *addresses, chooses)


FETCHES = ("processor", "far", "near")
"""Who brings memory into the caches before it is needed: the processor, or we, into the outer or the first ones."""


def read_bandwidth(buffer: Tensor, fetch: str) -> float:
    """Bytes per second at which all threads together read a contiguous tensor once, in a way of `FETCHES`."""
    num_bytes = buffer.numel() * buffer.element_size()
    return num_bytes / compiled().time_reading(buffer.data_ptr(), num_bytes, FETCHES.index(fetch))
