"""The target in fewer bits drafts for itself: outputs stay the same, and only linear layers have a second copy."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import Tensor

from outrider import LLM, SamplingParams
from outrider.drafting.draft_model import DraftModelDrafter
from outrider.errors import ConfigError
from outrider.kernels import native
from outrider.models.llama import LlamaModel
from outrider.models.packed_linear import packed_formats
from outrider.models.transformers_model import TransformersModel
from tests.e2e.test_quantize_cli import quantized
from tests.tiny_models import make_tiny

PROMPTS = [[5, 9, 5, 9, 5], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]]
SETTINGS = [
    SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0.8, top_k=20, repetition_penalty=1.1, seed=3, max_tokens=24, ignore_eos=True),
]


def tokens(llm: LLM, params: SamplingParams) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params)
    return [output.outputs[0].token_ids for output in outputs]


def draft_of(llm: LLM) -> LlamaModel | TransformersModel:
    assert isinstance(llm.engine.drafter, DraftModelDrafter)
    model = llm.engine.drafter._runner._model  # type: ignore[attr-defined]
    assert isinstance(model, LlamaModel | TransformersModel)
    return model


def formats_of(model: LlamaModel | TransformersModel) -> set[str]:
    if isinstance(model, TransformersModel):
        return set(packed_formats(model.module))
    return {linear.weight.format for layer in model._llama.layers for linear in layer.linears}


def is_mapped_from(tensor: Tensor, file: Path) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.endswith(str(file))
    return False


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_output_and_acceptance(family: str, weights: str, tmp_path: Path) -> None:
    plain = LLM(str(make_tiny(family, tmp_path / family)), decoding="none")
    llm = plain.with_decoding({"method": "self_draft", "weights": weights, "group_size": 32, "depth": 4})
    for params in SETTINGS:
        assert tokens(llm, params) == tokens(plain, params)
    assert llm.engine.stats.num_accepted_tokens > 0.4 * llm.engine.stats.num_draft_tokens
    assert weights in formats_of(draft_of(llm))
    assert weights not in formats_of(plain.model)  # type: ignore[arg-type]


def test_embeddings_have_no_second_copy(tmp_path: Path) -> None:
    llm = LLM(str(make_tiny("gpt2", tmp_path / "gpt2")), decoding={"method": "self_draft", "group_size": 32})
    draft, target = draft_of(llm), llm.model
    assert isinstance(draft, TransformersModel)
    assert isinstance(target, TransformersModel)
    assert draft.module.get_input_embeddings() is target.module.get_input_embeddings()
    assert draft.module is not target.module
    if native.is_available() and sys.platform == "linux":
        folder = make_tiny("llama", tmp_path / "llama")
        lean = draft_of(LLM(str(folder), decoding={"method": "self_draft", "group_size": 32}))
        assert isinstance(lean, LlamaModel)
        assert is_mapped_from(lean.embedding, folder / "model.safetensors")


@pytest.mark.parametrize("settings", [{"weights": "bf16"}, {"weights": "auto"}, {"model": "x"}, {"revision": "x"}])
def test_settings_that_make_no_sense(settings: dict) -> None:
    with pytest.raises(ConfigError, match="self_draft"):
        LLM(decoding={"method": "self_draft", **settings})


def test_a_checkpoint_that_holds_other_bits_says_so(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "plain")
    quantized(folder, tmp_path / "int8", "--weights", "int8")
    with pytest.raises(ConfigError, match="holds int8"):
        LLM(str(tmp_path / "int8"), decoding="self_draft")
