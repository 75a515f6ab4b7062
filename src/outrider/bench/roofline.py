"""How long a forward takes at least, from a model's configuration and a machine's peaks alone.

A forward of M rows over B sequences of context c reads the weights once and every sequence's keys and values once,
and multiplies every weight with every row:

    seconds = max(bytes / bandwidth, operations / peak) + overhead         (Williams, Waterman, Patterson 2009)
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, get_args

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from outrider.bench.hardware import Hardware
from outrider.config import Weights
from outrider.errors import ConfigError, UnsupportedModelError

BYTES_PER_WEIGHT: dict[str, float] = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0}
INT4_SCALE_BYTES = 2.0  # a group's float16 scale
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_NUM_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k")


@dataclass(frozen=True)
class ModelFigures:
    """What a roofline needs to know of a model.

    Attributes:
        num_shared: weights that every row meets: linear layers and the output layer. Input embeddings, of which a row
            reads one vector, are not among them.
        num_routed: weights in routed experts, of which a row meets `active_share`.
        num_experts: routed experts of a layer; 0 without any.
        weights: format of all of them.
        weight_bytes: of one weight, its share of scales included.
        kv_bytes: of a position's keys and values.
        attention_flops: of a row, for each position before it.
    """

    name: str
    num_shared: int
    num_routed: int = 0
    num_experts: int = 0
    active_share: float = 1.0
    weights: Weights = "bf16"
    weight_bytes: float = 2.0
    kv_bytes: float = 0.0
    attention_flops: float = 0.0

    @property
    def num_read(self) -> int:
        return self.num_shared + self.num_routed

    def bytes_read(self, num_rows: int) -> float:
        """Of weights, by a forward over so many rows; rows are taken to choose experts evenly and each on its own."""
        met = 1.0 - (1.0 - self.active_share) ** num_rows if self.num_routed else 0.0
        return self.weight_bytes * (self.num_shared + met * self.num_routed)

    def flops(self, num_rows: int, context: int) -> float:
        active = self.num_shared + self.active_share * self.num_routed
        return num_rows * (2.0 * active + self.attention_flops * context)


def forward_seconds(model: ModelFigures, machine: Hardware, num_rows: int, *, sequences: int, context: int) -> float:
    """Time of one forward.

    Args:
        num_rows: of all sequences together.
        sequences: whose keys and values are read.
        context: positions of each.
    """
    read = model.bytes_read(num_rows) + sequences * context * model.kv_bytes
    reading = read / (machine.bandwidth * machine.bandwidth_efficiency)
    computing = model.flops(num_rows, context) / (machine.flops_for(model.weights) * machine.compute_efficiency)
    return max(reading, computing) + machine.forward_s


def model_figures(
    config: PretrainedConfig, *, name: str, weights: Weights = "auto", group_size: int = 64
) -> ModelFigures:
    """Count a model's weights by its configuration; no weight is read or allocated.

    Args:
        weights: "auto" is what the checkpoint is said to hold.

    Raises:
        UnsupportedModelError: the configuration does not describe a model of its type.
    """
    chosen = _stored_format(config) if weights == "auto" else weights
    try:
        with torch.device("meta"):
            module: Any = AutoModelForCausalLM.from_config(deepcopy(config))
    except Exception as error:  # model classes raise anything on a configuration that they do not expect
        raise UnsupportedModelError(
            f"configuration of {name}",
            got=f"{type(error).__name__}: {str(error)[:120]}",
            expected="one to build from",
        ) from error
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    num_shared = num_routed = 0
    for path, parameter in module.named_parameters():
        if parameter is embedding.weight and not tied:
            continue
        if ".experts." in path:
            num_routed += parameter.numel()
        else:
            num_shared += parameter.numel()
    num_experts, num_active = _first(config, _NUM_EXPERTS), _first(config, _NUM_ACTIVE)
    routed = bool(num_routed and num_experts and num_active)
    num_layers, num_heads = config.num_hidden_layers, config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    cache_itemsize = 4 if chosen == "fp32" else 2
    return ModelFigures(
        name,
        num_shared,
        num_routed,
        num_experts if routed else 0,
        num_active / num_experts if routed else 1.0,
        chosen,
        bytes_per_weight(chosen, group_size),
        2.0 * num_layers * num_kv_heads * width * cache_itemsize,
        4.0 * num_layers * num_heads * width,  # scores and their sum of values, two operations each
    )


def bytes_per_weight(weights: Weights, group_size: int = 64) -> float:
    return 0.5 + INT4_SCALE_BYTES / group_size if weights == "int4" else BYTES_PER_WEIGHT[weights]


def _stored_format(config: PretrainedConfig) -> Weights:
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        bits = quantized.get("bits") if isinstance(quantized, Mapping) else getattr(quantized, "bits", None)
        if bits not in (4, 8):
            raise ConfigError(
                "quantization of the checkpoint",
                got=f"{bits} bits",
                expected="4 or 8",
                remedy=f"say the format by --weights: {', '.join(get_args(Weights)[1:])}",
            )
        return "int4" if bits == 4 else "int8"
    return "fp32" if config.dtype in (None, torch.float32) else "bf16"


def _first(config: PretrainedConfig, names: tuple[str, ...]) -> int:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), 0)
