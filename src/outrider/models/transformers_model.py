"""Any causal language model of transformers behind the `Model` protocol, on our pages and our attention.

transformers lets a registered function stand in for a model's attention (`AttentionInterface`). Ours writes
the rows' keys and values to our cache and attends over it, so sequences, chunks and trees are flattened to
``input_ids [1, N]`` without padding, masks or transformers' own caches. A model that does not ask the
interface would silently attend across sequences; construction and `probe_model` refuse it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache as call_once
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from outrider.cache.kv_cache import KVCache, LayerShape
from outrider.errors import UnsupportedModelError
from outrider.kernels import native, ops
from outrider.kernels.attention import ROW_BUCKET, AttentionBatch, AttentionParams, RowBucket
from outrider.models.batch import ForwardBatch
from outrider.models.model import Choices
from outrider.models.model_config import context_length_of, eos_token_ids_of

ATTENTION_NAME = "outrider"
ROW_INVARIANT_EXPERTS_NAME = "outrider_row_invariant"

WHAT_RUNS = (
    "use a decoder-only model with softmax attention, such as Llama, Qwen2, Qwen3, Mistral, Mixtral, Gemma, "
    "Phi3, GPT-2, GPT-NeoX, OPT, OLMo, OLMoE, Granite, GLM4, StableLM, Starcoder2, Cohere2 or gpt-oss"
)

_PLAIN_LAYER_TYPES = {"full_attention", "sliding_attention"}
_RECURRENT_LAYER_TYPES = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}


@dataclass(frozen=True)
class _Layer:
    """One attention layer: where its keys and values are kept, and how it attends."""

    cache_index: int
    shape: LayerShape
    params: AttentionParams


class _Survey:
    """Stands in for attention once, to see which layers ask for it and with what."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.layers: dict[int, _Layer] = {}
        self.key_dtype: torch.dtype | None = None
        self._config = config

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]
    ) -> Tensor:
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int) or layer in self.layers:
            raise _unsupported(f"its attention layer {layer!r} is nameless or runs twice in one forward")
        if options.get("attention_mask") is not None or options.get("is_causal") is False:
            raise _unsupported("it brings its own attention mask or bias, which trees cannot share")
        params = _attention_params(layer, query, options, self._config)
        shape = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        self.layers[layer] = _Layer(len(self.layers), shape, params)
        self.key_dtype = key.dtype
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)


class _Step:
    """Attention of one forward over `cache`: of a whole batch, or of one bucket in the bitwise mode."""

    def __init__(self, layers: Mapping[int, _Layer], cache: KVCache, attention: AttentionBatch | RowBucket) -> None:
        self._layers, self._cache, self._attention = layers, cache, attention
        self.num_calls = 0

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]
    ) -> Tensor:
        layer = self._layers[module.layer_idx]  # pyright: ignore[reportArgumentType]
        self.num_calls += 1
        rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [1, H, N, D] -> [N, H, D]
        caches = {
            "key_cache": self._cache.keys[layer.cache_index],
            "value_cache": self._cache.values[layer.cache_index],
            "params": layer.params,
        }
        if isinstance(self._attention, RowBucket):
            return ops.row_bucket_attention(*rows, bucket=self._attention, **caches)[None]
        return ops.attention(*rows, batch=self._attention, **caches)[None]


_ACTIVE: ContextVar[_Survey | _Step | None] = ContextVar("outrider_attention", default=None)


