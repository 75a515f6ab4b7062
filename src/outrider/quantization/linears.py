"""Which tensors of a checkpoint are weights of linear layers: asked of the model class, not guessed from names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from outrider.quantization.weights import WeightSource

ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})  # a few outputs that decide which experts run


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer of the model and the plain tensor that holds its weight.

    Attributes:
        module_name: in the transformers module.
        name: in the checkpoint, without ".weight".
        tensor_name: of the weight; the embedding's where an output layer is tied to it.
        transposed: the tensor is [K, N], as in GPT-2.
        is_head: the output layer, [vocab, K].
    """

    module_name: str
    name: str
    tensor_name: str
    transposed: bool
    is_head: bool

    @property
    def is_tied(self) -> bool:
        return self.tensor_name != f"{self.name}.weight"


def find_linears(config: PretrainedConfig, source: WeightSource) -> list[LinearLayer]:
    """The linear layers of a causal language model whose weights the checkpoint holds, in the model's order.

    Routers of mixtures of experts are left out: they are small, and an error there changes which experts run.
    """
    with torch.device("meta"):
        module: Any = AutoModelForCausalLM.from_config(config)
    prefix = f"{module.base_model_prefix}."
    head = module.get_output_embeddings()
    embedding = module.get_input_embeddings()
    embedding_name = next((name for name, part in module.named_modules() if part is embedding), None)
    layers = []
    for name, part in module.named_modules():
        if not isinstance(part, nn.Linear | Conv1D) or name.rpartition(".")[2] in ROUTERS:
            continue
        stored = _stored_name(name, prefix, source)
        if stored is not None:
            tensor = f"{stored}.weight"
        elif part is head and config.tie_word_embeddings and embedding_name is not None:
            stored, shared = name, _stored_name(embedding_name, prefix, source)
            if shared is None:
                continue
            tensor = f"{shared}.weight"
        else:
            continue
        layers.append(LinearLayer(name, stored, tensor, isinstance(part, Conv1D), part is head))
    return layers


def _stored_name(name: str, prefix: str, source: WeightSource) -> str | None:
    """The name in the checkpoint: the module's, or without the base model's prefix (saved from the base model)."""
    for candidate in (name, name.removeprefix(prefix)):
        if f"{candidate}.weight" in source and len(source.shape(f"{candidate}.weight")) == 2:
            return candidate
    return None
