"""The engine on a CUDA device; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from outrider import LLM, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

PROMPTS = ["def read_lines(path):\n    ", "import os\n\nclass Stack:\n    ", "for i in range("]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("drafter", ["ngram", "recycling", "draft_model"])
def test_drafters_give_the_tokens_of_plain_decoding(drafter: str, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=48)
    plain = LLM(decoding="none", device="cuda", dtype="float32", exactness="bitwise")
    alone = [plain.generate(prompt, params)[0].outputs[0].token_ids for prompt in PROMPTS]
    outputs = plain.with_decoding(drafter).generate(PROMPTS, params)
    assert [output.outputs[0].token_ids for output in outputs] == alone
