from __future__ import annotations

import torch

from outrider.sampling.logprobs import token_logprobs


def test_value_rank_and_alternatives() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 4.0, 3.0, 2.0]])
    expected = logits.log_softmax(-1)
    first, second = token_logprobs(logits, [2, 0], num_alternatives=2)
    assert list(first) == [2, 1, 3]
    assert [entry.rank for entry in first.values()] == [3, 1, 2]
    assert [entry.logprob for entry in first.values()] == [expected[0, token].item() for token in first]
    assert list(second) == [0, 1]
    assert [entry.rank for entry in second.values()] == [1, 2]
    assert second[0].decoded_token is None


def test_no_alternatives_gives_the_token_alone() -> None:
    (entries,) = token_logprobs(torch.tensor([[0.0, 3.0, 1.0]]), [2], num_alternatives=0)
    assert list(entries) == [2]
    assert entries[2].rank == 2


def test_of_equals_the_lower_id_ranks_first() -> None:
    (entries,) = token_logprobs(torch.zeros(1, 5), [3], num_alternatives=2)
    assert {token: entry.rank for token, entry in entries.items()} == {3: 4, 0: 1, 1: 2}


def test_more_alternatives_than_tokens() -> None:
    (entries,) = token_logprobs(torch.tensor([[0.0, 3.0]], dtype=torch.bfloat16), [1], num_alternatives=20)
    assert list(entries) == [1, 0]


def test_excluded_tokens_have_a_logprob_of_minus_infinity() -> None:
    (entries,) = token_logprobs(torch.tensor([[0.0, -torch.inf]]), [0], num_alternatives=2)
    assert entries[1].logprob == -torch.inf
    assert entries[0].logprob == 0.0


def test_rows_do_not_depend_on_the_batch() -> None:
    logits = torch.randn(9, 4097, generator=torch.Generator().manual_seed(0))
    together = token_logprobs(logits, range(9), num_alternatives=3)
    assert [token_logprobs(logits[row : row + 1], [row], 3)[0] for row in range(9)] == together
