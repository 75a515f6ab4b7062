"""`outrider advise`: which drafter, tree and length to use, measured here or predicted for another machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import count, cycle, islice
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from outrider.bench.hardware import KNOWN, LEAST_PROBE_BYTES, PROBE_CACHES, PROBED, THIS, Hardware, hardware_of
from outrider.cli import options as opt
from outrider.cli.bench_acceptance import encode_for
from outrider.cli.console import note, progress_bar, stdout_console
from outrider.cli.option_groups import ModelOptions, ReportOptions, WorkloadOptions, with_groups
from outrider.cli.options import MEASURING, EngineOptions, base_seed, option, require_in_range
from outrider.config import EngineConfig, Weights
from outrider.config.checks import check_weights
from outrider.errors import ConfigError
from outrider.sampling.params import SamplingParams

if TYPE_CHECKING:
    from outrider.bench.roofline import ModelFigures
    from outrider.bench.workloads import Workload
    from outrider.llm import LLM

DEFAULT_NUM_PROMPTS = 8
DEFAULT_CONTEXT = 512
LARGEST_RUN = 8  # sequences at once
MAX_CONTEXT, MAX_SECONDS = 1 << 24, 24 * 3600.0
PREDICTION = "Prediction"
# What a prediction has no use for: nothing is loaded, run or sampled.
MEASURED_ONLY = (
    *("dtype", "device", "exactness", "threads"),
    *("workload", "prompts", "data", "seconds", "recalibrate"),
    *("max_tokens", "temperature", "seed"),
)


@with_groups
def advise(
    ctx: typer.Context,
    *,
    target: ModelOptions,
    draft: Annotated[
        list[str] | None,
        option(
            "--draft",
            help="Draft model to try (repeatable): folder or hub id; for a prediction also a size such as 0.5B.",
            panel=opt.DRAFTING,
        ),
    ] = None,
    hardware: Annotated[
        str,
        option(
            "--hardware",
            help=f"{THIS}: measure; {', '.join(KNOWN)}, a JSON file, or this machine as a {PROBED} of a second finds "
            "it: predict.",
            panel=MEASURING,
        ),
    ] = THIS,
    source: WorkloadOptions,
    seconds: Annotated[
        float,
        option("--seconds", help="To spend on decoding; one round of all drafters always runs.", panel=MEASURING),
    ] = 60.0,
    recalibrate: Annotated[
        bool,
        option("--recalibrate", help="Measure anew what a forward costs, and keep that.", panel=MEASURING),
    ] = False,
    context: Annotated[
        int | None,
        option(
            "--context",
            help=f"Positions of a sequence. Default: the workload's, or {DEFAULT_CONTEXT} for a prediction.",
            panel=PREDICTION,
        ),
    ] = None,
    acceptance: Annotated[
        str | None,
        option(
            "--acceptance",
            help="How often a draft token is right, or a list by depth. Default: what the bundled pair measured.",
            panel=PREDICTION,
            metavar="P,...",
        ),
    ] = None,
    max_tokens: opt.MaxTokens = 128,
    temperature: opt.WorkloadTemperature = None,
    seed: opt.Seed = None,
    exactness: opt.ExactnessMode = EngineConfig.exactness,
    threads: opt.Threads = None,
    report: ReportOptions,
) -> None:
    """Say which drafter, tree and length to use, what it brings, and from which batch on plain decoding is as good.

    On this machine by measuring (an interruption advises on what there is); for another one, or for a model that is
    not at hand, from the machine's figures and the model's config.json alone.
    """
    if context is not None:
        require_in_range("--context", context, 0, MAX_CONTEXT)
    if not 0.0 < seconds <= MAX_SECONDS:
        raise ConfigError("--seconds", got=seconds, expected=f"above 0, at most {MAX_SECONDS}")
    engine = EngineOptions.of(
        target,
        exactness=exactness,
        max_num_seqs=LARGEST_RUN,
        threads=threads,
        prefix_caching=False,
    )
    if hardware.lower() != THIS:
        _check_used_by_prediction(ctx, hardware)
        report.check()
        engine.set_threads()
        machine = hardware_of(hardware)
        record = _prediction(
            machine, engine, draft or [], acceptance, context=DEFAULT_CONTEXT if context is None else context
        )
    else:
        if acceptance is not None:
            raise ConfigError("--acceptance", got="hardware 'this'", expected="another: here acceptance is measured")
        wanted = source.chosen(DEFAULT_NUM_PROMPTS)
        params = SamplingParams(
            temperature=wanted.temperature if temperature is None else temperature,
            max_tokens=max_tokens,
            seed=base_seed(seed, 1),
        )
        report.check()
        record = _measurement(
            engine, draft or [], wanted, params, seconds=seconds, recalibrate=recalibrate, context=context
        )
    report.write(record)
    if not report.json_out:
        from outrider.cli.advise_report import print_measurement, print_prediction

        shown = print_prediction if record["advice"] == "prediction" else print_measurement
        shown(stdout_console(), record)
    if record.get("interrupted"):
        raise KeyboardInterrupt


def _check_used_by_prediction(ctx: typer.Context, hardware: str) -> None:
    """Raises:
    ConfigError: an option was given that changes nothing of a prediction.
    """
    unused = [
        max(parameter.opts, key=len)
        for parameter in ctx.command.params
        if parameter.name in MEASURED_ONLY
        and _is_given(ctx, parameter.name)
        and not (parameter.name == "threads" and hardware.lower() == PROBED)  # those that the probe has
    ]
    if unused:
        raise ConfigError(
            ", ".join(unused),
            got=f"hardware {hardware!r}, on which no decoding is measured",
            expected=f"hardware {THIS!r}",
            remedy="leave it out for a prediction",
        )


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def _measurement(
    options: EngineOptions,
    drafts: list[str],
    workload: Workload,
    params: SamplingParams,
    *,
    seconds: float,
    recalibrate: bool,
    context: int | None,
) -> dict[str, Any]:
    llm = options.load("none")

    from outrider.bench import advise as a
    from outrider.bench.report import environment
    from outrider.bench.runner import PLAIN, OutriderContender, Results
    from outrider.engine.build import cost_of_target

    specs: dict[str, dict[str, Any]] = {PLAIN: {"method": "none"}, **a.candidates(llm, drafts)}
    encoded = encode_for(llm, workload, params.max_tokens or 0)
    note("measuring what a forward costs")
    cost = cost_of_target(llm.config, llm.model, recalibrate=recalibrate)
    chosen, max_tokens = a.fit_to_time(
        encoded, params.max_tokens or 0, cost, num_contenders=len(specs), seconds=seconds
    )
    params = replace(params, max_tokens=max_tokens)
    results, batched, interrupted = Results(), Results(), False
    try:
        with progress_bar() as progress:
            task, finished = progress.add_task("measuring", total=None), count()

            def run(names: Sequence[str], prompts: list[list[int]], batch: int, share: float, into: Results) -> None:
                contenders = [OutriderContender(name, llm, specs[name], params, batch) for name in names]
                a.measure(contenders, prompts, share * seconds, into, on_start)

            def on_start(name: str) -> None:
                progress.update(task, completed=next(finished), description=name)

            run(list(specs), chosen, 1, 1.0 - a.BATCH_SHARE, results)
            together = list(islice(cycle(encoded), a.BATCH_PROMPTS))
            run([PLAIN, a.fastest(results) or PLAIN], together, a.BATCH_PROMPTS, a.BATCH_SHARE, batched)
    except KeyboardInterrupt:
        if not a.fastest(results):
            raise
        interrupted = True
    if context is None:
        context = round(mean(map(len, chosen)) + max_tokens / 2)
    return {
        "advice": "measurement",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **environment(),
        "command": ["outrider", *sys.argv[1:]],
        "config": asdict(llm.config),
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "sampling": asdict(params),
        "prompts": workload.record(chosen),
        "context": context,
        "forward_cost": cost.as_mapping(),
        "roofline": _roofline(llm, options),
        "interrupted": interrupted,
        **a.advice(results, batched, specs, cost, context=context, exact=llm.config.exactness == "bitwise"),
    }


def _roofline(llm: LLM, options: EngineOptions) -> dict[str, Any] | None:
    """What a forward of one row would take if it did nothing but read the weights, beside what it takes."""
    from outrider.bench.forward import BandwidthProbe, last_level_cache_bytes
    from outrider.bench.roofline_check import roofline_check
    from outrider.engine.bundled import BUNDLED_TARGET
    from outrider.engine.calibration import one_row_timer
    from outrider.kernels import native

    if options.device != "cpu" or not native.is_available():
        return None
    stored = "fp32" if str(llm.model.dtype) == "torch.float32" else "auto"
    weights = stored if options.weights == "auto" else options.weights
    model = _figures(options.model or str(BUNDLED_TARGET), options.revision, weights, options.group_size)
    probe = BandwidthProbe(max(LEAST_PROBE_BYTES, PROBE_CACHES * (last_level_cache_bytes() or 0)))
    forward = one_row_timer(llm.model, row_invariant=llm.config.exactness == "bitwise")
    with native.cores_for_kernels():
        return roofline_check(model.bytes_read(1), forward, probe)


def _prediction(
    machine: Hardware, options: EngineOptions, drafts: list[str], acceptance: str | None, *, context: int
) -> dict[str, Any]:
    from outrider.bench import predict as p
    from outrider.engine.bundled import BUNDLED_DRAFT, BUNDLED_TARGET

    model, weights = options.model, options.weights
    rates = p.parse_acceptance(acceptance)
    target = _figures(model or str(BUNDLED_TARGET), options.revision, weights, options.group_size)
    names = drafts or ([str(BUNDLED_DRAFT)] if model is None else [])
    figures = [_draft_figures(name, target) for name in names]
    predictions = [p.predict(target, machine, of, context=context) for of in p.draftings(figures, rates)]
    best = max(predictions, key=lambda of: of.speedup)
    return {
        "advice": "prediction",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": ["outrider", *sys.argv[1:]],
        "hardware": asdict(machine),
        "model": asdict(target),
        "config": {
            "model": model,
            "weights": weights,
            "group_size": options.group_size,
            "revision": options.revision,
        },
        "context": context,
        "assumptions": p.assumptions(target, machine, context=context, rates_given=rates is not None),
        "plain_tokens_per_s": p.plain_tokens_per_s(target, machine, 1, context),
        "recommended": best.drafting.name if best.pays else "none",
        "drafter": best.spec() if best.pays else {"method": "none"},
        "predictions": [of.record() for of in predictions],
    }


def _figures(path: str, revision: str | None, weights: str, group_size: int) -> ModelFigures:
    """Of a model by its config.json; nothing else is read or downloaded."""
    check_weights("", weights, group_size)
    from outrider.bench.roofline import model_figures
    from outrider.models.loader import folder_of, quiet_transformers, read_config

    with quiet_transformers():
        config = read_config(folder_of(path, revision, files=["config.json"]))
        return model_figures(config, name=Path(path).name, weights=cast("Weights", weights), group_size=group_size)


def _draft_figures(name: str, target: ModelFigures) -> tuple[ModelFigures, str | None]:
    """A draft by its config.json, or by its size alone: then in the target's format, and without keys and values."""
    from outrider.bench.roofline import ModelFigures
    from outrider.bench.synthetic import parse_params

    if name[:1].isdigit() and not Path(name).expanduser().exists():
        size = parse_params(name)
        return ModelFigures(f"a {name} draft", size, weights=target.weights, weight_bytes=target.weight_bytes), None
    return _figures(name, None, "auto", 64), name
