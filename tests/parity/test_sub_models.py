"""Sub-models: the logits of a model that has only these layers, over the very same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from outrider.errors import UnsupportedModelError
from outrider.models.llama import LlamaModel
from outrider.models.loader import load_model
from outrider.models.probe import CachedRun
from outrider.models.sub_models import sub_model
from tests.tiny_models import make_tiny

TOKENS = [5, 9, 3, 77, 12, 4, 9]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gpt2", "opt", "gpt_neox"])
def test_logits_are_those_of_a_shorter_model(family: str, tmp_path: Path) -> None:
    folder = make_tiny(family, tmp_path / family)
    model = load_model(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for num_layers in (1, 2, 3):
        part = sub_model(model, num_layers)
        run = CachedRun(part, block_size=4, num_positions=16, num_sequences=1, row_invariant=False)
        got = torch.cat([run.feed("a", TOKENS[:3]), run.feed("a", TOKENS[3:])])
        shorter = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, num_hidden_layers=num_layers)
        with torch.no_grad():
            expected = shorter.eval()(input_ids=torch.tensor([TOKENS])).logits[0]
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    with torch.no_grad():  # the whole model is as it was
        expected = reference(input_ids=torch.tensor([TOKENS])).logits[0]
    run = CachedRun(model, block_size=4, num_positions=16, num_sequences=1, row_invariant=False)
    torch.testing.assert_close(run.feed("a", TOKENS), expected, atol=2e-4, rtol=1e-4)


def test_weights_are_shared(tmp_path: Path) -> None:
    lean = load_model(make_tiny("llama", tmp_path / "llama"))
    if isinstance(lean, LlamaModel):
        part = sub_model(lean, 2)
        assert isinstance(part, LlamaModel)
        assert part.embedding.data_ptr() == lean.embedding.data_ptr()
        assert all(a is b for a, b in zip(part._llama.layers, lean._llama.layers, strict=False))
    universal = load_model(make_tiny("gemma2", tmp_path / "gemma2"))
    part = sub_model(universal, 2)
    own, whole = part.module.state_dict(), universal.module.state_dict()  # type: ignore[attr-defined]
    assert own.keys() < whole.keys()
    assert all(tensor.data_ptr() == whole[name].data_ptr() for name, tensor in own.items())


@pytest.mark.parametrize("num_layers", [0, 4])
def test_a_depth_that_the_model_does_not_have(num_layers: int, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="1 to the model's 3"):
        sub_model(load_model(make_tiny("llama", tmp_path / "llama")), num_layers)
