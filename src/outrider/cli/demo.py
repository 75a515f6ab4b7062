"""`outrider demo`: the whole idea in a minute, on the bundled model."""

from __future__ import annotations

from typing import Annotated

import typer

from outrider.cli import options as opt
from outrider.cli.console import progress_bar, stdout_console
from outrider.cli.options import EngineOptions, base_seed
from outrider.errors import PromptError
from outrider.sampling.params import SamplingParams

DEMO_PROMPT = '''def flatten(items):
    """Return the elements of nested lists, in order."""
'''
REPEATS = 3


def demo(
    prompt: Annotated[str, typer.Argument(help="Code to continue.")] = DEMO_PROMPT,
    *,
    max_tokens: opt.MaxTokens = 128,
    temperature: opt.Temperature = 0.0,
    seed: opt.Seed = None,
    threads: opt.Threads = None,
) -> None:
    """Continue a piece of code by plain decoding and by every drafter: the same text, in less time."""
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=base_seed(seed, 1))
    if not prompt:
        raise PromptError("prompt", got="no text", expected="at least one token")
    engine = EngineOptions(threads=threads, prefix_caching=False)
    specs = opt.drafter_specs(["none", *opt.drafter_names(["all"], engine)], engine)

    from rich.syntax import Syntax

    console = stdout_console()
    with console.status("loading the bundled model"):
        llm = engine.load("none")
    from outrider.bench.report import speed_table, summarise
    from outrider.bench.runner import PLAIN, OutriderContender, Results, run_rounds

    contenders = [OutriderContender(name, llm, spec, params, batch_size=1) for name, spec in specs.items()]
    prompt_ids = llm.tokenizer.encode(prompt)
    results = Results()
    with progress_bar() as progress:
        task = progress.add_task("decoding", total=REPEATS * len(contenders), completed=-1)
        run_rounds(contenders, [prompt_ids], REPEATS, results, lambda _: progress.advance(task))
    text = llm.tokenizer.decode(results.samples[PLAIN][0].token_ids[0])
    console.print(Syntax(prompt + text, "python", background_color="default", word_wrap=True))
    summaries = [summarise(name, results, comparable=True) for name in specs]
    size = f"{sum(p.numel() for p in llm.model.module.parameters()) / 1e6:.1f}M parameters"
    console.print(speed_table(summaries, f"bundled model, {size}, {max_tokens} tokens", brief=True))
    if all(summary["num_equal"] == summary["num_outputs"] for summary in summaries):
        console.print("Every drafter gave the tokens of plain decoding.")
    else:
        console.print("A drafter gave other tokens than plain decoding; `outrider verify` tells ties from bugs.")
