"""Llamas of any size with random weights, made in memory: what a forward costs does not depend on what it says."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig

from outrider.errors import ConfigError, ModelLoadError
from outrider.kernels.packed import PackedWeight, WeightFormat, pack_bf16, pack_fp32, pack_int4, pack_int8
from outrider.quantization.weights import DEFAULT_GROUP_SIZE

VOCAB_SIZE = 32000
MAX_PARAMS = 10**12

_HEAD_DIM = 64
_HIDDEN_STEP = 5 * _HEAD_DIM  # five query heads share each key/value head
_FFN_RATIO = 3.2
_LAYER_RATIO = 12.0  # parameters of a layer over hidden^2: 2 + 2/5 of attention, 3 * 3.2 of the MLP
_REFERENCE_HIDDEN, _REFERENCE_LAYERS = 1280, 24
_MAX_POSITIONS = 1 << 20
_INT8_STD, _INT4_STD = 73.3, 4.6  # of uniform -127..127 and 0..15


@dataclass(frozen=True)
class Sizes:
    """The sizes of a Llama whose embeddings are tied.

    Attributes:
        params: weights that a forward reads: all layers' linears and the output layer.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    head_dim: int = _HEAD_DIM
    vocab: int = VOCAB_SIZE

    @property
    def params(self) -> int:
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn) + self.vocab * self.hidden


def parse_params(text: str) -> int:
    """A number of parameters from "0.5B", "350M" or "500000000".

    Raises:
        ConfigError: something else, or a size that no model has.
    """
    scale = {"B": 10**9, "M": 10**6, "K": 10**3}.get(text[-1:].upper(), 1)
    try:
        count = float(text if scale == 1 else text[:-1]) * scale
    except ValueError:
        count = math.nan
    if not 1 <= count <= MAX_PARAMS:
        raise ConfigError("--params", got=repr(text), expected="a size such as 0.5B, 350M or 500000000")
    return round(count)


def sizes_for(params: int) -> Sizes:
    """Sizes of a model of at least `params` parameters, embeddings counted once.

    The hidden size h is a multiple of 320 with h / 64 query heads, a fifth as many key/value heads, and an MLP of
    3.2 h: 12 h^2 parameters a layer. Each h takes as few layers as reach `params`; of all h the one is chosen whose
    depth is nearest to 24 sqrt(h / 1280). So 0.5B is h = 1280 with 24 layers, 1B 1600 with 31, 3B 2560 with 38.

    Raises:
        ConfigError: too few parameters for one layer and a vocabulary of 32000.
    """
    least = _sizes(_HIDDEN_STEP, 1).params
    if params < least:
        raise ConfigError(
            "--params",
            got=f"{params:,}",
            expected=f"at least {least:,}",
            remedy=f"the vocabulary of {VOCAB_SIZE} alone takes most of that",
        )
    fitting: list[Sizes] = []
    hidden = _HIDDEN_STEP
    while (left := params - VOCAB_SIZE * hidden) > 0 and left >= _LAYER_RATIO * hidden**2 / 2:
        fitting.append(_sizes(hidden, math.ceil(left / (_LAYER_RATIO * hidden**2))))
        hidden += _HIDDEN_STEP
    return min(fitting, key=_oddness)


def _sizes(hidden: int, layers: int) -> Sizes:
    heads = hidden // _HEAD_DIM
    return Sizes(hidden, layers, heads, heads // 5, round(_FFN_RATIO * hidden))


def _oddness(sizes: Sizes) -> float:
    """How far the depth is from what is usual for the width, as the logarithm of a factor."""
    usual = _REFERENCE_LAYERS * math.sqrt(sizes.hidden / _REFERENCE_HIDDEN)
    return abs(math.log(sizes.layers / usual))


def synthetic_config(sizes: Sizes) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=_MAX_POSITIONS,
        tie_word_embeddings=True,
    )


class SyntheticWeights:
    """Seeded random weights under the names of a Llama's checkpoint, made when asked for; as `WeightSource`.

    All formats of a layer are made of the same random bytes, without rounding or searching: int4 is not the nearest
    to int8. Their spread keeps activations of order one.

    Attributes:
        held: None, as of any checkpoint that is not quantised.
    """

    held: WeightFormat | None = None

    def __init__(self, sizes: Sizes, seed: int = 0) -> None:
        self._seed = seed
        self._shapes = _shapes(sizes)
        self._tensors: dict[str, Tensor] = {}  # those asked for as such (embedding, norms) are shared by all models

    @property
    def names(self) -> list[str]:
        return sorted(self._shapes)

    @property
    def linear_names(self) -> frozenset[str]:
        """None: layers are not stored packed."""
        return frozenset()

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises:
        ModelLoadError: no such tensor.
        """
        try:
            return self._shapes[name]
        except KeyError:
            raise ModelLoadError("synthetic weights", got=f"no tensor {name}", expected="a Llama's name") from None

    def tensor(self, name: str) -> Tensor:
        """A matrix in bfloat16, or ones in float32 for a norm; the same one every time.

        Raises:
            ModelLoadError: no such tensor.
        """
        if name not in self._tensors:
            shape = self.shape(name)
            self._tensors[name] = (
                torch.ones(shape) if len(shape) == 1 else self._integers(name).bfloat16() / _INT8_STD
            )
        return self._tensors[name]

    def linear(
        self,
        name: str,
        format: WeightFormat,
        group_size: int = DEFAULT_GROUP_SIZE,
        *,
        transposed: bool = False,
    ) -> PackedWeight:
        """A layer ready for the kernels.

        Args:
            name: of the layer, without ".weight".
            group_size: of int4.

        Raises:
            ModelLoadError: no such layer.
        """
        assert not transposed, "a Llama has no transposed layers"
        q = self._integers(f"{name}.weight")
        num_outputs, num_inputs = q.shape
        scale = 1 / (_INT8_STD * math.sqrt(num_inputs))
        match format:
            case "fp32":
                return pack_fp32(q.float() * scale)
            case "bf16":
                return pack_bf16(q.bfloat16() * scale)
            case "int8":
                return pack_int8(q, torch.full((num_outputs,), scale))
            case "int4":
                groups = (num_outputs, -(-num_inputs // group_size))
                scales = torch.full(groups, scale * _INT8_STD / _INT4_STD, dtype=torch.float16)
                return pack_int4(q.view(torch.uint8) & 15, scales, None, group_size)

    def _integers(self, name: str) -> Tensor:
        """int8 of the tensor's shape, uniform in -127..127 (-127 twice as often)."""
        shape = self.shape(name)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        words = torch.empty(-(-math.prod(shape) // 8), dtype=torch.int64)
        words.random_(-(2**63), None, generator=generator)  # eight bytes a draw: loading takes seconds, not minutes
        return words.view(torch.int8)[: math.prod(shape)].view(shape).clamp_(min=-127)


def _shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    hidden, queries, keys = sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (sizes.ffn, hidden),
        "mlp.up_proj": (sizes.ffn, hidden),
        "mlp.down_proj": (hidden, sizes.ffn),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    layers = {
        f"model.layers.{index}.{name}.weight": shape for index in range(sizes.layers) for name, shape in layer.items()
    }
    return {"model.embed_tokens.weight": (sizes.vocab, hidden), "model.norm.weight": (hidden,), **layers}
