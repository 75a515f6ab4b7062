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


@torch.inference_mode()
def score_text(
    target: nn.Module, draft: nn.Module, ids: list[int], stride: int = CHUNK // 2
) -> dict[str, float]:
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


def accepted_per_step(matches: list[bool], length: int) -> tuple[int, int]:
    """(accepted tokens, steps) of greedy chains of `length` draft tokens over one continuation.

    matches[i]: the draft's greedy token after the target's first i tokens is the target's own. An
    accepted prefix IS the target's text, so these flags say what every chain along it would do.
    """
    accepted = steps = position = 0
    while position < len(matches):
        run = 0
        while run < length and position + run < len(matches) and matches[position + run]:
            run += 1
        accepted, steps, position = accepted + run, steps + 1, position + run + 1
    return accepted, steps


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
def evaluate_acceptance(
    target: Any, draft: Any, prompts: list[list[int]], num_tokens: int
) -> dict[str, float]:
    """Tokens per step of greedy chain drafting along the target's greedy continuations."""
    inputs = torch.tensor(prompts)  # [B, T]: prompts of one length, so no padding
    output = target.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=num_tokens,
        do_sample=False,
    )
    greedy = draft(input_ids=output, use_cache=False).logits.argmax(-1)
    sums = {length: [0, 0] for length in (4, 6)}
    for row in range(len(prompts)):
        new = output[row, inputs.shape[1] :].tolist()
        end = new.index(0) + 1 if 0 in new else len(new)  # up to and with end-of-text
        guess = greedy[row, inputs.shape[1] - 1 :].tolist()
        matches = [guess[i] == new[i] for i in range(end)]
        for length, counts in sums.items():
            accepted, steps = accepted_per_step(matches, length)
            counts[0] += accepted
            counts[1] += steps
    result: dict[str, float] = {"prompts": len(prompts), "tokens_per_prompt": num_tokens}
    for length, (accepted, steps) in sums.items():
        result[f"accepted_per_step_{length}"] = accepted / steps
        result[f"tokens_per_step_{length}"] = accepted / steps + 1
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
