"""Acceptance length and drafting time of the drafters that look things up, on recorded outputs.

    python scripts/replay_drafters.py ngram edit '{"method": "merge", "sources": ["ngram", "edit"]}' --max-nodes 8 16

Workloads: what the bundled model writes for held-out code, edits of held-out functions (one name changed), and, with
--questions, prompts and reference answers from Spec-Bench's question.jsonl. `ms at 4096` is the median time that a
step's drafting takes where the output follows 4,096 tokens of held-out code.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from outrider.bench.held_out import held_out_prompts, rename_edits
from outrider.bench.replay import Recording, ReplayResult, replay
from outrider.config import drafter_config
from outrider.drafting.build import TargetParts, build_drafter
from outrider.drafting.drafter import Drafter, DraftStyle
from outrider.drafting.forward_cost import ForwardCost
from outrider.engine.references import with_token_references
from outrider.llm import LLM
from outrider.sampling.params import SamplingParams

DRAFTERS = ("ngram", "anpd", "aded", "copy", "edit", "history", "hierarchy", "merge")
LONG_CONTEXT = 4096
CATEGORIES = ("summarization", "rag", "qa", "translation", "math_reasoning")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafters", nargs="*", default=DRAFTERS, help="names or JSON specifications")
    parser.add_argument("--max-nodes", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--questions", type=Path, help="Spec-Bench's question.jsonl")
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()

    llm = LLM(decoding="ngram")
    workloads = recordings(llm, arguments.num_prompts, arguments.max_tokens, arguments.questions)
    long_context = long_recording(workloads["edit"])
    rows = []
    print(f"{'nodes':>5} {'drafter':40}" + "".join(f"{name[:10]:>11}" for name in workloads) + "   ms at 4096")
    for max_nodes in arguments.max_nodes:
        for drafter in arguments.drafters:
            spec = json.loads(drafter) if drafter.startswith("{") else {"method": drafter}
            spec["max_nodes"] = max_nodes
            results = {
                name: replay(build(llm, spec), recorded, max_nodes=max_nodes) for name, recorded in workloads.items()
            }
            long_ms = replay(build(llm, spec), [long_context], max_nodes=max_nodes).median_draft_ms
            rows.append({"drafter": spec, "ms_at_4096": long_ms, **as_json(results)})
            lengths = "".join(f"{result.acceptance_length:11.3f}" for result in results.values())
            print(f"{max_nodes:5} {drafter[:40]:40}{lengths} {long_ms:12.3f}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


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


def long_recording(recorded: Sequence[Recording]) -> Recording:
    """One recording behind `LONG_CONTEXT` tokens of others."""
    tokens = [token for one in recorded for token in (*one.prompt_token_ids, *one.output_token_ids)]
    last = recorded[-1]
    return Recording([*tokens, *last.prompt_token_ids][-LONG_CONTEXT:], last.output_token_ids)


def build(llm: LLM, spec: Mapping[str, Any]) -> Drafter:
    config = with_token_references(drafter_config(spec), llm.tokenizer, llm.model.vocab_size)

    def no_draft_model(*_: object) -> Any:
        raise SystemExit("a draft model cannot be replayed: it needs the target's cache")

    parts = TargetParts(llm.model.vocab_size, lambda: llm.tokenizer.fingerprint, no_draft_model, ForwardCost.unknown)
    return build_drafter(config, DraftStyle(), parts)


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
