"""Held-out figures of the exported pair: bits per byte, agreement, accepted tokens a step."""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from bundled.common import CHUNK, log
from bundled.corpus import collect_corpus
from bundled.model import load_pair

RankPath = tuple[int, ...]


@torch.inference_mode()
def score_text(target: nn.Module, draft: nn.Module, ids: list[int], stride: int = CHUNK // 2) -> dict[str, float]:
    """Sums over the tokens of one document, each seen with at least CHUNK - stride tokens before it.

    nll in nats; `agree` counts equal argmaxes; `overlap` sums sum_v min(p, q), the probability that
    rejection sampling accepts a draft token at temperature 1.
    """
    sums: dict[str, float] = dict.fromkeys(("tokens", "target_nll", "draft_nll", "agree", "overlap"), 0.0)
    tokens = torch.tensor([0, *ids])  # end-of-text comes before every document
    scored = 0  # tokens[1 : scored + 1] are done
    while scored < len(ids):
        end = min(len(ids), CHUNK if scored == 0 else scored + stride)
        start = max(0, end - CHUNK)
        window, labels = tokens[None, start:end], tokens[scored + 1 : end + 1]
        log_p, log_q = (
            model(input_ids=window, use_cache=False).logits[0, scored - start :].log_softmax(-1)
            for model in (target, draft)
        )
        sums["tokens"] += len(labels)
        sums["target_nll"] += F.nll_loss(log_p, labels, reduction="sum").item()
        sums["draft_nll"] += F.nll_loss(log_q, labels, reduction="sum").item()
        sums["agree"] += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
        sums["overlap"] += torch.minimum(log_p, log_q).exp().sum().item()
        scored = end
    return sums


def evaluate_text(target: nn.Module, draft: nn.Module, tokenizer: Any, texts: list[str]) -> dict[str, float]:
    """Bits per byte of both models and how often they agree, on whole files."""
    total: dict[str, float] = {}
    for text in texts:
        for key, value in score_text(target, draft, tokenizer(text, verbose=False)["input_ids"]).items():
            total[key] = total.get(key, 0.0) + value
    num_bytes = sum(len(text.encode()) for text in texts)
    return {
        "files": len(texts),
        "bytes": num_bytes,
        "tokens": total["tokens"],
        "target_loss": total["target_nll"] / total["tokens"],
        "draft_loss": total["draft_nll"] / total["tokens"],
        "target_bits_per_byte": total["target_nll"] / math.log(2) / num_bytes,
        "draft_bits_per_byte": total["draft_nll"] / math.log(2) / num_bytes,
        "top1_agreement": total["agree"] / total["tokens"],
        "overlap": total["overlap"] / total["tokens"],
    }


def chain(length: int) -> frozenset[RankPath]:
    return frozenset((0,) * depth for depth in range(1, length + 1))


# What a draft proposes each step, as paths of ranks below the root: (0, 1) is the second most likely
# token after the most likely one. The tree is the best for ranks right with chances .65, .12, .05.
DRAFT_SHAPES: dict[str, frozenset[RankPath]] = {
    "chain_4": chain(4),
    "chain_6": chain(6),
    "tree_12": chain(6) | {(1,), (0, 1), (1, 0), (2,), (0, 0, 1), (0, 1, 0)},
}
NUM_RANKS = 3
EARLY = 32  # tokens of a continuation, most of which come before it falls into a loop


def accepted_per_step(ranks: list[int], shape: frozenset[RankPath]) -> tuple[int, int]:
    """(accepted tokens, steps) of drafts of this shape over one continuation.

    ranks[i]: at which rank the draft has the target's own token after the target's first i tokens. An
    accepted path IS the target's text, so these ranks say what every draft along it would do.
    """
    accepted = steps = position = 0
    while position < len(ranks):
        depth = 0
        while position + depth < len(ranks) and tuple(ranks[position : position + depth + 1]) in shape:
            depth += 1
        accepted, steps, position = accepted + depth, steps + 1, position + depth + 1
    return accepted, steps


def repeated_share(tokens: list[int], size: int = 12) -> float:
    """The share of the runs of `size` tokens that occurred before: near 1 in a loop."""
    runs = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def held_out_prompts(texts: list[str], tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """`count` prompts of `length` tokens, spread over the files, each starting at a line."""
    random = np.random.default_rng(0)
    long_enough = [text for text in texts if len(text) > 16 * length]
    prompts = []
    for n in range(count):
        text = long_enough[n * len(long_enough) // count]
        start = text.index("\n", int(random.integers(len(text) // 2))) + 1
        prompts.append(tokenizer(text[start : start + 16 * length], verbose=False)["input_ids"][:length])
    return prompts


@torch.inference_mode()
def evaluate_acceptance(target: Any, draft: Any, prompts: list[list[int]], num_tokens: int) -> dict[str, float]:
    """Tokens per step of greedy drafting along the target's greedy continuations."""
    inputs = torch.tensor(prompts)  # [B, T]: prompts of one length, so no padding
    output = target.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=num_tokens,
        do_sample=False,
    )
    sums = {name: [0, 0] for name in (*DRAFT_SHAPES, "chain_4_early")}
    right = total = 0
    repeated = []
    for row in output:
        new = row[inputs.shape[1] :]
        end = (new == 0).nonzero()[:1].flatten().tolist()
        new = new[: end[0] + 1] if end else new  # up to and with end-of-text
        logits = draft(input_ids=row[None], use_cache=False).logits[0, inputs.shape[1] - 1 :][: len(new)]
        hits = logits.topk(NUM_RANKS).indices == new[:, None]  # [T, ranks]
        ranks = torch.where(hits.any(-1), hits.int().argmax(-1), NUM_RANKS).tolist()
        right, total = right + ranks.count(0), total + len(ranks)
        repeated.append(repeated_share(new.tolist()))
        for name, counts in sums.items():
            early = name.endswith("_early")
            shape = DRAFT_SHAPES[name.removesuffix("_early")]
            accepted, steps = accepted_per_step(ranks[:EARLY] if early else ranks, shape)
            counts[0] += accepted
            counts[1] += steps
    result: dict[str, float] = {"prompts": len(prompts), "tokens_per_prompt": num_tokens}
    result |= {"agreement": right / total, "repeated_share": sum(repeated) / len(repeated)}
    for name, (accepted, steps) in sums.items():
        result[f"accepted_{name}"] = accepted / steps
    return result


def evaluate(out: Path, max_files: int, num_prompts: int) -> dict[str, Any]:
    """All held-out figures of the exported pair."""
    target, draft, tokenizer = load_pair(out)
    _, held_out = collect_corpus(Path(sysconfig.get_path("stdlib")))
    texts = [text for _, text in sorted(held_out.items())]
    if max_files:
        texts = texts[:: max(1, math.ceil(len(texts) / max_files))]
    prompts = held_out_prompts(texts, tokenizer, num_prompts, 256)
    record: dict[str, Any] = {"acceptance": evaluate_acceptance(target, draft, prompts, 128)}
    log(f"acceptance: {record['acceptance']}")
    record["held_out"] = evaluate_text(target, draft, tokenizer, texts)
    log(f"held out: {record['held_out']}")
    sizes = {"target": target, "draft": draft}
    record["parameters"] = {n: sum(p.numel() for p in m.parameters()) for n, m in sizes.items()}
    return record
