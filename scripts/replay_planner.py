"""What the planner's estimates of acceptance are worth, on recorded proposals.

    python scripts/replay_planner.py record build/proposals.json
    python scripts/replay_planner.py replay build/proposals.json --set OWN_PRIOR=6 --set SHARED_PRIOR=8

`record` lets three drafters decode five workloads with the bundled models and keeps every tree and what came of it.
`replay` goes through them as the planner would: of each tree it takes the nodes that promise `--margin` times the
price of a row, and then learns what came. Printed is what a proposal brings on average over workloads and drafters,
at five prices of a row: accepted tokens less the price of the nodes taken; then the worst of the workloads, which is
what estimates cost where drafts are wrong; then what would be got if all nodes were taken, and if the future were
known.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from outrider.bench.workloads import open_workload
from outrider.drafting import acceptance
from outrider.drafting.auto import MARGIN
from outrider.drafting.drafter import DraftOutcome
from outrider.llm import LLM
from outrider.sampling.params import SamplingParams
from outrider.token_tree import TokenTree

WORKLOADS = (("code", 0.0, 24), ("code", 0.5, 16), ("code", 1.0, 24), ("edit", 0.0, 12), ("random", 1.5, 12))
DRAFTERS = (
    {"method": "suffix", "depth": 16, "max_nodes": 24},
    {"method": "merge", "depth": 16, "max_nodes": 24},
    {"method": "draft_model", "depth": 8, "min_path_prob": 0.0},
)
PRICES = (0.02, 0.05, 0.1, 0.2, 0.4)  # tokens a row
BATCH_SIZE = 4

# The proposals of each (workload and drafter): request, tree, tokens that came.
Recorded = dict[str, list[tuple[str, TokenTree, list[int]]]]
Pick = Callable[[str, str, TokenTree, list[int], float], Iterable[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "replay"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--margin", type=float, default=MARGIN)
    parser.add_argument("--set", action="append", default=[], help="NAME=NUMBER, a constant of acceptance.py")
    arguments = parser.parse_args()
    if arguments.action == "record":
        arguments.file.write_text(json.dumps(record()), encoding="utf-8")
        return
    for setting in arguments.set:
        name, _, value = setting.partition("=")
        if not hasattr(acceptance, name):
            parser.error(f"unknown constant {name!r}")
        setattr(acceptance, name, float(value))
    replay(load(arguments.file), arguments.margin)


def record() -> dict[str, list[list[object]]]:
    llm, records = LLM(decoding="none"), dict[str, list[list[object]]]()
    for workload, temperature, num_prompts in WORKLOADS:
        prompts = open_workload(workload, num_prompts).encode(
            llm.tokenizer.encode, vocab_size=llm.model.vocab_size, room=400
        )
        for spec in DRAFTERS:
            rows = records[f"{workload} {temperature} {spec['method']}"] = []
            drafting = llm.with_decoding(spec)
            observe = drafting.engine.drafter.observe

            def keep(outcomes: Sequence[DraftOutcome], rows=rows, observe=observe) -> None:
                for o in outcomes:
                    if o.tree.num_nodes > 1:
                        tree = [o.tree.tokens, o.tree.parents, o.tree.confidences]
                        rows.append([o.request_id, *tree, list(o.new_tokens)])
                observe(outcomes)

            drafting.engine.drafter.observe = keep
            for start in range(0, num_prompts, BATCH_SIZE):
                batch = prompts[start : start + BATCH_SIZE]
                params = [
                    SamplingParams(temperature=temperature, seed=start + i, max_tokens=128, ignore_eos=True)
                    for i in range(len(batch))
                ]
                drafting.generate([{"prompt_token_ids": ids} for ids in batch], params)
            print(f"{workload} {temperature} {spec['method']}: {len(rows)} proposals", flush=True)
    return records


def load(file: Path) -> Recorded:
    return {
        name: [
            (request_id, TokenTree(tuple(tokens), tuple(parents), confidences=tuple(confidences)), new)
            for request_id, tokens, parents, confidences, new in rows
        ]
        for name, rows in json.loads(file.read_text(encoding="utf-8")).items()
    }


def replay(recorded: Recorded, margin: float) -> None:
    print(f"{'a row costs':14}" + "".join(f"{price:9.2f}" for price in PRICES))
    estimator = acceptance.AcceptanceEstimator()

    def planned(name: str, request_id: str, tree: TokenTree, new: list[int], price: float) -> Iterable[int]:
        probs = estimator.path_probs(name, request_id, tree)
        if price == PRICES[-1]:
            estimator.observe(name, request_id, tree, new)
        return [node for node in range(1, tree.num_nodes) if probs[node] > margin * price]

    picks: dict[str, Pick] = {
        "planner": planned,
        "all nodes": lambda name, request_id, tree, new, price: range(1, tree.num_nodes),
        "the future": lambda name, request_id, tree, new, price: tree.nodes_along(new),
    }
    for label, pick in picks.items():
        means = [mean_gains(name, rows, pick) for name, rows in recorded.items()]
        by_price = list(zip(*means, strict=True))
        print(f"{label:14}" + "".join(f"{sum(gains) / len(gains):9.4f}" for gains in by_price))
        print(f"{'  worst':14}" + "".join(f"{min(gains):9.4f}" for gains in by_price))


def mean_gains(name: str, rows: list[tuple[str, TokenTree, list[int]]], pick: Pick) -> list[float]:
    """``[prices]`` accepted tokens less the price of rows, a proposal."""
    totals = [0.0] * len(PRICES)
    for request_id, tree, new in rows:
        accepted = set(tree.nodes_along(new))
        for index, price in enumerate(PRICES):
            totals[index] += sum((node in accepted) - price for node in pick(name, request_id, tree, new, price))
    return [total / len(rows) for total in totals]


if __name__ == "__main__":
    main()
