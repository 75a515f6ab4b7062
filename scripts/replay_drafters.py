"""Acceptance length and drafting time of the drafters that need no training, on recorded outputs.

    python scripts/replay_drafters.py ngram edit '{"method": "merge", "sources": ["ngram", "edit"]}' --max-nodes 8 16
    python scripts/replay_drafters.py --time --context 4096 --temperature 0 1 --vocab-size 4096 32000 --output FILE

Workloads: what the bundled model writes for held-out code, edits of held-out functions (one name changed), and, with
--questions, prompts and reference answers from Spec-Bench's question.jsonl. `ms at 4096` is the median time that a
step's drafting takes where the output follows 4,096 tokens of held-out code. Drafters that read the target's logits
or choices have no acceptance here, as recordings have neither: see `outrider bench acceptance`.

With --time, what `propose` and `observe` take together in a step of one request, median and 90th percentile of all
steps but the first, behind so many tokens: where the output goes on with held-out code, and where it copies a
function with one name changed. Logits and choices are made up (`SyntheticTarget`); vocabularies and temperatures
concern only drafters that read logits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from outrider.bench.held_out import held_out_files, held_out_prompts, rename_edits
from outrider.bench.replay import Recording, ReplayResult, SyntheticTarget, replay
from outrider.bench.report import environment
from outrider.config import drafter_config
from outrider.drafting.build import TargetParts, build_drafter
from outrider.drafting.drafter import Drafter, DraftStyle
from outrider.drafting.forward_cost import ForwardCost
from outrider.engine.references import with_token_references
from outrider.kernels import native
from outrider.llm import LLM
from outrider.sampling.params import SamplingParams

DRAFTERS = ("ngram", "anpd", "aded", "copy", "edit", "history", "hierarchy", "merge")
FOUR_SOURCES = '{"method": "merge", "sources": ["ngram", "aded", "copy", "suffix"]}'
TIMED = (*DRAFTERS, FOUR_SOURCES, "suffix", "recycling", "jacobi", "lookahead")
FROM_TARGET = ("recycling", "jacobi", "lookahead")  # draft what the target said
LONG_CONTEXT = 4096
NUM_CODE_TOKENS = 192
CATEGORIES = ("summarization", "rag", "qa", "translation", "math_reasoning")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafters", nargs="*", help="names or JSON specifications")
    parser.add_argument("--max-nodes", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--questions", type=Path, help="Spec-Bench's question.jsonl")
    parser.add_argument("--time", action="store_true", help="drafting time alone")
    parser.add_argument("--context", type=int, default=LONG_CONTEXT, help="tokens before the output, for --time")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0], help="for --time")
    parser.add_argument("--vocab-size", type=int, nargs="+", help="for --time; default: the model's")
    parser.add_argument("--num-texts", type=int, default=8, help="of each kind, for --time")
    parser.add_argument("--threads", type=int, default=1, help="of the compiled kernels, for --time")
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()

    llm = LLM(decoding="ngram")
    rows: list[dict[str, Any]] = []
    date = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"date": date, **environment(), "command": sys.argv, "rows": rows}
    for row in times(llm, arguments) if arguments.time else acceptance(llm, arguments):
        rows.append(row)
        if arguments.output:
            arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def specification(drafter: str, max_nodes: int) -> dict[str, Any]:
    spec = json.loads(drafter) if drafter.startswith("{") else {"method": drafter}
    sized = spec["method"] not in ("jacobi", "lookahead")  # these have blocks and windows instead
    return {**spec, "max_nodes": max_nodes} if sized else spec


def label(spec: Mapping[str, Any]) -> str:
    return spec["method"] + (f" {'+'.join(map(str, spec['sources']))}" if "sources" in spec else "")


def acceptance(llm: LLM, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure and print tokens a step; a row for each drafter and number of nodes."""
    workloads = recordings(llm, arguments.num_prompts, arguments.max_tokens, arguments.questions)
    long_context = long_recording(workloads["edit"])
    print(f"{'nodes':>5} {'drafter':40}" + "".join(f"{name[:10]:>11}" for name in workloads) + "   ms at 4096")
    for max_nodes in arguments.max_nodes:
        for drafter in arguments.drafters or DRAFTERS:
            spec = specification(drafter, max_nodes)
            if spec["method"] in FROM_TARGET:
                raise SystemExit(f"{drafter} reads what the target says, which is not recorded; use --time")
            results = {
                name: replay(build(llm, spec), recorded, max_nodes=max_nodes) for name, recorded in workloads.items()
            }
            long_ms = replay(build(llm, spec), [long_context], max_nodes=max_nodes).median_draft_ms
            lengths = "".join(f"{result.acceptance_length:11.3f}" for result in results.values())
            print(f"{max_nodes:5} {label(spec)[:40]:40}{lengths} {long_ms:12.3f}", flush=True)
            yield {"drafter": spec, "ms_at_4096": long_ms, **as_json(results)}


