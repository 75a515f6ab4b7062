"""Every family over our cache and attention equals its own eager forward; what would be wrong is refused."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from outrider.cache.kv_cache import KVCache
from outrider.errors import UnsupportedModelError
from outrider.kernels import reference
from outrider.kernels.attention import SequenceAttention
from outrider.kernels.native import ISA_VARIABLE, REFERENCE
from outrider.kernels.rows import SequenceRows
from outrider.models import transformers_model
from outrider.models.batch import ForwardBatch, rows_of
from outrider.models.loader import load_model
from outrider.models.probe import CachedRun, probe_model
from outrider.models.transformers_model import TransformersModel
from outrider.token_tree import TokenTree
from tests.tiny_models import FAMILIES, REFUSED_FAMILIES, build_tiny, make_tiny

VOCAB = 128
MODES = pytest.mark.parametrize("row_invariant", [False, True], ids=["numerical", "bitwise"])


def tokens_of(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


def eager(module: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """Logits ``[len(tokens), vocab]`` of transformers alone; `module` must not be ours yet."""
    with torch.inference_mode():
        return module(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]


def new_run(model: TransformersModel, num_sequences: int = 4) -> CachedRun:
    return CachedRun(
        model,
        block_size=4,
        num_positions=80,
        num_sequences=num_sequences,
        row_invariant=model.row_invariant,
    )


@MODES
@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_batch_equals_eager(family: str, row_invariant: bool) -> None:
    module = build_tiny(family, VOCAB)
    prompts = {"a": tokens_of(1, 23), "b": tokens_of(2, 9), "c": tokens_of(3, 1), "d": tokens_of(4, 30)}
    drafts = tokens_of(5, 7)
    trees = {
        "a": TokenTree((prompts["a"][-1], *drafts), (-1, 0, 0, 1, 1, 2, 5, 3)),
        "b": TokenTree.root_only(prompts["b"][-1]),
        "c": TokenTree.chain(prompts["c"][-1], drafts[:3]),
        "d": TokenTree((prompts["d"][-1], *drafts[:4]), (-1, 0, 0, 0, 0)),
    }
    expected = {
        name: torch.stack(
            [
                eager(module, [*prompts[name], *(tree.tokens[i] for i in tree.path(node))])[-1]
                for node in range(tree.num_nodes)
            ]
        )
        for name, tree in trees.items()
    }
    scale = max(float(logits.abs().max()) for logits in expected.values())
    assert scale > 3, "logits too uniform for errors to show"

    run = new_run(TransformersModel(module, name=family, row_invariant=row_invariant))
    run.feed("a", prompts["a"][:7])
    first = {"a": prompts["a"][7:15], "b": prompts["b"][:8], "d": prompts["d"][:3]}
    run.step({name: (chunk, range(-1, len(chunk) - 1)) for name, chunk in first.items()})
    run.commit({name: range(len(chunk)) for name, chunk in first.items()})
    chunks = {"a": prompts["a"][15:-1], "b": [], "c": [], "d": prompts["d"][3:-1]}
    logits = run.step({name: rows_of(tree, chunks[name]) for name, tree in trees.items()})
    for name in trees:
        torch.testing.assert_close(logits[name][len(chunks[name]) :], expected[name], atol=1e-5 * scale, rtol=0)


@MODES
@pytest.mark.parametrize("family", FAMILIES)
def test_commit_of_a_path_equals_a_fresh_prefill(family: str, row_invariant: bool) -> None:
    """After each commit of a random path, the cache is that of the accepted tokens alone."""
    module = build_tiny(family, VOCAB, seed=1)
    model = TransformersModel(module, name=family, row_invariant=row_invariant)
    rng = random.Random(7)
    run = new_run(model)
    accepted = tokens_of(8, 6)
    run.feed("a", accepted)
    run.feed("other", tokens_of(9, 5))  # takes the pages between those of "a"
    for _ in range(5):
        parents = [-1, *(rng.randrange(node) for node in range(1, 8))]
        tree = TokenTree(tuple(tokens_of(rng.randrange(1000), 8)), tuple(parents))
        run.step({"a": (tree.tokens, tree.parents), "other": ((3, 5), (-1, 0))})
        path = [0, *tree.path(rng.randrange(8))]
        run.commit({"a": path, "other": ()})
        accepted += [tree.tokens[node] for node in path]
        fresh = new_run(model)
        fresh.feed("a", accepted)
        for ours, theirs in zip(run.committed("a"), fresh.committed("a"), strict=True):
            assert len(ours) == len(accepted)
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4 if not row_invariant else 0)
            assert not row_invariant or torch.equal(ours, theirs)


@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_wrong_families_are_refused_with_a_reason(family: str, tmp_path: Path) -> None:
    reason = "recurrent state" if family == "mamba" else "does not use transformers' AttentionInterface"
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        load_model(make_tiny(family, tmp_path))
    assert "Llama" in str(caught.value), "says what would run"


def see_siblings(sequence: SequenceAttention, **_: object) -> Tensor | None:
    return None


def drop_option(monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    true = transformers_model._attention_params
    dropped: dict[str, Any] = {option: None}
    monkeypatch.setattr(transformers_model, "_attention_params", lambda *args: replace(true(*args), **dropped))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
class TestProbeFindsMutants:
    """The probe refuses a model as soon as our side of it is wrong, in bfloat16 too."""

    def refused(self, family: str, dtype: torch.dtype, reason: str = "eager") -> None:
        model = TransformersModel(build_tiny(family, VOCAB, dtype=dtype), name=family)
        with pytest.raises(UnsupportedModelError, match=reason):
            probe_model(model)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_nothing_wrong(self, family: str, dtype: torch.dtype) -> None:
        for row_invariant in (False, True):
            module = build_tiny(family, VOCAB, dtype=dtype)
            probe_model(TransformersModel(module, name=family, row_invariant=row_invariant))

    def test_siblings_seen(self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
        monkeypatch.setenv(ISA_VARIABLE, REFERENCE)
        monkeypatch.setattr(reference, "_bias", see_siblings)
        self.refused("llama", dtype)

    @pytest.mark.parametrize("option", ["sinks", "sliding_window"])
    def test_option_dropped(self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, option: str) -> None:
        drop_option(monkeypatch, option)
        self.refused("gpt_oss", dtype)

    def test_position_off_by_one(self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
        true = TransformersModel._run
        monkeypatch.setattr(
            TransformersModel,
            "_run",
            lambda self, ids, positions, rows, active: true(
                self, ids, positions + (positions > 11).long(), rows, active
            ),
        )
        self.refused("llama", dtype)
        self.refused("gpt2", dtype)


def test_probe_finds_a_dropped_softcap(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32: where scores are far below the cap, its absence is within bfloat16's rounding."""
    drop_option(monkeypatch, "softcap")
    with pytest.raises(UnsupportedModelError, match="eager"):
        probe_model(TransformersModel(build_tiny("gemma2", VOCAB), name="gemma2"))


