"""`outrider demo`: the whole idea in a minute, on the bundled model."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Annotated

import typer

from outrider.cli import options as opt
from outrider.cli.console import progress_bar, stderr_console, stdout_console
from outrider.cli.options import SAMPLING, EngineOptions, base_seed, option
from outrider.errors import PromptError
from outrider.sampling.params import SamplingParams

if TYPE_CHECKING:
    from typing import Any

    from outrider.llm import LLM

DEMO_PROMPT = '''def flatten(items):
    """Return the elements of nested lists, in order."""
'''
DEMO_TEMPERATURES = (0.0, 0.8)
REPEATS = 3


def demo(
    prompt: Annotated[str, typer.Argument(help="Code to continue.")] = DEMO_PROMPT,
    *,
    max_tokens: opt.MaxTokens = 128,
    temperature: Annotated[
        float | None, option("--temperature", "-t", help="Without it 0 and 0.8 in turn.", panel=SAMPLING)
    ] = None,
    seed: opt.Seed = 7,
    threads: opt.Threads = None,
) -> None:
    """Continue a piece of code by plain decoding and by every drafter: the same text, in less time."""
    first_seed = base_seed(seed, 1)
    settings = [
        SamplingParams(temperature=value, max_tokens=max_tokens, seed=first_seed)
        for value in (DEMO_TEMPERATURES if temperature is None else (temperature,))
    ]
    if not prompt:
        raise PromptError("prompt", got="no text", expected="at least one token")
    engine = EngineOptions(threads=threads, prefix_caching=False)
    specs = opt.drafter_specs(["none", *opt.drafter_names(["all"], engine)], engine)
    with stderr_console().status("loading the bundled model"):
        llm = engine.load("none")
    all_equal = [_decode_and_show(llm, specs, prompt, params) for params in settings]
    if all(all_equal):
        print("Every drafter gave the tokens of plain decoding.")
    else:
        print("A drafter gave other tokens than plain decoding: `outrider verify` tells ties from bugs.")


def _decode_and_show(llm: LLM, specs: dict[str, dict[str, Any]], prompt: str, params: SamplingParams) -> bool:
    """Decode in every way, print the text and the speeds; returns whether all outputs are equal."""
    from rich.syntax import Syntax

    from outrider.bench.report import speed_table, summarise
    from outrider.bench.runner import PLAIN, OutriderContender, Results, run_rounds

    contenders = [OutriderContender(name, llm, spec, params, batch_size=1) for name, spec in specs.items()]
    results = Results()
    with progress_bar() as progress:
        task = progress.add_task("decoding", total=REPEATS * len(contenders))
        finished = count()

        def on_start(name: str) -> None:
            progress.update(task, completed=next(finished), description=name)

        run_rounds(contenders, [llm.tokenizer.encode(prompt)], REPEATS, results, on_start)
    token_ids = results.samples[PLAIN][0].token_ids[0]
    how = "greedy" if params.greedy else f"temperature {params.temperature:g}, seed {params.seed}"
    title = f"bundled model, {how}, {len(token_ids)} tokens, {REPEATS} repeats"
    summaries = [summarise(name, results, comparable=True) for name in specs]
    console = stdout_console()
    code = Syntax(prompt + llm.tokenizer.decode(token_ids), "python", background_color="default", word_wrap=True)
    console.print(code, speed_table(summaries, title), sep="\n")
    return all(summary["num_equal"] == summary["num_outputs"] for summary in summaries)
