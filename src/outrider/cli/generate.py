"""`outrider generate`: continue one prompt, or many, from the command line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli import options as opt
from outrider.cli.console import note, progress_bar
from outrider.cli.option_groups import CacheOptions, DraftOptions, ModelOptions, with_groups
from outrider.cli.options import OUTPUT, SAMPLING, EngineOptions, option
from outrider.cli.prompts import Prompt, read_prompts
from outrider.cli.records import InOrder, Record, ResultFile, output_record, settings_digest
from outrider.config import EngineConfig, SchedulerConfig
from outrider.errors import ConfigError, SamplingParamsError
from outrider.sampling.params import SamplingParams

if TYPE_CHECKING:
    from outrider.llm import LLM
    from outrider.outputs import RequestOutput


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample, and when to end; see `SamplingParams`."""

    max_tokens: opt.MaxTokens = 128
    temperature: opt.Temperature = SamplingParams.temperature
    top_k: Annotated[int, option("--top-k", help="0 keeps all.", panel=SAMPLING)] = SamplingParams.top_k
    top_p: Annotated[float, option("--top-p", help="In (0, 1].", panel=SAMPLING)] = SamplingParams.top_p
    min_p: Annotated[float, option("--min-p", help="In [0, 1].", panel=SAMPLING)] = SamplingParams.min_p
    repetition_penalty: Annotated[
        float, option("--repetition-penalty", help="Of tokens in prompt or output.", panel=SAMPLING)
    ] = SamplingParams.repetition_penalty
    presence_penalty: Annotated[
        float, option("--presence-penalty", help="Of tokens in the output.", panel=SAMPLING)
    ] = SamplingParams.presence_penalty
    frequency_penalty: Annotated[
        float, option("--frequency-penalty", help="Per occurrence in the output.", panel=SAMPLING)
    ] = SamplingParams.frequency_penalty
    logit_bias: Annotated[
        list[str] | None,
        option("--logit-bias", help="Added to a token's logit; repeat it.", panel=SAMPLING, metavar="ID=BIAS"),
    ] = None
    min_tokens: Annotated[int, option("--min-tokens", help="No end before so many tokens.", panel=SAMPLING)] = (
        SamplingParams.min_tokens
    )
    stop: Annotated[
        list[str] | None, option("--stop", help="String that ends the text; repeat it.", panel=SAMPLING)
    ] = None
    stop_token_id: Annotated[
        list[int] | None, option("--stop-token-id", help="Token id that ends it; repeat it.", panel=SAMPLING)
    ] = None
    ignore_eos: Annotated[
        bool, option("--ignore-eos", help="Go on after an end-of-sequence token.", panel=SAMPLING)
    ] = False
    n: Annotated[int, option("--n", "-n", help="Samples per prompt.", panel=SAMPLING)] = SamplingParams.n
    seed: opt.Seed = None
    logprobs: Annotated[
        int | None,
        option("--logprobs", help="With --json: so many alternatives of each token.", panel=SAMPLING),
    ] = None

    def params(self) -> SamplingParams:
        """Raises:
        SamplingParamsError: a value out of its range.
        """
        return SamplingParams(
            n=self.n,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=_parse_logit_bias(self.logit_bias or []),
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            stop=self.stop or (),
            stop_token_ids=self.stop_token_id or (),
            ignore_eos=self.ignore_eos,
            seed=self.seed,
            logprobs=self.logprobs,
        )


@with_groups
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; - reads one prompt from standard input.")
    ] = None,
    *,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            "-p",
            help='File of prompts, one per line, or JSONL with {"prompt": ...}; - is stdin.',
        ),
    ] = None,
    target: ModelOptions,
    drafter: opt.Drafter = None,
    drafting: DraftOptions,
    verification: opt.Verification = EngineConfig.verification,
    sampling: SamplingOptions,
    cache: CacheOptions,
    max_num_seqs: opt.MaxNumSeqs = SchedulerConfig.max_num_seqs,
    max_batch_tokens: opt.MaxBatchTokens = SchedulerConfig.max_batch_tokens,
    threads: opt.Threads = None,
    stream: Annotated[
        bool, option("--stream", help="Print the text as it comes (one prompt).", panel=OUTPUT)
    ] = False,
    json_out: Annotated[
        bool, option("--json", help="Print one JSON object per prompt and line.", panel=OUTPUT)
    ] = False,
    output: Annotated[
        str | None,
        option("--output", "-o", help="Append the JSON objects to this file as they come.", panel=OUTPUT),
    ] = None,
    resume: Annotated[
        bool, option("--resume", help="Skip the prompts that --output already holds.", panel=OUTPUT)
    ] = False,
) -> None:
    """Continue one prompt, or every prompt of a file."""
    params = sampling.params()
    engine = EngineOptions.of(
        target,
        drafting,
        cache,
        drafter=drafter,
        verification=verification,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        threads=threads,
    )
    _check_outputs(stream=stream, n=params.n, as_json=json_out or output is not None, output=output, resume=resume)
    wanted = read_prompts(prompt, prompts)
    if stream:
        if len(wanted) > 1:
            raise ConfigError("--stream", got=f"{len(wanted)} prompts", expected="one")
        _stream(engine.load(), wanted[0], params)
    elif output is not None:
        _generate_to_file(engine, wanted, params, output, resume=resume, as_json=json_out)
    else:
        _generate_to_stdout(engine.load(), wanted, params, as_json=json_out)