def times(llm: LLM, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure and print drafting times; a row for each drafter, number of nodes, vocabulary, temperature and text."""
    torch.set_num_threads(1)
    native.set_num_threads(arguments.threads)
    texts = {
        "code": code_recordings(llm, arguments.context, arguments.num_texts),
        "edit": edit_recordings(llm, arguments.context, arguments.num_texts),
    }
    sizes = arguments.vocab_size or [llm.model.vocab_size]
    print(
        f"{'nodes':>5} {'vocab':>6} {'temp':>4} {'text':5}{'drafter':40}   median      p90  propose  observe  drafted"
    )
    for vocab_size in sizes:
        target = SyntheticTarget(vocab_size)
        for max_nodes in arguments.max_nodes:
            for drafter in arguments.drafters or TIMED:
                spec = specification(drafter, max_nodes)
                reads_logits = build(llm, spec, vocab_size).reads_logits
                for temperature in arguments.temperature if reads_logits else arguments.temperature[:1]:
                    if vocab_size != sizes[0] and not reads_logits:
                        continue
                    for text, recorded in texts.items():
                        made = build(llm, spec, vocab_size)
                        limit = max_nodes if "max_nodes" in spec else None
                        result = replay(made, recorded, max_nodes=limit, target=target, temperature=temperature)
                        row = time_row(result)
                        print(
                            f"{limit or made.max_nodes:5} {vocab_size:6} {temperature:4} {text:5}"
                            f"{label(spec)[:40]:40}"
                            f"{row['median_ms']:9.3f}{row['p90_ms']:9.3f}{row['propose_ms']:9.3f}"
                            f"{row['observe_ms']:9.3f}{row['drafted_per_step']:9.1f}",
                            flush=True,
                        )
                        where = {"context": arguments.context, "vocab_size": vocab_size, "temperature": temperature}
                        yield {"drafter": spec, "text": text, **where, **row}


def time_row(result: ReplayResult) -> dict[str, Any]:
    """Milliseconds a step of one request; `prompt_ms` is the first step's, in which the prompt is read."""
    return {
        "num_steps": len(result.step_ms),
        "median_ms": round(result.median_draft_ms, 4),
        "p10_ms": round(result.draft_ms(10), 4),
        "p90_ms": round(result.draft_ms(90), 4),
        "mean_ms": round(float(result.step_ms.mean()), 4),
        "propose_ms": round(float(np.median(result.propose_s)) * 1000, 4),
        "observe_ms": round(float(np.median(result.observe_s)) * 1000, 4),
        "prompt_ms": round(result.prompt_ms, 2),
        "drafted_per_step": round(result.num_drafted / result.num_steps, 2),
        "tokens_per_step": round(result.acceptance_length, 3),
    }


def code_recordings(llm: LLM, context: int, count: int) -> list[Recording]:
    """Held-out files from their beginnings, cut behind so many tokens."""
    needed = context + NUM_CODE_TOKENS
    encoded = (
        llm.tokenizer.encode(path.read_text(encoding="utf-8", errors="replace"), add_special_tokens=False)
        for path in held_out_files()
        if path.stat().st_size > needed
    )
    found = (tokens[:needed] for tokens in encoded if len(tokens) >= needed)
    return [Recording(tokens[:context], tokens[context:]) for tokens in islice(found, count)]


def edit_recordings(llm: LLM, context: int, count: int) -> list[Recording]:
    """Edits of held-out functions, each behind so many tokens of others."""
    recorded = [recording(llm, *edit) for edit in rename_edits(context // 64)]
    return [long_recording([*recorded[index + 1 :], *recorded[: index + 1]], context) for index in range(count)]


def recordings(llm: LLM, num_prompts: int, max_tokens: int, questions: Path | None) -> dict[str, list[Recording]]:
    """Recorded outputs by workload."""
    prompts, _ = held_out_prompts(num_prompts)
    workloads: dict[str, list[Recording]] = {}
    for name, temperature in (("code", 0.0), ("code t=0.8", 0.8)):
        params = SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True, seed=3)
        workloads[name] = [
            Recording(output.prompt_token_ids, output.outputs[0].token_ids)
            for output in llm.generate(prompts, params)
        ]
    workloads["edit"] = [recording(llm, *edit) for edit in rename_edits(num_prompts)]
    if questions is not None:
        rows = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
        for category in CATEGORIES:
            workloads[category] = [
                recording(llm, row["turns"][0], "\n" + first_answer(row["reference"]))
                for row in rows
                if row["category"] == category and row.get("reference")
            ][:num_prompts]
    return {name: recorded for name, recorded in workloads.items() if recorded}


def first_answer(reference: str | Sequence[Any]) -> str:
    return reference if isinstance(reference, str) else first_answer(reference[0])


def recording(llm: LLM, prompt: str, output: str) -> Recording:
    encode = llm.tokenizer.encode
    return Recording(encode(prompt, add_special_tokens=False), encode(output, add_special_tokens=False))


def long_recording(recorded: Sequence[Recording], context: int = LONG_CONTEXT) -> Recording:
    """The last recording behind so many tokens of the others."""
    tokens = [token for one in recorded[:-1] for token in (*one.prompt_token_ids, *one.output_token_ids)]
    last = recorded[-1]
    return Recording([*tokens, *last.prompt_token_ids][-context:], last.output_token_ids)


def build(llm: LLM, spec: Mapping[str, Any], vocab_size: int | None = None) -> Drafter:
    config = with_token_references(drafter_config(spec), llm.tokenizer, llm.model.vocab_size)

    def no_draft_model(*_: object) -> Any:
        raise SystemExit("a draft model cannot be replayed: it needs the target's cache")

    size = vocab_size or llm.model.vocab_size
    return build_drafter(
        config,
        DraftStyle(),
        TargetParts(size, lambda: llm.tokenizer.fingerprint, no_draft_model, ForwardCost.unknown),
    )


def as_json(results: Mapping[str, ReplayResult]) -> dict[str, Any]:
    return {
        name: {
            "acceptance_length": round(result.acceptance_length, 4),
            "num_steps": result.num_steps,
            "num_drafted": result.num_drafted,
            "num_accepted": result.num_accepted,
            "draft_ms": round(result.median_draft_ms, 4),
            "calibration_error": round(result.calibration_error, 4),
        }
        for name, result in results.items()
    }


if __name__ == "__main__":
    main()
