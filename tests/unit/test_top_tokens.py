"""The most probable tokens of rows, against a naive reading."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.drafting import top_tokens as module
from outrider.drafting.top_tokens import top_tokens
from outrider.kernels.native import ISA_VARIABLE, REFERENCE


@given(
    st.integers(0, 2**32),
    st.integers(1, 20),
    st.sampled_from([9, 256, 257, 1000, 4096, 5003, 32000, 66001]),
    st.sampled_from([1, 8, 32]),
    st.sampled_from(["exact", "bfloat16", "integral"]),
)
def test_the_largest_come_first(seed: int, num_rows: int, vocab_size: int, count: int, rounding: str) -> None:
    """Also with equals: many of them where logits were rounded."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab_size, generator=generator)
    if rounding != "exact":
        logits = logits.round() if rounding == "integral" else logits.bfloat16().float()
    count = min(count, vocab_size)
    for isa in (None, REFERENCE):
        with pytest.MonkeyPatch.context() as patch:
            if isa:
                patch.setenv(ISA_VARIABLE, isa)
            tokens, values = top_tokens(logits, count)
        assert tokens.shape == values.shape == (num_rows, count)
        assert torch.equal(torch.from_numpy(values), logits.sort(dim=-1, descending=True).values[:, :count])
        assert torch.equal(torch.from_numpy(values), logits.gather(1, torch.from_numpy(tokens)))
        assert all(len(set(row)) == count for row in tokens.tolist())


@pytest.mark.parametrize("count", [1, 8, 32])
@pytest.mark.parametrize("special", [float("-inf"), float("inf"), float("nan"), 0.0])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999, 1.0])
def test_rows_that_are_not_sound_spoil_no_other_row(count: int, special: float, share: float) -> None:
    generator = torch.Generator().manual_seed(count)
    logits = torch.randn(5, 4096, generator=generator)
    sound = [0, 2, 4]
    logits[1, torch.rand(4096, generator=generator) < share] = special
    logits[3, :] = special
    tokens, values = top_tokens(logits, count)
    assert torch.equal(torch.from_numpy(values[sound]), logits[sound].topk(count).values)
    assert (tokens >= 0).all()
    assert (tokens < 4096).all()
    assert all(len(set(row)) == count for row in tokens.tolist())


def test_other_types_of_logits_and_parts_of_rows() -> None:
    logits = torch.randn(6, 4096)
    for given_logits in (
        logits[1:4],
        logits[::2],
        logits.to(torch.bfloat16),
        logits.double(),
        logits[:0],
        logits.T[:40],
    ):
        tokens, values = top_tokens(given_logits, 4)
        expected = given_logits.float().topk(4).values if len(given_logits) else given_logits[:, :4]
        assert torch.equal(torch.from_numpy(values), expected)
        assert tokens.shape == values.shape


def test_what_groups_are_not_made_for_is_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, REFERENCE)
    logits = torch.randn(3, 5000)
    expected = top_tokens(logits, 8)
    for name in ("ID_BITS", "ROW_BITS"):
        monkeypatch.setattr(module, name, 1)
        assert module._top(logits.numpy(), 8) is None
        assert (top_tokens(logits, 8)[0] == expected[0]).all()
        monkeypatch.setattr(module, name, {"ID_BITS": 21, "ROW_BITS": 10}[name])
