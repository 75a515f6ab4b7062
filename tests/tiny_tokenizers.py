"""Small trained tokenizers of different conventions, and tiny models that have them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import build_tiny

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "def main():\n    for line in lines:\n        print(line.strip())\n    return None\n",
    "Grüße aus Köln: 3 Äpfel, 12 Öfen und ein naïve café — 你好世界 🙂👍🏽 done.",
    "In the end, the ending of the text ends where the text ends.   Spaces   stay.\n\n\tTabs too.",
]


@cache
def byte_level(vocab_size: int, *, seed: int = 0) -> PreTrainedTokenizerFast:
    """As GPT-2's: bytes, a word's space before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS[seed:] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@cache
def sentencepiece(vocab_size: int) -> PreTrainedTokenizerFast:
    """As Llama's: "▁" for spaces and before the text, bytes as tokens for other characters, a special token first."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 256, special_tokens=specials, show_progress=False, limit_alphabet=50
    )
    trained.train_from_iterator(TEXTS * 3, trainer)
    state = json.loads(trained.to_str())
    vocab, model = state["model"]["vocab"], state["model"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    model |= {"fuse_unk": True, "byte_fallback": True}
    state["pre_tokenizer"] = None
    trained = Tokenizer.from_str(json.dumps(state))
    trained.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    trained.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def make_tiny_with(tokenizer: Any, family: str, path: Path, seed: int = 0) -> Path:
    """A tiny random model with this tokenizer; returns `path`."""
    options = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    build_tiny(family, len(tokenizer), seed, torch.float32, options).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
