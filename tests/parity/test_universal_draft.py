"""Real models with tokenizers of different conventions: the text never changes, whichever way drafts cross."""

from __future__ import annotations

from pathlib import Path

import pytest

from outrider import LLM, SamplingParams
from outrider.config import UniversalDraftConfig
from outrider.drafting.draft_model import DraftModelDrafter
from outrider.drafting.text_draft import TextDrafter
from outrider.errors import ConfigError, VocabularyMismatchError
from tests.tiny_models import make_tiny
from tests.tiny_tokenizers import TEXTS, byte_level, make_tiny_with, sentencepiece

SETTINGS = [
    SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0.9, top_k=30, repetition_penalty=1.1, seed=3, max_tokens=24),
]
PROMPTS = [TEXTS[0][:30], TEXTS[2], "🙂", "<|user|>Hi"]


def outputs(llm: LLM, params: SamplingParams) -> list[tuple[list[int], str]]:
    return [(of.outputs[0].token_ids, of.outputs[0].text) for of in llm.generate(PROMPTS, params)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("universal")
    return {
        "bytes-600": str(make_tiny_with(byte_level(600), "llama", path / "a")),
        "bytes-400": str(make_tiny_with(byte_level(400, seed=1), "qwen3", path / "b", seed=1)),
        "sentencepiece": str(make_tiny_with(sentencepiece(520), "llama", path / "c", seed=2)),
        "gpt2": str(make_tiny_with(byte_level(400, seed=1), "gpt2", path / "d", seed=3)),
    }


@pytest.mark.parametrize("alignment", ["auto", "vocabulary", "text"])
@pytest.mark.parametrize(
    ("target", "draft"),
    [("bytes-600", "sentencepiece"), ("sentencepiece", "bytes-400"), ("gpt2", "bytes-600"), ("bytes-600", "gpt2")],
)
def test_output_is_plain_decodings(target: str, draft: str, alignment: str, folders: dict[str, str]) -> None:
    plain = LLM(folders[target], decoding="none")
    llm = plain.with_decoding(
        {"method": "universal_draft", "model": folders[draft], "alignment": alignment, "min_path_prob": 0.0}
    )
    for params in SETTINGS:
        assert outputs(llm, params) == outputs(plain, params)
    assert llm.engine.stats.num_draft_tokens > 100


@pytest.mark.parametrize("rule", ["rejection", "tree_rejection", "multi_candidate"])
@pytest.mark.parametrize("alignment", ["vocabulary", "text"])
def test_greedy_under_rejection_rules(alignment: str, rule: str, folders: dict[str, str]) -> None:
    plain = LLM(folders["bytes-600"], decoding="none")
    spec = {"method": "universal_draft", "model": folders["sentencepiece"], "alignment": alignment, "width": 2}
    llm = plain.with_decoding(spec, verification=rule)
    assert outputs(llm, SETTINGS[0]) == outputs(plain, SETTINGS[0])


@pytest.mark.parametrize("spec", [{}, {"width": 2, "max_expanded": 2, "depth": 4}], ids=str)
def test_the_bundled_pair_drafts_as_with_draft_model(spec: dict) -> None:
    """One tokenizer: token by token, the very same drafts; by the text, the same chains where it is greedy."""
    plain = LLM(decoding="none")
    same = plain.with_decoding({"method": "draft_model", **spec})
    universal = plain.with_decoding({"method": "universal_draft", **spec})
    assert isinstance(universal.engine.drafter, DraftModelDrafter)
    for temperature in (0.0, 0.7):
        params = SamplingParams(temperature=temperature, max_tokens=40, seed=2)
        prompts = ["def fibonacci(n):\n", "class Grüße:\n    "]
        assert [o.outputs[0].text for o in universal.generate(prompts, params)] == [
            o.outputs[0].text for o in same.generate(prompts, params)
        ]
    ours, theirs = universal.engine.stats, same.engine.stats
    assert (ours.num_draft_tokens, ours.num_accepted_tokens) == (theirs.num_draft_tokens, theirs.num_accepted_tokens)


def test_the_bundled_pair_by_the_text() -> None:
    plain = LLM(decoding="none")
    llm = plain.with_decoding({"method": "universal_draft", "alignment": "text"})
    same = plain.with_decoding("draft_model")
    params, prompts = SamplingParams(temperature=0.0, max_tokens=60), ["def fibonacci(n):\n", "import os\n"]
    assert [o.outputs[0].text for o in llm.generate(prompts, params)] == [
        o.outputs[0].text for o in same.generate(prompts, params)
    ]
    assert llm.engine.stats.num_accepted_tokens > 0.9 * same.engine.stats.num_accepted_tokens


def test_the_alignment_is_chosen_by_what_is_shared(folders: dict[str, str]) -> None:
    plain = LLM(folders["bytes-600"], decoding="none")

    def built(**settings: object) -> object:
        return plain.with_decoding({"method": "universal_draft", "model": folders["gpt2"], **settings}).engine.drafter

    assert isinstance(built(min_overlap=0.3), DraftModelDrafter)
    assert isinstance(built(min_overlap=0.9), TextDrafter)
    assert isinstance(built(min_overlap=0.9, alignment="vocabulary"), DraftModelDrafter)


def test_the_refusal_of_a_draft_with_another_vocabulary_names_the_way_out(folders: dict[str, str]) -> None:
    plain = LLM(folders["bytes-600"], decoding="none")
    with pytest.raises(VocabularyMismatchError, match="universal_draft"):
        plain.with_decoding({"method": "draft_model", "model": folders["gpt2"]})


def test_vocabularies_without_a_common_token(folders: dict[str, str], tmp_path: Path) -> None:
    words = make_tiny("llama", tmp_path / "words")
    plain = LLM(folders["bytes-600"], decoding="none")
    llm = plain.with_decoding({"method": "universal_draft", "model": str(words)})
    assert isinstance(llm.engine.drafter, TextDrafter)
    assert outputs(llm, SETTINGS[0]) == outputs(plain, SETTINGS[0])


@pytest.mark.parametrize("settings", [{"alignment": "letters"}, {"min_overlap": 1.5}])
def test_settings(settings: dict) -> None:
    with pytest.raises(ConfigError, match="universal_draft"):
        UniversalDraftConfig(**settings)
