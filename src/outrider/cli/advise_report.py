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
from outrider.config import EngineConfig

TRUSTED = 1.25  # how many times off the expectation of a batch may be before the reader is told


def print_prediction(console: Console, record: Mapping[str, Any]) -> None:
    machine, found = record["hardware"], record["predictions"]
    title = (
        f"PREDICTION, no decoding was measured: {record['model']['name']}, {record['model']['weights']}, on "
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
    print_paste(console, record["config"], record["drafter"])
    console.print("\nThis stands on:", *(f"- {escape(said)}" for said in record["assumptions"]), sep="\n")


def print_measurement(console: Console, record: Mapping[str, Any]) -> None:
    config, prompts, plain = record["config"], record["prompts"], record["plain"]
    title = (
        f"{config['model'] or 'bundled model'}, {record['dtype']}, weights {config['weights']}, "
        f"{config['exactness']}; "
        f"{prompts['workload']}, {prompts['count']} prompts, up to {record['sampling']['max_tokens']} tokens, "
        f"temperature {record['sampling']['temperature']:g}; plain decoding {_spread(plain, '.1f')} tokens/s"
    )
    table = _table(title, ("tokens/s", "speedup", "tokens a step", "most drafts", "depth", "repeats", "identical"))
    for of in record["candidates"]:
        table.add_row(
            of["name"],
            _spread(of["tokens_per_s"], ".1f"),
            _spread(of["speedup"], ".2f", "x"),
            f"{of['acceptance_length']:.2f}",
            *("-" if of[key] is None else str(of[key]) for key in ("nodes", "depth")),
            str(of["repeats"]),
            f"{of['num_equal']}/{of['num_outputs']}",
        )
    batches = "in a batch, by the measured cost of rows and what was accepted: speedup (mean draft tokens)"
    console.print(table, batch_table(record["candidates"], batches))
    console.print(*_sentences(record), sep="\n", markup=False)
    print_paste(console, config, record["drafter"])


def _sentences(record: Mapping[str, Any]) -> list[str]:
    by_name = {of["name"]: of for of in record["candidates"]}
    best = by_name.get(record["best"])
    said: list[str] = []
    if best is not None and record["recommended"] == best["name"]:
        said.append(
            f"Use {best['name']}: {_spread(best['tokens_per_s'], '.1f')} tokens/s, "
            f"{_spread(best['speedup'], '.2f', 'x')}, {best['acceptance_length']:.2f} tokens a step."
        )
        if record["as_good"]:
            said.append(f"As good within the error: {', '.join(record['as_good'])}.")
    elif best is not None:
        said.append(
            f"Decode plainly: the best drafter, {best['name']}, came to {_spread(best['speedup'], '.2f', 'x')}."
        )
    else:
        said.append("Decode plainly: no drafter gave plain decoding's output to the last token.")
    if best is not None:
        coverage = best["speedup"]["coverage"]
        error = f"In brackets: hold the true median with probability {coverage:.0%}."
        said.append(error if coverage else "One repeat tells no error; give more --seconds.")
        said.append("The error is over repeats of these prompts; others may fare otherwise.")
    said.append(
        f"Batches are computed, not run: context {record['context']}, rows beyond "
        f"{record['forward_cost']['rows'][-1]} "
        "extrapolated, drafts cut to their best depth."
    )
    if any(of["num_equal"] != of["num_outputs"] for of in by_name.values()):
        said.append("Some outputs differ from plain decoding's; `outrider verify` tells ties from bugs.")
    check = record["batch_check"]
    if check is not None:
        running = check["mean_sequences"]
        said.append(
            f"Checked in batches of {check['batch_size']}, {check['name']}: {_spread(check['speedup'], '.2f', 'x')}, "
            f"expected {check['expected_speedup']:.2f}x for the {running['drafting']} sequences that ran in the mean "
            f"({running['plain']} without drafts); {check['num_equal']}/{check['num_outputs']} outputs identical."
        )
        off = check["expected_speedup"] / check["speedup"]["median"]
        if not 1 / TRUSTED <= off <= TRUSTED:
            said.append(f"So the table of batches is too {'optimistic' if off > 1 else 'pessimistic'} here.")
    roofline = record["roofline"]
    if roofline is not None:
        cache = roofline["last_level_cache_bytes"] or 0
        said.append(
            f"Roofline of one row: {roofline['weight_bytes_read'] / 1e6:.1f} MB at "
            f"{roofline['bandwidth'] / 1e9:.1f} GB/s; "
            f"measured {1e3 * roofline['measured_s']:.2f} ms; predicted/measured "
            f"{roofline['predicted_over_measured']:.2f} [{roofline['low']:.2f}, {roofline['high']:.2f}]"
            + (" (the weights fit into the last-level cache)." if roofline["weight_bytes_read"] < cache else ".")
        )
    if record["interrupted"]:
        said.append("Interrupted: this is what had finished.")
    return said


def _spread(interval: Mapping[str, float], form: str, unit: str = "") -> str:
    value = f"{interval['median']:{form}}{unit}"
    return value if not interval["coverage"] else f"{value} [{interval['low']:{form}}, {interval['high']:{form}}]"


def batch_table(found: Sequence[Mapping[str, Any]], title: str) -> Table:
    """A row a drafter, a column a batch size, and where plain decoding is as good."""
    table = _table(title, (*(f"batch {size}" for size in BATCHES), "plain as good from"))
    for of in found:
        cells = [f"{plan['speedup']:.2f}x ({plan['num_nodes']:.3g})" for plan in of["batches"]]
        end = of["break_even_batch"]
        table.add_row(of["name"], *cells, f"above {of['examined_to_batch']}" if end is None else f"batch {end}")
    return table


def print_paste(console: Console, config: Mapping[str, Any], spec: Mapping[str, Any]) -> None:
    """The configuration in Python and for the command line.

    Args:
        config: of the engine; what differs from the defaults is written.
    """
    lines = (python_line(config, spec), cli_line(config, spec))
    console.print("\nTo paste:", *(f"    {line}" for line in lines), sep="\n", markup=False, soft_wrap=True)


def python_line(config: Mapping[str, Any], spec: Mapping[str, Any]) -> str:
    first = "" if config["model"] is None else f"{config['model']!r}, "
    rest = "".join(f", {name}={value!r}" for name, value in _settings(config).items())
    return f"llm = LLM({first}decoding={dict(spec)!r}{rest})"


def cli_line(config: Mapping[str, Any], spec: Mapping[str, Any]) -> str:
    """The same as options of every command; a draft model has an option of its own."""
    settings = {key: value for key, value in spec.items() if key != "method"}
    words = [] if config["model"] is None else ["--model", config["model"]]
    for name, value in _settings(config).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    words += ["--decoding", spec["method"]]
    for name in ("model", "draft_model"):
        if isinstance(settings.get(name), str):
            words += ["--draft-model", settings.pop(name)]
    if settings:
        words += ["--decoding-config", json.dumps(settings)]
    return f"outrider generate PROMPT {shlex.join(words)}"


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    names = ("revision", "dtype", "weights", "group_size", "device")
    return {name: config[name] for name in names if name in config and config[name] != getattr(EngineConfig, name)}


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