def _check_outputs(*, stream: bool, n: int, as_json: bool, output: str | None, resume: bool) -> None:
    if stream and (as_json or n > 1):
        raise ConfigError("--stream", got="--json or --output" if as_json else f"n={n}", expected="plain text, n=1")
    if resume and output is None:
        raise ConfigError("--resume", got="no --output", expected="the file to resume")


def _parse_logit_bias(values: Sequence[str]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for value in values:
        token, _, bias = value.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError as error:
            raise SamplingParamsError("--logit-bias", got=repr(value), expected="ID=BIAS, such as 42=-5") from error
    return biases


def _stream(llm: LLM, prompt: Prompt, params: SamplingParams) -> None:
    shown = 0
    output: RequestOutput | None = None
    try:
        for output in llm.stream(prompt, params):
            text = output.outputs[0].text
            print(text[shown:], end="", flush=True)
            shown = len(text)
    except BaseException:
        if shown:
            print(flush=True)  # what follows on the terminal begins a line of its own
        raise
    print(flush=True)
    if output is not None:
        _note_summary([output])


def _generate_to_stdout(llm: LLM, prompts: Sequence[Prompt], params: SamplingParams, *, as_json: bool) -> None:
    def emit(record: Record) -> None:
        if as_json:
            print(json.dumps(record, ensure_ascii=False), flush=True)
        else:
            _print_text(record, len(prompts))

    indices = range(len(prompts))
    with InOrder(indices, emit) as in_order:
        _note_summary(_generate(llm, prompts, params, indices, in_order.put))


def _generate_to_file(
    engine: EngineOptions,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    path: str,
    *,
    resume: bool,
    as_json: bool,
) -> None:
    """Append to the file in the order of finishing, so that nothing finished is lost to a kill."""
    with ExitStack() as stack:
        results = stack.enter_context(ResultFile(path, _digest(engine, params), resume=resume))
        done = results.finished(prompts) if resume else set()
        indices = [index for index in range(len(prompts)) if index not in done]
        if not indices:
            note(f"{path} holds all {len(prompts)} prompts already")
            return

        def emit(record: Record) -> None:
            results.write(record)
            if as_json:
                print(json.dumps(record, ensure_ascii=False), flush=True)

        outputs = _generate(engine.load(), [prompts[i] for i in indices], params, indices, emit)
        _note_summary(outputs)


def _digest(engine: EngineOptions, params: SamplingParams) -> str:
    """Of all that the tokens depend on; under the coupled rule the drafter is not among it."""
    settings: dict[str, Any] = {
        "model": _identity(engine.model),
        "revision": engine.revision,
        "dtype": engine.dtype,
        "weights": [engine.weights, engine.group_size, engine.cache_dtype],
        "verification": engine.verification,
        "exactness": engine.exactness,
        "device": engine.device,
        "params": asdict(params),
    }
    if engine.verification != "coupled":
        settings["drafter"] = engine.drafter_spec()
    return settings_digest(settings)


def _identity(model: str | None) -> str | None:
    return os.path.realpath(model) if model is not None and os.path.exists(model) else model


def _generate(
    llm: LLM,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    indices: Sequence[int],
    emit: Callable[[Record], None],
) -> list[RequestOutput]:
    """Generate for all prompts, handing on each one's record when it is finished, under its own index."""
    with progress_bar(enabled=len(prompts) > 1) as progress:
        task = progress.add_task("generating", total=len(prompts))

        def on_output(position: int, output: RequestOutput) -> None:
            emit(output_record(indices[position], output))
            progress.advance(task)

        return llm.generate(prompts, params, on_output=on_output)


def _print_text(record: Record, num_prompts: int) -> None:
    samples = record.get("outputs", [record])
    for number, sample in enumerate(samples, 1):
        if num_prompts > 1 or len(samples) > 1:
            of = f", sample {number} of {len(samples)}" if len(samples) > 1 else ""
            print(f"=== prompt {record['index'] + 1} of {num_prompts}{of}: {_first_line(record)}")
        print(sample.get("text", f"error: {record.get('error')}"), flush=True)


def _first_line(record: Record) -> str:
    line = str(record["prompt"] or record.get("prompt_token_ids")).strip().split("\n")[0]
    return line if len(line) <= 60 else f"{line[:57]}..."


def _note_summary(outputs: Sequence[RequestOutput]) -> None:
    """Speed and acceptance of the whole call, for whoever sits at the terminal."""
    samples = [sample for output in outputs for sample in output.outputs]
    num_tokens = sum(len(sample.token_ids) for sample in samples)
    num_steps = sum(sample.metrics.num_steps for sample in samples)
    start = min(sample.metrics.arrival_time for sample in samples)
    end = max((sample.metrics.finish_time or start for sample in samples), default=start)
    seed = f", seed {samples[0].seed}" if len(samples) == 1 else ""
    if end > start and sys.stderr.isatty():
        speed, length = num_tokens / (end - start), num_tokens / max(1, num_steps)
        note(f"{num_tokens} tokens, {speed:.1f} tokens/s, {length:.2f} tokens a step{seed}")
