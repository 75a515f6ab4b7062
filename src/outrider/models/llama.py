"""The lean path: Llama, Mistral, Qwen2 and Qwen3 on our own kernels, a whole forward in one call.

The same weights and the same batches as on the universal path; hidden states are float32 between the layers, and
every row is computed as if it were alone (the bitwise mode is what this path always does).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from outrider.cache.kv_cache import KVCache, LayerShape
from outrider.errors import ModelLoadError, UnsupportedModelError
from outrider.kernels import native
from outrider.kernels.packed import WeightFormat
from outrider.models.batch import ForwardBatch
from outrider.models.model import Choices
from outrider.models.model_config import context_length_of, eos_token_ids_of
from outrider.quantization.tensor_files import first_line
from outrider.quantization.weights import WeightSource, lm_head_format

LEAN_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

_FIXED_ROPE = {"default", "linear", "llama3", "yarn"}  # angles that do not depend on the length of a text


def why_not_lean(config: PretrainedConfig) -> str | None:
    """What keeps a model of this configuration from the lean path; None if nothing does."""
    if config.model_type not in LEAN_MODEL_TYPES:
        return f"model_type {config.model_type}"
    rope, head_dim = _rotary_embedding(config), head_dim_of(config)
    objections = {
        f"hidden_act {config.hidden_act}": config.hidden_act not in ("silu", "swish"),
        f"rope type {rope.rope_type}": rope.rope_type not in _FIXED_ROPE,
        f"a rotary embedding of {len(rope.inv_freq) * 2} of {head_dim} dimensions": len(rope.inv_freq) * 2
        != head_dim,
        "key/value heads that do not divide the attention heads": config.num_attention_heads
        % config.num_key_value_heads,
    }
    return next((reason for reason, holds in objections.items() if holds), None)


class LlamaModel:
    """A Llama, Mistral, Qwen2 or Qwen3 on the compiled kernels, as `Model` describes.

    Args:
        config: one for which `why_not_lean` has no objection.
        weights: all tensors.
        format: of the linear layers that `weights` does not hold packed.
        group_size: of int4.
        dtype: that the checkpoint is computed in.
        cache_dtype: of keys and values: float32, bfloat16 or int8.
        name: what errors and statistics call it.

    Raises:
        ModelLoadError: a tensor is missing, or of a shape that the configuration does not ask for.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        weights: WeightSource,
        *,
        format: WeightFormat,
        group_size: int,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
        name: str,
    ) -> None:
        self.name = name
        self.runs_on_kernels = True
        self.dtype = dtype
        self.cache_dtype = cache_dtype
        self.device = torch.device("cpu")
        self.config = config
        self.vocab_size = config.vocab_size
        self.context_length = context_length_of(config)
        self.eos_token_ids = eos_token_ids_of(config)
        width = native.cache_width(head_dim_of(config), cache_dtype)
        self.layer_shapes = (LayerShape(config.num_key_value_heads, width, width),) * config.num_hidden_layers
        reader = _Reader(config, weights, format, group_size)
        self._final_norm = reader.tensor("model.norm.weight")
        layers = [reader.layer(index) for index in range(config.num_hidden_layers)]
        self._llama = self._assemble(layers, reader.embedding(), reader.lm_head())
        self._caches: WeakKeyDictionary[KVCache, Any] = WeakKeyDictionary()

    def with_layers(self, num_layers: int) -> LlamaModel:
        """The sub-model of the first layers, with the same final norm and output layer, over the same weights."""
        twin = copy(self)
        twin.layer_shapes = self.layer_shapes[:num_layers]
        llama = self._llama
        twin._llama = self._assemble(llama.layers[:num_layers], llama.embedding, llama.lm_head)
        twin._caches = WeakKeyDictionary()  # which name as many layers
        return twin

    def _assemble(
        self, layers: Sequence[native.LlamaLayerWeights], embedding: Tensor, lm_head: native.Linear
    ) -> native.Llama:
        config, rope = self.config, _rotary_embedding(self.config)
        return native.Llama(
            layers,
            embedding=embedding,
            final_norm=self._final_norm,
            lm_head=lm_head,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim_of(config),
            norm_eps=config.rms_norm_eps,
            inverse_frequencies=rope.inv_freq,
            rope_scaling=rope.attention_scaling,
        )

    @property
    def embedding(self) -> Tensor:
        """``[vocab, hidden]`` float32 or bfloat16."""
        return self._llama.embedding

    @property
    def kernel_seconds(self) -> float:
        """Wall time of the last forward inside the kernels."""
        return self._llama.last_seconds

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a forward reads, embeddings not counted."""
        linears = [linear for layer in self._llama.layers for linear in layer.linears]
        return sum(linear.weight.data.numel() for linear in [*linears, self._llama.lm_head])

    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Logits ``[R, vocab]`` float32 of the wanted rows; writes the rows' keys and values into `cache`."""
        logits = self._room_for_logits(batch)
        self._llama.forward(batch.sequences, self._caches_of(cache), logits=logits, chooses=False)
        return logits

    def choose(self, batch: ForwardBatch, cache: KVCache, *, with_logits: bool = False) -> Choices | None:
        """What follows each wanted row, whose logits need never leave the processor's caches."""
        logits = self._room_for_logits(batch) if with_logits else None
        maxima = None if logits is None else torch.empty(len(logits), native.num_maxima(self.vocab_size))
        caches = self._caches_of(cache)
        tokens, log_weights = self._llama.forward(batch.sequences, caches, logits=logits, maxima=maxima)
        return None if native.UNDECIDED in tokens else Choices(tokens, log_weights, logits, maxima)

    def _room_for_logits(self, batch: ForwardBatch) -> Tensor:
        return torch.empty(sum(len(rows.logits_rows) for rows in batch.sequences), self.vocab_size)

    def _caches_of(self, cache: KVCache) -> Any:
        caches = self._caches.get(cache)
        if caches is None:
            caches = self._caches[cache] = native.llama_caches(cache.keys, cache.values)
        return caches