def _attention_of_active_step(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    active = _ACTIVE.get()
    assert active is not None, "a model set to outrider's attention was called outside TransformersModel"
    options["attention_mask"] = attention_mask
    return active.attend(module, query, key, value, options), None


@call_once
def _register() -> None:
    AttentionInterface.register(ATTENTION_NAME, _attention_of_active_step)
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError:  # transformers before fused experts: nothing to replace
        return
    ExpertsInterface.register(ROW_INVARIANT_EXPERTS_NAME, row_invariant_experts)


class TransformersModel:
    """A transformers causal language model, run with our attention over our cache.

    Args:
        module: in evaluation mode; its attention implementation is changed in place.
        name: what errors and statistics call it.
        row_invariant: prepare for the bitwise mode (a mixture's experts then compute whole buckets).

    Raises:
        UnsupportedModelError: its attention does not go through transformers' interface, or it keeps
            other state than keys and values.
    """

    def __init__(self, module: PreTrainedModel, *, name: str, row_invariant: bool = False) -> None:
        _register()
        self.name = name
        self.runs_on_kernels = False
        self.kernel_seconds = 0.0
        self.row_invariant = row_invariant
        self.module = module
        self.config = module.config.get_text_config(decoder=True)
        self.device = module.device
        self.context_length = context_length_of(self.config)
        self._takes_logits_rows = "logits_to_keep" in inspect.signature(module.forward).parameters
        _refuse_foreign_layers(module, self.config)
        self.use_own_attention()
        self.use_own_experts(row_invariant)
        survey = _Survey(self.config)
        logits = self._survey_forward(survey)
        self.vocab_size = logits.shape[-1]
        self.dtype = self.cache_dtype = survey.key_dtype or module.dtype
        self._layers = survey.layers
        self.layer_shapes = tuple(layer.shape for layer in survey.layers.values())
        self.eos_token_ids = eos_token_ids_of(getattr(module, "generation_config", None), self.config, module.config)

    @property
    def attention_params(self) -> tuple[AttentionParams, ...]:
        """How each attention layer attends, in the order of `layer_shapes`."""
        return tuple(layer.params for layer in self._layers.values())

    def use_own_attention(self) -> None:
        """Let the module attend through outrider.

        Raises:
            UnsupportedModelError: transformers kept another implementation.
        """
        _switch_attention(self.module, ATTENTION_NAME)

    @property
    def is_mixture(self) -> bool:
        """Whether rows are routed to experts."""
        return any("experts" in name for name, _ in self.module.named_modules())

    def use_own_experts(self, own: bool) -> None:
        """Let a mixture's experts compute whole buckets, or as transformers alone would."""
        can_set = getattr(self.module, "_can_set_experts_implementation", None)
        if self.row_invariant and self.is_mixture and can_set is not None and can_set():
            self.module.set_experts_implementation(ROW_INVARIANT_EXPERTS_NAME if own else "eager")

    def with_sliding_window(self, window: int) -> TransformersModel:
        """The same module with `window` in all its sliding layers: few rows then test them."""
        twin = self._twin()
        twin._layers = {
            index: layer
            if layer.params.sliding_window is None
            else replace(layer, params=replace(layer.params, sliding_window=window))
            for index, layer in self._layers.items()
        }
        return twin

    def with_cache_dtype(self, dtype: torch.dtype) -> TransformersModel:
        """The same module with keys and values of another dtype; int8 needs the compiled kernels."""
        twin = self._twin()
        twin.cache_dtype = dtype
        twin.layer_shapes = tuple(
            LayerShape(
                layer.shape.num_heads,
                native.cache_width(layer.shape.key_dim, dtype),
                native.cache_width(layer.shape.value_dim, dtype),
            )
            for layer in self._layers.values()
        )
        return twin

    def share_embeddings(self, other: TransformersModel) -> None:
        """Use the input embeddings of `other`, a model of the same checkpoint, if it has them in the same form."""
        own, others = self.module.get_input_embeddings(), other.module.get_input_embeddings()
        ours, theirs = own.weight, others.weight
        if (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device):
            self.module.set_input_embeddings(others)

    def _twin(self) -> TransformersModel:
        twin = object.__new__(TransformersModel)
        twin.__dict__.update(self.__dict__)
        return twin

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Logits ``[R, vocab]`` float32 of the wanted rows; writes the rows' keys and values into `cache`."""
        if batch.attention.row_invariant:
            return self._forward_in_buckets(batch, cache)
        step = _Step(self._layers, cache, batch.attention)
        return self._run(batch.token_ids, batch.positions, batch.logits_rows, step)

    def choose(self, batch: ForwardBatch, cache: KVCache, *, with_logits: bool = False) -> Choices | None:
        """None: the module writes whole rows."""
        return None

    def _forward_in_buckets(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """The bitwise mode: every operation of the model sees ROW_BUCKET rows, whatever the batch.

        Padding repeats the bucket's first row, so that it costs a mixture of experts no further experts.
        """
        num_rows = len(batch.token_ids)
        wanted = batch.logits_rows
        if wanted is None:
            wanted = torch.arange(num_rows, device=self.device)
        logits = torch.empty(len(wanted), self.vocab_size, device=self.device)
        nothing = wanted.new_zeros(1)  # a forward cannot keep no row
        for bucket in batch.attention.row_buckets:
            rows = torch.arange(bucket.start, bucket.start + ROW_BUCKET, device=self.device)
            rows = torch.where(rows < bucket.end, rows, bucket.start)
            here = ((wanted >= bucket.start) & (wanted < bucket.end)).nonzero()[:, 0]
            step = _Step(self._layers, cache, bucket)
            keep = None if len(here) else nothing
            bucket_logits = self._run(batch.token_ids[rows], batch.positions[rows], keep, step)
            if len(here):
                logits[here] = bucket_logits[wanted[here] - bucket.start]
        return logits

    def _run(
        self, token_ids: Tensor, positions: Tensor, logits_rows: Tensor | None, active: _Survey | _Step
    ) -> Tensor:
        """Logits ``[R, vocab]`` float32 with `active` as attention."""
        select = {"logits_to_keep": logits_rows} if self._takes_logits_rows and logits_rows is not None else {}
        previous = _ACTIVE.set(active)
        try:
            output = self.module(input_ids=token_ids[None], position_ids=positions[None], use_cache=False, **select)
        finally:
            _ACTIVE.reset(previous)
        logits = output.logits[0]
        if logits_rows is not None and not self._takes_logits_rows:
            logits = logits[logits_rows]
        if isinstance(active, _Step) and active.num_calls != len(self._layers):
            raise _unsupported(
                f"{active.num_calls} of its {len(self._layers)} attention layers went through the interface"
            )
        return logits.float()

    @torch.inference_mode()
    def _survey_forward(self, survey: _Survey) -> Tensor:
        rows = torch.arange(3, device=self.device)
        try:
            logits = self._run(torch.zeros_like(rows), rows, None, survey)
        except UnsupportedModelError:
            raise
        except Exception as error:  # whatever a model's own code raises when it meets a batch of this form
            raise _unsupported(f"its forward failed with {type(error).__name__}: {error}") from error
        if not survey.layers:
            raise _unsupported(
                f"none of the attention of {type(self.module).__name__} goes through transformers' "
                "AttentionInterface, so sequences of one batch would see each other"
            )
        return logits


def row_invariant_experts(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """A mixture of experts in which an expert always computes all rows: no row's bits depend on the others.

    Args:
        self: a module of transformers' ExpertsInterface: stacked projections and flags for their form.
        hidden_states: ``[rows, hidden]``; top_k_index, top_k_weights: ``[rows, k]``.

    Returns:
        ``[rows, hidden]``.
    """
    experts: Any = self

    def project(rows: Tensor, name: str, expert: int) -> Tensor:
        weight = getattr(experts, name)[expert]
        rows = rows @ weight if experts.is_transposed else nn.functional.linear(rows, weight)
        return rows + getattr(experts, f"{name}_bias")[expert] if experts.has_bias else rows

    choices = hidden_states.new_zeros(*top_k_index.shape, hidden_states.shape[-1])
    for expert in top_k_index.unique().tolist():
        if experts.has_gate:
            inner = experts._apply_gate(project(hidden_states, "gate_up_proj", expert))
        else:
            inner = experts.act_fn(project(hidden_states, "up_proj", expert))
        outer = project(inner, "down_proj", expert)
        if getattr(experts, "has_post_expert_norm", False):
            outer = experts.post_expert_norm(outer)
        choices = torch.where((top_k_index == expert)[..., None], outer[:, None], choices)
    return (choices * top_k_weights[..., None]).sum(dim=1).to(hidden_states.dtype)


def use_eager_attention(module: PreTrainedModel) -> None:
    """Let the module attend by its own eager code.

    Raises:
        UnsupportedModelError: transformers kept another implementation.
    """
    _switch_attention(module, "eager")


def _switch_attention(module: PreTrainedModel, implementation: str) -> None:
    try:
        module.set_attn_implementation(implementation)
    except Exception as error:  # transformers raises several types here
        raise _unsupported(f"transformers refuses to change its attention: {error}") from error
    kept = module.config.get_text_config(decoder=True)._attn_implementation
    if kept != implementation:
        raise _unsupported(
            f"{type(module).__name__} does not use transformers' AttentionInterface (its attention stays "
            f"{kept}; often because of ALiBi or another position bias inside it)"
        )


def _refuse_foreign_layers(module: PreTrainedModel, config: PretrainedConfig) -> None:
    """Refuse what keeps state besides keys and values, before a forward can hide it."""
    kinds = set(getattr(config, "layer_types", None) or ()) - _PLAIN_LAYER_TYPES
    if getattr(module, "_is_stateful", False) or kinds & _RECURRENT_LAYER_TYPES:
        raise _unsupported(
            f"{type(module).__name__} keeps a recurrent state, which a tree of drafts would mix up and a "
            "rejected draft would leave stale"
        )
    if kinds:
        raise _unsupported(f"its layers attend by {', '.join(sorted(kinds))}")
    if getattr(config, "is_encoder_decoder", False):
        raise _unsupported(f"{type(module).__name__} is an encoder-decoder")


def _attention_params(
    layer: int, query: Tensor, options: Mapping[str, Any], config: PretrainedConfig
) -> AttentionParams:
    """What a layer passes to the interface, held against its configuration.

    A window that only the configuration names is used: the model's own mask is made from it.
    """
    passed = options.get("sliding_window")
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if layer_types and layer_types[layer] != "sliding_attention":
        window = None
    if passed is not None and window is not None and passed != window:
        raise _unsupported(f"layer {layer} passes a sliding window of {passed}, its configuration says {window}")
    scaling = options.get("scaling")
    return AttentionParams(
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        sliding_window=window if passed is None else passed,
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
    )


def _unsupported(reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"model cannot run: {reason}", remedy=WHAT_RUNS)
