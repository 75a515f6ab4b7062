"""Advice as tables, sentences and lines to paste."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from outrider.bench.speculation import BATCHES


def print_prediction(console: Console, record: Mapping[str, Any]) -> None:
    machine, found = record["hardware"], record["predictions"]
    title = (
        f"PREDICTION, nothing was measured: {record['model']['name']}, {record['model']['weights']}, on "
        f"{machine['name']}, context {record['context']}; plain decoding {record['plain_tokens_per_s']:.1f} tokens/s"
    )
    table = _table(title, ("draft tokens", "depth", "width", "tokens a step", "tokens/s", "speedup"))
    for of in found:
        table.add_row(
            of["name"],
            str(of["nodes"]),
            str(of["depth"]),
            str(of["width"]),
            f"{of['acceptance_length']:.2f}",
            f"{of['tokens_per_s']:.1f}",
            f"{of['batches'][0]['speedup']:.2f}x",
        )
    console.print(table, batch_table(found, "best draft for each batch size: speedup (draft tokens)"))
    if record["recommended"] == "none":
        console.print("Decode plainly: no draft is expected to pay.")
    else:
        console.print(f"Use {escape(record['recommended'])}.")
    print_paste(console, record["model_path"], record["weights"], record["drafter"])
    console.print("\nThis stands on:", *(f"- {escape(said)}" for said in record["assumptions"]), sep="\n")


def batch_table(found: Sequence[Mapping[str, Any]], title: str) -> Table:
    """A row a drafter, a column a batch size, and where plain decoding is as good."""
    table = _table(title, (*(f"batch {size}" for size in BATCHES), "plain as good from"))
    for of in found:
        cells = [f"{plan['speedup']:.2f}x ({plan['num_nodes']:.3g})" for plan in of["batches"]]
        end = of["break_even_batch"]
        table.add_row(of["name"], *cells, "never" if end is None else f"batch {end}")
    return table


def print_paste(console: Console, model: str | None, weights: str, spec: Mapping[str, Any]) -> None:
    """The configuration in Python and for the command line."""
    lines = (python_line(model, weights, spec), cli_line(model, weights, spec))
    console.print("\nTo paste:", *(f"    {line}" for line in lines), sep="\n", markup=False, soft_wrap=True)


def python_line(model: str | None, weights: str, spec: Mapping[str, Any]) -> str:
    first = "" if model is None else f"{model!r}, "
    last = "" if weights == "auto" else f", weights={weights!r}"
    return f"llm = LLM({first}drafter={dict(spec)!r}{last})"


def cli_line(model: str | None, weights: str, spec: Mapping[str, Any]) -> str:
    """The same as options of every command; a draft model has an option of its own."""
    settings = {key: value for key, value in spec.items() if key != "method"}
    words = [] if model is None else ["--model", model]
    words += [] if weights == "auto" else ["--weights", weights]
    words += ["--drafter", spec["method"]]
    if isinstance(settings.get("model"), str):
        words += ["--draft-model", settings.pop("model")]
    if settings:
        words += ["--drafter-config", json.dumps(settings)]
    return f"outrider generate PROMPT {shlex.join(words)}"


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
