"""`outrider bench acceptance`: tokens a step of every drafter at equal numbers of draft tokens, over workloads."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from itertools import count
from typing import TYPE_CHECKING, Annotated, Any, get_args

from outrider.bench.data_sets import DATA_SETS
from outrider.bench.workloads import Workload
from outrider.cli import options as opt
from outrider.cli.console import note, progress_bar, stdout_console
from outrider.cli.option_groups import CacheOptions, DraftOptions, ModelOptions, ReportOptions, with_groups
from outrider.cli.options import (
    MAX_TOGETHER,
    MEASURING,
    SAMPLING,
    EngineOptions,
    base_seed,
    option,
    parse_numbers,
    require_in_range,
)
from outrider.cli.prompts import chosen_workload
from outrider.config import EngineConfig, SchedulerConfig
from outrider.config.draft_models import GrowthName
from outrider.errors import ConfigError
from outrider.sampling.params import SamplingParams
from outrider.verification.descriptions import RULE_DESCRIPTIONS

if TYPE_CHECKING:
    from rich.table import Table

    from outrider.bench.acceptance import AcceptanceRow, AcceptanceRuns
    from outrider.llm import LLM

DEFAULT_NUM_PROMPTS = 8
DEFAULT_WORKLOADS = "code,edit,random"
GROWTHS = get_args(GrowthName)
Growths = Annotated[
    str | None,
    option(
        "--growth",
        help=f"Also measure draft_model with trees that grow so: all, or some of {', '.join(GROWTHS)}.",
        panel=opt.DRAFTING,
        metavar="NAME,...",
    ),
]


@with_groups
def acceptance(
    *,
    target: ModelOptions,
    drafter: opt.Drafters = None,
    drafting: DraftOptions,
    growths: Growths = None,
    rules: Annotated[
        str,
        option(
            "--verification",
            help=f"Rules to run under: {opt.VERIFICATION_HELP}.",
            panel=opt.DRAFTING,
            metavar="RULE,...",
        ),
    ] = EngineConfig.verification,
    budgets: Annotated[
        str, option("--budget", help="Most draft tokens of a step.", panel=MEASURING, metavar="N,...")
    ] = "8,16,32",
    workloads: Annotated[
        str, option("--workload", "--workloads", help="Kinds of prompts.", panel=MEASURING, metavar="NAME,...")
    ] = DEFAULT_WORKLOADS,
    prompts: Annotated[
        int, option("--prompts", "-p", help="Prompts of each workload.", panel=MEASURING)
    ] = DEFAULT_NUM_PROMPTS,
    data: opt.DataFile = None,
    batch_size: opt.BatchSize = 1,
    max_tokens: opt.MaxTokens = 128,
    temperatures: Annotated[
        str | None,
        option(
            "--temperature",
            "-t",
            help="0 is greedy decoding. Default: 0; for random prompts 1.5.",
            panel=SAMPLING,
            metavar="T,...",
        ),
    ] = None,
    seed: opt.Seed = None,
    cache: CacheOptions,
    max_batch_tokens: opt.MaxBatchTokens = SchedulerConfig.max_batch_tokens,
    threads: opt.Threads = None,
    report: ReportOptions,
) -> None:
    """Compare drafters by tokens a step at equal numbers of draft tokens, whatever the machine.

    An interruption prints the rows that are finished.
    """
    names = _names(rules, "--verification", RULE_DESCRIPTIONS)
    nodes = _budgets(budgets)
    heats = None if temperatures is None else parse_numbers(temperatures, "--temperature", float)
    require_in_range("--batch-size", batch_size, 1, MAX_TOGETHER)
    wanted = _workloads(workloads, prompts, data)
    plan = [(of, heat) for of in wanted for heat in (heats or [of.temperature])]
    params = [SamplingParams(temperature=heat, max_tokens=max_tokens, seed=base_seed(seed, 1)) for _, heat in plan]
    engine = EngineOptions.of(
        target,
        drafting,
        cache,
        max_num_seqs=batch_size,
        max_batch_tokens=max_batch_tokens,
        threads=threads,
        prefix_caching=False,
    )
    specs = chosen_specs(drafter, growths, engine)
    if not specs:
        raise ConfigError("--decoding", got="none", expected="a drafter to measure")
    report.check()
    llm = engine.load("none")

    from outrider.bench.acceptance import AcceptanceRuns

    runs = AcceptanceRuns(llm, specs, nodes, max_tokens, params[0].seed or 0, batch_size)
    runs.contenders()  # a budget that a drafter refuses is an error before anything runs
    encoded = {of.name: encode_for(llm, of, max_tokens) for of in wanted}
    settings = {
        "command": ["outrider", *sys.argv[1:]],
        "config": asdict(llm.config),
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "drafters": specs,
        "budgets": nodes,
        "rules": names,
        "batch_size": batch_size,
        "max_tokens": max_tokens,
        "seed": params[0].seed,
        "workloads": [of.record(encoded[of.name]) for of in wanted],
    }
    try:
        _measure(runs, plan, encoded, names)
    finally:
        _report(runs.rows, settings, report)


def chosen_specs(drafter: list[str] | None, growths: str | None, engine: EngineOptions) -> dict[str, dict[str, Any]]:
    """Of the drafters named but "none", and of draft_model with every growth named.

    Raises:
        ConfigError: an unknown growth, or none can be had without a draft model.
    """
    chosen = [name for name in opt.drafter_names(drafter, engine) if name != "none"]
    if growths is None:
        return opt.drafter_specs(chosen, engine)
    grown = _names(",".join(GROWTHS) if growths == "all" else growths, "--growth", GROWTHS)
    if engine.model is not None and engine.draft_model is None:
        raise ConfigError("--growth", got="no draft model", expected="one by --draft-model")
    specs = opt.drafter_specs([*chosen, "draft_model"], engine)

    from outrider.bench.acceptance import growth_specs

    return {**{name: specs[name] for name in chosen}, **growth_specs(grown, specs["draft_model"])}


def encode_for(llm: LLM, workload: Workload, max_tokens: int) -> list[list[int]]:
    """Token ids of a workload's prompts, with room for the output in the model's context."""
    return workload.encode(
        llm.tokenizer.encode,
        vocab_size=llm.model.vocab_size,
        room=llm.model.context_length - max_tokens,
        special=llm.model.eos_token_ids,
    )


def _budgets(text: str) -> list[int]:
    budgets: list[int] = parse_numbers(text, "--budget", int)
    if not all(1 <= budget <= 1024 for budget in budgets):
        raise ConfigError("--budget", got=repr(text), expected="integers from 1 to 1024")
    return budgets


def _workloads(names: str, num_prompts: int, data: str | None) -> list[Workload]:
    """The workloads named; the data file is for those that take one."""
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",")))
    if data is not None and not set(chosen) & set(DATA_SETS):
        raise ConfigError("--data", got=f"workloads {names}", expected=f"one of {', '.join(DATA_SETS)} among them")
    return [
        chosen_workload(name, str(num_prompts), data if name in DATA_SETS else None, num_prompts) for name in chosen
    ]


def _names(text: str, name: str, known: Any) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    for unknown in names:
        if unknown not in known:
            raise ConfigError(name, got=repr(unknown), expected=f"some of {', '.join(known)}")
    return list(dict.fromkeys(names))


def _measure(
    runs: AcceptanceRuns, plan: list[tuple[Workload, float]], encoded: dict[str, list[list[int]]], rules: list[str]
) -> None:
    with progress_bar() as progress:
        task = progress.add_task("measuring", total=len(plan) * (1 + len(rules) * len(runs.contenders())))
        finished = count()
        for workload, temperature in plan:
            runs.run(
                workload.name,
                encoded[workload.name],
                temperature,
                rules,
                lambda name: progress.update(task, completed=next(finished), description=name),
            )


def _report(rows: list[AcceptanceRow], settings: dict[str, Any], report: ReportOptions) -> None:
    from outrider.bench.report import environment

    if not rows:
        note("nothing was measured")
        return
    date = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    results = [row.record() for row in rows]
    record = {"benchmark": "acceptance", "date": date, **environment(), **settings, "results": results}
    report.write(record)
    if report.json_out:
        return
    config = settings["config"]
    title = (
        f"tokens a step: {config['model'] or 'bundled model'}, {settings['dtype']}, weights {config['weights']}, "
        f"batch {settings['batch_size']}, up to {settings['max_tokens']} tokens"
    )
    console = stdout_console()
    console.print(_table(rows, title))
    console.print("Draft tokens, and ms in the drafter, are per step and request, over all columns.")
    if any(row.num_equal not in (None, row.num_outputs) for row in rows):
        console.print("Some outputs differ from plain decoding's; `outrider verify` tells ties from bugs.")


def _table(rows: list[AcceptanceRow], title: str) -> Table:
    """A row a rule, drafter and budget; a column a workload and temperature."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    columns = list(dict.fromkeys((row.workload, row.temperature) for row in rows))
    lines: dict[tuple[str, str, int], dict[tuple[str, float], AcceptanceRow]] = {}
    for row in rows:
        lines.setdefault((row.rule, row.drafter, row.budget), {})[row.workload, row.temperature] = row
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in ("rule", "drafter"):
        table.add_column(heading, no_wrap=True)
    headings = [f"{workload} t={temperature:g}" for workload, temperature in columns]
    for heading in ("budget", *headings, "draft tokens", "draft ms", "identical"):
        table.add_column(heading, justify="right")
    for (rule, drafter, budget), of in lines.items():
        lengths = [f"{of[column].acceptance_length:.2f}" if column in of else "-" for column in columns]
        num_steps = sum(row.num_steps for row in of.values())
        drafted = sum(row.draft_tokens_per_step * row.num_steps for row in of.values()) / max(1, num_steps)
        draft_ms = sum(row.draft_ms * row.num_steps for row in of.values()) / max(1, num_steps)
        numbers = [f"{drafted:.1f}", f"{draft_ms:.3f}"]
        table.add_row(rule, drafter, str(budget), *lengths, *numbers, _identical(of.values()))
    return table


def _identical(rows: Any) -> str:
    compared = [row for row in rows if row.num_equal is not None]
    if not compared:
        return "-"
    equal, total = sum(row.num_equal for row in compared), sum(row.num_outputs for row in compared)
    text = f"{equal}/{total}"
    return text if equal == total else f"[yellow]{text}[/]"
