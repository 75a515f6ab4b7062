"""The model whose forwards are measured: from a folder or made up, in every weight format, if it fits in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from transformers import AutoConfig, PretrainedConfig

from outrider.bench.synthetic import SyntheticWeights, parse_params, sizes_for, synthetic_config
from outrider.engine.bundled import BUNDLED_TARGET
from outrider.errors import ConfigError, ModelLoadError, UnsupportedModelError
from outrider.kernels import native
from outrider.kernels.packed import WeightFormat, num_panels, panel_bytes
from outrider.models.llama import LEAN_MODEL_TYPES, LlamaModel, why_not_lean
from outrider.quantization.weights import WeightSource, lm_head_format, open_weights

FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
DEFAULT_FORMATS: tuple[WeightFormat, ...] = ("bf16", "int8", "int4")

_LAYER_LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_PACKING_BYTES = 24  # for each weight of the layer that is being packed, in all its copies


@dataclass(frozen=True, eq=False)
class BenchTarget:
    """A model of the lean path, and how it is to be loaded.

    Attributes:
        name: for people.
        formats: of the linear layers, one model each.
        group_size: of int4.
    """

    name: str
    config: PretrainedConfig
    weights: WeightSource
    formats: tuple[WeightFormat, ...]
    group_size: int

    @property
    def linear_names(self) -> list[str]:
        """Of the layers that a forward reads, in its order, without ".weight"."""
        layer = [f"self_attn.{name}_proj" for name in "qkvo"] + [
            f"mlp.{name}_proj" for name in ("gate", "up", "down")
        ]
        names = [f"model.layers.{i}.{name}" for i in range(self.config.num_hidden_layers) for name in layer]
        return [*names, self._head_name]

    @property
    def num_params(self) -> int:
        """Weights that a forward reads; embeddings count where they are the output layer too."""
        return sum(math.prod(self._shape(name)) for name in self.linear_names)

    @property
    def shapes(self) -> dict[str, int]:
        """The sizes by their names in config.json."""
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        sizes = {name: getattr(self.config, name) for name in names}
        head_dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // sizes["num_attention_heads"]
        more = {name: getattr(self.config, name) for name in ("intermediate_size", "vocab_size")}
        return {**sizes, "head_dim": head_dim, **more}

    def linears(self, format: WeightFormat) -> list[native.Linear]:
        """All linear layers that a forward reads.

        Raises:
            ModelLoadError: a tensor is missing.
        """
        linears = []
        for name in self.linear_names:
            bias = f"{name}.bias"
            weight = self.weights.linear(name, self._format_of(name, format), self.group_size)
            linears.append(native.Linear(weight, self.weights.tensor(bias) if bias in self.weights else None))
        return linears

    def model(self, format: WeightFormat) -> LlamaModel:
        """The model on the lean path; its cache is of bfloat16, for fp32 of float32.

        Raises:
            ModelLoadError: a tensor is missing, or of another shape than the configuration's.
        """
        return LlamaModel(
            self.config,
            self.weights,
            format=format,
            group_size=self.group_size,
            dtype=cache_dtype(format),
            cache_dtype=cache_dtype(format),
            name=self.name,
        )

    def needed_bytes(self, *, max_rows: int, num_positions: int) -> int:
        """Memory of all formats at once, with caches, activations and what packing takes; estimated upwards.

        Args:
            max_rows: of a forward.
            num_positions: of the caches.
        """
        packed = largest = 0
        for name in self.linear_names:
            num_outputs, num_inputs = self._shape(name)
            largest = max(largest, num_outputs * num_inputs)
            for format in self.formats:
                kind = self._format_of(name, format)
                group_size = self.group_size if kind == "int4" else 0
                packed += num_panels(num_outputs) * panel_bytes(kind, num_inputs, group_size, kind == "int4")
        sizes = self.shapes
        position = 2 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * sizes["head_dim"]
        caches = sum(num_positions * position * cache_dtype(format).itemsize for format in self.formats)
        row = 4 * (sizes["vocab_size"] + 4 * sizes["intermediate_size"] + 8 * sizes["hidden_size"])
        embedding = 4 * sizes["vocab_size"] * sizes["hidden_size"]
        return packed + caches + max_rows * row + embedding + _PACKING_BYTES * largest

    @property
    def _head_name(self) -> str:
        own = "lm_head" in self.weights.linear_names or not self.config.tie_word_embeddings
        return "lm_head" if own else "model.embed_tokens"

    def _format_of(self, name: str, format: WeightFormat) -> WeightFormat:
        return lm_head_format(format) if name == self._head_name else format

    def _shape(self, name: str) -> tuple[int, int]:
        num_outputs, num_inputs = self.weights.shape(f"{name}.weight")
        return num_outputs, num_inputs


def cache_dtype(format: WeightFormat) -> torch.dtype:
    return torch.float32 if format == "fp32" else torch.bfloat16


def open_target(
    model: str | None, params: str | None, formats: Sequence[WeightFormat] | None, group_size: int
) -> BenchTarget:
    """Find out what is to be measured; weights are not read yet.

    Args:
        model: a folder with config.json and safetensors; None is the bundled model, unless there are `params`.
        params: the size of a synthetic model, such as "0.5B".
        formats: None is what a quantised checkpoint holds, and DEFAULT_FORMATS for others.

    Raises:
        ConfigError: both a model and a size, or a format that a quantised checkpoint does not hold.
        ModelLoadError: no model there.
        UnsupportedModelError: a model that the lean path does not run.
    """
    if params is not None:
        if model is not None:
            raise ConfigError("--model and --params", got="both", expected="a folder or a size")
        sizes = sizes_for(parse_params(params))
        weights = cast(WeightSource, SyntheticWeights(sizes))
        chosen = tuple(formats or DEFAULT_FORMATS)
        return BenchTarget(f"synthetic {params}", synthetic_config(sizes), weights, chosen, group_size)
    if model == "":
        raise ConfigError("--model", got="nothing", expected="a folder")
    folder = Path(model or BUNDLED_TARGET).expanduser()
    config = _read_config(folder)
    weights = open_weights(folder)
    if formats is None:
        formats = DEFAULT_FORMATS if weights.held is None else (weights.held,)
    for format in formats:
        open_weights(folder, format)
    return BenchTarget(model or "bundled model", config, weights, tuple(formats), group_size)


def check_memory(needed: int, available: int | None) -> None:
    """Refuse before anything is allocated.

    Args:
        available: bytes; None where the system does not say.

    Raises:
        ConfigError: more is needed than there is.
    """
    if available is not None and needed > available:
        raise ConfigError(
            "memory for all weight formats at once, and the bandwidth probe",
            got=f"{needed / 2**30:.1f} GiB needed",
            expected=f"at most the {available / 2**30:.1f} GiB that are free",
            remedy="name fewer formats by --weights, or a smaller model",
        )


def _read_config(folder: Path) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise ModelLoadError(
            f"model folder {folder}",
            got="no config.json",
            expected="a Hugging Face model folder",
            remedy="download a model of the hub first, or make one up with --params",
        )
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # configuration classes validate with several exception types
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelLoadError(f"{folder / 'config.json'} is not valid", got=first_line) from error
    objection = why_not_lean(config)
    if objection is not None:
        raise UnsupportedModelError(
            f"{folder} has no compiled forward",
            got=objection,
            expected=f"one of {', '.join(LEAN_MODEL_TYPES)} without peculiarities",
            remedy="measure whole generations by `outrider bench decode`",
        )
    return config
