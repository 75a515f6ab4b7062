"""The file of packed weights: a safetensors file whose packed tensors kernels use as they are.

Each linear layer's `<name>.weight` is uint8 [num_panels, panel_bytes], laid out as `outrider.kernels.packed` says and
64-byte aligned in the file; every other tensor is as in the model that was quantised. The safetensors metadata holds

    format   "outrider-packed"
    version  "1"
    linears  JSON: {name: {format, num_outputs, num_inputs, group_size, has_zeros, input_order}}, input_order being
             the name of an int32 [num_inputs] tensor or null

Alignment needs no padding between tensors, which safetensors forbids: the header is filled up with spaces to a
multiple of 64, packed tensors come first and are multiples of 64 long, and the others follow by falling element size.
One file holds the whole model, whatever its size. It is mapped into memory, in pages of 4 KB; kernels read large
pages faster, so a model's layers are copied to those where they fit.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from outrider.errors import ModelLoadError
from outrider.kernels import huge_pages
from outrider.kernels.packed import ALIGNMENT, PackedWeight, WeightFormat, num_panels, panel_bytes
from outrider.quantization.tensor_files import TensorFiles

FORMAT_NAME = "outrider-packed"
FORMAT_VERSION = 1
QUANT_METHOD = "outrider"  # in config.json

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_WRITE_AGAIN = "quantise the model again with this version of outrider"


@dataclass(frozen=True)
class Descriptor:
    """What a packed weight's bytes are; `input_order` names a tensor of the same file."""

    format: WeightFormat
    num_outputs: int
    num_inputs: int
    group_size: int = 0
    has_zeros: bool = False
    input_order: str | None = None

    @property
    def data_shape(self) -> tuple[int, int]:
        """(num_panels, panel_bytes).

        Raises:
            ValueError: settings that do not belong together.
        """
        num_bytes = panel_bytes(self.format, self.num_inputs, self.group_size, self.has_zeros)
        return num_panels(self.num_outputs), num_bytes


@dataclass(frozen=True)
class PlannedLinear:
    """A linear layer to be written: what it will be, and how to make it when its turn comes."""

    name: str
    descriptor: Descriptor
    make: Callable[[], PackedWeight]
    input_order: Tensor | None = None  # int32 [num_inputs], with a descriptor that names it


def plan_linear(name: str, packed: PackedWeight) -> PlannedLinear:
    """A weight that is there already."""
    order_name = None if packed.input_order is None else f"{name}.input_order"
    shape = packed.num_outputs, packed.num_inputs
    descriptor = Descriptor(packed.format, *shape, packed.group_size, packed.has_zeros, order_name)
    return PlannedLinear(name, descriptor, lambda: packed, packed.input_order)


def write_packed(path: Path, linears: Sequence[PlannedLinear], tensors: Mapping[str, Tensor]) -> None:
    """Write the file, making one layer at a time; `path` appears when it is whole.

    Args:
        tensors: everything but the packed weights and their input orders.

    Raises:
        ModelLoadError: a tensor of a dtype that the format does not know.
        OSError: the file cannot be written.
    """
    others = dict(tensors)
    for plan in linears:
        if plan.input_order is not None:
            assert plan.descriptor.input_order is not None
            others[plan.descriptor.input_order] = plan.input_order
    others = dict(sorted(others.items(), key=lambda item: (-item[1].element_size(), item[0])))
    header = _header(linears, others)
    temporary = path.with_name(path.name + ".partial")
    try:
        with temporary.open("wb") as file:
            file.write(header)
            for plan in linears:
                packed = plan.make()
                made = plan_linear(plan.name, packed).descriptor
                assert made == plan.descriptor, f"{plan.name}: planned {plan.descriptor}, made {made}"
                _write_tensor(file, packed.data)
            for tensor in others.values():
                _write_tensor(file, tensor)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # there only if something failed


