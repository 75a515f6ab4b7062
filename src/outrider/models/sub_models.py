"""Sub-models: the first layers of a model behind the same embedding, final norm and output layer.

A model that was trained for it (sorted fine-tuning, Kavehzadeh et al., arXiv 2309.08968) answers well at several
depths. Sub-models share all weights with the model that they are part of.
"""

from __future__ import annotations

from copy import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from outrider.errors import UnsupportedModelError
from outrider.models.llama import LlamaModel
from outrider.models.model import Model
from outrider.models.probe import probe_model
from outrider.models.transformers_model import TransformersModel


def sub_model(model: Model, num_layers: int) -> Model:
    """The first `num_layers` layers of a loaded model, over the same weights.

    Raises:
        UnsupportedModelError: the model has fewer layers, or its layers are not one list.
    """
    if not 1 <= num_layers <= len(model.layer_shapes):
        raise UnsupportedModelError(
            f"sub-model of {model.name}",
            got=f"{num_layers} layers",
            expected=f"1 to the model's {len(model.layer_shapes)}",
        )
    if isinstance(model, LlamaModel):
        return model.with_layers(num_layers)  # of all layers too: with working memory of its own
    if num_layers == len(model.layer_shapes):
        return model
    if not isinstance(model, TransformersModel):
        raise UnsupportedModelError(f"sub-model of {model.name}", got=type(model).__name__, expected="a loaded model")
    twin = TransformersModel(_first_layers(model.module, num_layers), name=model.name)
    probe_model(twin)
    return twin if model.cache_dtype == twin.cache_dtype else twin.with_cache_dtype(model.cache_dtype)


def _first_layers(module: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """A copy of a module's frame around the same parts, with the first of its layers."""
    total = module.config.get_text_config(decoder=True).num_hidden_layers
    lists = [name for name, part in module.named_modules() if isinstance(part, nn.ModuleList) and len(part) == total]
    if len(lists) != 1:
        raise UnsupportedModelError(
            f"sub-model of {type(module).__name__}",
            got=f"{len(lists)} lists of {total} layers",
            expected="one list of decoder layers",
            remedy="use a Llama, Qwen, Mistral, Gemma, Phi, GPT-2 or similar decoder",
        )
    *parents, name = lists[0].split(".")
    twin = part = _reframed(module)
    for parent in parents:
        child = _reframed(getattr(part, parent))
        part._modules[parent] = child
        part = child
    layers = getattr(part, name)
    part._modules[name] = nn.ModuleList(list(layers)[:num_layers])
    return twin


def _reframed(module: Any) -> Any:
    """A shallow copy whose parts can be exchanged."""
    twin = copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    return twin
