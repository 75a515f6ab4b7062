"""Linear layers of transformers' modules on our kernels: swapped after loading, or read packed from the checkpoint.

What is swapped are `nn.Linear` and the `Conv1D` of GPT-2, each by exact type: a subclass computes something else. A
mixture's fused experts are tensors of their own and stay as they are.
"""

from __future__ import annotations

from functools import cache as call_once
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from outrider.errors import ModelLoadError, UnsupportedModelError
from outrider.kernels import ops
from outrider.kernels.packed import PackedWeight, WeightFormat
from outrider.quantization.linears import ROUTERS
from outrider.quantization.weights import WeightSource, lm_head_format, pack_linear

HELD_METHOD = "outrider_held"
"""What transformers' catalogue of quantisers calls ours; no config.json names it."""


class PackedLinear(nn.Module):
    """A linear layer over a packed weight, for inference on the CPU.

    Args:
        packed: the weight [N, K].
        bias: ``[N]``, or None; a parameter as in the layer that this one replaces.
        dtype: of the layer that this one replaces.
    """

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = packed
        self.register_parameter("bias", bias)
        self._dtype = dtype
        self._linear: ops.Linear | None = None

    @property
    def weight(self) -> Tensor:
        """Shape and dtype without values, which is all that a few models ask a layer's weight for."""
        return torch.empty(self.packed.num_outputs, self.packed.num_inputs, dtype=self._dtype, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` -> ``[..., N]`` in the dtype of `x`."""
        if self._linear is None:  # not before: the bias may still be loaded after construction
            self._linear = ops.Linear(self.packed, self._parameters["bias"])
        y = self._linear(x.reshape(-1, self.packed.num_inputs))
        return y.view(*x.shape[:-1], self.packed.num_outputs).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.packed.num_inputs}, {self.packed.num_outputs}, {self.packed.format}"


def swap_linears(module: PreTrainedModel, format: WeightFormat, plain: WeightFormat, group_size: int) -> None:
    """Pack every linear layer of a loaded module, freeing its weight before the next one is packed.

    Args:
        module: on the CPU, its weights finite.
        format: of the layers; the output layer gets `lm_head_format` of it.
        plain: of the routers of a mixture, in which a rounding error would change which experts run.
        group_size: of int4.

    Raises:
        ModelLoadError: a weight that cannot be quantised.
    """
    head = module.get_output_embeddings()
    done: WeakKeyDictionary[nn.Module, PackedLinear] = WeakKeyDictionary()  # a layer may have several names
    for name in _linear_names(module):
        part: Any = module.get_submodule(name)
        if part not in done:
            wanted = plain if name.rpartition(".")[2] in ROUTERS else format
            wanted = lm_head_format(wanted) if part is head else wanted
            weight = part.weight.T if isinstance(part, Conv1D) else part.weight
            packed = pack_linear(weight.detach(), wanted, group_size, f"{name}.weight")
            done[part] = PackedLinear(packed, part.bias, weight.dtype)
        _replace(module, name, done[part])


def packed_formats(module: nn.Module) -> set[WeightFormat]:
    """Formats of the packed linear layers of a module."""
    return {part.packed.format for part in module.modules() if isinstance(part, PackedLinear)}


def require_finite(module: nn.Module, folder: Path) -> None:
    """Refuse damaged weights by name.

    Raises:
        ModelLoadError: a NaN or infinity.
    """
    for name, parameter in module.named_parameters():
        if not parameter.sum(dtype=torch.float32).isfinite():  # as large as it is, one NaN or infinity shows
            raise ModelLoadError(
                f"tensor {name} of {folder}",
                got="NaN or infinite weights",
                expected="finite numbers",
                remedy="check the checkpoint",
            )


class HeldWeights(QuantizationConfigMixin):
    """For `from_pretrained(quantization_config=...)`: the layers that a checkpoint holds packed.

    Raises:
        ModelLoadError: a layer that cannot be read.
    """

    def __init__(self, source: WeightSource) -> None:
        _register()
        self.quant_method: Any = HELD_METHOD
        self.folder = source.folder
        # Read here, as transformers builds modules where tensors have no memory and another default dtype.
        self.layers = {name: source.linear(name, "fp32") for name in sorted(source.linear_names)}

    def __deepcopy__(self, memo: dict[int, Any]) -> HeldWeights:
        """Itself: transformers copies configurations, and this one is as large as the model."""
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": HELD_METHOD}


class _HeldQuantizer(HfQuantizer):
    """Puts packed layers into a module before transformers loads the rest of it."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        assert isinstance(self.quantization_config, HeldWeights)
        _place_held(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.remove_quantization_config(model)  # for all that transformers knows, an ordinary module from here on
        return model

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return False

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return False


@call_once
def _register() -> None:
    register_quantizer(HELD_METHOD)(_HeldQuantizer)


def _place_held(module: PreTrainedModel, held: HeldWeights) -> None:
    """Replace every held layer, known by its name or by that without the base model's prefix, in an empty module."""
    prefix = f"{module.base_model_prefix}."
    left = set(held.layers)
    for name in _linear_names(module):
        stored = next((known for known in (name, name.removeprefix(prefix)) if known in held.layers), None)
        if stored is None:
            continue
        part: Any = module.get_submodule(name)
        packed = held.layers[stored]
        got = [packed.num_outputs, packed.num_inputs]
        expected = list(part.weight.T.shape if isinstance(part, Conv1D) else part.weight.shape)
        if got != expected:
            raise ModelLoadError(
                f"weights of {held.folder}",
                got=f"{stored} of shape {got}",
                expected=f"{expected}, as config.json asks for",
                remedy="use config.json and weights of the same model",
            )
        left.discard(stored)
        _replace(module, name, PackedLinear(packed, part.bias, part.weight.dtype))
    if left:
        class_name = type(module).__name__
        raise UnsupportedModelError(
            f"weights of {held.folder}",
            got=f"{len(left)} quantised layers, such as {min(left)}, that are no linear layers of {class_name}",
            expected="no others quantised (a mixture's experts run unquantised)",
            remedy="quantise the original model with `outrider quantize`",
        )


def _linear_names(module: nn.Module) -> list[str]:
    parts = module.named_modules(remove_duplicate=False)
    return [name for name, part in parts if type(part) in (nn.Linear, Conv1D)]


def _replace(module: PreTrainedModel, name: str, packed: PackedLinear) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(parent), attribute, packed)
    weight = f"{name}.weight"
    tied = module.all_tied_weights_keys  # its weight is no parameter any more, and transformers would look for it
    module.all_tied_weights_keys = {key: to for key, to in tied.items() if weight not in (key, to)}
