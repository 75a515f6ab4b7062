r"""Does `auto` ever lose? Plain decoding and the planner take turns, batch by batch, on what drafts cannot guess.

Memory on shared machines changes its speed within seconds, so batches are decoded by both, one after the other. Who
is second is up to a quarter faster with a small model, so a pair is two batches, one in each order, and its ratio
that of the sums; what counts is the median over pairs. Outputs are compared token for token.

Where a batch takes longer than memory keeps its speed (a large model, many prompts), `--by-steps` lets the two take
turns step by step instead: whoever has fewer tokens goes next. `--control` lets a second plain engine take part: how
far it is from the first is what this machine cannot tell.

    OMP_NUM_THREADS=2 python benchmarks/never_slower.py --model build/inflated --dtype bfloat16 \
        --draft-model src/outrider/bundled/draft --output benchmarks/results/NAME.json
    OMP_NUM_THREADS=2 python benchmarks/never_slower.py --contenders draft-model --cases random-1.5-b16 --pairs 9
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from outrider import LLM, SamplingParams
from outrider.bench.report import environment
from outrider.bench.workloads import open_workload
from outrider.config import SchedulerConfig


@dataclass(frozen=True)
class Case:
    """Attributes:
    num_prompts: of a run. One of as many prompts as the batch holds ends with its slowest request, however fast the
        others were; of three times as many the batch stays full.
    num_pairs: of runs.
    max_tokens: of each output.
    """

    workload: str
    temperature: float
    batch_size: int
    num_prompts: int
    num_pairs: int
    max_tokens: int

    @property
    def name(self) -> str:
        name = f"{self.workload}-{self.temperature}-b{self.batch_size}"
        return name if self.num_prompts == self.batch_size else f"{name}-of-{self.num_prompts}"


CASES = {
    case.name: case
    for case in (
        Case("random", 1.5, 1, 1, 9, 96),
        Case("code", 0.8, 1, 1, 9, 96),
        Case("code", 2.0, 1, 1, 9, 96),
        Case("code", 1.0, 4, 12, 5, 48),
        Case("code", 1.0, 16, 16, 5, 48),
        Case("code", 1.0, 16, 48, 3, 48),
        Case("random", 1.5, 16, 16, 5, 48),
        Case("random", 1.5, 48, 48, 3, 32),
    )
}
CONTENDERS = ("training-free", "draft-model")
MAX_PROMPTS = 48  # more runs take them again, with other seeds
WARM_UP = "def main():\n"
CASES_HELP = f"workload, temperature and batch size; all unless named: {', '.join(CASES)}"


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the bundled one unless given")
    parser.add_argument("--draft-model", help="of the contender that has one; the bundled target has its own")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache-gb", type=float, default=0.5)
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, help="what `auto` chooses from; both if it can"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=CASES_HELP)
    parser.add_argument("--pairs", type=int, help="pairs of runs of every case, instead of each one's own number")
    parser.add_argument("--by-steps", action="store_true", help="take turns step by step, not batch by batch")
    parser.add_argument("--control", action="store_true", help="also time a second plain engine against the first")
    parser.add_argument("--output", help="JSON, written after every case")
    args = parser.parse_args(argv)
    has_draft = args.model is None or args.draft_model is not None
    if args.contenders is None:
        args.contenders = CONTENDERS if has_draft else CONTENDERS[:1]
    elif "draft-model" in args.contenders and not has_draft:
        parser.error("--contenders: got draft-model without a draft model, expected --draft-model with --model")
    if args.pairs is not None and args.pairs < 1:
        parser.error(f"--pairs: got {args.pairs}, expected 1 or more")
    return args


def main() -> None:
    args = arguments(sys.argv[1:])
    plain = LLM(
        args.model,
        decoding="none",
        dtype=args.dtype,
        device=args.device,
        cache={"prefix_caching": False, "memory_gb": args.cache_gb},
    )
    specs: dict[str, dict[str, Any]] = {
        "training-free": {"method": "auto"}
        if args.model
        else {"method": "auto", "drafters": ["suffix", "recycling"]},
        "draft-model": {"method": "auto", "draft_model": args.draft_model},
    }
    cases = [CASES[name] for name in args.cases]
    if args.pairs is not None:
        cases = [replace(case, num_pairs=args.pairs) for case in cases]
    record: dict[str, Any] = {"command": command_line(), "environment": environment(), "rows": []}
    for name in args.contenders:
        for row in measure(plain, name, specs[name], cases, by_steps=args.by_steps, control=args.control):
            record["rows"].append(row)
            if args.output:  # an interruption leaves what there is
                Path(args.output).write_text(json.dumps(record, indent=2) + "\n")


def command_line() -> str:
    """What was typed, to be pasted from a result."""
    threads = os.environ.get("OMP_NUM_THREADS")
    return shlex.join([*([f"OMP_NUM_THREADS={threads}"] if threads else []), "python", *sys.argv])


def measure(
    plain: LLM, name: str, spec: dict[str, Any], cases: Sequence[Case], *, by_steps: bool, control: bool
) -> Iterator[dict[str, Any]]:
    """One row a case, printed as it is done."""
    for case in cases:
        num_prompts = case.num_prompts
        plain.config = replace(plain.config, scheduler=SchedulerConfig(max_num_seqs=case.batch_size))
        auto = plain.with_decoding(spec)
        encoded = open_workload(case.workload, min(MAX_PROMPTS, 2 * num_prompts * case.num_pairs)).encode(
            plain.tokenizer.encode, vocab_size=plain.model.vocab_size, room=400
        )
        equal, tokens = True, 0
        plain = plain.with_decoding("none")  # a cache as fresh as the other's
        llms = {"plain": plain, "auto": auto}
        if control:
            llms["control"] = plain.with_decoding("none")
        speedups: dict[str, list[float]] = {label: [] for label in llms if label != "plain"}
        for llm in llms.values():
            llm.generate(WARM_UP, SamplingParams(temperature=0.0, max_tokens=8))
        for pair in range(case.num_pairs):
            seconds = dict.fromkeys(llms, 0.0)
            for run, order in enumerate((tuple(llms), tuple(reversed(llms))), 2 * pair):
                batch, params = batch_of(case, run, encoded)
                outputs = {}
                for group in [order] if by_steps else [(label,) for label in order]:
                    for label, decoded in decode({label: llms[label] for label in group}, batch, params).items():
                        seconds[label] += decoded[0]
                        outputs[label] = decoded[1]
                equal &= all(output == outputs["plain"] for output in outputs.values())
                tokens += sum(map(len, outputs["auto"]))
            for label, ratios in speedups.items():
                ratios.append(seconds["plain"] / seconds[label])
        stats = auto.engine.stats
        row = {
            "auto": name,
            "case": case.name,
            "workload": case.workload,
            "temperature": case.temperature,
            "batch_size": case.batch_size,
            "num_prompts": num_prompts,
            "speedup_median": statistics.median(speedups["auto"]),
            "speedups": speedups["auto"],
            "acceptance_length": stats.acceptance_length,
            "draft_ms_per_step": 1e3 * stats.draft_s / stats.num_steps,
            "outputs_equal": equal,
            "num_tokens": tokens,
        }
        if control:
            row |= {"control_median": statistics.median(speedups["control"]), "controls": speedups["control"]}
        print(
            f"{name}, {case.name}: "
            + "".join(
                f"{'' if label == 'auto' else 'plain again '}{statistics.median(ratios):.3f}x "
                f"({min(ratios):.3f} to {max(ratios):.3f}), "
                for label, ratios in speedups.items()
            )
            + f"{stats.acceptance_length:.2f} tokens a step, "
            f"{'equal' if equal else 'DIFFERENT'}",
            flush=True,
        )
        yield row


def batch_of(case: Case, run: int, encoded: Sequence[Sequence[int]]) -> tuple[list[Any], list[SamplingParams]]:
    """Prompts of a run, and how each is sampled."""
    first = run * case.num_prompts
    batch = [{"prompt_token_ids": encoded[i % len(encoded)]} for i in range(first, first + case.num_prompts)]
    # A seed for each prompt: at a high temperature equal noise makes equal texts, which are no test.
    params = [
        SamplingParams(temperature=case.temperature, seed=100 * run + i, max_tokens=case.max_tokens, ignore_eos=True)
        for i in range(case.num_prompts)
    ]
    return batch, params


def decode(
    llms: Mapping[str, LLM], batch: Sequence[Any], params: Sequence[SamplingParams]
) -> dict[str, tuple[float, list[list[int]]]]:
    """Every engine's seconds for a batch and its tokens; engines take turns step by step."""
    seconds = dict.fromkeys(llms, 0.0)
    generations = {}
    for label, llm in llms.items():
        start = time.perf_counter()
        generations[label] = [llm.prepare(prompt, p) for prompt, p in zip(batch, params, strict=True)]
        for generation in generations[label]:
            llm.add(generation)
        seconds[label] += time.perf_counter() - start
    num_tokens = dict.fromkeys(llms, 0)
    while running := [label for label, llm in llms.items() if llm.has_unfinished]:
        label = min(running, key=num_tokens.__getitem__)
        before = llms[label].engine.stats.num_output_tokens
        start = time.perf_counter()
        llms[label].step()
        seconds[label] += time.perf_counter() - start
        num_tokens[label] += llms[label].engine.stats.num_output_tokens - before
    return {
        label: (seconds[label], [llms[label].output(each).outputs[0].token_ids for each in generations[label]])
        for label in llms
    }


if __name__ == "__main__":
    main()
