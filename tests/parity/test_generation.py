"""Whole generations, family by family: what transformers generates alone, we generate in a batch with drafts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from outrider import LLM, SamplingParams
from outrider.models.llama import LlamaModel
from outrider.token_tree import TokenTree
from tests.parity.generation_checks import PROMPTS, check_generation, tokens
from tests.tiny_models import FAMILIES, make_tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_transformers_and_plain_decoding(family: str, tmp_path: Path) -> None:
    check_generation(make_tiny(family, tmp_path / family))


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
