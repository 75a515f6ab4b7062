"""From an open model folder to the file of its packed weights."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from outrider.errors import ConfigError, UnsupportedModelError
from outrider.kernels.packed import GROUP_SIZES, PackedWeight, WeightFormat, dequantize
from outrider.quantization.linears import LinearLayer
from outrider.quantization.packed_checkpoint import (
    FORMAT_VERSION,
    QUANT_METHOD,
    Descriptor,
    PlannedLinear,
    plan_linear,
    write_packed,
)
from outrider.quantization.weights import DEFAULT_GROUP_SIZE, WeightSource, lm_head_format, pack_linear

Method = Literal["rtn", "gptq"]


@dataclass(frozen=True)
class QuantizationSettings:
    """What becomes of a model's linear layers.

    Attributes:
        weights: "int8" (a scale per output) or "int4" (a scale per output and group of inputs).
        group_size: of int4: 32, 64 or 128.
        method: "rtn" rounds to nearest; "gptq" calibrates (int4).
        lm_head: format of the output layer; None is int8.

    Raises:
        ConfigError: values outside these, or gptq for int8.
    """

    weights: WeightFormat = "int4"
    group_size: int = DEFAULT_GROUP_SIZE
    method: Method = "rtn"
    lm_head: WeightFormat | None = None

    def __post_init__(self) -> None:
        if self.weights not in ("int8", "int4"):
            raise ConfigError("weights", got=repr(self.weights), expected="int8 or int4")
        if self.group_size not in GROUP_SIZES:
            raise ConfigError("group size", got=self.group_size, expected="32, 64 or 128")
        if self.method not in get_args(Method):
            raise ConfigError("method", got=repr(self.method), expected="rtn or gptq")
        if self.lm_head not in (None, "int8", "int4", "bf16"):
            raise ConfigError("lm_head", got=repr(self.lm_head), expected="int8, int4 or bf16")
        if self.method == "gptq" and self.weights != "int4":
            raise ConfigError(
                "method", got="gptq for int8", expected="rtn", remedy="int8 loses next to nothing without calibration"
            )

    def format_of(self, layer: LinearLayer) -> WeightFormat:
        if layer.is_head:
            return self.lm_head or lm_head_format(self.weights)
        return self.weights

    def to_config(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        group = {"group_size": self.group_size} if self.weights == "int4" else {}
        lm_head = self.lm_head or lm_head_format(self.weights)
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "weights": self.weights,
            **group,
            "lm_head": lm_head,
            "method": self.method,
        }


@dataclass(frozen=True)
class QuantizationReport:
    """What a conversion did.

    Attributes:
        bytes_before, bytes_after: of all tensors, and of the file.
        weight_error: |W - W'| / |W| over all linear layers (Frobenius norms).
        seconds: of writing, with rounding but without calibration.
    """

    num_linears: int
    bytes_before: int
    bytes_after: int
    weight_error: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def write_quantized(
    source: WeightSource,
    layers: Sequence[LinearLayer],
    settings: QuantizationSettings,
    path: Path,
    *,
    calibrated: Mapping[str, PackedWeight] | None = None,
    on_layer: Callable[[], None] = lambda: None,
) -> QuantizationReport:
    """Write all weights of a model, its linear layers packed, to one file.

    Args:
        layers: what `find_linears` found.
        calibrated: layers that are done, by their names in the module; the others are rounded to nearest.
        on_layer: called when a layer is written.

    Raises:
        UnsupportedModelError: no linear layers, or ones that are quantised already.
        ModelLoadError: a weight that cannot be quantised.
        OSError: the file cannot be written.
    """
    check_quantizable(source, layers)
    start = time.perf_counter()
    squares = [0.0, 0.0]  # of errors, of weights

    def plan(layer: LinearLayer) -> PlannedLinear:
        weight = source.tensor(layer.tensor_name)
        weight = weight.T if layer.transposed else weight
        done = (calibrated or {}).get(layer.module_name)
        planned = _plan_rounding(layer, weight, settings) if done is None else plan_linear(layer.name, done)

        def make() -> PackedWeight:
            packed = planned.make()
            on_layer()
            error, whole = _squares(weight, packed)
            squares[0] += error
            squares[1] += whole
            return packed

        return dataclasses.replace(planned, make=make)

    packed_tensors = {layer.tensor_name for layer in layers if not layer.is_tied}
    others = {name: source.tensor(name) for name in source.names if name not in packed_tensors}
    write_packed(path, [plan(layer) for layer in layers], others)
    return QuantizationReport(
        num_linears=len(layers),
        bytes_before=sum(source.tensor(name).nbytes for name in source.names),
        bytes_after=path.stat().st_size,
        weight_error=(squares[0] / max(squares[1], 1e-300)) ** 0.5,
        seconds=time.perf_counter() - start,
    )


def check_quantizable(source: WeightSource, layers: Sequence[LinearLayer]) -> None:
    """Refuse a model of which nothing would be quantised, or which is already.

    Raises:
        UnsupportedModelError: such a one.
    """
    if source.held is not None:
        raise UnsupportedModelError(
            f"{source.folder}",
            got=f"{source.held} weights",
            expected="float weights",
            remedy="quantise the original model; this one runs as it is",
        )
    if not layers:
        raise UnsupportedModelError(
            f"{source.folder}", got="no tensors of linear layers", expected="a model with linear layers"
        )


def _plan_rounding(layer: LinearLayer, weight: Tensor, settings: QuantizationSettings) -> PlannedLinear:
    format = settings.format_of(layer)
    group_size = settings.group_size if format == "int4" else 0
    descriptor = Descriptor(format, weight.shape[0], weight.shape[1], group_size)
    return PlannedLinear(layer.name, descriptor, lambda: pack_linear(weight, format, group_size, layer.tensor_name))


def _squares(weight: Tensor, packed: PackedWeight) -> tuple[float, float]:
    restored = dequantize(packed)
    whole = float(weight.float().square().sum())
    return float(restored.sub_(weight.float()).square_().sum()), whole
