"""Does `auto` ever lose? Plain decoding and the planner take turns, batch by batch, on what drafts cannot guess.

Memory on shared machines changes its speed within seconds, so batches are decoded by both, one after the other. Who
is second is up to a quarter faster with a small model, so a pair is two batches, one in each order, and its ratio
that of the sums; what counts is the median over pairs. Outputs are compared token for token.

    OMP_NUM_THREADS=2 python benchmarks/never_slower.py --model build/inflated --dtype bfloat16 \
        --draft-model src/outrider/bundled/draft --output benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from outrider import LLM, SamplingParams
from outrider.bench.report import environment
from outrider.bench.workloads import open_workload
from outrider.config import SchedulerConfig

# (workload, temperature, batch size, prompts of a run, pairs, tokens). A run of as many prompts as the batch
# holds ends with its slowest request, however fast the others were; of three times as many the batch stays full.
CASES = (
    ("random", 1.5, 1, 1, 9, 96),
    ("code", 0.8, 1, 1, 9, 96),
    ("code", 2.0, 1, 1, 9, 96),
    ("code", 1.0, 4, 12, 5, 48),
    ("code", 1.0, 16, 16, 5, 48),
    ("code", 1.0, 16, 48, 3, 48),
    ("random", 1.5, 16, 16, 5, 48),
    ("random", 1.5, 48, 48, 3, 32),
)
MAX_PROMPTS = 48  # more runs take them again, with other seeds
WARM_UP = "def main():\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--draft-model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--cache-gb", type=float, default=0.5)
    parser.add_argument("--output")
    args = parser.parse_args()
    plain = LLM(
        args.model,
        decoding="none",
        dtype=args.dtype,
        cache={"prefix_caching": False, "memory_gb": args.cache_gb},
    )
    contenders = {
        "training-free": {"method": "auto"}
        if args.model
        else {"method": "auto", "drafters": ["suffix", "recycling"]},
        "with a draft model": {"method": "auto", "draft_model": args.draft_model},
    }
    if args.draft_model is None and args.model is not None:
        del contenders["with a draft model"]
    record: dict[str, Any] = {"environment": environment(), "rows": []}
    for name, spec in contenders.items():
        for row in measure(plain, name, spec):
            record["rows"].append(row)
            if args.output:  # an interruption leaves what there is
                Path(args.output).write_text(json.dumps(record, indent=2) + "\n")


def measure(plain: LLM, name: str, spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row a case, printed as it is done."""
    for workload, temperature, batch_size, num_prompts, pairs, max_tokens in CASES:
        plain.config = replace(plain.config, scheduler=SchedulerConfig(max_num_seqs=batch_size))
        auto = plain.with_decoding(spec)
        encoded = open_workload(workload, min(MAX_PROMPTS, 2 * num_prompts * pairs)).encode(
            plain.tokenizer.encode, vocab_size=plain.model.vocab_size, room=400
        )
        ratios, equal, tokens = [], True, 0
        plain = plain.with_decoding("none")  # a cache as fresh as the other's
        for llm in (plain, auto):
            llm.generate(WARM_UP, SamplingParams(temperature=0.0, max_tokens=8))
        for pair in range(pairs):
            seconds = {"plain": 0.0, "auto": 0.0}
            for run, order in enumerate((("plain", "auto"), ("auto", "plain")), 2 * pair):
                # A seed for each prompt: at a high temperature equal noise makes equal texts, which are no test.
                params = [
                    SamplingParams(
                        temperature=temperature, seed=100 * run + i, max_tokens=max_tokens, ignore_eos=True
                    )
                    for i in range(num_prompts)
                ]
                first = run * num_prompts
                batch: Any = [
                    {"prompt_token_ids": encoded[i % len(encoded)]} for i in range(first, first + num_prompts)
                ]
                outputs = {}
                for label in order:
                    start = time.perf_counter()
                    generated = {"plain": plain, "auto": auto}[label].generate(batch, params)
                    seconds[label] += time.perf_counter() - start
                    outputs[label] = [output.outputs[0].token_ids for output in generated]
                equal &= outputs["plain"] == outputs["auto"]
                tokens += sum(map(len, outputs["auto"]))
            ratios.append(seconds["plain"] / seconds["auto"])
        stats = auto.engine.stats
        row = {
            "auto": name,
            "workload": workload,
            "temperature": temperature,
            "batch_size": batch_size,
            "num_prompts": num_prompts,
            "speedup_median": statistics.median(ratios),
            "speedups": ratios,
            "acceptance_length": stats.acceptance_length,
            "draft_ms_per_step": 1e3 * stats.draft_s / stats.num_steps,
            "outputs_equal": equal,
            "num_tokens": tokens,
        }
        print(
            f"{name}, {workload}, temperature {temperature}, batch {batch_size} of {num_prompts}: "
            f"{row['speedup_median']:.3f}x ({min(ratios):.3f} to {max(ratios):.3f}), "
            f"{stats.acceptance_length:.2f} tokens a step, "
            f"{'equal' if equal else 'DIFFERENT'}",
            flush=True,
        )
        yield row


if __name__ == "__main__":
    main()
