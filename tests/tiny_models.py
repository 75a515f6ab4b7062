"""Tiny models with random weights for every family that the tests run, and some that must be refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CONTEXT_LENGTH = 256
SLIDING_WINDOW = 6  # smaller than the contexts of the tests

_COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT_LENGTH,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]

_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama3": {"model_type": "llama", "rope_parameters": _LLAMA3_ROPE},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "mistral": {"model_type": "mistral", "sliding_window": SLIDING_WINDOW},
    "gemma2": {
        "model_type": "gemma2",
        "sliding_window": SLIDING_WINDOW,
        "layer_types": _ALTERNATING,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 20.0,
        "query_pre_attn_scalar": 16,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": SLIDING_WINDOW,
        "layer_types": _ALTERNATING,
        "query_pre_attn_scalar": 16,
    },
    "phi3": {"model_type": "phi3", "pad_token_id": 0, "head_dim": 12},
    "gpt2": {"model_type": "gpt2", "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT_LENGTH},
    "gpt_neox": {"model_type": "gpt_neox"},
    "opt": {"model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 48},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "olmoe": {"model_type": "olmoe", "num_experts": 4, "head_dim": 12, "num_experts_per_tok": 2},
    "gpt_oss": {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": SLIDING_WINDOW,
        "layer_types": _ALTERNATING,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "bloom": {"model_type": "bloom", "n_head": 4, "n_layer": 3},
    "mpt": {"model_type": "mpt", "d_model": 48, "n_heads": 4, "n_layers": 3, "max_seq_len": CONTEXT_LENGTH},
    "mamba": {"model_type": "mamba", "state_size": 8},
}

REFUSED_FAMILIES = ("bloom", "mpt", "mamba")
FAMILIES = tuple(family for family in _FAMILIES if family not in REFUSED_FAMILIES)
MIXTURE_FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")


def build_tiny(
    family: str,
    vocab_size: int = 128,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    options: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A tiny model in evaluation mode whose logits are far from uniform, so that errors show.

    Args:
        family: one of FAMILIES or REFUSED_FAMILIES.
        options: of the configuration, instead of the family's own.
    """
    special = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    chosen = {**_COMMON, **special, "vocab_size": vocab_size, "dtype": dtype, **_FAMILIES[family], **(options or {})}
    config = AutoConfig.for_model(**chosen)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or "ln_" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif parameter.ndim >= 2:
                    embedding = "emb" in name or "wte" in name or "wpe" in name
                    fan_in = 1 if embedding else parameter.shape[-1]
                    parameter.normal_(std=1.0 if embedding else 1.5 * fan_in**-0.5)
                else:
                    parameter.normal_(std=0.5)
    return model.to(dtype).eval()


def make_tiny(
    family: str, path: Path, vocab_size: int = 128, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """Save a tiny model of `family` with a tokenizer whose text is ``t5 t7 t9``; returns `path`."""
    build_tiny(family, vocab_size, seed, dtype).save_pretrained(path)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"t{i}": i for i in range(3, vocab_size)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)
    return path
