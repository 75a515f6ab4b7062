"""`outrider verify`: the losslessness report of a model, its drafters and this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli import options as opt
from outrider.cli.console import note, progress_bar, report_json, stdout_console
from outrider.cli.options import ENGINE, SAMPLING, EngineOptions, base_seed, option, parse_numbers
from outrider.cli.prompts import prompts_or_held_out
from outrider.config import CacheConfig, EngineConfig
from outrider.errors import ConfigError
from outrider.sampling.params import SamplingParams

if TYPE_CHECKING:
    from outrider.losslessness.report import Mismatch, Report, Setting

DEFAULT_NUM_PROMPTS = 16
MAX_EXPLAINED = 10  # mismatches printed in full; the JSON has all


def verify(
    *,
    model: opt.Model = None,
    revision: opt.Revision = None,
    dtype: opt.Dtype = EngineConfig.dtype,
    device: opt.Device = EngineConfig.device,
    drafter: opt.Drafters = None,
    draft_model: opt.DraftModel = None,
    drafter_settings: opt.DrafterSettings = None,
    verification: opt.Verification = EngineConfig.verification,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", "-p", help="A file of prompts, or how many pieces of held-out code."),
    ] = None,
    max_tokens: opt.MaxTokens = 32,
    temperatures: Annotated[
        str | None,
        option("--temperatures", help="Verify these instead of the default settings.", panel=SAMPLING, metavar="T,..."),
    ] = None,
    seed: opt.Seed = None,
    batch_sizes: Annotated[
        str, option("--batch-sizes", help="Prompts that run together.", panel=ENGINE, metavar="N,...")
    ] = "1,4,16",
    exactness: opt.ExactnessMode = EngineConfig.exactness,
    cache_gb: opt.CacheGb = CacheConfig.memory_gb,
    threads: opt.Threads = None,
    json_out: opt.JsonOut = False,
    output: opt.OutputFile = None,
) -> None:
    """Hold every drafter's output against plain decoding's, token for token.

    Exit status 0: all equal, but for proven numerical ties; 1: a difference that rounding does not explain.
    """
    wanted, source = prompts_or_held_out(prompts, DEFAULT_NUM_PROMPTS)
    engine = EngineOptions(
        model=model,
        revision=revision,
        dtype=dtype,
        device=device,
        draft_model=draft_model,
        drafter_settings=drafter_settings,
        verification=verification,
        exactness=exactness,
        cache_gb=cache_gb,
        threads=threads,
    )
    names = opt.drafter_names(drafter, engine)
    specs = opt.drafter_specs(names, engine)
    sizes = parse_numbers(batch_sizes, "--batch-sizes", int)
    if not sizes or min(sizes) < 1:
        raise ConfigError("--batch-sizes", got=repr(batch_sizes), expected="integers of at least 1")
    first_seed = base_seed(seed, len(wanted))
    chosen = _chosen_params(temperatures, max_tokens, first_seed)

    plain = engine.load("none")
    from outrider.losslessness.report import Setting, Verifier, default_settings

    settings = [Setting(name, params) for name, params in chosen] or default_settings(max_tokens, first_seed)
    settings = _settings_for_rule(settings, verification)
    llms = {name: plain.with_drafter(spec) for name, spec in specs.items()}
    batches = {"none": plain.with_drafter("none")} if max(sizes) > 1 else {}
    verifier = Verifier(plain, {**batches, **llms}, wanted, sizes)
    try:
        with progress_bar() as progress:
            task = progress.add_task("verifying", total=verifier.num_generations(len(settings)))
            verifier.run(settings, lambda count: progress.advance(task, count))
    finally:
        report = verifier.report
        record = {
            "model": plain.model.name,
            "dtype": str(plain.model.dtype).removeprefix("torch."),
            "exactness": exactness,
            "verification": verification,
            "drafters": specs,
            "prompts": {"source": source, "count": len(wanted)},
            "max_tokens": max_tokens,
            "seed": first_seed,
            **report.record(),
        }
        report_json(record, to_stdout=json_out, path=output)
        if not json_out:
            _print_report(report, record)
    if report.num_bugs:
        raise typer.Exit(1)


def _chosen_params(temperatures: str | None, max_tokens: int, seed: int) -> list[tuple[str, SamplingParams]]:
    """A setting for each temperature asked for; checked before the model is loaded."""
    SamplingParams(max_tokens=max_tokens)
    if temperatures is None:
        return []
    return [
        (f"temperature {value:g}", SamplingParams(temperature=value, max_tokens=max_tokens, seed=seed))
        for value in parse_numbers(temperatures, "--temperatures", float)
    ]


def _settings_for_rule(settings: list[Setting], verification: str) -> list[Setting]:
    """All settings for the coupled rule; for the others the greedy ones, where they too promise equal tokens.

    Raises:
        ConfigError: none is left.
    """
    if verification == "coupled":
        return settings
    greedy = [setting for setting in settings if setting.params.greedy]
    if not greedy:
        raise ConfigError(
            f"verifying the rule {verification!r}",
            got="sampling",
            expected="temperature 0",
            remedy="it is exact in distribution, not token for token; verify it greedily, or verify 'coupled'",
        )
    note(f"{verification} is exact in distribution, not token for token: verifying its greedy settings only")
    return greedy


def _print_report(report: Report, record: dict[str, Any]) -> None:
    from rich.table import Table

    console = stdout_console()
    table = Table(title=f"{record['model']}, {record['dtype']}, {record['exactness']}", title_justify="left")
    for heading in ("setting", "drafter", "batch"):
        table.add_column(heading)
    for heading in ("outputs", "equal", "ties", "bugs", "tokens", "tokens a step"):
        table.add_column(heading, justify="right")
    for cell in report.cells:
        style = "red" if cell.num_bugs else "yellow" if cell.num_ties else None
        counts = (cell.num_outputs, cell.num_equal, cell.num_ties, cell.num_bugs, cell.num_tokens)
        table.add_row(
            cell.setting,
            cell.drafter,
            str(cell.batch_size),
            *map(str, counts),
            f"{cell.acceptance_length:.2f}",
            style=style,
        )
    console.print(table)
    worst_first = sorted(report.mismatches, key=lambda mismatch: mismatch.explanation.verdict)
    for mismatch in worst_first[:MAX_EXPLAINED]:
        console.print(_explained(mismatch), markup=False)
    if len(worst_first) > MAX_EXPLAINED:
        console.print(f"... and {len(worst_first) - MAX_EXPLAINED} more (--json has all)")
    console.print(
        f"{report.num_equal} of {report.num_outputs} outputs equal plain decoding's, "
        f"{report.num_ties} numerical ties, {report.num_bugs} bugs"
    )


def _explained(mismatch: Mismatch) -> str:
    of = mismatch.explanation
    top = ", ".join(f"{token}: {logit:.4f}" for token, logit in of.top_two)
    return (
        f"{of.verdict}: {mismatch.drafter}, {mismatch.setting}, batch {mismatch.batch_size}, "
        f"prompt {mismatch.prompt_index}, output token {of.position}: plain {of.plain_token} "
        f"{mismatch.plain_text!r}, other {of.other_token} {mismatch.other_text!r}; top two logits {top} "
        f"(gap {of.top_two_gap:.3g}); shapes differ by {of.delta:.3g}; {of.reason}"
    )