class PackedFile:
    """The packed linear layers of a checkpoint that `write_packed` wrote.

    Attributes:
        weights: the format of the decoder's layers, as config.json says.
        names: of the layers, without ".weight".
        tensor_names: of the tensors that they are made of.
    """

    def __init__(self, files: TensorFiles, weights: WeightFormat) -> None:
        """Read the descriptors and hold them against the tensors.

        Raises:
            ModelLoadError: another kind of file, another version, or descriptors that do not fit.
        """
        self._files = files
        self.weights: WeightFormat = weights
        self._descriptors = _read_descriptors(files)
        self.names = frozenset(self._descriptors)
        orders = {d.input_order for d in self._descriptors.values() if d.input_order is not None}
        self.tensor_names = frozenset({f"{name}.weight" for name in self.names} | orders)
        for name, descriptor in self._descriptors.items():
            _check_fits(files, name, descriptor)

    def shape(self, name: str) -> tuple[int, int]:
        """(N, K) of a layer."""
        descriptor = self._descriptors[name]
        return descriptor.num_outputs, descriptor.num_inputs

    def read(self, name: str) -> PackedWeight:
        """A layer to compute with: in large pages if all layers fit there, else in the mapped file's memory.

        Raises:
            ModelLoadError: an input order that is no order.
        """
        packed = self.mapped(name)
        return replace(packed, data=huge_pages.copy_of(packed.data)) if self._is_copied else packed

    def mapped(self, name: str) -> PackedWeight:
        """A layer whose data is the mapped file's memory.

        Raises:
            ModelLoadError: an input order that is no order.
        """
        d = self._descriptors[name]
        data = self._files.tensor(f"{name}.weight")
        if data.data_ptr() % ALIGNMENT:  # written again by a program that does not align
            data = data.clone()
        order = None
        if d.input_order is not None:
            order = self._files.tensor(d.input_order)
            if not torch.equal(order.sort().values, torch.arange(d.num_inputs, dtype=torch.int32)):
                raise _unfit(self._files, d.input_order, "repeated or missing inputs", f"0..{d.num_inputs - 1} once")
        return PackedWeight(d.format, d.num_outputs, d.num_inputs, d.group_size, d.has_zeros, data, order)

    @cached_property
    def _is_copied(self) -> bool:
        """Decided once: what is copied takes memory from what is left."""
        return huge_pages.has_room_for(sum(math.prod(d.data_shape) for d in self._descriptors.values()))


def is_packed(files: TensorFiles) -> bool:
    return files.metadata.get("format") == FORMAT_NAME


def _header(linears: Sequence[PlannedLinear], others: Mapping[str, Tensor]) -> bytes:
    """Eight bytes of length, then JSON and spaces: a multiple of 64 in all."""
    descriptors = {plan.name: asdict(plan.descriptor) for plan in linears}
    entries: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT_NAME,
            "version": str(FORMAT_VERSION),
            "linears": json.dumps(descriptors, separators=(",", ":")),
        }
    }
    end = 0

    def add(name: str, dtype: str, shape: Sequence[int], num_bytes: int) -> None:
        nonlocal end
        assert name not in entries, f"{name} twice"
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + num_bytes]}
        end += num_bytes

    for plan in linears:
        panels, num_bytes = plan.descriptor.data_shape
        add(f"{plan.name}.weight", "U8", (panels, num_bytes), panels * num_bytes)
    for name, tensor in others.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise ModelLoadError(f"tensor {name}", got=tensor.dtype, expected=", ".join(_DTYPE_NAMES.values()))
        add(name, _DTYPE_NAMES[tensor.dtype], tensor.shape, tensor.nbytes)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    if tensor.numel():
        tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tofile(file)


def _read_descriptors(files: TensorFiles) -> dict[str, Descriptor]:
    version = files.metadata.get("version")
    if not is_packed(files) or version != str(FORMAT_VERSION):
        found = f"format {files.metadata.get('format')!r}, version {version!r}" if files.metadata else "no metadata"
        raise ModelLoadError(
            f"weights of {files.folder}",
            got=found,
            expected=f"format {FORMAT_NAME!r}, version '{FORMAT_VERSION}'",
            remedy=_WRITE_AGAIN,
        )
    try:
        linears = json.loads(files.metadata["linears"])
        descriptors = {name: _descriptor(fields) for name, fields in linears.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unfit(
            files, "the metadata", f"{type(error).__name__}: {error}", "a descriptor of each layer"
        ) from error
    return descriptors


def _descriptor(fields: Mapping[str, Any]) -> Descriptor:
    """Raises TypeError or ValueError where the fields are not those of a descriptor."""
    descriptor = Descriptor(**fields)
    kinds = {"format": str, "has_zeros": bool, "input_order": (str, type(None))}
    for name, value in asdict(descriptor).items():
        kind = kinds.get(name, int)
        if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or value < 0)):
            raise ValueError(f"{name} is {value!r}")
    if descriptor.num_outputs < 1:
        raise ValueError("num_outputs is 0")
    _ = descriptor.data_shape
    return descriptor


def _check_fits(files: TensorFiles, name: str, descriptor: Descriptor) -> None:
    expected: list[tuple[str, str, tuple[int, ...]]] = [(f"{name}.weight", "U8", descriptor.data_shape)]
    if descriptor.input_order is not None:
        expected.append((descriptor.input_order, "I32", (descriptor.num_inputs,)))
    for tensor, dtype, shape in expected:
        got = (files.dtype(tensor), files.shape(tensor))
        if got != (dtype, shape):
            raise _unfit(files, tensor, f"{got[0]} {list(got[1])}", f"{dtype} {list(shape)} for {descriptor}")


def _unfit(files: TensorFiles, what: str, got: object, expected: object) -> ModelLoadError:
    return ModelLoadError(
        f"{what} of the packed weights of {files.folder}", got=got, expected=expected, remedy=_WRITE_AGAIN
    )
