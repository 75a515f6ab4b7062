"""Whole generations of a tiny model: what transformers generates alone, we generate in a batch with drafts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from outrider import LLM, SamplingParams

PROMPTS = [[5, 9, 5, 9, 5], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, top_k=20, repetition_penalty=1.1, seed=3, max_tokens=24, ignore_eos=True)


def tokens(llm: LLM, params: SamplingParams) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params)
    return [output.outputs[0].token_ids for output in outputs]


def check_generation(folder: Path, *, device: str = "cpu", exactness: Any = "auto", **of_transformers: Any) -> None:
    """Greedy as transformers alone, sampled as plain decoding alone, with three drafters.

    Args:
        of_transformers: to its `from_pretrained`.

    Raises:
        AssertionError: a token differs, or no draft was ever accepted.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **of_transformers).to(device)
    model.generation_config.eos_token_id = None
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device=device)
        mask = torch.ones_like(ids)
        made = model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0)
        expected.append(made[0, len(prompt) :].tolist())
    scheduler = {"max_num_seqs": 4, "max_batch_tokens": 16}
    plain = LLM(str(folder), decoding="none", device=device, exactness=exactness, scheduler=scheduler)
    assert tokens(plain, GREEDY) == expected
    sampled = tokens(plain, SAMPLED)
    for drafter in ["recycling", "ngram", {"method": "draft_model", "model": str(folder), "width": 2}]:
        llm = plain.with_decoding(drafter)
        assert tokens(llm, GREEDY) == expected
        assert tokens(llm, SAMPLED) == sampled
        assert llm.engine.stats.num_accepted_tokens > 0
