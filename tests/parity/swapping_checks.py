"""What the tests of swapped linear layers share: tiny models' logits by two ways, their errors, whole generations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from outrider import LLM, SamplingParams
from outrider.kernels import native
from outrider.kernels.native import ISA_VARIABLE, REFERENCE
from outrider.kernels.packed import PackedWeight
from outrider.models.model import Model
from outrider.models.packed_linear import PackedLinear
from outrider.models.probe import CachedRun

TOKENS = [int(token) for token in torch.randint(3, 128, (40,), generator=torch.Generator().manual_seed(0))]
LEVELS = ["compiled", REFERENCE]


def set_kernels(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if level == REFERENCE:
        monkeypatch.setenv(ISA_VARIABLE, REFERENCE)
    elif not native.is_available():
        pytest.skip("outrider was built without compiled kernels")


@torch.no_grad()
def eager(module: Any) -> Tensor:
    return module(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0].float()


def logits_of(model: Model) -> Tensor:
    run = CachedRun(model, block_size=4, num_positions=64, num_sequences=1, row_invariant=True)
    return run.feed("a", TOKENS)


def row_errors(found: Tensor, exact: Tensor) -> Tensor:
    """Of each row's logits, as a part of their spread."""
    return (found - exact).square().mean(dim=-1).sqrt() / exact.std(dim=-1)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float(row_errors(found, exact).max())


def typical_error(found: Tensor, exact: Tensor) -> float:
    """Of half the rows: where activations are rounded, a mixture may send a few rows to other experts."""
    return float(row_errors(found, exact).median())


def packed_of(module: nn.Module) -> dict[str, PackedWeight]:
    return {name: part.packed for name, part in module.named_modules() if isinstance(part, PackedLinear)}


def assert_drafters_agree(plain: LLM, draft: Path, num_prompts: int = 10) -> list[list[int]]:
    """One by one without a drafter, and all at once with each; the tokens."""
    assert plain.config.exactness == "bitwise"
    prompts = [{"prompt_token_ids": [3 + i, 9, 4, 9 + i][: 1 + i % 4]} for i in range(num_prompts)]
    params = [
        SamplingParams(temperature=0.9 * (i % 2), seed=7 + i, max_tokens=12, ignore_eos=True)
        for i in range(num_prompts)
    ]
    alone = [
        plain.generate(prompt, some)[0].outputs[0].token_ids for prompt, some in zip(prompts, params, strict=True)
    ]
    for drafter in ("none", "ngram", "recycling", {"method": "draft_model", "model": str(draft), "width": 2}):
        outputs = plain.with_decoding(drafter).generate(prompts, params)
        assert [output.outputs[0].token_ids for output in outputs] == alone, drafter
    return alone
