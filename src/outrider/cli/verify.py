"""`outrider verify`: the losslessness report of a model, its drafters and this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli import options as opt
from outrider.cli.console import note, progress_bar, stdout_console
from outrider.cli.option_groups import CacheOptions, DraftOptions, ModelOptions, ReportOptions, with_groups
from outrider.cli.options import ENGINE, SAMPLING, EngineOptions, base_seed, option, parse_numbers
from outrider.cli.prompts import prompts_or_held_out
from outrider.config import EngineConfig
from outrider.errors import ConfigError
from outrider.losslessness.settings import Setting, default_settings, temperature_settings

if TYPE_CHECKING:
    from outrider.losslessness.report import Cell, Mismatch, Report, Verifier

DEFAULT_NUM_PROMPTS = 16
DEFAULT_MAX_TOKENS = 24
MAX_EXPLAINED = 8  # divergences printed; the JSON has all


@with_groups
def verify(
    *,
    target: ModelOptions,
    drafter: opt.Drafters = None,
    drafting: DraftOptions,
    verification: opt.Verification = EngineConfig.verification,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", "-p", help="A file of prompts, or how many pieces of held-out code."),
    ] = None,
    max_tokens: opt.MaxTokens = DEFAULT_MAX_TOKENS,
    temperatures: Annotated[
        str | None,
        option(
            "--temperatures",
            help="Verify these instead of the default settings.",
            panel=SAMPLING,
            metavar="T,...",
        ),
    ] = None,
    seed: opt.Seed = None,
    batch_sizes: Annotated[
        str, option("--batch-sizes", help="Prompts that run together.", panel=ENGINE, metavar="N,...")
    ] = "1,4,16",
    cache: CacheOptions,
    threads: opt.Threads = None,
    report: ReportOptions,
) -> None:
    """Hold every drafter's output against plain decoding's, token for token.

    Exit status 0: all equal, but for proven numerical ties; 1: a difference that rounding does not explain.
    """
    wanted, source = prompts_or_held_out(prompts, DEFAULT_NUM_PROMPTS)
    engine = EngineOptions.of(target, drafting, cache, verification=verification, threads=threads)
    names = opt.drafter_names(drafter, engine)
    specs = {"none": {"method": "none"}, **opt.drafter_specs(names, engine)}
    sizes = _sizes(batch_sizes)
    if list(specs) == ["none"] and max(sizes) == 1:
        raise ConfigError("--decoding", got="none alone, one prompt at a time", expected="something to compare")
    settings = _settings(temperatures, max_tokens, base_seed(seed, len(wanted)), verification)
    report.check()

    plain = engine.load("none")
    from outrider.losslessness.report import Verifier

    llms = {name: plain.with_decoding(spec) for name, spec in specs.items()}
    verifier = Verifier(plain, llms, wanted, sizes)
    record = {
        "model": plain.model.name if target.model else "bundled model",
        "dtype": str(plain.model.dtype).removeprefix("torch."),
        "weights": plain.config.weights,
        "exactness": plain.config.exactness,
        "verification": verification,
        "drafters": specs,
        "settings": {setting.name: str(setting.params) for setting in settings},
        "prompts": {"source": source, "count": len(wanted)},
    }
    try:
        _run(verifier, settings)
    finally:  # an interruption reports what there is
        report.write({**record, **verifier.report.record()})
        if not report.json_out:
            _print_report(verifier.report, record)
    if verifier.report.num_bugs:
        raise typer.Exit(1)


def _sizes(text: str) -> list[int]:
    sizes: list[int] = parse_numbers(text, "--batch-sizes", int)
    if min(sizes) < 1:
        raise ConfigError("--batch-sizes", got=repr(text), expected="integers of at least 1")
    return sizes


def _settings(temperatures: str | None, max_tokens: int, seed: int, verification: str) -> list[Setting]:
    """The settings asked for; of a rule that is exact in distribution only the greedy ones.

    Raises:
        ConfigError: none is left.
    """
    if temperatures is None:
        settings = default_settings(max_tokens, seed)
    else:
        settings = temperature_settings(parse_numbers(temperatures, "--temperatures", float), max_tokens, seed)
    if verification == "coupled":
        return settings
    greedy = [setting for setting in settings if setting.params.greedy]
    if not greedy:
        raise ConfigError(
            f"verifying the rule {verification!r}",
            got="sampling",
            expected="temperature 0",
            remedy="it is exact in distribution, not token for token; verify it greedily, or 'coupled'",
        )
    note(f"{verification} is exact in distribution, not token for token: verifying its greedy settings only")
    return greedy


def _run(verifier: Verifier, settings: list[Setting]) -> None:
    with progress_bar() as progress:
        task = progress.add_task("verifying", total=verifier.num_generations(len(settings)))
        verifier.run(settings, lambda count: progress.advance(task, count))


def _print_report(report: Report, record: dict[str, Any]) -> None:
    from rich.table import Table

    console = stdout_console()
    title = (
        "outputs equal to plain decoding's: {model}, {dtype}, weights {weights}, {exactness}, {verification}, "
        "{count} prompts"
    )
    table = Table(
        title=title.format(**record, count=record["prompts"]["count"]), title_justify="left", highlight=False
    )
    sizes = sorted({cell.batch_size for cell in report.cells})
    for heading in ("setting", "drafter"):
        table.add_column(heading, no_wrap=True)
    for heading in (*(f"batch {size}" for size in sizes), "tokens", "tokens a step"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows: dict[tuple[str, str], dict[int, Cell]] = {}
    for cell in report.cells:
        rows.setdefault((cell.setting, cell.drafter), {})[cell.batch_size] = cell
    for (setting, drafter), cells in rows.items():
        num_tokens = sum(cell.num_tokens for cell in cells.values())
        num_steps = sum(cell.num_steps for cell in cells.values())
        counts = [_counts(cells[size]) if size in cells else "-" for size in sizes]
        table.add_row(setting, drafter, *counts, str(num_tokens), f"{num_tokens / max(1, num_steps):.2f}")
    console.print(table)
    explained = _explanations(report.mismatches)
    for line in explained[:MAX_EXPLAINED]:
        console.print(line, markup=False)
    if len(explained) > MAX_EXPLAINED:
        console.print(f"... and {len(explained) - MAX_EXPLAINED} more (--json has all)")
    console.print(
        f"{report.num_equal} of {report.num_outputs} outputs are equal, "
        f"{report.num_ties} differ by a numerical tie, {report.num_bugs} by a bug"
    )


def _counts(cell: Cell) -> str:
    text = f"{cell.num_equal}/{cell.num_outputs}"
    if cell.num_ties:
        text += f" [yellow]{cell.num_ties} tied[/]"
    if cell.num_bugs:
        text += f" [red]{cell.num_bugs} WRONG[/]"
    return text


def _explanations(mismatches: list[Mismatch]) -> list[str]:
    """A line for each divergence, bugs first; batch sizes and drafters that diverged alike share it."""
    who: dict[str, tuple[str, list[str]]] = {}
    for mismatch in mismatches:
        of = mismatch.explanation
        top = ", ".join(f"{token}: {logit:.4f}" for token, logit in of.top_two)
        text = (
            f"{mismatch.setting}, prompt {mismatch.prompt_index}, output token {of.position}: "
            f"plain {of.plain_token} {mismatch.plain_text!r}, other {of.other_token} {mismatch.other_text!r}; "
            f"top two logits {top} (gap {of.top_two_gap:.3g}); shapes differ by {of.delta:.3g}; {of.reason}"
        )
        who.setdefault(text, (of.verdict, []))[1].append(f"{mismatch.drafter} at batch {mismatch.batch_size}")
    bugs_first = sorted(who.items(), key=lambda item: item[1][0])
    return [f"{verdict}: {text} ({', '.join(runs)})" for text, (verdict, runs) in bugs_first]
