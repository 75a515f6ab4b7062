"""Log-probabilities of generated tokens, as vLLM gives them by default: of the raw logits, not processed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass
class Logprob:
    """Attributes:
    rank: 1 for the most probable token; of equals, the lower id ranks first.
    decoded_token: the token's text, for whoever has the tokenizer to fill in.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]


def token_logprobs(logits: Tensor, token_ids: Sequence[int], num_alternatives: int) -> list[TokenLogprobs]:
    """Log-probabilities of chosen tokens and of the most probable alternatives.

    Args:
        logits: ``[num_tokens, vocab]`` raw logits that each token was chosen from.
        num_alternatives: also give this many most probable tokens.

    Returns:
        Per token: the chosen token first, then the most probable ones by rank (the chosen may be one).
    """
    rows = logits.float().log_softmax(-1).cpu().numpy()
    num_alternatives = min(num_alternatives, rows.shape[-1])
    result = []
    for row, token in zip(rows, token_ids, strict=True):
        chosen = row[token]
        rank = 1 + int((row > chosen).sum()) + int((row[:token] == chosen).sum())
        entries = {token: Logprob(float(chosen), rank)}
        if num_alternatives:
            border = np.partition(row, -num_alternatives)[-num_alternatives]
            # ascending ids, which the stable sort keeps among equals
            candidates = np.flatnonzero(row >= border)
            best = candidates[np.argsort(-row[candidates], kind="stable")][:num_alternatives]
            for best_rank, best_token in enumerate(best.tolist(), 1):
                entries.setdefault(best_token, Logprob(float(row[best_token]), best_rank))
        result.append(entries)
    return result
