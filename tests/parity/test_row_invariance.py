"""The bitwise mode: a row's bits do not depend on its batch, and the self-test notices when they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from outrider.cache.kv_cache import KVCache
from outrider.errors import ExactnessError
from outrider.kernels import native, reference
from outrider.kernels.attention import AttentionParams, RowBucket
from outrider.kernels.native import ISA_VARIABLE, REFERENCE
from outrider.models.batch import ForwardBatch
from outrider.models.probe import probe_model
from outrider.models.row_invariance import check_row_invariance
from outrider.models.transformers_model import TransformersModel
from tests.tiny_models import FAMILIES, MIXTURE_FAMILIES, build_tiny

TRUE_ATTENTION = reference.row_bucket_attention


@pytest.fixture(params=["compiled", REFERENCE])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == REFERENCE:
        monkeypatch.setenv(ISA_VARIABLE, REFERENCE)
    elif not native.is_available():
        pytest.skip("no compiled kernels")


@pytest.fixture
def reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, REFERENCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("kernels")
def test_holds(family: str, dtype: torch.dtype) -> None:
    model = TransformersModel(build_tiny(family, dtype=dtype), name=family, row_invariant=True)
    check_row_invariance(model)


def test_holds_where_the_context_is_short() -> None:
    module: Any = build_tiny("gpt2")
    module.config.n_positions = 32
    positions = module.transformer.wpe
    positions.weight = torch.nn.Parameter(positions.weight[:32].clone())
    model = TransformersModel(module, name="short", row_invariant=True)
    assert model.context_length == 32
    check_row_invariance(model)


class WithoutBuckets(TransformersModel):
    """A mutant: the bitwise mode is asked for and ignored."""

    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        return super().forward(ForwardBatch(batch.sequences, batch.device), cache)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float32) for family in ("llama", "gpt2", "gemma2", "gpt_oss")]
    + [(family, torch.bfloat16) for family in ("llama", "gpt2")],
    ids=str,
)
@pytest.mark.usefixtures("reference_kernels")  # the compiled ones, and so some models, are always row-invariant
def test_ignoring_the_mode_is_noticed(family: str, dtype: torch.dtype) -> None:
    model = WithoutBuckets(build_tiny(family, dtype=dtype), name=family, row_invariant=True)
    with pytest.raises(ExactnessError, match="not row-invariant"):
        check_row_invariance(model)


@pytest.mark.parametrize("family", MIXTURE_FAMILIES)
def test_experts_that_depend_on_the_batch_are_noticed(family: str) -> None:
    model = TransformersModel(build_tiny(family), name=family, row_invariant=False)
    with pytest.raises(ExactnessError, match="not row-invariant"):
        check_row_invariance(model)


def two_splits(query: Tensor, keys: Tensor, values: Tensor, bucket: RowBucket, params: AttentionParams) -> Tensor:
    """A mutant: the splits are as long as the longest row of the bucket needs."""
    with patch.object(reference, "KEY_SPLIT", bucket.slots.shape[1] // 2):
        return TRUE_ATTENTION(query, keys, values, bucket, params)


def whole_rows(query: Tensor, keys: Tensor, values: Tensor, bucket: RowBucket, params: AttentionParams) -> Tensor:
    """A mutant: one softmax over all keys of the bucket's longest row, without splits."""
    group = query.shape[1] // keys.shape[1]
    longest = int(bucket.num_keys.max())
    slots = bucket.slots[:, :longest]
    k = keys[slots].repeat_interleave(group, dim=2)
    v = values[slots].repeat_interleave(group, dim=2)
    scores = torch.einsum("rhd,rlhd->rhl", query, k) * params.scaling
    hidden = torch.arange(longest) >= bucket.num_keys[:, None]
    weights = scores.masked_fill(hidden[:, None], float("-inf")).softmax(dim=-1)
    return torch.einsum("rhl,rlhd->rhd", weights, v)


@pytest.mark.parametrize("mutant", [two_splits, whole_rows])
@pytest.mark.usefixtures("reference_kernels")
def test_other_attention_is_noticed(mutant: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "row_bucket_attention", mutant)
    model = TransformersModel(build_tiny("llama"), name="mutant", row_invariant=True)
    probe_model(model)  # it computes the right thing, only not always in the same order
    with pytest.raises(ExactnessError, match="not row-invariant"):
        check_row_invariance(model)
