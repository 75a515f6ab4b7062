"""Choose the functions of the editing workload: those of the held-out modules that the bundled model copies best.

    python scripts/editing_prompts.py

writes ``src/outrider/bench/editing_functions.json`` and prints how much of every rewritten function the model copies.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from statistics import mean, median

from outrider import LLM, SamplingParams
from outrider.bench.editing import CHOSEN, edit_prompt, functions_of, held_out_by_name

NUM_CHOSEN = 24
MAX_PER_FILE = 3
MIN_TOKENS, MAX_TOKENS = 20, 100  # of the part that is to be copied
MAX_PROMPT_TOKENS = 800


def copied(output: list[int], expected: list[int]) -> float:
    """The part of the expected tokens that stand in the output, in order."""
    blocks = difflib.SequenceMatcher(None, output, expected, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / len(expected)


def main() -> None:
    llm = LLM(decoding="ngram", scheduler={"max_num_seqs": 16})
    cases: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
    for name, path in held_out_by_name().items():
        for function, code in dict(functions_of(path)).items():
            made = edit_prompt(code) if len(code) < 1000 else None
            if made is None:
                continue
            prompt, rest = map(llm.tokenizer.encode, made)
            if MIN_TOKENS <= len(rest) <= MAX_TOKENS and len(prompt) <= MAX_PROMPT_TOKENS:
                cases[name, function] = prompt, rest
    params = [SamplingParams(temperature=0.0, max_tokens=len(rest), ignore_eos=True) for _, rest in cases.values()]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt, _ in cases.values()], params)
    parts = {
        case: copied(output.outputs[0].token_ids, rest)
        for (case, (_, rest)), output in zip(cases.items(), outputs, strict=True)
    }
    chosen: list[tuple[str, str]] = []
    per_file: Counter[str] = Counter()
    for case in sorted(parts, key=lambda case: (-parts[case], case)):
        if len(chosen) < NUM_CHOSEN and per_file[case[0]] < MAX_PER_FILE:
            chosen.append(case)
            per_file[case[0]] += 1
    record = {
        "copied": {"mean": round(mean(parts[case] for case in chosen), 2), "least": round(parts[chosen[-1]], 2)},
        "copied_of_all": {"functions": len(parts), "median": round(median(parts.values()), 2)},
        "functions": chosen,
    }
    CHOSEN.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print({key: value for key, value in record.items() if key != "functions"})
    for case in chosen:
        print(f"{parts[case]:.2f}  {len(cases[case][1]):3d} tokens  {case[0]} {case[1]}")


if __name__ == "__main__":
    main()
