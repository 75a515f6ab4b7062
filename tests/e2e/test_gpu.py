"""The engine on a CUDA device; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from outrider import LLM, SamplingParams
from outrider.models.row_invariance import check_row_invariance
from outrider.models.transformers_model import TransformersModel
from tests.tiny_models import FAMILIES, build_tiny, make_tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

PROMPTS = ["def read_lines(path):\n    ", "import os\n\nclass Stack:\n    ", "for i in range("]
TOKENS = [[5, 9, 5, 9, 5], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, top_k=20, repetition_penalty=1.1, seed=3, max_tokens=24, ignore_eos=True)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("drafter", ["auto", "ngram", "suffix", "recycling", "lookahead", "jacobi", "draft_model"])
def test_drafters_give_the_tokens_of_plain_decoding(drafter: str, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=48)
    plain = LLM(decoding="none", device="cuda", dtype="float32", exactness="bitwise")
    alone = [plain.generate(prompt, params)[0].outputs[0].token_ids for prompt in PROMPTS]
    outputs = plain.with_decoding(drafter).generate(PROMPTS, params)
    assert [output.outputs[0].token_ids for output in outputs] == alone


def tokens(llm: LLM, params: SamplingParams) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in TOKENS], params)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("exactness", ["numerical", "bitwise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_transformers_and_plain_decoding(family: str, exactness: str, tmp_path: Path) -> None:
    folder = make_tiny(family, tmp_path / family)
    # Eager: what transformers 5.17 chooses by itself leaves Gemma 2's softcap out.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").to("cuda")
    model.generation_config.eos_token_id = None
    expected = []
    for prompt in TOKENS:
        ids = torch.tensor([prompt], device="cuda")
        mask = torch.ones_like(ids)
        made = model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0)
        expected.append(made[0, len(prompt) :].tolist())
    plain = LLM(
        str(folder),
        decoding="none",
        device="cuda",
        exactness=exactness,
        scheduler={"max_num_seqs": 4, "max_batch_tokens": 16},
    )
    assert tokens(plain, GREEDY) == expected
    sampled = tokens(plain, SAMPLED)
    for drafter in ["recycling", "ngram", {"method": "draft_model", "model": str(folder), "width": 2}]:
        llm = plain.with_decoding(drafter)
        assert tokens(llm, GREEDY) == expected
        assert tokens(llm, SAMPLED) == sampled
        assert llm.engine.stats.num_accepted_tokens > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bitwise_mode_holds(family: str, dtype: torch.dtype) -> None:
    model = TransformersModel(build_tiny(family, dtype=dtype).to("cuda"), name=family, row_invariant=True)
    check_row_invariance(model)
