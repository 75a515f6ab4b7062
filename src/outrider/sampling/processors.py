"""From the target's raw logits to the distribution that a request asked for; each row follows its own path.

Row i of a context is node i of its tree: its successor is chosen after the output tokens (the root is the
last of them, or of the prompt) and the draft tokens on the path to the node. What a row becomes is what plain
decoding would make of it, bit for bit, because every operation works row by row.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from outrider.sampling.params import COLD_TEMPERATURE, SamplingParams
from outrider.token_tree import TokenTree

COLDEST_TEMPERATURE = 1e-30  # smaller ones round to 0 in float32

_Filter = tuple[float, float, int, float]  # temperature, min_p, top_k, top_p
_NO_FILTER: _Filter = (1.0, 0.0, 0, 1.0)


@dataclass(frozen=True, eq=False)
class RowContext:
    """What the rows of one request depend on.

    Attributes:
        rows: the rows of its tree, one per node, in order.
        token_ids: committed tokens, the prompt first; the root is the last of them.
        num_prompt_tokens: how many of them are the prompt; the others are the output.
        stop_ids: token ids that `min_tokens` holds back: end-of-sequence and the request's own.
    """

    rows: slice
    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt_tokens: int
    tree: TokenTree
    stop_ids: Collection[int]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


def process_logits(logits: Tensor, contexts: Sequence[RowContext]) -> Tensor:
    """Apply each request's parameters to its rows, in the order and meaning of vLLM's.

    Greedy rows keep their scale, and need no filter. Of equals at the border of top_k or top_p the lowest ids
    stay, so that exactly k do. A row whose tokens are all excluded is all -inf (see `sampler.check_finite`).

    Args:
        logits: ``[num_rows, vocab]`` raw logits; never written to.
        contexts: of disjoint rows.

    Returns:
        ``[num_rows, vocab]`` float32 log-weights, -inf for excluded tokens; `logits` itself if unchanged.
    """
    processed = logits.float()
    owned = processed is not logits
    groups: dict[_Filter, list[slice]] = {}
    for context in contexts:
        params = context.params
        if _edits_tokens(context):
            processed, owned = (processed if owned else processed.clone()), True
            _edit_tokens(processed[context.rows], context)
        if not params.greedy:
            key = (params.temperature, params.min_p, max(params.top_k, 0), params.top_p)
            if key != _NO_FILTER:
                groups.setdefault(key, []).append(context.rows)
    if not groups:
        return processed
    num_rows = logits.shape[0]
    if len(groups) == 1 and sum(s.stop - s.start for s in next(iter(groups.values()))) == num_rows:
        return _scale_and_filter(processed, *next(iter(groups)))
    processed = processed if owned else processed.clone()
    for key, slices in groups.items():
        rows = torch.cat([torch.arange(s.start, s.stop) for s in slices]).to(processed.device)
        processed[rows] = _scale_and_filter(processed[rows], *key)
    return processed


def _edits_tokens(context: RowContext) -> bool:
    params = context.params
    held_back = params.min_tokens > context.num_output_tokens
    return held_back or params.has_penalties or bool(params.logit_bias)


def _edit_tokens(rows: Tensor, context: RowContext) -> None:
    """Bias, min_tokens and penalties, in place on the request's rows ``[num_nodes, vocab]``."""
    params = context.params
    if params.logit_bias:
        biases = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=rows.device)
        rows[:, list(params.logit_bias)] += biases
    num_missing = params.min_tokens - context.num_output_tokens
    if num_missing > 0:
        early = [node for node, depth in enumerate(context.tree.depths) if depth < num_missing]
        stop_ids = sorted(token for token in context.stop_ids if token < rows.shape[1])
        rows[torch.tensor(early)[:, None], torch.tensor(stop_ids, dtype=torch.int64)] = -math.inf
    if params.has_penalties:
        _penalise_rows(rows, context)


def _penalise_rows(rows: Tensor, context: RowContext) -> None:
    """Penalties of the committed tokens on all rows at once, then each node's own path over them."""
    vocab_size = rows.shape[1]
    device = rows.device
    committed = torch.tensor(context.token_ids, dtype=torch.int64, device=device)
    counts = torch.bincount(committed[context.num_prompt_tokens :], minlength=vocab_size)
    seen = counts > 0
    seen[committed] = True

    nodes: list[int] = []
    tokens: list[int] = []
    path_counts: list[int] = []
    for node in range(1, context.tree.num_nodes):
        path = [context.tree.tokens[ancestor] for ancestor in context.tree.path(node)]
        for token in dict.fromkeys(path):
            nodes.append(node)
            tokens.append(token)
            path_counts.append(path.count(token))
    unpenalised = rows[nodes, tokens]
    rows.copy_(_penalise(rows, counts, seen, context.params))
    if nodes:
        all_counts = counts[tokens] + torch.tensor(path_counts, device=device)
        rows[nodes, tokens] = _penalise(unpenalised, all_counts, all_counts > 0, context.params)


def _penalise(logits: Tensor, counts: Tensor, seen: Tensor, params: SamplingParams) -> Tensor:
    """Penalised logits, given how often each token is in the output and whether it is in prompt or output."""
    penalty = params.repetition_penalty
    if penalty != 1.0:
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits = logits - params.frequency_penalty * counts
    return logits - params.presence_penalty * (counts > 0)


def _scale_and_filter(logits: Tensor, temperature: float, min_p: float, top_k: int, top_p: float) -> Tensor:
    """Temperature, min_p, top_k and top_p on rows ``[num_rows, vocab]`` that share them, as a new tensor."""
    if temperature < COLD_TEMPERATURE:
        logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, COLDEST_TEMPERATURE)
    elif temperature != 1.0:
        logits = logits / temperature
    if min_p > 0.0:
        # probability < min_p * the largest probability, without the softmax
        border = logits.amax(-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < border, -math.inf)
    top_k = min(top_k, logits.shape[-1]) or logits.shape[-1]
    if top_k < logits.shape[-1] or top_p < 1.0:
        logits = _keep_most_probable(logits, top_k, top_p)
    return logits


def _keep_most_probable(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Mask all but the `top_k` most probable tokens, then all but the fewest of them that reach `top_p`."""
    top = _largest(logits, top_k)
    if top_p < 1.0:
        # A token stays while those before it do not reach top_p; the first always does.
        reached = top.softmax(-1).cumsum(-1)[:, :-1]
        num_kept = 1 + (reached < top_p).sum(-1, keepdim=True)
    else:
        num_kept = torch.full((logits.shape[0], 1), top_k, device=logits.device)
    border = top.gather(-1, num_kept - 1)
    kept = logits >= border
    if not torch.equal(kept.sum(-1, keepdim=True), num_kept):
        above = logits > border
        ties = logits == border
        kept = above | (ties & (ties.cumsum(-1) <= num_kept - above.sum(-1, keepdim=True)))
    return logits.masked_fill(~kept, -math.inf)


def _largest(logits: Tensor, count: int) -> Tensor:
    """The `count` largest values of each row, descending, ``[num_rows, count]``."""
    if count < logits.shape[-1]:
        return logits.topk(count, dim=-1).values
    if logits.device.type == "cpu":  # NumPy sorts values with SIMD, some 30 times faster than torch.sort
        return torch.from_numpy(np.sort(logits.numpy(), axis=-1)[:, ::-1].copy())
    return logits.sort(dim=-1, descending=True).values
