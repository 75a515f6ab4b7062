"""Whole generations, family by family: what transformers generates alone, we generate in a batch with drafts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from outrider import LLM, SamplingParams
from outrider.models.llama import LlamaModel
from outrider.token_tree import TokenTree
from tests.tiny_models import FAMILIES, make_tiny

PROMPTS = [[5, 9, 5, 9, 5], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, top_k=20, repetition_penalty=1.1, seed=3, max_tokens=24, ignore_eos=True)


def tokens(llm: LLM, params: SamplingParams) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_transformers_and_plain_decoding(family: str, tmp_path: Path) -> None:
    folder = make_tiny(family, tmp_path / family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
        expected.append(made[0, len(prompt) :].tolist())
    plain = LLM(str(folder), decoding="none", scheduler={"max_num_seqs": 4, "max_batch_tokens": 16})
    assert tokens(plain, GREEDY) == expected
    sampled = tokens(plain, SAMPLED)
    for drafter in ["recycling", "ngram", {"method": "draft_model", "model": str(folder), "width": 2}]:
        llm = plain.with_decoding(drafter)
        assert tokens(llm, GREEDY) == expected
        assert tokens(llm, SAMPLED) == sampled
        assert llm.engine.stats.num_accepted_tokens > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("drafter", ["recycling", "draft_model"])
def test_a_draft_with_nan_keys_does_not_reach_the_output_or_the_cache(
    drafter: str, family: str, tmp_path: Path
) -> None:
    """Every tree is given one more child: a token whose embedding is NaN, which plain decoding never chooses."""
    folder = make_tiny(family, tmp_path / family)
    plain = LLM(str(folder), decoding="none")
    spec = {"method": drafter, "model": str(folder)} if drafter == "draft_model" else drafter
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    expected = tokens(plain, params)
    poisoned = next(t for t in range(3, 128) if not any(t in output for output in (*expected, *PROMPTS)))
    llm = plain.with_decoding(spec)
    propose = llm.engine.drafter.propose

    def with_poison(contexts):
        return [
            TokenTree((*tree.tokens, poisoned), (*tree.parents, 0)) if context.max_nodes >= tree.num_nodes else tree
            for context, tree in zip(contexts, propose(contexts), strict=True)
        ]

    llm.engine.drafter.propose = with_poison
    if isinstance(plain.model, LlamaModel):
        embedding = plain.model.embedding
    else:
        embedding = plain.model.module.get_input_embeddings().weight
    with torch.no_grad():
        embedding[poisoned] = float("nan")
    assert tokens(llm, params) == expected
    assert tokens(llm, params) == expected, "the second time through the prefix index"
    llm.engine.cache.check_integrity()
