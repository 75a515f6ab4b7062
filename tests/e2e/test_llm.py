"""The Python API on the bundled model, as a user calls it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from outrider import LLM, SamplingParams
from outrider.engine.bundled import BUNDLED_DRAFT, BUNDLED_TARGET
from outrider.errors import (
    CacheError,
    ConfigError,
    ModelLoadError,
    NumericsError,
    OutriderError,
    PromptError,
    QueueFullError,
    SamplingParamsError,
    VocabularyMismatchError,
)
from tests.tiny_models import make_tiny

PROMPT = "def read_lines(path, encoding=None):\n    "
PROMPTS = [
    PROMPT,
    "import os\n\n\nclass Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, ",
    "for i in range(",
    "#",
    "def test_add(self):\n    self.assertEqual(add(1, 2), 3)\n    self.assertEqual(",
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=48)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=48, seed=7)
DRAFTERS = [
    "ngram",
    "recycling",
    "draft_model",
    {"method": "draft_model", "width": 3, "max_expanded": 2, "depth": 3, "max_nodes": 12},
]


@pytest.fixture(scope="module")
def plain() -> LLM:
    return LLM(decoding="none", exactness="bitwise", scheduler={"max_num_seqs": 8, "max_batch_tokens": 128})


def tokens(outputs) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafter", DRAFTERS, ids=str)
def test_every_drafter_gives_the_tokens_of_plain_decoding(plain: LLM, drafter, params: SamplingParams) -> None:
    """In bitwise mode, batched against alone: not one token may differ."""
    alone = [tokens(plain.generate(prompt, params))[0] for prompt in PROMPTS]
    llm = plain.with_decoding(drafter)
    assert tokens(llm.generate(PROMPTS, params)) == alone
    assert llm.engine.stats.num_draft_tokens > 0


def test_greedy_equals_transformers_generate() -> None:
    from transformers import AutoModelForCausalLM

    llm = LLM(decoding="draft_model", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_TARGET, dtype=torch.float32)
    for prompt in PROMPTS[:3]:
        (output,) = llm.generate(prompt, GREEDY)
        ids = torch.tensor([output.prompt_token_ids])
        reference = model.generate(ids, max_new_tokens=48, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert output.outputs[0].token_ids == reference.tolist()


def test_what_a_request_output_holds(plain: LLM) -> None:
    (output,) = plain.generate(PROMPT, SamplingParams(temperature=1.0, max_tokens=12, logprobs=2))
    (completion,) = output.outputs
    assert output.finished
    assert output.prompt == PROMPT
    assert plain.tokenizer.decode(output.prompt_token_ids) == PROMPT
    assert completion.text == plain.tokenizer.decode(completion.token_ids)
    assert completion.finish_reason in {"length", "stop"}
    assert completion.lossless
    again = plain.generate(PROMPT, SamplingParams(temperature=1.0, max_tokens=12, seed=completion.seed))
    assert tokens(again) == [completion.token_ids], "the seed that the output names gives it again"
    assert completion.logprobs is not None
    for token, entries in zip(completion.token_ids, completion.logprobs, strict=True):
        assert token in entries
        assert 2 <= len(entries) <= 3
        assert all(entry.logprob <= 0 and entry.decoded_token is not None for entry in entries.values())
        assert sorted(e.rank for e in entries.values())[:2] == [1, 2]
    assert completion.cumulative_logprob == pytest.approx(
        sum(entries[token].logprob for token, entries in zip(completion.token_ids, completion.logprobs, strict=True))
    )


def test_samples_of_one_prompt_differ_and_the_first_is_that_of_n_1(plain: LLM) -> None:
    one = tokens(plain.generate(PROMPT, SamplingParams(temperature=1.0, max_tokens=16, seed=5)))
    many = plain.generate(PROMPT, SamplingParams(n=3, temperature=1.0, max_tokens=16, seed=5))
    assert tokens(many)[0] == one[0]
    assert len({tuple(t) for t in tokens(many)}) == 3
    assert len({completion.seed for completion in many[0].outputs}) == 3


def test_stream_grows_and_ends_as_generate(plain: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=40, stop=["return", "\n\n\n"])
    llm = plain.with_decoding("recycling")
    texts = [output.outputs[0].text for output in llm.stream(PROMPT, params)]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert texts[-1] == plain.generate(PROMPT, params)[0].outputs[0].text
    assert "return" not in texts[-1]


def test_a_closed_stream_leaves_nothing_behind(plain: LLM) -> None:
    stream = plain.stream(PROMPT, GREEDY)
    next(stream)
    stream.close()
    assert not plain.engine.has_unfinished
    assert plain.engine.cache.pool.num_used == 0


def test_an_interruption_leaves_nothing_behind(plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    right, count = plain.engine.step, iter(range(100))

    def step():
        if next(count) == 5:
            raise KeyboardInterrupt
        return right()

    monkeypatch.setattr(plain.engine, "step", step)
    with pytest.raises(KeyboardInterrupt):
        plain.generate(PROMPTS, GREEDY)
    monkeypatch.undo()
    assert plain.engine.cache.pool.num_used == 0
    assert tokens(plain.generate(PROMPT, GREEDY))


def test_a_loop_of_ones_own_gives_what_generate_gives(plain: LLM) -> None:
    first, second = (plain.prepare(prompt, SAMPLED) for prompt in PROMPTS[:2])
    dropped = plain.prepare(PROMPTS[2], SamplingParams(n=2, max_tokens=500))
    plain.add(first)
    plain.add(dropped)
    for _ in range(5):
        assert set(plain.step()) <= {first, dropped}
    plain.add(second)
    plain.abort(dropped)
    while plain.has_unfinished:
        assert dropped not in plain.step()
    expected = tokens(plain.generate(PROMPTS[:2], SAMPLED))
    assert tokens([plain.output(first), plain.output(second)]) == expected
    assert plain.sample(first, 0, first_token=10).token_ids == expected[0][10:]
    assert [of.finish_reason for of in plain.output(dropped).outputs] == ["abort", "abort"]
    assert plain.engine.cache.pool.num_used == 0


def test_a_generation_is_added_whole_or_not_at_all() -> None:
    llm = LLM(BUNDLED_DRAFT, decoding="none", scheduler={"max_num_seqs": 1, "max_waiting": 3})
    first, second = (llm.prepare(PROMPT, SamplingParams(n=2, max_tokens=4)) for _ in range(2))
    llm.add(first)
    with pytest.raises(QueueFullError):
        llm.add(second)
    assert list(llm.engine.scheduler.waiting) == first.requests
    while llm.has_unfinished:
        assert llm.step() in ([], [first])
    assert not llm._owners


def test_each_prompt_may_have_its_own_parameters(plain: LLM) -> None:
    each = [GREEDY, SAMPLED, SamplingParams(temperature=0.0, max_tokens=3)]
    seen = []
    outputs = plain.generate(
        PROMPTS[:3], each, on_output=lambda index, output: seen.append((index, output.request_id))
    )
    assert [len(t) for t in tokens(outputs)][2] == 3
    assert sorted(seen) == [(index, output.request_id) for index, output in enumerate(outputs)]
    assert tokens(outputs)[1] == tokens(plain.generate(PROMPTS[1], SAMPLED))[0]


def test_prompts_may_be_token_ids(plain: LLM) -> None:
    ids = plain.tokenizer.encode(PROMPT)
    assert tokens(plain.generate({"prompt_token_ids": ids}, GREEDY)) == tokens(plain.generate(PROMPT, GREEDY))


def test_the_context_is_filled_and_not_overrun(plain: LLM) -> None:
    limit = plain.model.context_length
    ids = (plain.tokenizer.encode(PROMPT) * 200)[: limit - 5]
    for drafter in ["ngram", "draft_model"]:
        llm = plain.with_decoding(drafter)
        (output,) = llm.generate(
            {"prompt_token_ids": ids}, SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
        )
        assert output.outputs[0].finish_reason == "length"
        assert len(output.outputs[0].token_ids) == 5


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("", PromptError),
        ({"prompt_token_ids": []}, PromptError),
        ({"prompt_token_ids": [1, -2]}, PromptError),
        ({"prompt_token_ids": [10**9]}, PromptError),
        ({"prompt_token_ids": [1.5]}, PromptError),
        ({"text": "x"}, PromptError),
        ("\ud800", PromptError),
        ("a b c d e f " * 600, PromptError),
    ],
    ids=str,
)
def test_bad_prompts(plain: LLM, prompt, error: type[OutriderError]) -> None:
    with pytest.raises(error, match="prompt 2 of 2") as raised:
        plain.generate([PROMPT, prompt], GREEDY)
    assert "\n" not in str(raised.value)
    assert not plain.engine.has_unfinished


def test_one_params_for_each_prompt_or_one_for_all(plain: LLM) -> None:
    with pytest.raises(SamplingParamsError, match="one each"):
        plain.generate(PROMPTS, [GREEDY, GREEDY])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"decoding": "medusa"}, ConfigError),
        ({"decoding": {"method": "ngram", "max_ngrams": 3}}, ConfigError),
        ({"decoding": {"method": "ngram", "depth": 0}}, ConfigError),
        ({"verification": "typical"}, ConfigError),
        ({"exactness": "roughly"}, ConfigError),
        ({"dtype": "int3"}, ConfigError),
        ({"cache": {"blocksize": 3}}, ConfigError),
        ({"cache": {"memory_gb": 1e-9}}, ConfigError),
        ({"scheduler": {"max_num_seqs": 0}}, ConfigError),
        ({"model": "/no/such/folder"}, ModelLoadError),
        ({"model": ""}, ConfigError),
        ({"cache": {"memory_gb": 1e6, "num_blocks": 10**12}}, CacheError),
    ],
    ids=str,
)
def test_bad_settings(arguments: dict, error: type[OutriderError]) -> None:
    with pytest.raises(error) as raised:
        LLM(**arguments)
    assert "\n" not in str(raised.value)


def test_a_draft_with_another_vocabulary_is_refused(plain: LLM, tmp_path: Path) -> None:
    other = make_tiny("llama", tmp_path / "other")
    with pytest.raises(VocabularyMismatchError, match="decoding="):
        plain.with_decoding({"method": "draft_model", "model": str(other)})


def test_a_target_of_the_users_needs_a_draft_of_the_users(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no draft model"):
        LLM(BUNDLED_DRAFT, decoding="draft_model")


def test_broken_weights_end_with_an_error_and_never_with_text(tmp_path: Path) -> None:
    folder = tmp_path / "nan"
    folder.mkdir()
    for source in Path(BUNDLED_DRAFT).iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
    weights = load_file(folder / "model.safetensors")
    poisoned = LLM(BUNDLED_DRAFT, decoding="none").tokenizer.encode("class")[0]
    weights["model.embed_tokens.weight"][poisoned] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"]
    with pytest.raises(OutriderError, match="NaN"):  # tied embeddings: every logit row has one
        LLM(str(folder), decoding="none")


def test_numerics_error_keeps_the_other_outputs(plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    right = plain.model.forward

    def forward(batch, cache):
        logits = right(batch, cache)
        rows = batch.token_ids if batch.logits_rows is None else batch.token_ids[batch.logits_rows]
        logits[rows == plain.tokenizer.encode("#")[0]] = float("nan")
        return logits

    monkeypatch.setattr(plain.model, "forward", forward)
    monkeypatch.setattr(plain.model, "choose", lambda *_, **__: None)
    with pytest.raises(NumericsError) as raised:
        plain.generate(["#", PROMPT], SamplingParams(temperature=0.0, max_tokens=4))
    bad, good = raised.value.outputs
    assert bad.outputs[0].finish_reason == "error"
    assert bad.outputs[0].text == ""
    assert good.outputs[0].finish_reason == "length"


CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_chat_uses_the_models_template(plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [{"role": "user", "content": "print hello"}]
    with pytest.raises(ConfigError, match="chat template"):
        plain.chat(messages, GREEDY)
    monkeypatch.setattr(plain.tokenizer._backend, "chat_template", CHATML)
    (output,) = plain.chat(messages, GREEDY)
    assert output.prompt == "<|user|>print hello\n<|assistant|>"
    assert len(plain.chat([messages, messages], GREEDY)) == 2
    with pytest.raises(PromptError):
        plain.chat([{"role": "user"}], GREEDY)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% set x = messages.append(1) %}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for",
        "{{ 'x' * 10**9 }}",
        "{{ ['x'] * 9999999 }}",
        "{{ 10 ** 10 ** 7 }}",
    ],
)
def test_templates_run_in_a_sandbox(plain: LLM, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain.tokenizer._backend, "chat_template", template)
    with pytest.raises(OutriderError):
        plain.chat([{"role": "user", "content": "x"}], GREEDY)
