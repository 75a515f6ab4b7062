"""Coupled trees against rejection at temperature 1: tokens a step at equal numbers of draft tokens, with intervals.

Prompts are functions of held-out code behind the first 48, none of which anything was fitted to; seeds likewise. The
drafters learn nothing between requests, so the prompts are independent, and intervals come from drawing prompts anew
(bootstrap, all seeds of a prompt together): of each mean, and of its difference to the coupled trees' on the same
prompts. Outputs of the coupled rule are compared with plain decoding's, token for token.

    python benchmarks/coupled_trees.py --seeds 21 22 23 --output benchmarks/results/NAME.json

A seed that the output file has already is not run again, so the work may be done in parts, and be interrupted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from outrider import LLM, SamplingParams
from outrider.bench.acceptance import with_budget
from outrider.bench.held_out import held_out_prompts
from outrider.bench.report import environment
from outrider.bench.workloads import prompts_hash

FIRST_PROMPT, MAX_TOKENS, BATCH_SIZE = 48, 128, 16
NUM_RESAMPLES, LEVEL = 20_000, 0.95
COUPLED = "coupled, DySpec tree"
# Name: rule and specification.
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    COUPLED: ("coupled", {"growth": "dyspec", "min_path_prob": 0.0, "max_expanded": 1}),
    "rejection, chain": ("rejection", {"min_path_prob": 0.0}),
    "tree_rejection, stochastic beam of 2": ("tree_rejection", {"growth": "rsd_s", "min_path_prob": 0.0, "width": 2}),
    "tree_rejection, stochastic beam of 3": ("tree_rejection", {"growth": "rsd_s", "min_path_prob": 0.0, "width": 3}),
    "tree_rejection, two chains": ("tree_rejection", {"growth": "rsd_c", "min_path_prob": 0.0}),
    "multi_candidate, two chains": ("multi_candidate", {"growth": "mcsd", "min_path_prob": 0.0}),
}

Counts = dict[str, list[list[int]]]  # contender -> [prompt] of (tokens, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[21, 22, 23])
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--budget", type=int, default=8)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    plain = LLM(decoding="none", cache={"prefix_caching": False}, scheduler={"max_num_seqs": BATCH_SIZE})
    texts, source = held_out_prompts(FIRST_PROMPT + args.prompts)
    prompt_ids = [plain.tokenizer.encode(text) for text in texts[FIRST_PROMPT:]]
    specs = {
        name: with_budget({"method": "draft_model", **spec}, args.budget) for name, (_, spec) in CONTENDERS.items()
    }
    settings = {
        "benchmark": "coupled_trees",
        "prompts": {"source": f"{source}, from {FIRST_PROMPT} on", "sha256": prompts_hash(prompt_ids)},
        "num_prompts": args.prompts,
        "max_tokens": MAX_TOKENS,
        "temperature": 1.0,
        "budget": args.budget,
        "contenders": {name: {"rule": rule, "spec": specs[name]} for name, (rule, _) in CONTENDERS.items()},
    }
    record = json.loads(args.output.read_text()) if args.output.exists() else {**settings, "seeds": {}}
    if {name: record[name] for name in settings} != settings:
        raise SystemExit(f"{args.output} has other prompts or settings: give another --output")
    for seed in args.seeds:
        if str(seed) not in record["seeds"]:
            counts, equal = run(plain, specs, prompt_ids, seed)
            record["seeds"][str(seed)] = {**environment(), "num_equal": equal, "tokens_and_steps": counts}
        record["results"] = pooled([of["tokens_and_steps"] for of in record["seeds"].values()])
        args.output.write_text(json.dumps(record) + "\n")
        equal = sum(of["num_equal"] for of in record["seeds"].values())
        print(f"seeds {', '.join(record['seeds'])}: {equal} of {len(record['seeds']) * args.prompts} coupled equal")
        for name, of in record["results"].items():
            low, high = of["interval"]
            line = f"  {name:40s} {of['tokens_per_step']:.3f} [{low:.3f}, {high:.3f}]"
            print(line, *(f"{value:+.3f}" for value in of.get("difference", ())), flush=True)


def run(
    plain: LLM, specs: Mapping[str, dict[str, Any]], prompt_ids: list[list[int]], seed: int
) -> tuple[Counts, int]:
    """Tokens and steps of every prompt under every contender; how many coupled outputs are plain decoding's."""
    prompts: Any = [{"prompt_token_ids": ids} for ids in prompt_ids]
    params = [
        SamplingParams(temperature=1.0, max_tokens=MAX_TOKENS, seed=1000 * seed + index)
        for index in range(len(prompts))
    ]
    expected = [output.outputs[0].token_ids for output in plain.generate(prompts, params)]
    counts: Counts = {}
    num_equal = 0
    for name, (rule, _) in CONTENDERS.items():
        outputs = plain.with_decoding(specs[name], verification=rule).generate(prompts, params)
        metrics = [output.outputs[0].metrics for output in outputs]
        counts[name] = [[of.num_steps + of.num_accepted_tokens, of.num_steps] for of in metrics]
        if rule == "coupled":
            num_equal = sum(o.outputs[0].token_ids == ids for o, ids in zip(outputs, expected, strict=True))
    return counts, num_equal


def pooled(seeds: list[Counts]) -> dict[str, dict[str, Any]]:
    """Means over all tokens, their intervals, and differences to the coupled trees: mean, lower and upper end."""
    sums = {name: np.sum([np.array(counts[name]) for counts in seeds], axis=0) for name in CONTENDERS}
    num_prompts = len(sums[COUPLED])
    drawn = np.random.default_rng(0).integers(num_prompts, size=(NUM_RESAMPLES, num_prompts))
    means = {name: of[:, 0].sum() / of[:, 1].sum() for name, of in sums.items()}
    resampled = {name: of[drawn, 0].sum(axis=1) / of[drawn, 1].sum(axis=1) for name, of in sums.items()}
    found: dict[str, dict[str, Any]] = {}
    for name in CONTENDERS:
        found[name] = {"tokens_per_step": float(means[name]), "interval": interval(resampled[name])}
        if name != COUPLED:
            ahead = float(means[COUPLED] - means[name])
            found[name]["difference"] = [ahead, *interval(resampled[COUPLED] - resampled[name])]
    return found


def interval(values: np.ndarray) -> list[float]:
    return np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()


if __name__ == "__main__":
    main()
