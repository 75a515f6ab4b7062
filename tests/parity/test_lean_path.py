"""The lean path against transformers: logits, whole generations, and mutants that its probe must refuse."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from outrider import LLM, SamplingParams
from outrider.cache.kv_cache import KVCache
from outrider.errors import UnsupportedModelError
from outrider.kernels import native
from outrider.kernels.packed import WeightFormat, dequantize
from outrider.kernels.rows import SequenceRows
from outrider.models import llama as llama_module
from outrider.models.batch import ForwardBatch
from outrider.models.llama import LEAN_MODEL_TYPES, LlamaModel, load_llama, why_not_lean
from outrider.models.probe import CachedRun, probe_lean_path
from outrider.models.row_invariance import check_row_invariance
from outrider.quantization.weights import WeightSource, open_weights
from outrider.token_tree import TokenTree
from tests.parity.kernel_hooks import forced_fetch, forced_parts
from tests.parity.kernel_levels import use_threads
from tests.tiny_models import build_tiny, make_tiny

pytestmark = pytest.mark.skipif(not native.is_available(), reason="outrider was built without compiled kernels")

OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "wide heads": {"model_type": "llama", "head_dim": 20},
    "one key head": {"model_type": "llama", "num_key_value_heads": 1},
    "mha": {"model_type": "llama", "num_key_value_heads": 4},
    "llama3 rope": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "yarn": {
        "model_type": "qwen3",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "linear rope": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    },
    "mistral": {"model_type": "mistral", "sliding_window": 6},
    "mistral without window": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen2 windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3"},
    "qwen3 biases": {"model_type": "qwen3", "attention_bias": True},
}


def make(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Save a tiny random model; returns the module."""
    module: Any = build_tiny(options["model_type"], dtype=dtype, **({"options": options}))
    module.save_pretrained(folder)
    return module


def load(folder: Path, format: WeightFormat = "fp32", cache_dtype: torch.dtype = torch.float32) -> LlamaModel:
    config = AutoConfig.from_pretrained(folder)
    assert why_not_lean(config) is None
    return load_llama(
        folder,
        config,
        open_weights(folder),
        format=format,
        group_size=32,
        dtype=torch.float32,
        cache_dtype=cache_dtype,
        name=str(folder),
    )


