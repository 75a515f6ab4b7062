"""One nested draft before two targets: each keeps its own output, and the weights are loaded once."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from outrider import LLM, SamplingParams
from outrider.engine import draft_models
from outrider.errors import UnsupportedModelError
from outrider.models.llama import LlamaModel
from tests.tiny_models import make_tiny

PROMPTS = [[5, 9, 5, 9, 5], [7], [3, 1, 4, 1, 5, 9, 2, 6]]
SETTINGS = [
    SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0.8, top_k=20, seed=3, max_tokens=24, ignore_eos=True),
]


def tokens(llm: LLM, params: SamplingParams) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_two_targets_and_one_draft(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = make_tiny(family, tmp_path / "draft")
    targets = [draft, make_tiny("qwen3", tmp_path / "other", seed=1)]
    loaded: list[Any] = []
    right = draft_models.load_model

    def load_model(path: Any, **options: Any) -> Any:
        loaded.append(path)
        return right(path, **options)

    monkeypatch.setattr(draft_models, "load_model", load_model)
    spec = {"method": "sorted_draft", "model": str(draft), "layers": [1, 3], "min_confidence": 0.5, "depth": 4}
    llms = []
    for target in targets:
        plain = LLM(str(target), decoding="none")
        llm = plain.with_decoding(spec)
        for params in SETTINGS:
            assert tokens(llm, params) == tokens(plain, params)
        llms.append(llm)
    assert loaded == [str(draft)], "the second LLM found it loaded"
    runners = [llm.engine.drafter._runner for llm in llms]  # type: ignore[attr-defined]
    assert all(min(runner.num_exits) > 0 for runner in runners), "both depths were used"
    assert llms[0].engine.stats.num_accepted_tokens > 20, "a target accepts what its own layers say"
    for level in (0, 1):
        first, second = (runner._levels[level]._model for runner in runners)
        if isinstance(first, LlamaModel):
            assert first._llama.layers[0] is second._llama.layers[0]
            assert first._llama is not second._llama, "working memory of its own"


def test_a_draft_that_nobody_uses_is_forgotten(tmp_path: Path) -> None:
    draft = make_tiny("llama", tmp_path / "draft")
    llm = LLM(str(draft), decoding={"method": "sorted_draft", "model": str(draft), "layers": [1]})
    assert any(str(draft) in key for key in draft_models._NESTED_DRAFTS)
    del llm
    gc.collect()
    assert not any(str(draft) in key for key in draft_models._NESTED_DRAFTS)


def test_more_layers_than_there_are(tmp_path: Path) -> None:
    draft = make_tiny("llama", tmp_path / "draft")
    with pytest.raises(UnsupportedModelError, match="1 to the model's 3"):
        LLM(str(draft), decoding={"method": "sorted_draft", "model": str(draft), "layers": [1, 5]})
