"""`outrider bench kernels` and `outrider bench forward`: what M tokens cost, from the weights up."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from outrider.cli import options as opt
from outrider.cli.console import check_writable, note, progress_bar, report_json, stdout_console
from outrider.cli.options import EngineOptions, parse_numbers
from outrider.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from outrider.bench.forward import Measurement, Workload
    from outrider.bench.target import BenchTarget
    from outrider.kernels.packed import WeightFormat

MEASURING = "Measuring"
DEFAULT_ROWS = "1,2,4,8,16,32,64"
MAX_ROWS = 4096
MAX_SEQUENCES = 1024
MAX_POSITIONS = 1 << 17
_FOREIGN_LOAD = 1.0  # programs beside our own threads, from which on a warning is due

ModelFolder = Annotated[
    str | None,
    opt.option("--model", "-m", help="Folder (safetensors); without it the bundled model.", panel=opt.MODEL),
]
Params = Annotated[
    str | None,
    opt.option("--params", help="Instead of a model: make one up of this size, such as 0.5B.", panel=opt.MODEL),
]
Weights = Annotated[
    str | None,
    opt.option(
        "--weights",
        "-w",
        help="Formats of the linear layers, of bf16, int8, int4, fp32; by default bf16,int8,int4, or what the "
        "checkpoint holds.",
        panel=opt.MODEL,
    ),
]
GroupSize = Annotated[int, opt.option("--group-size", help="Of int4: 32, 64 or 128.", panel=opt.MODEL)]
Rows = Annotated[str, opt.option("--rows", help="Tokens in a forward, with commas.", panel=MEASURING)]
Sequences = Annotated[
    int,
    opt.option("--sequences", help="Sequences in a forward, each with so many new tokens.", panel=MEASURING),
]
Repeats = Annotated[
    int,
    opt.option("--repeats", "-r", help="Samples of each, with equal bandwidth before and after.", panel=MEASURING),
]
Context = Annotated[int, opt.option("--context", help="Cached tokens before the new ones.", panel=MEASURING)]
Prefill = Annotated[int, opt.option("--prefill", help="Also a prompt of so many tokens; 0: none.", panel=MEASURING)]
Plot = Annotated[str | None, opt.option("--plot", help="Draw milliseconds over tokens (PNG).", panel=opt.OUTPUT)]


@dataclass(frozen=True)
class Settings:
    """What the user asked for; see the options.

    Attributes:
        what: the command.
        context, prefill: 0 for kernels alone.
        sequences: 1 for kernels alone.
    """

    what: Literal["kernels", "forward"]
    model: str | None
    params: str | None
    weights: str | None
    rows: str
    group_size: int
    repeats: int
    threads: int | None
    json_out: bool
    output: str | None
    plot: str | None
    context: int = 0
    prefill: int = 0
    sequences: int = 1


def kernels(
    *,
    model: ModelFolder = None,
    params: Params = None,
    weights: Weights = None,
    group_size: GroupSize = 64,
    rows: Rows = DEFAULT_ROWS,
    repeats: Repeats = 9,
    threads: opt.Threads = None,
    json_out: opt.JsonOut = False,
    output: opt.OutputFile = None,
    plot: Plot = None,
) -> None:
    """Measure the linear layers of a model alone: every weight is read once for M tokens.

    Runs whose memory bandwidth before and after differs are not counted; an interruption prints what there is.
    """
    _bench(Settings("kernels", model, params, weights, rows, group_size, repeats, threads, json_out, output, plot))


def forward(
    *,
    model: ModelFolder = None,
    params: Params = None,
    weights: Weights = None,
    group_size: GroupSize = 64,
    rows: Rows = DEFAULT_ROWS,
    context: Context = 64,
    prefill: Prefill = 512,
    sequences: Sequences = 1,
    repeats: Repeats = 9,
    threads: opt.Threads = None,
    json_out: opt.JsonOut = False,
    output: opt.OutputFile = None,
    plot: Plot = None,
) -> None:
    """Measure whole forwards of M tokens with all logits, as decoding and verification run them.

    Runs whose memory bandwidth before and after differs are not counted; an interruption prints what there is.
    """
    _bench(
        Settings(
            "forward", model, params, weights, rows, group_size, repeats, threads, json_out, output, plot,
            context, prefill, sequences,
        )
    )  # fmt: skip


def _bench(settings: Settings) -> None:
    rows = _check(settings)
    _require_kernels(settings.what)
    from outrider.bench.forward import BandwidthProbe, Measurement, measure, probe_bytes
    from outrider.bench.target import check_memory, open_target
    from outrider.kernels.available_memory import available_bytes

    formats = None if settings.weights is None else _formats(settings.weights)
    target = open_target(settings.model, settings.params, formats, settings.group_size)
    longest = max(settings.context + max(rows), settings.prefill)
    length = target.config.max_position_embeddings
    if settings.what == "forward" and longest > length:
        raise ConfigError("--context, --rows and --prefill", got=f"{longest} positions", expected=f"at most {length}")
    max_rows = max(settings.sequences * max(rows), settings.prefill)
    needed = target.needed_bytes(max_rows=max_rows, num_positions=(settings.sequences + 1) * longest)
    check_memory(needed + probe_bytes(), available_bytes())
    measurement = Measurement()
    with progress_bar() as progress:
        task = progress.add_task("loading", total=None)
        workloads: list[Workload] = []
        for format in target.formats:
            progress.update(task, description=f"loading {format}")
            workloads += _workloads(settings, target, format, rows, longest)
        probe = BandwidthProbe(probe_bytes())
        progress.update(task, total=settings.repeats * len(workloads))

        def on_start(workload: Workload) -> None:
            what = f"{workload.weights}, {workload.num_rows} tokens"
            progress.update(task, completed=measurement.num_kept, description=what)

        try:
            measure(workloads, settings.repeats, measurement, probe=probe, on_start=on_start)
        finally:
            progress.stop()
            _report(settings, target, workloads, measurement)


def _check(settings: Settings) -> list[int]:
    """The numbers of rows; everything that can be found wrong without a model is."""
    EngineOptions(threads=settings.threads).set_threads()
    rows: list[int] = sorted(set(parse_numbers(settings.rows, "--rows", int)))
    limits = [
        *(("--rows", row, 1, MAX_ROWS) for row in rows),
        ("--sequences", settings.sequences, 1, MAX_SEQUENCES),
        ("--repeats", settings.repeats, 1, opt.MAX_REPEATS),
        ("--context", settings.context, 0, MAX_POSITIONS),
        ("--prefill", settings.prefill, 0, MAX_POSITIONS),
    ]
    for name, value, low, high in limits:
        opt.require_in_range(name, value, low, high)
    from outrider.kernels.packed import GROUP_SIZES

    if settings.group_size not in GROUP_SIZES:
        raise ConfigError("--group-size", got=settings.group_size, expected=f"one of {GROUP_SIZES}")
    if settings.plot is not None:
        from outrider.bench.plot import check_can_plot

        check_can_plot(settings.plot)
    check_writable(settings.output)
    check_writable(settings.plot)
    return rows


def _formats(text: str) -> list[WeightFormat]:
    from outrider.bench.target import FORMATS

    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in FORMATS]
    if unknown:
        raise ConfigError("--weights", got=repr(unknown[0]), expected=f"some of {', '.join(FORMATS)}")
    return [name for name in FORMATS if name in names]


def _require_kernels(command: str) -> None:
    from outrider.kernels import native

    try:
        available = native.is_available()
    except native.IsaError as error:
        raise ConfigError(str(error)) from error
    if not available:
        raise ConfigError(
            f"outrider bench {command}",
            got="reference code",
            expected="compiled kernels",
            remedy=f"unset {native.ISA_VARIABLE}, or install a C++ compiler (g++ or clang++) and reinstall outrider",
        )


def _workloads(
    settings: Settings, target: BenchTarget, format: WeightFormat, rows: Sequence[int], longest: int
) -> list[Workload]:
    from outrider.bench.forward import ForwardRuns, KernelRuns

    if settings.what == "kernels":
        linears = KernelRuns(format, target.linears(format))
        return [linears.workload(num_rows) for num_rows in rows]
    runs = ForwardRuns(
        format,
        target.model(format),
        context=settings.context,
        num_positions=longest,
        num_sequences=settings.sequences,
    )
    num_params = target.num_params
    workloads = [runs.workload(num_rows, num_params) for num_rows in rows]
    return workloads + ([runs.prefill(settings.prefill, num_params)] if settings.prefill else [])


def _report(settings: Settings, target: BenchTarget, workloads: Sequence[Workload], measurement: Measurement) -> None:
    """Print, write and draw what was measured."""
    from outrider.bench.forward import summarise
    from outrider.bench.report import environment

    summary = summarise(measurement)
    if not summary["rows"]:
        note("nothing was measured")
        return
    record = {
        "benchmark": settings.what,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **summary,
        "config": _config(settings, target, workloads),
        **environment(),
    }
    report_json(record, to_stdout=settings.json_out, path=settings.output)
    config = record["config"]
    what = "linear layers alone" if settings.what == "kernels" else f"forwards after {settings.context} tokens"
    if settings.sequences > 1:
        what += f" of each of {settings.sequences} sequences"
    title = f"{target.name} ({config['num_params'] / 1e6:.0f}M weights read), {what}; {record['machine']['cpu']}, "
    title += f"{config['threads']} thread{'s' if config['threads'] > 1 else ''}, {config['isa']}"
    if settings.plot is not None:
        from outrider.bench.plot import plot_slack

        plot_slack(record, settings.plot, title)
    if settings.json_out:
        return
    console = stdout_console()
    console.print(_table(record["rows"], title, relative=True))
    if record["prefill"]:
        console.print(_table(record["prefill"], "prompts, logits of the last token", relative=False))
    console.print(_footnote(record))


def _config(settings: Settings, target: BenchTarget, workloads: Sequence[Workload]) -> dict[str, Any]:
    """Everything that decides what the figures mean."""
    from outrider.bench.forward import AGREEMENT, MAX_TRIES, probe_bytes
    from outrider.bench.target import cache_dtype
    from outrider.kernels import native

    config = {
        "command": ["outrider", *sys.argv[1:]],
        "isa": native.isa(),
        "threads": native.num_threads(),
        "model": target.name,
        "shapes": target.shapes,
        "num_params": target.num_params,
        "weight_bytes": {workload.weights: workload.num_bytes for workload in workloads},
        "group_size": settings.group_size,
        "rows": sorted({workload.num_rows for workload in workloads if workload.kind != "prefill"}),
        "repeats": settings.repeats,
        "max_tries": MAX_TRIES * settings.repeats,
        "warm_up": "every workload once before each timed run",
        "probe_bytes": probe_bytes(),
        "probe_agreement": AGREEMENT,
    }
    if settings.what == "kernels":
        return config
    dtypes = {format: str(cache_dtype(format)).removeprefix("torch.") for format in target.formats}
    sizes = {"context": settings.context, "prefill": settings.prefill, "sequences": settings.sequences}
    return {**config, **sizes, "cache_dtype": dtypes}


def _table(rows: Sequence[dict[str, Any]], title: str, *, relative: bool) -> Table:
    """A line for each row.

    Args:
        relative: compare the times with those of one token; otherwise say tokens per second.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    single = {row["weights"]: row["ms"] for row in rows if row["m"] == 1}
    cells = [(row, _cells(row, single.get(row["weights"]), relative=relative)) for row in rows]
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("weights", no_wrap=True)
    for heading in ("tokens", *cells[0][1]):
        table.add_column(heading, justify="right", no_wrap=True)
    for (row, values), following in zip(cells, [*rows[1:], rows[-1]], strict=True):
        last = following["weights"] != row["weights"]
        table.add_row(row["weights"], str(row["m"]), *values.values(), end_section=last)
    return table


