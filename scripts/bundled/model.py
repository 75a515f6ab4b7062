"""The shapes of the two models, their making, export and loading."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bundled.common import CHUNK, write_json


@dataclass(frozen=True)
class Shape:
    """The sizes of one Llama model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int


TARGET_SHAPE = Shape(hidden=256, layers=6, heads=8, kv_heads=4, ffn=896)
DRAFT_SHAPE = Shape(hidden=128, layers=2, heads=4, kv_heads=2, ffn=352)


def build_model(shape: Shape, vocab: int, seed: int) -> Any:
    """A randomly initialised Llama whose deeper projections start smaller (as in GPT-2)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=CHUNK,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(1 / math.sqrt(2 * shape.layers))
    return model


def export_models(models: nn.ModuleDict, tokenizer_folder: Path, out: Path) -> None:
    """Write out/target and out/draft: bf16 weights, configs and tokenizer, each folder replaced at once."""
    from transformers import GenerationConfig

    for name, model in models.items():
        folder, partial = out / name, out / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        weights = {k: v.detach().to(torch.bfloat16) for k, v in model.state_dict().items()}
        copy: Any = type(model)(model.config).to(torch.bfloat16)
        copy.load_state_dict(weights)
        copy.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
        copy.save_pretrained(partial)
        settings = json.loads((partial / "config.json").read_text())
        write_json(partial / "config.json", settings | {"dtype": "float32"})  # what to compute in
        (partial / "model.safetensors").chmod(0o644)  # it comes readable by its owner alone
        for path in tokenizer_folder.iterdir():
            shutil.copyfile(path, partial / path.name)
        old = out / f".{name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)


def load_pair(out: Path) -> tuple[Any, Any, Any]:
    """The exported (target, draft, tokenizer); the bf16 weights compute in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pair = [
        AutoModelForCausalLM.from_pretrained(out / name, dtype=torch.float32).eval() for name in ("target", "draft")
    ]
    return pair[0], pair[1], AutoTokenizer.from_pretrained(out / "target")