def load_llama(
    folder: Path,
    config: PretrainedConfig,
    weights: WeightSource,
    *,
    format: WeightFormat,
    group_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    name: str,
) -> LlamaModel:
    """A model of the family from a folder whose weights are open already; see `LlamaModel`."""
    model = LlamaModel(
        config, weights, format=format, group_size=group_size, dtype=dtype, cache_dtype=cache_dtype, name=name
    )
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
        model.eos_token_ids = eos_token_ids_of(generation, config)
    return model


class _Reader:
    """Tensors by their names in the checkpoints of these families.

    What a model of this configuration consists of, and in which shapes, says its module in transformers, built
    without memory.

    Raises:
        ModelLoadError: tensors are missing, or of other shapes.
    """

    def __init__(
        self, config: PretrainedConfig, weights: WeightSource, format: WeightFormat, group_size: int
    ) -> None:
        self._config, self._weights = config, weights
        self._format: WeightFormat = format
        self._group_size = group_size
        self._windows = _sliding_windows(config)
        try:
            with torch.device("meta"):
                module = AutoModelForCausalLM.from_config(config)
        except Exception as error:  # anything that a model class raises on an unexpected configuration
            raise ModelLoadError(
                f"model {weights.folder} cannot be built",
                got=f"{type(error).__name__}: {first_line(error)}",
                expected="a valid configuration",
                remedy="check config.json",
            ) from error
        self._shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        if config.tie_word_embeddings:
            del self._shapes["lm_head.weight"]
        self._require_all(type(module).__name__)

    def _require_all(self, class_name: str) -> None:
        missing = sorted(name for name in self._shapes if name not in self._weights)
        if missing:
            raise ModelLoadError(
                f"weights of {self._weights.folder}",
                got=f"{len(missing)} tensors missing, such as {', '.join(missing[:3])}",
                expected=f"every tensor of {class_name}",
                remedy="download all files of the model; adapters must be merged into their base model first",
            )
        mismatched = [name for name, shape in self._shapes.items() if self._weights.shape(name) != shape]
        if mismatched:
            raise ModelLoadError(
                f"weights of {self._weights.folder}",
                got=f"{len(mismatched)} tensors of other shapes, such as {mismatched[0]}",
                expected="the shapes that config.json asks for",
                remedy="use config.json and weights of the same model",
            )

    def tensor(self, name: str) -> Tensor:
        tensor = self._weights.tensor(name)
        if not tensor.sum(dtype=torch.float32).isfinite():  # as large as it is, one NaN or infinity shows
            raise ModelLoadError(
                f"tensor {name} of {self._weights.folder}",
                got="NaN or infinite weights",
                expected="finite numbers",
                remedy="check the checkpoint",
            )
        return tensor

    def embedding(self) -> Tensor:
        table = self.tensor("model.embed_tokens.weight")
        return table if table.dtype in (torch.float32, torch.bfloat16) else table.float()

    def lm_head(self) -> native.Linear:
        """The output layer: of its own, packed from a tied one, or the embedding."""
        own = "lm_head" in self._weights.linear_names or not self._config.tie_word_embeddings
        return self.linear("lm_head" if own else "model.embed_tokens", lm_head_format(self._format))

    def linear(self, name: str, format: WeightFormat | None = None) -> native.Linear:
        if name not in self._weights.linear_names:
            self.tensor(f"{name}.weight")
        weight = self._weights.linear(name, format or self._format, self._group_size)
        bias = f"{name}.bias"
        return native.Linear(weight, self.tensor(bias) if bias in self._shapes else None)

    def layer(self, index: int) -> native.LlamaLayerWeights:
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"

        def head_norm(name: str) -> Tensor | None:
            full = f"{attention}.{name}.weight"
            return self.tensor(full) if full in self._shapes else None

        gate, up = self.linear(f"{mlp}.gate_proj"), self.linear(f"{mlp}.up_proj")
        if gate.weight.format != up.weight.format:  # they are computed side by side
            raise UnsupportedModelError(
                f"{mlp} of {self._weights.folder}",
                got=f"gate_proj in {gate.weight.format} and up_proj in {up.weight.format}",
                expected="one format for both",
                remedy="quantise the original model with `outrider quantize`",
            )
        return native.LlamaLayerWeights(
            query=self.linear(f"{attention}.q_proj"),
            key=self.linear(f"{attention}.k_proj"),
            value=self.linear(f"{attention}.v_proj"),
            output=self.linear(f"{attention}.o_proj"),
            gate=gate,
            up=up,
            down=self.linear(f"{mlp}.down_proj"),
            input_norm=self.tensor(f"{prefix}.input_layernorm.weight"),
            post_norm=self.tensor(f"{prefix}.post_attention_layernorm.weight"),
            query_norm=head_norm("q_norm"),
            key_norm=head_norm("k_norm"),
            sliding_window=self._windows[index],
        )


def _rotary_embedding(config: PretrainedConfig) -> Any:
    """The four families share it; `inv_freq`, `attention_scaling` and `rope_type` are what counts."""
    return LlamaRotaryEmbedding(config)  # pyright: ignore[reportArgumentType]


def _sliding_windows(config: PretrainedConfig) -> list[int | None]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def head_dim_of(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
