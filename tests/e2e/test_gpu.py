"""The engine on a CUDA device; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from outrider import LLM, SamplingParams
from outrider.models.row_invariance import check_row_invariance
from outrider.models.transformers_model import TransformersModel
from tests.parity.generation_checks import check_generation
from tests.tiny_models import FAMILIES, build_tiny, make_tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

PROMPTS = ["def read_lines(path):\n    ", "import os\n\nclass Stack:\n    ", "for i in range("]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("drafter", ["auto", "ngram", "suffix", "recycling", "lookahead", "jacobi", "draft_model"])
def test_drafters_give_the_tokens_of_plain_decoding(drafter: str, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=48)
    plain = LLM(decoding="none", device="cuda", dtype="float32", exactness="bitwise")
    alone = [plain.generate(prompt, params)[0].outputs[0].token_ids for prompt in PROMPTS]
    outputs = plain.with_decoding(drafter).generate(PROMPTS, params)
    assert [output.outputs[0].token_ids for output in outputs] == alone


@pytest.mark.parametrize("exactness", ["numerical", "bitwise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_transformers_and_plain_decoding(family: str, exactness: str, tmp_path: Path) -> None:
    # Eager: what transformers 5.17 chooses by itself leaves Gemma 2's softcap out.
    folder = make_tiny(family, tmp_path / family)
    check_generation(folder, device="cuda", exactness=exactness, attn_implementation="eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bitwise_mode_holds(family: str, dtype: torch.dtype) -> None:
    model = TransformersModel(build_tiny(family, dtype=dtype).to("cuda"), name=family, row_invariant=True)
    check_row_invariance(model)