@torch.no_grad()
def eager(module: Any, tokens: list[int]) -> torch.Tensor:
    return module(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    """Chunked prefill, then a tree, against the module's own forward over every path."""
    module = make(tmp_path, **OPTIONS[name])
    model = load(tmp_path)
    probe_lean_path(model.config)
    run = CachedRun(model, block_size=4, num_positions=128, num_sequences=2, row_invariant=True)
    prompt = torch.randint(3, 128, (71,), generator=torch.Generator().manual_seed(0)).tolist()
    logits = torch.cat([run.feed("a", prompt[:30]), run.feed("a", prompt[30:31]), run.feed("a", prompt[31:])])
    torch.testing.assert_close(logits, eager(module, prompt), atol=2e-4, rtol=1e-4)
    tree = TokenTree((5, 6, 7, 8, 9), (-1, 0, 0, 2, 2))
    nodes = run.step({"b": ((3, 4), (-1, 0)), "a": (tree.tokens, tree.parents)})["a"]
    for node in range(tree.num_nodes):
        path = [tree.tokens[0], *(tree.tokens[i] for i in tree.path(node) if i)]
        torch.testing.assert_close(nodes[node], eager(module, prompt + path)[-1], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", LEAN_MODEL_TYPES)
@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4"])
def test_every_format_is_near_its_dequantised_twin(family: str, format: WeightFormat, tmp_path: Path) -> None:
    """The module with dequantised weights differs by the rounding of activations only."""
    module = make(tmp_path, model_type=family)
    model = load(tmp_path, format)
    source, tokens = open_weights(tmp_path), list(range(5, 40))
    exact = eager(module, tokens)
    with torch.no_grad():
        for name, linear in module.named_modules():
            if isinstance(linear, torch.nn.Linear):
                stored = "model.embed_tokens" if f"{name}.weight" not in source else name
                of = llama_module.lm_head_format(format) if name == "lm_head" else format
                linear.weight = torch.nn.Parameter(dequantize(source.linear(stored, of, 32)))
    ours = CachedRun(model, block_size=4, num_positions=64, num_sequences=1, row_invariant=True).feed("a", tokens)
    error = (ours - eager(module, tokens)).square().mean().sqrt() / exact.std()
    assert error < {"fp32": 1e-5, "bf16": 0.03, "int8": 0.06, "int4": 0.06}[format]


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("level", native.levels()[:-1])
def test_row_invariance(
    level: str, format: WeightFormat, cache_dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, level)
    make(tmp_path, model_type="qwen3")
    for threads in (1, 2, 3):
        native.set_num_threads(threads)
        try:
            check_row_invariance(load(tmp_path, format, cache_dtype))
        finally:
            native.set_num_threads(None)


def test_gate_and_up_of_different_formats_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, model_type="llama")
    true = WeightSource.linear

    def mixed(self: WeightSource, name: str, format: WeightFormat, group_size: int) -> Any:
        return true(self, name, "int8" if name.endswith("up_proj") else format, group_size)

    monkeypatch.setattr(WeightSource, "linear", mixed)
    with pytest.raises(UnsupportedModelError, match="gate_proj in int4 and up_proj in int8"):
        load(tmp_path, "int4")


def test_an_int8_cache_is_near_the_exact_one(tmp_path: Path) -> None:
    make(tmp_path, model_type="qwen3")
    tokens, found = list(range(3, 80)), []
    for cache_dtype in (torch.float32, torch.int8):
        run = CachedRun(
            load(tmp_path, cache_dtype=cache_dtype),
            block_size=4,
            num_positions=128,
            num_sequences=1,
            row_invariant=True,
        )
        found.append(torch.cat([run.feed("a", tokens[:40]), run.feed("a", tokens[40:])]))
    error = (found[1] - found[0]).square().mean().sqrt() / found[0].std()
    assert 1e-4 < error < 0.03


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("head", ["random", "ties", "nan"])
def test_choices_are_the_argmax_of_the_logits(head: str, threads: int, tmp_path: Path) -> None:
    """Of equal logits the lowest token, across threads, and a row with NaN gives NaN."""
    module = make(tmp_path, model_type="llama")
    with torch.no_grad():
        if head == "ties":
            module.lm_head.weight[:] = module.lm_head.weight[:1]
            module.save_pretrained(tmp_path)
    model = load(tmp_path)
    if head == "nan":
        model.embedding[20] = float("nan")
    cache = KVCache(model.layer_shapes, num_blocks=8, block_size=8, dtype=model.cache_dtype, prefix_caching=False)
    cache.admit("a", [])
    rows = SequenceRows(list(range(3, 33)), range(-1, 29), 0, cache.reserve("a", 30), (0, 3, 29))
    batch = ForwardBatch([rows])
    native.set_num_threads(threads)
    try:
        logits, choices = model.forward(batch, cache), model.choose(batch, cache)
    finally:
        native.set_num_threads(None)
    assert choices is not None
    assert choices.log_weights == logits.amax(-1).tolist() or head == "nan"
    sound = 2 if head == "nan" else 3  # the last row has seen token 20
    assert choices.token_ids[:sound] == logits.numpy().argmax(-1)[:sound].tolist()
    assert all(map(math.isfinite, choices.log_weights[:sound]))
    assert math.isnan(choices.log_weights[2]) == (head == "nan")


def test_bits_do_not_depend_on_threads(tmp_path: Path) -> None:
    make(tmp_path, model_type="llama")
    model = load(tmp_path, "int4")
    found = []
    for threads in (1, 2, 3, 4):
        native.set_num_threads(threads)
        try:
            run = CachedRun(model, block_size=4, num_positions=64, num_sequences=1, row_invariant=True)
            found.append([run.feed("a", list(range(3, 40))), *run.committed("a")])
        finally:
            native.set_num_threads(None)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4"])
def test_bits_do_not_depend_on_how_weights_are_read(format: WeightFormat, tmp_path: Path) -> None:
    make(tmp_path, model_type="llama")
    model = load(tmp_path, format)
    found = []
    for fetch in native.FETCHES:
        for num_rows in (7, 14, 17, 37):  # one and several blocks
            run = CachedRun(model, block_size=4, num_positions=64, num_sequences=1, row_invariant=True)
            with forced_fetch(fetch):
                rows = [run.feed("a", list(range(3 + i, 3 + min(i + num_rows, 37)))) for i in range(0, 37, num_rows)]
            found.append([torch.cat(rows), *run.committed("a")])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4"])
def test_bits_do_not_depend_on_how_threads_divide_layers(format: WeightFormat, tmp_path: Path) -> None:
    """Cores of unequal speed get unequal parts; one may get nothing of a small layer."""
    make(tmp_path, model_type="llama")
    model = load(tmp_path, format)
    found = []
    for bounds in ((0, 1), (0, 0.5, 1), (0, 0.9, 1), (0, 0.1, 1), (0, 0, 1), (0, 1, 1), (0, 0.2, 0.25, 1)):
        with use_threads(len(bounds) - 1), forced_parts(bounds):
            run = CachedRun(model, block_size=4, num_positions=64, num_sequences=1, row_invariant=True)
            rows = [run.feed("a", list(range(3, 20))), run.feed("a", list(range(20, 24)))]
            cache = KVCache(
                model.layer_shapes, num_blocks=8, block_size=8, dtype=model.cache_dtype, prefix_caching=False
            )
            cache.admit("a", [])
            batch = ForwardBatch(
                [SequenceRows(list(range(3, 33)), range(-1, 29), 0, cache.reserve("a", 30), (0, 3, 29))]
            )
            choices = model.choose(batch, cache)
            assert choices is not None
            found.append([torch.cat(rows), torch.tensor(choices.token_ids), *run.committed("a")])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("column", [0, -1])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_nan_that_one_thread_makes_within_the_mlp_is_not_lost(
    format: WeightFormat, column: int, tmp_path: Path
) -> None:
    """Rounding needs the largest magnitude, which the threads gather; nothing but this column tells of the NaN."""
    make(tmp_path, model_type="llama", mlp_bias=True)
    model = load(tmp_path, format)
    bias = model._llama.layers[-1].gate.bias
    assert bias is not None
    bias[column] = float("nan")
    for threads in (1, 2, 3):
        native.set_num_threads(threads)
        try:
            run = CachedRun(model, block_size=4, num_positions=64, num_sequences=1, row_invariant=True)
            assert run.feed("a", [3, 4, 5, 6, 20]).isnan().all()
        finally:
            native.set_num_threads(None)


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_drafters_do_not_change_the_output(cache_dtype: Any, weights: Any, tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "llama")
    plain = LLM(str(folder), decoding="none", weights=weights, cache={"dtype": cache_dtype})
    assert plain.config.exactness == "bitwise"
    assert plain.engine.cache.keys[0].dtype == (torch.int8 if cache_dtype == "int8" else torch.float32)
    prompts = [{"prompt_token_ids": [3 + i, 9, 4, 9 + i]} for i in range(20)]
    for params in (
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
        SamplingParams(temperature=0.9, seed=7, max_tokens=20, ignore_eos=True),
    ):
        one_by_one = [plain.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts]
        for drafter in ("none", "ngram", "recycling", {"method": "draft_model", "model": str(folder), "width": 2}):
            outputs = plain.with_decoding(drafter).generate(prompts, params)
            assert [output.outputs[0].token_ids for output in outputs] == one_by_one


def windows_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(llama_module, "_sliding_windows", lambda config: [None] * config.num_hidden_layers)


def windows_off_by_one(patch: pytest.MonkeyPatch) -> None:
    true = llama_module._sliding_windows
    patch.setattr(llama_module, "_sliding_windows", lambda config: [w and w + 1 for w in true(config)])


def siblings_seen(patch: pytest.MonkeyPatch) -> None:
    true = LlamaModel.forward

    def chained(self: LlamaModel, batch: ForwardBatch, cache: KVCache) -> Tensor:
        return true(
            self, ForwardBatch([replace(s, parents=range(-1, len(s.token_ids) - 1)) for s in batch.sequences]), cache
        )

    patch.setattr(LlamaModel, "forward", chained)


def slower_rotation(patch: pytest.MonkeyPatch) -> None:
    true = llama_module._rotary_embedding

    def slower(config: PretrainedConfig) -> Any:
        rope = true(config)
        rope.inv_freq = rope.inv_freq * 0.9
        return rope

    patch.setattr(llama_module, "_rotary_embedding", slower)


def head_norms_dropped(patch: pytest.MonkeyPatch) -> None:
    true = llama_module._Reader.layer
    patch.setattr(llama_module._Reader, "layer", lambda self, index: replace(true(self, index), query_norm=None))


def values_for_keys(patch: pytest.MonkeyPatch) -> None:
    true = llama_module._Reader.layer

    def swapped(self: Any, index: int) -> native.LlamaLayerWeights:
        layer = true(self, index)
        return replace(layer, key=layer.value, value=layer.key)

    patch.setattr(llama_module._Reader, "layer", swapped)


MUTANTS: list[tuple[Callable[[pytest.MonkeyPatch], None], str]] = [
    (windows_ignored, "mistral"),
    (windows_off_by_one, "mistral"),
    (siblings_seen, "llama"),
    (slower_rotation, "llama"),
    (head_norms_dropped, "qwen3"),
    (values_for_keys, "llama"),
]


def config_of(family: str) -> PretrainedConfig:
    return copy.deepcopy(build_tiny(family, options=OPTIONS[family]).config)


@pytest.mark.parametrize(("mutate", "family"), MUTANTS)
def test_the_probe_refuses_mutants(
    mutate: Callable[[pytest.MonkeyPatch], None], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(family)
    probe_lean_path(config)
    mutate(monkeypatch)
    with pytest.raises(UnsupportedModelError, match="lean path"):
        probe_lean_path(config)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gpt2"}, "model_type gpt2"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
            "rope type dynamic",
        ),
    ],
)
def test_what_stays_on_the_universal_path(changes: dict[str, Any], reason: str) -> None:
    config = AutoConfig.for_model(**{"model_type": "llama", **changes})
    assert why_not_lean(config) == reason
