"""`outrider bench`: how fast every way of decoding is, on the user's model and machine."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from itertools import count
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli import options as opt
from outrider.cli.bench_acceptance import Growths, acceptance, chosen_specs, encode_for
from outrider.cli.bench_kernels import forward, kernels
from outrider.cli.console import note, progress_bar, stdout_console
from outrider.cli.option_groups import (
    CacheOptions,
    DraftOptions,
    ModelOptions,
    ReportOptions,
    WorkloadOptions,
    with_groups,
)
from outrider.cli.options import (
    MAX_REPEATS,
    MAX_TOGETHER,
    MEASURING,
    EngineOptions,
    base_seed,
    require_in_range,
)
from outrider.config import EngineConfig, SchedulerConfig
from outrider.sampling.params import SamplingParams

if TYPE_CHECKING:
    from outrider.bench.runner import Contender, Results
    from outrider.llm import LLM

DEFAULT_NUM_PROMPTS = 8

bench_app = typer.Typer(
    help="Measure speed; every figure stands beside the equality of its output.", no_args_is_help=True
)


bench_app.command()(kernels)
bench_app.command()(forward)
bench_app.command()(acceptance)


@bench_app.callback()
def _bench() -> None:
    pass


@bench_app.command("decode")
@with_groups
def decode(
    *,
    target: ModelOptions,
    drafter: opt.Drafters = None,
    drafting: DraftOptions,
    growths: Growths = None,
    verification: opt.Verification = EngineConfig.verification,
    source: WorkloadOptions,
    batch_size: opt.BatchSize = 1,
    repeats: Annotated[
        int, opt.option("--repeats", "-r", help="Times that every contender runs.", panel=MEASURING)
    ] = 3,
    with_transformers: Annotated[
        bool,
        typer.Option(
            "--transformers/--no-transformers",
            help="Also measure generate() of transformers: plain, assisted, prompt lookup.",
            rich_help_panel=MEASURING,
        ),
    ] = True,
    max_tokens: opt.MaxTokens = 128,
    temperature: opt.WorkloadTemperature = None,
    seed: opt.Seed = None,
    cache: CacheOptions,
    max_batch_tokens: opt.MaxBatchTokens = SchedulerConfig.max_batch_tokens,
    threads: opt.Threads = None,
    report: ReportOptions,
) -> None:
    """Measure plain decoding, every drafter and transformers on the same weights and prompts.

    The contenders take turns; an interruption prints what there is.
    """
    wanted = source.chosen(DEFAULT_NUM_PROMPTS)
    require_in_range("--batch-size", batch_size, 1, MAX_TOGETHER)
    require_in_range("--repeats", repeats, 1, MAX_REPEATS)
    temperature = wanted.temperature if temperature is None else temperature
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=base_seed(seed, 1))
    engine = EngineOptions.of(
        target,
        drafting,
        cache,
        verification=verification,
        max_num_seqs=batch_size,
        max_batch_tokens=max_batch_tokens,
        threads=threads,
        prefix_caching=False,
    )
    specs = chosen_specs(drafter, growths, engine)
    report.check()
    llm = engine.load("none")
    prompt_ids = encode_for(llm, wanted, max_tokens)
    contenders = _contenders(
        llm, specs, params, batch_size, draft_model=drafting.draft_model, with_transformers=with_transformers
    )

    from outrider.bench.runner import Results

    results = Results()
    settings = {
        "command": ["outrider", *sys.argv[1:]],
        "config": asdict(llm.config),
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "drafters": specs,
        "sampling": asdict(params),
        "batch_size": batch_size,
        "repeats": repeats,
        "warm_up": "8 tokens of another prompt before every run, after a fresh start of the drafter",
        "prompts": wanted.record(prompt_ids),
    }
    try:
        _measure(contenders, prompt_ids, repeats, results)
    finally:
        _report(results, contenders, settings, report)


def _contenders(
    llm: LLM,
    specs: dict[str, dict[str, Any]],
    params: SamplingParams,
    batch_size: int,
    *,
    draft_model: str | None,
    with_transformers: bool,
) -> list[Contender]:
    from outrider.bench.runner import PLAIN, OutriderContender, transformers_contenders

    contenders: list[Contender] = [
        OutriderContender(name, llm, spec, params, batch_size)
        for name, spec in {PLAIN: {"method": "none"}, **specs}.items()
    ]
    if with_transformers:
        contenders += transformers_contenders(llm, draft_model, params, batch_size)
    return contenders


def _measure(contenders: list[Contender], prompts: list[list[int]], repeats: int, results: Results) -> None:
    from outrider.bench.runner import run_rounds

    with progress_bar() as progress:
        task = progress.add_task("measuring", total=repeats * len(contenders))
        finished = count()

        def on_start(name: str) -> None:
            progress.update(task, completed=next(finished), description=name)

        run_rounds(contenders, prompts, repeats, results, on_start)


def _report(results: Results, contenders: list[Contender], settings: dict[str, Any], report: ReportOptions) -> None:
    """Print and write what was measured."""

    from outrider.bench.report import environment, speed_table, step_table, summarise

    comparable = {contender.name: contender.comparable for contender in contenders}
    summaries = [summarise(name, results, comparable[name]) for name in results.complete()]
    if not summaries:
        note("nothing was measured")
        return
    record = {
        "benchmark": "decode",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **environment(),
        **settings,
        "results": summaries,
    }
    report.write(record)
    if report.json_out:
        return
    console = stdout_console()
    machine, prompts = record["machine"], settings["prompts"]
    config = settings["config"]
    title = (
        f"{config['model'] or 'bundled model'}, {settings['dtype']}, weights {config['weights']}, "
        f"{config['exactness']}, workload {prompts['workload']}, "
        f"temperature {settings['sampling']['temperature']:g}, batch {settings['batch_size']}, "
        f"{prompts['count']} prompts, up to {settings['sampling']['max_tokens']} tokens, "
        f"{settings['repeats']} repeats; {machine['cpu']}, {machine['torch_threads']} threads"
    )
    console.print(speed_table(summaries, title), step_table(summaries))
    if any(summary["num_equal"] not in (None, summary["num_outputs"]) for summary in summaries):
        console.print("Some outputs differ from plain decoding's; `outrider verify` tells ties from bugs.")