def _cells(row: dict[str, Any], single_ms: float | None, *, relative: bool) -> dict[str, str]:
    """What stands in a row, by the columns' headings."""

    def text(value: float | None, form: str, factor: float = 1.0) -> str:
        return "-" if value is None else format(factor * value, form)

    ms = row["ms"]
    ratio = None if ms is None or single_ms is None else ms / single_ms
    return {
        "ms": text(ms, ".2f"),
        "range": f"{text(row['ms_min'], '.2f')}-{text(row['ms_max'], '.2f')}",
        **({"in kernels": text(row["kernel_ms"], ".2f")} if "kernel_ms" in row else {}),
        **({"of one": text(ratio, ".2f")} if relative else {"tokens/s": text(row["tokens_per_s"], ".0f")}),
        "GB/s": text(row["gbps"], ".1f"),
        "of bandwidth": text(row["share"], ".0%"),
        "GFLOP/s": text(row["gflops"], ".0f"),
        "samples": f"{row['num_samples']}/{row['num_tried']}",
    }


def _footnote(record: dict[str, Any]) -> str:
    probe, config, machine = record["probe"], record["config"], record["machine"]
    rows = [*record["rows"], *record["prefill"]]
    kept, tried = (sum(row[key] for row in rows) for key in ("num_samples", "num_tried"))
    text = (
        f"Kept {kept} of {tried} runs: those whose bandwidth before and after agreed within "
        f"{100 * config['probe_agreement']:.0f}%. Read bandwidth: median {probe['gbps_median']:.1f} GB/s, "
        f"{probe['gbps_min']:.1f}-{probe['gbps_max']:.1f} in {probe['num_probes']} probes of "
        f"{config['probe_bytes'] / 2**30:.2g} GiB."
    )
    load = (machine["load_average"] or [0.0])[0]
    if load - config["threads"] > _FOREIGN_LOAD:
        text += f"\nOther programs ran meanwhile (load average {load:.1f} on {machine['cores']} cores): run it alone."
    return text