def test_probe_finds_a_window_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    true = TransformersModel.with_sliding_window
    monkeypatch.setattr(TransformersModel, "with_sliding_window", lambda self, window: true(self, window + 1))
    for family in ("mistral", "gemma2", "gpt_oss"):
        module = build_tiny(family, VOCAB)
        with pytest.raises(UnsupportedModelError, match="sliding windows"):
            probe_model(TransformersModel(module, name=family))


def test_window_that_only_the_configuration_names_is_used() -> None:
    module = build_tiny("llama", VOCAB)
    module.config.sliding_window = 6
    model = TransformersModel(module, name="llama")
    assert {params.sliding_window for params in model.attention_params} == {6}
    with pytest.raises(UnsupportedModelError, match="own attention"):  # Llama's eager mask ignores the setting
        probe_model(model)


def test_bucket_padding_is_not_written() -> None:
    """Rows that pad a bucket leave the cache alone."""
    model = TransformersModel(build_tiny("llama", VOCAB), name="llama", row_invariant=True)
    run = new_run(model, num_sequences=1)
    for cache in (*run._cache.keys, *run._cache.values):
        cache.fill_(7.0)
    run.feed("a", [1, 2, 3])
    for cache in (*run._cache.keys, *run._cache.values):
        assert int((cache != 7.0).flatten(1).any(dim=1).sum()) == 3


@MODES
def test_forward_returns_the_wanted_rows_only(row_invariant: bool) -> None:
    module = build_tiny("gpt_neox", VOCAB, dtype=torch.bfloat16)
    model = TransformersModel(module, name="gpt_neox", row_invariant=row_invariant)
    cache = KVCache(model.layer_shapes, num_blocks=8, block_size=8, dtype=model.dtype)
    tokens = tokens_of(1, 40)

    def forward(wanted: Sequence[int]) -> Tensor:
        rows = SequenceRows(tokens, range(-1, 39), 0, np.arange(40), wanted)
        return model.forward(ForwardBatch([rows], row_invariant=row_invariant), cache)

    everything = forward(range(40))
    assert everything.shape == (40, VOCAB)
    assert everything.dtype == torch.float32
    for wanted in ([39], [0, 17, 18, 39], [16]):
        torch.testing.assert_close(forward(wanted), everything[wanted], atol=0.05, rtol=0.05)
