"""`WeightSource`: where models take their weights from, whatever the checkpoint's format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, get_args

from torch import Tensor

from outrider.errors import ConfigError, ModelLoadError
from outrider.kernels.packed import PackedWeight, WeightFormat, pack_bf16, pack_fp32
from outrider.quantization.hub_formats import HubInt4
from outrider.quantization.packed_checkpoint import QUANT_METHOD, PackedFile, is_packed
from outrider.quantization.round_to_nearest import quantize_int4, quantize_int8
from outrider.quantization.tensor_files import LoadedTensors, TensorFiles, open_tensor_files, read_json

DEFAULT_GROUP_SIZE = 64


class HeldLinears(Protocol):
    """Linear layers that a checkpoint holds in a format of its own.

    Attributes:
        weights: what most of them are.
        names: of the layers, without ".weight".
        tensor_names: of the tensors that they are made of.
    """

    weights: WeightFormat
    names: frozenset[str]
    tensor_names: frozenset[str]

    def shape(self, name: str) -> tuple[int, int]: ...

    def read(self, name: str) -> PackedWeight: ...


class WeightSource:
    """The weights of a model folder by their names in the checkpoint.

    Attributes:
        folder: where they are.
        held: the format of the linear layers that the checkpoint holds quantised or packed; None for a plain one.
    """

    def __init__(self, files: TensorFiles | LoadedTensors, linears: HeldLinears | None = None) -> None:
        self.folder = files.folder
        self.held: WeightFormat | None = None if linears is None else linears.weights
        self._files = files
        self._linears = linears
        self._linear_names = frozenset() if linears is None else linears.names
        hidden = frozenset() if linears is None else linears.tensor_names
        self._tensor_names = [name for name in files.names if name not in hidden]

    @property
    def names(self) -> list[str]:
        """Of the plain tensors, sorted; not of what quantised or packed layers are made of."""
        return self._tensor_names

    @property
    def linear_names(self) -> frozenset[str]:
        """Of the layers that the checkpoint holds quantised or packed, without ".weight"."""
        return self._linear_names

    def __contains__(self, name: str) -> bool:
        """Whether `shape` knows the name: a plain tensor's, or "<layer>.weight"."""
        return name.removesuffix(".weight") in self._linear_names or name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor; of "<layer>.weight" (N, K) also where the layer is quantised or packed.

        Raises:
            ModelLoadError: no such tensor.
        """
        layer = name.removesuffix(".weight")
        if self._linears is not None and layer in self._linear_names:
            return self._linears.shape(layer)
        return self._files.shape(name)

    def tensor(self, name: str) -> Tensor:
        """A plain tensor in the mapped file's memory, dtype as stored: do not write to it.

        Raises:
            ModelLoadError: no such tensor, or a layer that is not stored plainly.
        """
        if self._linears is not None and (name in self._linears.tensor_names or name not in self._files):
            layer = name.removesuffix(".weight")
            if layer in self._linear_names:
                raise ModelLoadError(f"tensor {name}", got="a quantised layer", expected="a plain tensor")
        return self._files.tensor(name)

    def linear(
        self,
        name: str,
        format: WeightFormat,
        group_size: int = DEFAULT_GROUP_SIZE,
        *,
        transposed: bool = False,
    ) -> PackedWeight:
        """A layer ready for the kernels: as the checkpoint holds it, or else packed, or rounded to nearest.

        Args:
            name: of the layer, without ".weight".
            format: for a layer that is stored plainly; one that is not stays what it is.
            group_size: of int4.
            transposed: the plain tensor is [K, N], as in the Conv1D of GPT-2.

        Raises:
            ModelLoadError: no such layer, or one that cannot be quantised.
        """
        if self._linears is not None and name in self._linear_names:
            return self._linears.read(name)
        weight = self.tensor(f"{name}.weight")
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ModelLoadError(
                f"tensor {name}.weight",
                got=f"{weight.dtype} {list(weight.shape)}",
                expected="a float matrix",
                remedy="use a checkpoint of float32, float16 or bfloat16 weights",
            )
        return pack_linear(weight.T if transposed else weight, format, group_size, f"{name}.weight")


def lm_head_format(format: WeightFormat) -> WeightFormat:
    """What the output layer becomes in a model of `format`: it suffers most from four bits."""
    return "int8" if format == "int4" else format


def pack_linear(weight: Tensor, format: WeightFormat, group_size: int, name: str) -> PackedWeight:
    """Pack a float weight [N, K], rounding to nearest where the format is of integers.

    Args:
        name: of the tensor, for errors.

    Raises:
        ModelLoadError: a weight that cannot be quantised.
    """
    match format:
        case "fp32":
            return pack_fp32(weight)
        case "bf16":
            return pack_bf16(weight)
        case "int8":
            return quantize_int8(weight, name)
        case "int4":
            return quantize_int4(weight, group_size, name)


def open_weights(folder: Path, asked: WeightFormat | None = None) -> WeightSource:
    """Open a model folder: plain safetensors in one file or several, GPTQ, AWQ, or packed by `outrider quantize`.

    Args:
        asked: the format that the user named; None leaves it to the checkpoint.

    Raises:
        ModelLoadError: no, damaged or unfit files.
        UnsupportedModelError: a quantisation that outrider does not read.
        ConfigError: `asked` is not what a quantised checkpoint holds.
    """
    files = open_tensor_files(folder)
    linears = _held_linears(files, _quantization_config(folder))
    if linears is not None and asked is not None and asked != linears.weights:
        raise ConfigError(
            "weights",
            got=f"{asked} for {folder}, which holds {linears.weights}",
            expected=f"{linears.weights}, or auto",
            remedy=f"quantise the original model to {asked}",
        )
    return WeightSource(files, linears)


def _quantization_config(folder: Path) -> Mapping[str, Any] | None:
    """Of config.json, or of the separate file of AutoGPTQ's first versions."""
    config = read_json(folder / "config.json").get("quantization_config")
    separate = folder / "quantize_config.json"
    if config is None and separate.is_file():
        return {"quant_method": "gptq", **read_json(separate)}
    if config is not None and not isinstance(config, Mapping):
        raise ModelLoadError(
            f"{folder / 'config.json'}", got=f"quantization_config {config!r}", expected="a JSON object"
        )
    return config


def _held_linears(files: TensorFiles, config: Mapping[str, Any] | None) -> HeldLinears | None:
    method = None if config is None else config.get("quant_method")
    if is_packed(files) != (method == QUANT_METHOD):
        raise ModelLoadError(
            f"{files.folder}",
            got=f"quant_method {method!r} in config.json and weights of format {files.metadata.get('format')!r}",
            expected="config.json and weights of the same model",
            remedy="quantise the model again, into an empty folder",
        )
    if config is None:
        return None
    if method != QUANT_METHOD:
        return HubInt4(files, config)
    formats: dict[object, WeightFormat] = {name: name for name in get_args(WeightFormat)}
    weights = formats.get(config.get("weights"))
    if weights is None:
        raise ModelLoadError(
            f"{files.folder / 'config.json'}",
            got=f"weights {config.get('weights')!r}",
            expected=", ".join(map(str, formats)),
        )
    return PackedFile(files, weights)
